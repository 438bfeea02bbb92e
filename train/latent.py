"""Text-to-image diffusion in the latents of an autoencoder (Rombach et al. 2022): Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from defenses.errors import UserError
from train import adapters, pipelines
from train.conditioner import Condition, Conditioner, embed
from train.models import ModelConfig
from train.pipelines import Parts

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of a text encoder that gets adapters


class LatentModel(nn.Module):
    """The network that is trained, as a module; what is frozen beside it (autoencoder, text encoders that are not trained) moves with
    it but is none of its parameters, so that optimizer, average, checkpoints and gradient rules never see it.

    Args:
        parts: of a pipeline.
        train_text: whether the text encoders are trained too.

    Attributes:
        unet: the denoising network.
        text_encoders: those that are trained; empty where they are frozen.
    """

    def __init__(self, parts: Parts, train_text: bool = False):
        super().__init__()
        self.unet = parts.unet
        self.text_encoders = nn.ModuleList(parts.text_encoders if train_text else [])
        frozen = [parts.vae, *([] if train_text else parts.text_encoders)]
        for module in frozen:
            module.requires_grad_(False).eval()
        # a tuple: nn.Module registers modules and lists of parameters, not what lies in a plain tuple
        self.beside, self.parts = tuple(frozen), parts
        zeros = parts.kind == "sdxl" and parts.force_zeros_for_empty_prompt
        self.conditioner = Conditioner(parts.tokenizers, parts.text_encoders, zeros)
        # tokens of a record that is trained under zeros
        self.nothing = self.conditioner.tokens([""]) if zeros else None

    @property
    def vae(self) -> nn.Module:
        return self.parts.vae

    @property
    def trains_text(self) -> bool:
        return len(self.text_encoders) > 0

    def _apply(self, fn: Callable, recurse: bool = True) -> "LatentModel":
        for module in self.beside:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def condition(self, batch) -> Condition:
        """What ``batch`` is conditioned on: its embeddings, or those of its tokens by the text encoders in training, with the noise
        that a defense asked for."""
        if batch.tokens is None:
            return Condition(batch.text, batch.pooled)
        found = embed(self.text_encoders, batch.tokens)
        if self.nothing is not None:
            found = found.without((batch.tokens == self.nothing.to(batch.tokens.device)).flatten(1).all(1))
        if batch.text is not None:  # noise to add, in units of the embedding's standard deviation
            found.text = found.text + batch.text * spread(found.text)
        return found

    def forward(self, latents: torch.Tensor, batch, empty: Condition | None = None) -> torch.Tensor:
        """The network's own output for noisy ``latents``, [B, c, h, w].

        Args:
            batch: its timesteps and conditions.
            empty: condition of one record to take for all instead of the batch's own.
        """
        condition = self.condition(batch) if empty is None else repeated(empty, len(latents))
        return predict(self.unet, latents, batch.timesteps, condition, batch.time_ids)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of the latents of images in [-1, 1], float32 [B, 2c, h, w]."""
        return self.vae.encode(to_channels(images, self.vae.config.in_channels)).latent_dist.parameters.float()

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the autoencoder to those that are noised."""
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents to images, float32 [B, C, H, W] in [0, 1]."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def predict(
    unet: nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    time_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward pass of the network, [B, c, h, w].

    Args:
        time_ids: sizes and crop of Stable Diffusion XL, float32 [B, 6].
    """
    more = {}
    if condition.pooled is not None:
        more = {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": time_ids}}
    return unet(latents, timesteps, encoder_hidden_states=condition.text, return_dict=False, **more)[0]


def repeated(condition: Condition, count: int) -> Condition:
    """The condition of one record for ``count`` of them."""
    pooled = condition.pooled
    return Condition(condition.text.expand(count, -1, -1), None if pooled is None else pooled.expand(count, -1))


def spread(text: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each record's embedding, [B, 1, 1]; a constant to the gradient."""
    return text.detach().flatten(1).std(1)[:, None, None]


def time_ids(size: int) -> list[float]:
    """Sizes of an uncropped square picture, as Stable Diffusion XL is told them (Podell et al. 2023, section 2.2)."""
    return [float(value) for value in (size, size, 0, 0, size, size)]


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey to RGB by repeating, RGB to grey by its luma (ITU-R 601)."""
    if images.shape[1] == channels:
        return images
    if channels != 1:
        return images.expand(-1, channels, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    return (images * luma).sum(1, keepdim=True)


def build(config: ModelConfig, image_size: int, channels: int, classes: int, base: Path | None) -> LatentModel:
    """The model of a pipeline, with what is trained marked.

    Args:
        base: the folder of a pipeline that was made for this run; None: ``model.pretrained``.

    Raises:
        UserError: the pipeline cannot be used (`train.pipelines.load`), does not fit the pictures, or the adapter or patterns do not
            fit the network.
    """
    if classes:
        raise UserError("data.label_key", "a text-to-image model takes captions, not classes", "set it to null")
    source = str(base) if base is not None else config.pretrained
    parts = pipelines.load(source, None if base is not None else config.revision)
    check_size(parts, image_size)
    # the size that it is trained at is what a pipeline call draws and an attack asks for
    parts.unet.register_to_config(sample_size=image_size // 2 ** (len(parts.vae.config.block_out_channels) - 1))
    adapters.apply(parts.unet, config.adapter, config.trainable)
    model = LatentModel(parts, config.train_text_encoder or base is not None)  # a random text encoder says nothing
    if model.trains_text:
        for encoder in model.text_encoders:
            prepare_text_encoder(encoder, config, len(parts.text_encoders))
    return model


def prepare_text_encoder(encoder: nn.Module, config: ModelConfig, encoders: int) -> None:
    """Marks what of a text encoder is trained: all that has an influence, or adapters of its own where the network has some.

    Args:
        encoders: of the pipeline; of the first of two only the last but one hidden state is used.
    """
    body = getattr(encoder, "text_model", encoder)
    unused = encoders == 2 and not hasattr(encoder, "text_projection")
    if config.adapter is not None:
        layers = range(len(body.encoder.layers) - unused)
        targets = [f"layers.{layer}.self_attn.{name}" for layer in layers for name in TEXT_TARGETS]
        adapters.apply(encoder, replace(config.adapter, targets=targets), None)
        return
    encoder.requires_grad_(True)
    if unused:
        body.encoder.layers[-1].requires_grad_(False)
        body.final_layer_norm.requires_grad_(False)


def check_size(parts: Parts, image_size: int) -> None:
    """Refuses pictures that the levels of autoencoder and network do not divide."""
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    step = factor * 2 ** (len(parts.unet.config.block_out_channels) - 1)
    if image_size % step:
        near = max(step, round(image_size / step) * step)
        raise UserError(
            "data.image_size", f"{image_size} is not a multiple of {step}, which {parts.source} needs", f"take {near}"
        )


def check_schedule(config: ModelConfig, schedule: DDPMScheduler, parts: Parts) -> None:
    """Refuses to go on training with another noise schedule or prediction than the pipeline's.

    Raises:
        UserError: with all settings that would fit; or no settings would.
    """
    theirs, ours = parts.scheduler.config, schedule.config
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if theirs.get(name) not in (None, False):
            raise UserError(
                "model.pretrained",
                f"the scheduler of {parts.source} has {name}, a noise schedule that is not trained with here",
                "give a pipeline with a schedule of betas alone",
            )
    keys = {
        "prediction_type": "prediction",
        "beta_schedule": "noise_schedule",
        "num_train_timesteps": "timesteps",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
    }
    betas = theirs.get("beta_schedule") != "squaredcos_cap_v2"  # which has no first and last variance
    wrong = {
        key: theirs.get(name)
        for name, key in keys.items()
        if theirs.get(name) != ours.get(name) and (betas or not name.endswith(("start", "end")))
    }
    if wrong:
        fitting = " ".join(f"train.diffusion.{key}={value}" for key, value in wrong.items())
        raise UserError(
            f"train.diffusion.{next(iter(wrong))}", f"differs from that of {parts.source}", f"set {fitting}"
        )


def save(folder: Path, model: LatentModel, schedule: DDPMScheduler) -> None:
    """Writes a complete pipeline of diffusers, adapters merged; these lie by themselves in ``lora/`` where they are all that was
    trained. The scheduler is the one that the pipeline came with.

    Args:
        schedule: not used: it equals the pipeline's own as far as training is concerned.
    """
    parts = model.parts
    pipelines.save(folder, parts)
    pipelines.save_lora(folder / "lora", parts.unet, parts.text_encoders)


def conditions_of(model: LatentModel, prompts: Sequence[str], known: Callable | None = None) -> Condition:
    """Embeddings of prompts, each distinct one encoded once."""
    distinct = list(dict.fromkeys(prompts))
    encode = known or model.conditioner.encode
    found, place = encode(distinct), {prompt: index for index, prompt in enumerate(distinct)}
    order = [place[prompt] for prompt in prompts]
    return Condition(found.text[order], None if found.pooled is None else found.pooled[order])


def trained_conditions(model: LatentModel, captions: Sequence[str], known: Callable | None = None) -> Condition:
    """Embeddings as they are trained on: no caption is what guidance leads away from, zeros for most pipelines of XL."""
    found = conditions_of(model, captions, known)
    if not model.conditioner.zero_for_empty:
        return found
    return found.without(torch.tensor([not each.strip() for each in captions], device=found.text.device))
