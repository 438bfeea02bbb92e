"""The choice of model, and the denoising networks: diffusers' `UNet2DModel` in pixel space, unconditional or class-conditional."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from defenses.errors import UserError
from train import adapters
from train.autoencoder import ScratchConfig

# Block widths, residual layers per block, levels with attention. "base" has the layout of google/ddpm-cifar10-32 and "large"
# that of diffusers' unconditional training example, so that their published figures can be compared.
SIZES = {
    "nano": ((16, 32, 32), 1, ()),  # 0.3 M parameters: for machines without a GPU and without bf16
    "tiny": ((32, 64, 64), 1, ()),  # 1.1 M parameters
    "small": ((64, 128, 128), 2, (2,)),  # 6 M
    "base": ((128, 256, 256, 256), 2, (1,)),  # 36 M
    "large": ((128, 128, 256, 256, 512, 512), 2, (4,)),  # 114 M
}


@dataclass(kw_only=True)
class ModelConfig:
    """Section ``model``."""

    # pixel: UNet2DModel on pixels; latent: Stable Diffusion 1.x, 2.x, XL, 3; gan: the baseline that is no diffusion model
    family: Literal["pixel", "latent", "gan"] = "pixel"
    size: Literal["nano", "tiny", "small", "base", "large"] = "tiny"  # ignored where `pretrained` is given
    pretrained: str | None = (
        None  # folder (or hub id) of a diffusers pipeline of this family to start from; null: from scratch
    )
    revision: str | None = None  # revision of a hub id; null: its default
    dropout: float = 0.0  # probability inside residual blocks
    # low-rank adapters on a frozen network; null: none
    adapter: adapters.AdapterConfig | None = None
    # shell-style patterns of the parameters that are trained, beside the adapter where there is one, e.g. ["*norm*", "*.bias",
    # "class_embedding*"]; null: all, with an adapter none but its own
    trainable: list[str] | None = None
    # latent: whether the text encoders are trained too, whole or, with an adapter, by adapters of their own; from scratch they
    # always are
    train_text_encoder: bool = False
    scratch: ScratchConfig = field(default_factory=ScratchConfig)  # latent, where `pretrained` is null
    cache: bool = (
        True  # latent: keep latents and text embeddings on disk, where no defense changes the pictures or captions
    )

    def __post_init__(self):
        if self.family == "gan":
            self._refuse_for_gan()
        if self.family != "latent" and self.train_text_encoder:
            raise UserError("model.train_text_encoder", f"a model of family {self.family} has none", "set it to false")
        if self.family == "latent" and self.dropout:
            raise UserError("model.dropout", "is not offered for family latent", "set it to 0")
        if self.adapter is not None and self.pretrained is None:
            raise UserError(
                "model.adapter", "would adapt random weights", "give model.pretrained, or set model.adapter=null"
            )
        if self.trainable == [] and self.adapter is None:
            raise UserError("model.trainable", "trains no parameter", "null trains all")
        if not 0 <= self.dropout < 1:
            raise UserError("model.dropout", f"{self.dropout} is not a probability below 1", "choose 0 <= dropout < 1")

    def _refuse_for_gan(self) -> None:
        """What is for denoising networks alone. A GAN cannot go on from a released one: its discriminator stays behind."""
        for key in ("pretrained", "adapter", "trainable", "dropout"):
            if getattr(self, key):
                off = "0" if key == "dropout" else "null"
                raise UserError(
                    f"model.{key}", "is not offered for a GAN, which starts from scratch", f"set it to {off}"
                )


def build(config: ModelConfig, image_size: int, channels: int, classes: int) -> UNet2DModel:
    """UNet for [B, channels, image_size, image_size]; ``classes`` 0 means unconditional. Only what is trained has
    ``requires_grad``. Random weights come from torch's global generator.

    Raises:
        UserError: the image size does not fit the number of levels, the pretrained weights do not fit the data, or the
            adapter or the trainable patterns do not fit the model.
    """
    source = _from_scratch if config.pretrained is None else _load_pretrained
    return adapters.apply(source(config, image_size, channels, classes), config.adapter, config.trainable)


def _from_scratch(config: ModelConfig, image_size: int, channels: int, classes: int) -> UNet2DModel:
    widths, layers, attention = SIZES[config.size]
    _check_size(image_size, len(widths))
    down = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths))]
    up = ["AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(widths)))]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        # groups of at least 4 channels: in a group of one the norm removes what a bias or the time embedding adds
        norm_num_groups=min(32, widths[0] // 4),
        down_block_types=down,
        up_block_types=up,
        dropout=config.dropout,
        num_class_embeds=classes or None,
    )


def _check_size(image_size: int, levels: int) -> None:
    step = 2 ** (levels - 1)
    if image_size % step:
        near = max(step, round(image_size / step) * step)
        raise UserError(
            "data.image_size", f"{image_size} is not a multiple of {step}, which the model needs", f"take {near}"
        )


def check_schedule(config: ModelConfig, schedule: DDPMScheduler) -> None:
    """Refuses to go on training with another objective than the pretrained model's.

    Raises:
        UserError: its prediction type, noise schedule or number of timesteps is another one.
    """
    if config.pretrained is None:
        return
    try:
        theirs = DDPMScheduler.load_config(config.pretrained, subfolder="scheduler", revision=config.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            "model.pretrained", f"{config.pretrained} has no scheduler", "give a whole pipeline folder"
        ) from error
    names = {"prediction_type": "prediction", "beta_schedule": "noise_schedule", "num_train_timesteps": "timesteps"}
    for name, key in names.items():
        wanted = theirs.get(name, {"prediction_type": "epsilon"}.get(name))
        if wanted != schedule.config[name]:
            raise UserError(
                f"train.diffusion.{key}",
                f"is {schedule.config[name]}, {config.pretrained} has {wanted}",
                f"set it to {wanted}",
            )


def _load_pretrained(config: ModelConfig, image_size: int, channels: int, classes: int) -> UNet2DModel:
    try:
        stored = UNet2DModel.load_config(config.pretrained, subfolder="unet", revision=config.revision)
        captioned = stored.get("_class_name") == "UNet2DConditionModel"
        model = (
            None
            if captioned
            else UNet2DModel.from_pretrained(
                config.pretrained,
                subfolder="unet",
                revision=config.revision,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            "model.pretrained", f"{config.pretrained}: {reason}", "give a saved diffusers pipeline folder"
        ) from error
    if model is None:
        raise UserError(
            "model.pretrained", f"{config.pretrained} is a text-to-image pipeline", "set model.family=latent"
        )
    found = (model.config.in_channels, model.config.num_class_embeds or 0)
    if found != (channels, classes):
        raise UserError(
            "model.pretrained",
            f"has {found[0]} channels and {found[1]} classes, the data {channels} and {classes}",
            "set data.channels and data.label_key to match, or choose another model",
        )
    _check_size(image_size, len(model.config.block_out_channels))
    # what the saved pipeline draws; no path of this machine in what is published
    model.register_to_config(sample_size=image_size, _name_or_path="")
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = config.dropout
    return model


def save_pipeline(folder: Path, model: nn.Module, scheduler: DDPMScheduler) -> None:
    """Writes ``model`` with its noise schedule as a diffusers `DDIMPipeline` (safetensors).

    The weights may live on any device; the pipeline loads with ``DiffusionPipeline.from_pretrained(folder)``, without PEFT: an
    adapter is merged into the weights. Where it is all that was trained, it also lies by itself in ``adapter/``.
    """
    pipeline = DDIMPipeline(unet=adapters.merged(model), scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    adapters.save(folder / "adapter", model)


def parameter_count(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, of what lies frozen beside the network too (`train.latent.LatentModel`), or of those that are trained."""
    own = sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
    return own if trainable else own + sum(parameter_count(module) for module in getattr(model, "beside", ()))


def memory_format(device: torch.device) -> torch.memory_format:
    """Layout of the convolutions: channels-last feeds GPU tensor cores; on CPUs it was slower (docs/performance.md)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
