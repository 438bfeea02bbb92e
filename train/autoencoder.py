"""Training of a small variational autoencoder (Kingma and Welling 2014), the first stage of latent diffusion (Rombach et
al. 2022).

Without the adversarial and perceptual losses of that paper, which need further networks: squared error and a little
divergence from the standard normal distribution. Batches and noise are functions of (seed, step, record), gradients are
sums over ranks: a resumed training equals one that was never stopped, 1 and N processes train alike.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from defenses.errors import UserError
from defenses.ranks import on_main, together
from defenses.seeding import RecordRandom
from train import checkpoint
from train.attention import training_attention
from train.diffusion import autocast
from train.optim import OptimizerConfig, build_optimizer
from train.plan import EpochPlan, repeats

BATCH = 64  # pictures of a forward pass without gradients
FIRST_LOG_VARIANCE = -6.0  # of the posterior: a standard deviation of 0.05
MEASURED = 512  # pictures, at most, that the latents' scale and the reconstruction error are measured on


@dataclass(kw_only=True)
class ScratchConfig:
    """Section ``model.scratch``: training of the autoencoder of a pipeline from scratch. Not used with model.pretrained."""

    autoencoder_steps: int = 1600  # optimizer steps
    autoencoder_batch_size: int = 16  # pictures per step, over all processes
    autoencoder_learning_rate: float = 2e-3  # highest; it rises over a tenth of the steps, then falls to 0 as a cosine
    # weight of the Kullback-Leibler divergence per latent number beside the squared error per pixel of [-1, 1]: more makes
    # the latents easier to learn and the pictures blurrier
    kl_weight: float = 1e-4
    # folder in which finished autoencoders are kept, named by all that decides them: a run that needs the same one takes it from
    # there. Changes no number. null: none is kept; a comparison keeps them for its arms
    autoencoders: str | None = None

    def __post_init__(self) -> None:
        for name in ("autoencoder_steps", "autoencoder_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.scratch.{name}", f"{getattr(self, name)} is less than 1", "use 1 or more")
        rate, weight = self.autoencoder_learning_rate, self.kl_weight
        if not 0 < rate < math.inf:
            raise UserError("model.scratch.autoencoder_learning_rate", f"{rate} is not positive", "2e-3 is usual")
        if not 0 <= weight < math.inf:
            raise UserError("model.scratch.kl_weight", f"{weight} is not a weight", "use 0 or more; 1e-4 is usual")


@dataclass
class AutoencoderTraining:
    """What one training needs beside the network.

    Attributes:
        images: uint8 [N, C, H, W]; ``rows`` of them are trained on, int64.
        precision: "bf16" or "fp32" arithmetic; weights stay float32.
        folder: for interim states, beside the pipeline's; removed by the caller.
        save_every_sec: how much time is lost at most when the process is killed.
    """

    config: ScratchConfig
    images: np.ndarray
    rows: np.ndarray
    seed: int
    precision: str
    accelerator: Any
    folder: Path
    save_every_sec: float = 30.0

    def run(self, vae: AutoencoderKL) -> float:
        """Trains ``vae`` in place, from the interim state if there is one; the result is the same on all ranks.

        Returns:
            Seconds of training, over all stops.

        Raises:
            UserError: the batch is smaller than the number of processes, or the weights are no longer finite.
        """
        steps, accelerator = self.config.autoencoder_steps, self.accelerator
        ranks = accelerator.num_processes
        if self.config.autoencoder_batch_size < ranks:
            raise UserError("model.scratch.autoencoder_batch_size", f"is less than {ranks} processes", "raise it")
        optimizer = build_optimizer(OptimizerConfig(), list(vae.parameters()), self.config.autoencoder_learning_rate)
        state = self._resume(vae, optimizer)
        plan = EpochPlan(self.rows, self.config.autoencoder_batch_size, self.seed)
        vae.train()
        saved = time.perf_counter()
        bar = tqdm(total=steps, initial=state["step"], desc="autoencoder", disable=not accelerator.is_main_process)
        while state["step"] < steps:
            started = time.perf_counter()
            error = self._step(vae, optimizer, plan, state["step"])
            state["step"] += 1
            state["seconds"] += time.perf_counter() - started
            bar.update()
            if state["step"] % 20 == 0:
                bar.set_postfix_str(f"error {error.item():.4f}")
            if time.perf_counter() - saved >= self.save_every_sec and accelerator.is_main_process:
                self._save(vae, optimizer, state)
                saved = time.perf_counter()
        bar.close()
        vae.eval()
        if not all(parameter.isfinite().all() for parameter in vae.parameters()):
            raise UserError("model.scratch.autoencoder_learning_rate", "the autoencoder diverged", "lower it")
        return state["seconds"]

    def _step(self, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, plan: EpochPlan, step: int) -> torch.Tensor:
        """One update; returns this rank's mean squared error, pixels in [-1, 1]."""
        rows = plan.batch(step)
        own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        random = RecordRandom(self.seed, step, rows[own], repeats(rows)[own])
        pictures = scaled(self.images[rows[own]]).to(self.accelerator.device)
        with autocast(pictures.device, self.precision), training_attention(pictures.device, self.precision):
            error, divergence = self._losses(vae, pictures, random)
        loss = (error + self.config.kl_weight * divergence).sum() / len(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        add_over_ranks(vae, self.accelerator)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = self.config.autoencoder_learning_rate * rate(step, self.config.autoencoder_steps)
        optimizer.step()
        return error.detach().mean()

    @staticmethod
    def _losses(vae: AutoencoderKL, pictures: torch.Tensor, random: RecordRandom) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error per pixel and divergence per latent number of each picture, two float32 [B]."""
        posterior = vae.encode(pictures).latent_dist
        shape = posterior.mean.shape[1:]  # [latent channels, h, w]
        noise = random.normal("autoencoder", *shape).to(pictures.device)
        decoded = vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample  # [B, C, H, W]
        error = (decoded.float() - pictures).square().flatten(1).mean(1)
        return error, posterior.kl().float() / math.prod(shape)

    def _fingerprint(self) -> str:
        """Changes with whatever an interim state belongs to."""
        told = [
            asdict(replace(self.config, autoencoders=None)),
            self.seed,
            self.precision,
            list(self.images.shape),
            self.rows.tolist(),
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _save(self, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """One complete state in ``folder``, the one before it removed. No weights are averaged: they stand for themselves."""
        weights = [parameter.detach() for parameter in vae.parameters()]
        folder = self.folder / f"step-{state['step']}"
        checkpoint.save(folder, vae, optimizer, weights, {**state, "fingerprint": self._fingerprint()})
        checkpoint.prune(self.folder, keep=1)

    def _resume(self, vae: AutoencoderKL, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restores the interim state; one of other settings or records is removed."""
        newest = on_main(self.accelerator, self._newest)
        if newest is None:
            return {"step": 0, "seconds": 0.0}
        _, state = together(self.accelerator, lambda: checkpoint.load(newest, vae, optimizer))
        return {"step": state["step"], "seconds": state["seconds"]}

    def _newest(self) -> Path | None:
        newest = checkpoint.latest(self.folder)
        if newest is not None:
            if json.loads((newest / "state.json").read_text())["fingerprint"] == self._fingerprint():
                return newest
            shutil.rmtree(self.folder)
        return None


@torch.no_grad()
def initialise(vae: AutoencoderKL) -> None:
    """Weights from which a small autoencoder learns within hundreds of steps, in place of torch's random ones.

    Residual branches start at 0 (Goyal et al. 2017, section 5.1), since each begins with a norm that takes a picture's own
    brightness and colour away; the convolutions between them keep the variance (torch's default divides it by 3: He et al.
    2015 with a = sqrt(5)), so that the picture reaches the latent and comes back; the latent starts almost without noise.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, ResnetBlock2D):
            nn.init.zeros_(layer.conv2.weight)
            nn.init.zeros_(layer.conv2.bias)
        elif isinstance(layer, Attention):
            nn.init.zeros_(layer.to_out[0].weight)
            nn.init.zeros_(layer.to_out[0].bias)
        elif isinstance(layer, nn.Conv2d) and not name.endswith(("conv1", "conv2")):
            layer.weight *= math.sqrt(3)
    vae.quant_conv.bias[vae.config.latent_channels :] = FIRST_LOG_VARIANCE


def rate(step: int, steps: int) -> float:
    """Learning rate of ``step`` (from 0) as a share of the highest."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def add_over_ranks(model: nn.Module, accelerator: Any) -> None:
    """Replaces every gradient by its sum over the ranks, in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    total = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def scaled(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, C, H, W] to float32 in [-1, 1], what an autoencoder sees."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def some(rows: np.ndarray) -> np.ndarray:
    """At most `MEASURED` of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MEASURED)).round().astype(np.int64)]


