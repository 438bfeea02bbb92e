"""Text-to-image diffusion in the latents of an autoencoder (Rombach et al. 2022): Stable Diffusion 1.x, 2.x, XL and 3."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from defenses.errors import UserError
from train import adapters, kinds, pipelines
from train.conditioner import Condition
from train.diffusion import Schedule
from train.models import ModelConfig
from train.pipelines import Parts

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of a text encoder that gets adapters


class LatentModel(nn.Module):
    """The network that is trained, as a module; what is frozen beside it (autoencoder, text encoders that are not trained) moves with
    it but is none of its parameters, so that optimizer, average, checkpoints and gradient rules never see it.

    Args:
        parts: of a pipeline.
        train_text: whether the text encoders are trained too; T5 never is.

    Attributes:
        parts: of the pipeline; its network is registered under its name there, ``unet`` or ``transformer``.
        kind: how the network is told of text and time.
        text_encoders: those that are trained; empty where they are frozen.
    """

    def __init__(self, parts: Parts, train_text: bool = False):
        super().__init__()
        self.add_module(parts.part, parts.network)
        trained = parts.trainable_text_encoders if train_text else []
        self.text_encoders = nn.ModuleList(trained)
        frozen = [parts.vae, *parts.text_encoders[len(trained) :]]
        for module in frozen:
            module.requires_grad_(False).eval()
        # a tuple: nn.Module registers modules and lists of parameters, not what lies in a plain tuple
        self.beside, self.parts = tuple(frozen), parts
        self.kind = kinds.of(parts)
        self.conditioner = self.kind.conditioner()
        # tokens of a record that is trained under zeros
        self.nothing = self.conditioner.tokens([""]) if self.conditioner.zero_for_empty else None

    @property
    def network(self) -> nn.Module:
        return self.parts.network

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
        found = self.conditioner.embed(batch.tokens)
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
        return self.kind.predict(latents, self.kind.times(batch.timesteps), condition, batch.time_ids)

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
    parts.network.register_to_config(sample_size=image_size // parts.factor)
    adapters.apply(parts.network, config.adapter, config.trainable)
    model = LatentModel(parts, config.train_text_encoder or base is not None)  # a random text encoder says nothing
    if model.trains_text:
        for encoder in model.text_encoders:
            prepare_text_encoder(encoder, config, len(model.text_encoders))
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
    """Refuses pictures that the levels of autoencoder and network do not divide, or that are larger than it has places for."""
    side, largest = kinds.of(parts).sides()
    step = parts.factor * side
    most = None if largest is None else largest * parts.factor
    if image_size % step or (most is not None and image_size > most):
        near = max(step, round(image_size / step) * step)
        problem = f"{image_size} is not a multiple of {step}, which {parts.source} needs"
        if most is not None and near > most:
            near, problem = most, f"{image_size} is more than the {most} that {parts.source} has places for"
        raise UserError("data.image_size", problem, f"take {near}")


def save(folder: Path, model: LatentModel, schedule: Schedule) -> None:
    """Writes a complete pipeline of diffusers, adapters merged; these lie by themselves in ``lora/`` where they are all that was
    trained. The scheduler is the one that the pipeline came with.

    Args:
        schedule: not used: it equals the pipeline's own as far as training is concerned.
    """
    parts = model.parts
    pipelines.save(folder, parts)
    pipelines.save_lora(folder / "lora", parts.network, parts.text_encoders)


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
