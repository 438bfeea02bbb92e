"""Builds the trainer from the configuration, trains, and saves the model that is released."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from defenses.base import CheckpointView, Defense, RunContext
from defenses.errors import UserError
from defenses.ranks import on_main, together
from train import checkpoint, families, textstage
from train.combinations import (
    is_quiet,
    plan_and_rule,
    refuse_combinations,
    refuse_dropout,
    refuse_mixing,
    sampling_frequency,
)
from train.compiled import refuse_without_compiler
from train.data import Dataset
from train.diffusion import noise_schedule
from train.loop import Trainer
from train.models import memory_format
from train.monitor import heldout_batches, heldout_losses, sample_on_all_ranks
from train.optim import build_optimizer, build_schedule
from train.pipelines import frozen_digest
from train.planting import SPLIT as CANARY
from train.records import class_names, labels_of, pool_of, trained_rows
from train.release import RECORD, SIDECAR, build_model, release
from train.runlog import RunDirectory
from train.sampling import save_grid
from train.state import TrainConfig, TrainState, averaged_weights, trained_parameters


def train_model(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    defenses: list[Defense],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Trains (or resumes, or finds all done) and writes ``model/``.

    Args:
        defenses: those that `select_records` was given, with what they noted there.

    Returns:
        The contents of the model's sidecar: what evaluation and report need to know of training.
    """
    if on_main(accelerator, lambda: (directory.model / SIDECAR).exists()):
        return json.loads((directory.path / RECORD).read_text())
    names = class_names(dataset, config.data.label_key)
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, names)
    newest = on_main(accelerator, lambda: checkpoint.latest(directory.checkpoints))
    if newest is not None:
        trainer.resume(newest)
    else:
        directory.truncate_metrics(0)
    accelerator.wait_for_everyone()
    start_trackers(config, accelerator)
    trainer.train()
    for tracker in accelerator.trackers:
        tracker.finish()
    return release(config, dataset, directory, accelerator, trainer, names)


def build_trainer(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    accelerator: Accelerator,
    defenses: list[Defense],
    names: list[str],
    rehearsal: bool = False,
) -> Trainer:
    """Wires model, optimizer, plan, seams and previews together. What can be refused without a model is refused first: the one that
    a text-to-image run from scratch begins with takes long to make.

    Args:
        rehearsal: for a dry run: that model is not trained, latents and texts are not encoded ahead.
    """
    settings = config.train
    rows = trained_rows(dataset)
    refuse_early(config, defenses, accelerator)
    begin(config, dataset, directory, accelerator, defenses)
    plan, rule = plan_and_rule(config, rows, defenses)
    textstage.prepare_base(config, dataset, directory, defenses, accelerator, trained=not rehearsal)
    model = build_model(config, names, directory.path)
    model = model.to(accelerator.device, memory_format=memory_format(accelerator.device)).train()
    speed_up(model, settings)
    optimizer = build_optimizer(settings.optimizer, trained_parameters(model), settings.learning_rate)
    ema = EMAModel(trained_parameters(model), decay=settings.ema_decay, foreach=True)
    state = TrainState(model=model, optimizer=optimizer, ema=ema)
    schedule = noise_schedule(settings.diffusion)
    family = families.of(config.model)
    family.check(config.model, schedule, defenses, model)
    refuse_dropout(model, defenses)
    quiet = is_quiet(config, defenses)
    text = textstage.texts_of(config, dataset, directory, defenses, model, accelerator, rehearsal)
    wants = {name for defense in defenses for name in defense.wants}
    objective = family.objective(model, settings, schedule, wants, text.encode)
    heldout = {} if quiet else heldout_batches(config, dataset, names, objective, accelerator, text.captions)
    frequency = sampling_frequency(config, dataset, defenses, names)
    prompts = textstage.preview_prompts(config, dataset, defenses)

    def fetch(batch_rows: np.ndarray) -> dict[str, Any]:
        pixels = torch.from_numpy(dataset.images[batch_rows])
        return {"images": pixels, "labels": labels_of(dataset, batch_rows, names), **text.fields(batch_rows)}

    def draw_samples(indices) -> torch.Tensor:
        with averaged_weights(state) as averaged:
            return sample_on_all_ranks(config, averaged, schedule, frequency, indices, accelerator, prompts)

    def preview(step: int) -> None:
        images = draw_samples(range(settings.preview_count))
        if accelerator.is_main_process:
            save_grid(directory.samples / f"step-{step}.png", images)
            textstage.write_preview_prompts(directory, config, prompts, model)

    def view(step: int) -> CheckpointView:
        pool, control = pool_of(dataset, config.run.seed), dataset.rows("calibration")
        return CheckpointView(step, draw_samples, pool, control, state.images_seen)

    trainer = Trainer(
        config=settings,
        seed=config.run.seed,
        state=state,
        wrapped=accelerator.prepare_model(model) if rule.prepares_model else model,
        objective=objective,
        plan=plan,
        fetch=fetch,
        rule=rule,
        defenses=defenses,
        lr_schedule=build_schedule(settings.optimizer, optimizer, settings.steps),
        accelerator=accelerator,
        directory=directory,
        evaluate=lambda: heldout_losses(config, state, objective, heldout, accelerator),
        preview=preview,
        view=view,
        quiet=quiet,
        frozen=on_main(accelerator, lambda: frozen_digest([model, *getattr(model, "beside", ())])),
    )
    if any(defense.private for defense in defenses):
        together(accelerator, lambda: refuse_mixing(trainer))
    together(accelerator, lambda: rule.check(model, trainer.loss, trainer.example(4)))
    return trainer