def _batches(images: np.ndarray, rows: np.ndarray, device: torch.device) -> Iterator[torch.Tensor]:
    for start in range(0, len(rows), BATCH):
        yield scaled(images[rows[start : start + BATCH]]).to(device)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray, rows: np.ndarray) -> None:
    """Gives every latent channel mean 0 and variance 1 on the pictures, by its two 1 x 1 convolutions, so that what is
    decoded stays the same. Stable Diffusion scales all channels alike and shifts none (Rombach et al. 2022, appendix G);
    pictures on white ground would leave channels with a mean far from 0, where the noise of diffusion never starts.

    The variance of a latent is that of the posterior means plus the mean posterior variance.
    """
    device = next(vae.parameters()).device
    first, second, count = 0.0, 0.0, 0
    for pictures in _batches(images, some(rows), device):
        posterior = vae.encode(pictures).latent_dist
        mean, var = posterior.mean.double(), posterior.var.double()
        first, second = first + mean.sum((0, 2, 3)), second + (mean.square() + var).sum((0, 2, 3))
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
    shift = first / count  # [latent channels]
    scale = (second / count - shift.square()).sqrt()
    channels, (into, out) = len(shift), (vae.quant_conv, vae.post_quant_conv)
    out.bias += (out.weight[:, :, 0, 0].double() @ shift).to(out.bias)
    out.weight *= scale.to(out.weight)[None, :, None, None]
    into.bias[:channels] = ((into.bias[:channels] - shift) / scale).to(into.bias)
    into.weight[:channels] = (into.weight[:channels] / scale[:, None, None, None]).to(into.weight)
    into.bias[channels:] -= 2 * scale.log().to(
        into.bias
    )  # the second half of the channels is the logarithm of the variance


@torch.no_grad()
def reconstruction_l2(vae: AutoencoderKL, images: np.ndarray, rows: np.ndarray) -> float:
    """Mean distance between pictures and what comes back from the means of their latents: root of the mean squared
    difference, pixels in [0, 1], as extraction measures it."""
    distances = []
    for pictures in _batches(images, some(rows), next(vae.parameters()).device):
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
        distances.append(((decoded - pictures) / 2).square().flatten(1).mean(1).sqrt())
    return torch.cat(distances).mean().item()
