"""A released model as the white-box attacks see it: predicted noise of any picture, at any timestep, under any condition."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.nn.functional import interpolate

from defenses.errors import UserError
from eval.textconditions import null_condition, text_condition
from train import flow
from train.gan import PIPELINE as GAN_PIPELINE
from train.models import memory_format
from train.pipelinefolder import KINDS, OPTIONAL
from train.release import SIDECAR

PREDICTIONS = ("epsilon", "v_prediction", "sample")
Condition = dict[str, torch.Tensor]  # keyword arguments of the network, each [B, ...]; empty: unconditional


@dataclass
class Denoiser:
    """White-box access to a diffusion model. All tensors are float32 on ``device``.

    Attributes:
        network: what is differentiated; frozen and in evaluation mode.
        alphas_cumprod: float32 [T]; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. Of a flow: a_t of the same ratio of signal to noise.
        prediction: what the network returns, one of PREDICTIONS, or "flow": the velocity noise - x_0.
        predict: (x_t [B, ...], timesteps int64 [B], condition) -> output of the network [B, ...].
        encode: uint8 [B, C, H, W] of the data -> x_0 [B, ...] in the model's own space: pixels in [-1, 1], or scaled latents.
        decode: x_0 -> images float32 [B, C, H, W] in [0, 1], of the data's shape.
        condition: class indices or captions, one per record -> what ``predict`` takes.
        kind: what the model is conditioned on.
        latent: whether x_0 is the latent of an autoencoder, which hides what only pixels show.
        classes: names of the classes in the order of their indices; empty where unknown or unconditional.
        shape: of one x_0, (c, h, w).
        null: number of records -> the condition that guidance leads away from, as the pipeline itself makes it; None: ``kind`` is
            not "caption".
    """

    network: nn.Module
    alphas_cumprod: torch.Tensor
    prediction: str
    predict: Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
    encode: Callable[[np.ndarray], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    condition: Callable[[Sequence[Any]], Condition]
    kind: Literal["none", "class", "caption"]
    latent: bool
    device: torch.device
    classes: Sequence[str] = ()
    shape: tuple[int, ...] = ()
    null: Callable[[int], Condition] | None = None
    levels: torch.Tensor | None = None

    @property
    def timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return len(self.alphas_cumprod)

    def timestep(self, place: float) -> int:
        """The timestep at a share of the schedule in [0, 1): t = 100 of T = 1000 is 0.1."""
        return min(int(round(place * self.timesteps)), self.timesteps - 1)

    def rates(self, timesteps: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of x_0 and of the noise in x_t, sqrt(a_t) and sqrt(1 - a_t), or 1 - s_t and s_t, [B, 1, ...] to multiply with ``x``."""
        if self.levels is not None:
            spread = self.levels[timesteps].reshape(-1, *[1] * (x.ndim - 1))
            return 1 - spread, spread
        signal = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (x.ndim - 1))
        return signal.sqrt(), (1 - signal).sqrt()

    def shares(self, timesteps: np.ndarray) -> tuple[list[float], list[float]]:
        """`rates` at each of ``timesteps``, int64 [n], as numbers; before them those of x_0 itself, 1 and 0."""
        if self.levels is not None:
            spread = np.concatenate([[0.0], self.levels.cpu().double().numpy()[timesteps]])
            return (1 - spread).tolist(), spread.tolist()
        signal = np.concatenate([[1.0], self.alphas_cumprod.cpu().double().numpy()[timesteps]])
        return (signal**0.5).tolist(), ((1 - signal) ** 0.5).tolist()

    def noised(self, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t of x_0 = ``x``."""
        signal, spread = self.rates(timesteps, x)
        return signal * x + spread * noise

    def epsilon(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Predicted noise in x_t = ``x``, whatever the network itself predicts (Salimans and Ho 2022, appendix D)."""
        output = self.predict(x, timesteps, condition)
        if self.prediction == "epsilon":
            return output
        signal, spread = self.rates(timesteps, x)
        if self.prediction == "flow":
            return x + signal * output
        return signal * output + spread * x if self.prediction == "v_prediction" else (x - signal * output) / spread

    def predict_clean(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Predicted x_0 in x_t = ``x``; without dividing by sqrt(a_t), which is 0 at the end of some schedules, where the network
        does not predict the noise itself."""
        output = self.predict(x, timesteps, condition)
        if self.prediction == "epsilon":
            return self.clean(x, output, timesteps)
        signal, spread = self.rates(timesteps, x)
        if self.prediction == "flow":
            return x - spread * output
        return signal * x - spread * output if self.prediction == "v_prediction" else output

    def clean(self, x: torch.Tensor, epsilon: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predicted x_0 from x_t = ``x`` and the noise predicted in it."""
        signal, spread = self.rates(timesteps, x)
        return (x - spread * epsilon) / signal


def load(folder: Path, shape: tuple[int, int, int], device: torch.device, latent_side: int | None = None) -> Denoiser:
    """The denoiser of a pipeline saved in diffusers' format: safetensors only, no remote code, no network.

    Args:
        shape: (C, H, W) of the data.
        latent_side: of a text-to-image model that is asked at another size than its own; null: its own.

    Raises:
        UserError: it cannot be loaded, or is a kind of model that these attacks do not know.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError("pipeline", f"{folder} holds no model_index.json", "give a folder written by save_pretrained")
    try:
        told = json.loads(index.read_text())
        name = told.get("_class_name")
        if name == GAN_PIPELINE:
            raise _unknown(folder, "a GAN, which predicts no noise")
        # diffusers wants to hear that Stable Diffusion 3 comes without T5
        absent = {part: None for part in OPTIONAL if name in KINDS and told.get(part) == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, **absent
        )
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(
            "pipeline", f"{folder}: {reason}", "it must load with DiffusionPipeline.from_pretrained"
        ) from error
    if isinstance(getattr(pipeline, "transformer", None), SD3Transformer2DModel) and KINDS.get(name) == "sd3":
        return _text_to_image(pipeline, shape, device, latent_side)
    schedule = getattr(getattr(pipeline, "scheduler", None), "config", {})
    if "beta_schedule" not in schedule or schedule.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise _unknown(folder, f"a {name} without a schedule of betas, or one that predicts neither noise, v nor image")
    network = getattr(pipeline, "unet", None)
    if isinstance(network, UNet2DModel) and not hasattr(pipeline, "vqvae"):
        sidecar = folder / SIDECAR
        classes = json.loads(sidecar.read_text()).get("classes") or () if sidecar.exists() else ()
        return of_network(network, pipeline.scheduler.config, shape, device, classes)
    if isinstance(network, UNet2DConditionModel) and hasattr(pipeline, "vae") and hasattr(pipeline, "encode_prompt"):
        if network.config.in_channels != pipeline.vae.config.latent_channels:
            raise _unknown(folder, f"a {name} whose network sees more than the latents (inpainting, upscaling)")
        return _text_to_image(pipeline, shape, device, latent_side)
    raise _unknown(folder, f"a {name}")


def _unknown(folder: Path, what: str) -> UserError:
    return UserError(
        "pipeline",
        f"{folder} is {what}: membership, inpainting and canary losses need UNet2DModel, or a UNet2DConditionModel or Stable Diffusion 3 with VAE and text encoder",
        "switch these attacks off (attack.membership=null attack.inpainting=null); extraction does not need them",
    )


def of_network(
    network: UNet2DModel,
    schedule: dict[str, Any],
    shape: tuple[int, int, int],
    device: torch.device,
    classes: Sequence[str] = (),
) -> Denoiser:
    """The denoiser of a network on pixels, unconditional or class-conditional.

    Args:
        schedule: configuration of its scheduler.
        shape: (C, H, W) of the data.
    """
    network = network.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    size = network.config.sample_size or shape[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    kind = "class" if network.config.num_class_embeds else "none"

    def predict(x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        return network(x, timesteps, return_dict=False, **condition)[0].float()

    def condition(values: Sequence[Any]) -> Condition:
        return {} if kind == "none" else {"class_labels": torch.as_tensor(np.asarray(values, np.int64), device=device)}

    return Denoiser(
        network=network,
        alphas_cumprod=_alphas_cumprod(schedule, device),
        prediction=schedule.get("prediction_type", "epsilon"),
        predict=predict,
        encode=lambda images: _fit(_tensor(images, device), (network.config.in_channels, *size)) * 2 - 1,
        decode=lambda x: _fit(x / 2 + 0.5, shape).clamp(0, 1),
        condition=condition,
        kind=kind,
        latent=False,
        device=device,
        classes=classes,
        shape=(network.config.in_channels, *size),
    )


def _text_to_image(
    pipeline: Any, shape: tuple[int, int, int], device: torch.device, latent_side: int | None
) -> Denoiser:
    """Stable Diffusion 1.x, 2.x, XL, 3: denoising of the scaled latents of the VAE, under the embedding of a caption."""
    pipeline.to(device)
    flows = not hasattr(pipeline, "unet")
    network, vae = pipeline.transformer if flows else pipeline.unet, pipeline.vae
    for part in (network, vae, *(getattr(pipeline, f"text_encoder{number}", None) for number in ("", "_2", "_3"))):
        if part is not None:
            part.eval().requires_grad_(False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sizes = latent_side or network.config.sample_size
    sizes = (sizes, sizes) if isinstance(sizes, int) else tuple(sizes or (0, 1))
    if sizes[0] != sizes[1]:
        raise UserError(
            "pipeline", f"its network has sample_size {network.config.sample_size}", "only square sizes are known"
        )
    side = sizes[0] * factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode(images: np.ndarray) -> torch.Tensor:
        pixels = _fit(_tensor(images, device), (vae.config.in_channels, side, side)) * 2 - 1
        # the mean, not a draw: the same latent for every attack and every model
        return (vae.encode(pixels).latent_dist.mean - shift) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(x: torch.Tensor) -> torch.Tensor:
        pixels = vae.decode(x / vae.config.scaling_factor + shift, return_dict=False)[0]
        return _fit(pixels / 2 + 0.5, shape).clamp(0, 1)

    schedule = pipeline.scheduler.config
    levels = flow.levels(schedule.num_train_timesteps, schedule.shift).to(device) if flows else None

    def predict(x: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        if flows:
            times = levels[timesteps] * len(levels)
            return network(x, timestep=times, return_dict=False, **condition)[0].float()
        added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
        more = {"added_cond_kwargs": added} if added else {}
        text = condition["encoder_hidden_states"]
        return network(x, timesteps, encoder_hidden_states=text, return_dict=False, **more)[0].float()

    return Denoiser(
        network=network,
        alphas_cumprod=_alphas_cumprod(schedule, device) if levels is None else _same_ratio(levels),
        prediction="flow" if flows else schedule.get("prediction_type", "epsilon"),
        predict=predict,
        encode=encode,
        decode=decode,
        condition=partial(text_condition, pipeline, side, device),
        kind="caption",
        latent=True,
        device=device,
        shape=(network.config.in_channels, *sizes),
        null=partial(null_condition, pipeline, side, device),
        levels=levels,
    )


def _alphas_cumprod(schedule: dict[str, Any], device: torch.device) -> torch.Tensor:
    return DDPMScheduler.from_config(schedule).alphas_cumprod.to(device, torch.float32)


def _same_ratio(levels: torch.Tensor) -> torch.Tensor:
    """a with a / (1 - a) = ((1 - s) / s)^2, float32 [T]."""
    signal, noise = (1 - levels).square(), levels.square()
    return signal / (signal + noise)


def _tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255


def _fit(images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Resizes and converts float32 [n, c, h, w] in [0, 1] to [n, *shape]."""
    if images.shape[1] != shape[0]:
        luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
        images = (images * luma).sum(1, keepdim=True) if shape[0] == 1 else images.expand(-1, shape[0], -1, -1)
    if tuple(images.shape[2:]) != tuple(shape[1:]):
        images = interpolate(images, tuple(shape[1:]), mode="bicubic", antialias=True).clamp(0, 1)
    return images
