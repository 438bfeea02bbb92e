"""The kinds of models: one table of what differs between them. The loop knows none of it; a new kind is one more entry."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.base import Defense, GradientRule
from defenses.errors import UserError
from train import adversarial, diffusion, gan, latent, models, sampling, textobjective, textsampling
from train.diffusion import Schedule
from train.models import ModelConfig
from train.objective import Objective
from train.optim import MeanGradient
from train.state import TrainConfig


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: (model settings, image size, channels, classes, folder of a pipeline made for the run or None) -> everything that is
            trained, in one module, with random weights from torch's global generator or pretrained ones.
        released: that module -> the part that is counted, sampled and given away; the module itself where that is all of it.
        check: (model settings, noise schedule, defenses, that module) before the first step; raises `UserError` for what cannot be.
        objective: (that module, section ``train``, noise schedule, what seam 3 wants to be told, captions -> condition or None)
            -> its losses.
        rule: section ``train`` -> how losses become a gradient where no defense owns that.
        sample: (released part, noise schedule, sampler settings, indices, shape (C, H, W), *, seed, labels, prompts, precision) ->
            images, float32 [n, C, H, W] in [0, 1] on the CPU, each a function of (weights, seed, index, label or prompt).
        save: (folder, module, noise schedule) writes the released form: ``model_index.json``, configurations, safetensors.
        notes: lines of the dry run.
        captioned: whether it is trained on captions and sampled by prompts.
    """

    build: Callable[[ModelConfig, int, int, int, Path | None], nn.Module]
    released: Callable[[nn.Module], nn.Module]
    check: Callable[[ModelConfig, Schedule, list[Defense], nn.Module], None]
    objective: Callable[[nn.Module, TrainConfig, Schedule, Collection[str], Callable | None], Objective]
    rule: Callable[[TrainConfig], GradientRule]
    sample: Callable[..., torch.Tensor]
    save: Callable[[Path, nn.Module, Schedule], None]
    notes: tuple[str, ...] = ()
    captioned: bool = False


def _sample_pixel(model: nn.Module, schedule: Schedule, *arguments: Any, prompts=None, **options) -> torch.Tensor:
    return sampling.sample(model, schedule.config, *arguments, **options)


def _sample_gan(generator, schedule, sampler, indices, shape, *, prompts=None, **options: Any) -> torch.Tensor:
    return gan.sample(generator, indices, **options)


def _sample_latent(model, schedule, sampler, indices, shape, *, labels=None, **options: Any) -> torch.Tensor:
    return textsampling.sample(model, sampler, indices, shape, as_trained=True, **options)


def _mean_gradient(train: TrainConfig) -> MeanGradient:
    clip = train.optimizer.max_grad_norm
    return MeanGradient(train.batch_size, clip, train.precision, train.gradient_checkpointing)


def _latent_objective(model, train: TrainConfig, schedule: Schedule, wants, encode) -> Objective:
    return textobjective.objective(
        model,
        train.diffusion,
        schedule,
        caption_dropout=train.caption_dropout,
        precision=train.precision,
        wants=wants,
        encode=encode,
    )


def _refuse_private(config: ModelConfig, schedule: Schedule, defenses: list[Defense], model: nn.Module) -> None:
    for defense in defenses:
        if type(defense).gradient_rule is not Defense.gradient_rule:
            raise UserError(
                f"defenses.{defense.name}",
                "owns the gradient, which in a GAN belongs to two players: not offered",
                "switch it off, or take model.family=pixel",
            )


FAMILIES = {
    "pixel": Family(
        build=lambda config, size, channels, classes, base=None: models.build(config, size, channels, classes),
        released=lambda model: model,
        check=lambda config, schedule, defenses, model: models.check_schedule(config, schedule),
        objective=lambda model, train, schedule, wants, encode: diffusion.objective(train.diffusion, schedule),
        rule=_mean_gradient,
        sample=_sample_pixel,
        save=models.save_pipeline,
    ),
    "latent": Family(
        build=latent.build,
        released=lambda model: model,
        check=lambda config, schedule, defenses, model: model.kind.check_schedule(schedule),
        objective=_latent_objective,
        rule=_mean_gradient,
        sample=_sample_latent,
        save=latent.save,
        captioned=True,
    ),
    "gan": Family(
        build=lambda config, size, channels, classes, base=None: gan.build(config, size, channels, classes),
        released=lambda model: model.generator,
        check=_refuse_private,
        objective=lambda model, train, schedule, wants, encode: adversarial.objective(train.gan),
        rule=lambda train: adversarial.PlayersGradient(
            train.batch_size, train.optimizer.max_grad_norm, train.precision
        ),
        sample=_sample_gan,
        save=gan.save,
        notes=(
            "family gan: train.diffusion, generate.sampler and generate.steps are not used; an image is one forward pass",
        ),
    ),
}


def of(config: ModelConfig) -> Family:
    """The family that ``model.family`` names."""
    return FAMILIES[config.family]


def build(config: ModelConfig, image_size: int, channels: int, classes: int, base: Path | None = None) -> nn.Module:
    """See `Family.build`."""
    return of(config).build(config, image_size, channels, classes, base)