def refuse_early(config: SimpleNamespace, defenses: list[Defense], accelerator: Accelerator) -> None:
    """What can be refused before there is a model: that of a text-to-image run from scratch takes long to make.

    Raises:
        UserError: too small a batch; defenses that contradict each other, the kind of model or how it is run; an optimizer that is
            not installed or does not work here.
    """
    settings = config.train
    if settings.batch_size < accelerator.num_processes * settings.accumulation:
        raise UserError(
            "train.batch_size",
            f"{settings.batch_size} is less than {accelerator.num_processes} processes x {settings.accumulation} micro-batches",
            "raise it, or lower train.accumulation",
        )
    if settings.diffusion.prediction == "flow" and (config.model.family != "latent" or config.model.pretrained is None):
        raise UserError(
            "train.diffusion.prediction",
            "flow goes on from a pipeline of Stable Diffusion 3 and is not offered for other models",
            "set model.family=latent model.pretrained=PIPELINE, or take epsilon or v_prediction",
        )
    refuse_combinations(config, defenses)
    owners = [d.name for d in defenses if type(d).gradient_rule is not Defense.gradient_rule]
    for key in ("gradient_checkpointing", "compile"):
        if getattr(settings, key) and owners:
            raise UserError(f"train.{key}", f"does not work with gradients per record ({owners[0]})", "set it to false")
    for section in ("train", "generate"):
        if getattr(config, section).compile:
            refuse_without_compiler(f"{section}.compile", accelerator.device)
    if config.generate.compile and config.model.family == "gan":
        raise UserError("generate.compile", "is not offered for GANs: an image is one pass", "set it to false")
    is_quiet(config, defenses)
    build_optimizer(settings.optimizer, [nn.Parameter(torch.ones(1, device=accelerator.device))], 1.0)


def speed_up(model: nn.Module, settings: TrainConfig) -> None:
    """Gradient checkpointing and compilation, in place."""
    if settings.gradient_checkpointing:
        for module in model.modules():
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
            elif hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        getattr(model, "network", model).compile()


def begin(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    accelerator: Accelerator,
    defenses: list[Defense],
) -> None:
    """Tells every defense of the run; any may refuse it."""
    settings, pool = config.train, pool_of(dataset, config.run.seed)
    if families.of(config.model).captioned:  # as they are trained on
        captions, more = textstage.captions_of(config, dataset, defenses)
        pool = replace(pool, caption=captions, more_captions=more)
    context = RunContext(
        pool=pool,
        control=dataset.rows("calibration"),
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        precision=settings.precision,
        seed=config.run.seed,
        checkpoint_every=settings.checkpoint_every,
        nonprivate_metrics=config.report.nonprivate_metrics,
        folder=directory.path,
        accelerator=accelerator,
        planted=dataset.rows(CANARY, kept=True),
        left_out=sum(record.canary == "coin" and not record.kept for record in dataset.records),
        timesteps=settings.diffusion.timesteps,
        quiet=is_quiet(config, defenses),
        flow=settings.diffusion.prediction == "flow",
    )
    for defense in defenses:
        defense.begin(context)


def start_trackers(config: SimpleNamespace, accelerator: Accelerator) -> None:
    """Opens the trackers that the accelerator was built with."""
    if config.train.trackers:
        settings = {"run": config.run.name, "steps": config.train.steps, "batch_size": config.train.batch_size}
        accelerator.init_trackers("deffuse", settings)
