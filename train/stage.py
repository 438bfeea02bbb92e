"""Builds the trainer from the configuration, trains, and saves the model that is released."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from defenses import registry
from defenses.base import BatchPlan, CheckpointView, Defense, GradientRule, RunContext
from defenses.errors import UserError
from defenses.ranks import on_main, together
from defenses.seeding import derive
from train import checkpoint, families, textstage
from train.data import Dataset
from train.diffusion import noise_schedule
from train.families import build
from train.files import write_json
from train.loop import Trainer
from train.models import memory_format, parameter_count
from train.monitor import heldout_batches, heldout_losses, sample_on_all_ranks
from train.optim import build_optimizer, build_schedule
from train.pipelines import frozen_digest
from train.plan import EpochPlan
from train.planting import SPLIT as CANARY
from train.records import class_frequency, class_names, labels_of, pool_of, trained_rows
from train.runlog import RunDirectory
from train.sampling import save_grid
from train.state import TrainConfig, TrainState, averaged_weights, released_model, trained_parameters

SIDECAR = "deffuse.json"  # beside model_index.json: what diffusers' format has no place for
RECORD = "training.json"  # in the run directory: the same and what is for the holder of the records alone
FOR_THE_HOLDER = ("train_seconds", "peak_memory_bytes", "defense_states")  # not beside a private model


def build_model(config: SimpleNamespace, names: list[str], run: Path | None = None) -> nn.Module:
    """The network with initial weights that depend on run.seed alone.

    Args:
        run: run directory, where a text-to-image model from scratch has its first pipeline.
    """
    torch.manual_seed(derive(config.run.seed, "weights"))
    base = textstage.base_of(config, run)
    return build(config.model, config.data.image_size, config.data.channels, len(names), base)


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
    textstage.prepare_base(config, dataset, directory, defenses, accelerator)
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
) -> Trainer:
    """Wires model, optimizer, plan, seams and previews together."""
    settings = config.train
    rows = trained_rows(dataset)
    if settings.batch_size < accelerator.num_processes * settings.accumulation:
        raise UserError(
            "train.batch_size",
            f"{settings.batch_size} is less than {accelerator.num_processes} processes x {settings.accumulation} micro-batches",
            "raise it, or lower train.accumulation",
        )
    refuse_combinations(config, defenses)
    model = build_model(config, names, directory.path)
    model = model.to(accelerator.device, memory_format=memory_format(accelerator.device)).train()
    speed_up(model, settings, defenses)
    optimizer = build_optimizer(settings.optimizer, trained_parameters(model), settings.learning_rate)
    ema = EMAModel(trained_parameters(model), decay=settings.ema_decay, foreach=True)
    state = TrainState(model=model, optimizer=optimizer, ema=ema)
    schedule = noise_schedule(settings.diffusion)
    family = families.of(config.model)
    family.check(config.model, schedule, defenses, model)
    begin(config, dataset, directory, accelerator, defenses)
    plan, rule = plan_and_rule(config, rows, defenses)
    quiet = is_quiet(config, defenses)
    text = textstage.texts_of(config, dataset, directory, defenses, model, accelerator)
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
            textstage.write_preview_prompts(directory, config, prompts)

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
        frozen=frozen_digest([model, *getattr(model, "beside", ())]),
    )
    if any(defense.private for defense in defenses):
        together(accelerator, lambda: refuse_mixing(trainer))
    together(accelerator, lambda: rule.check(model, trainer.loss, trainer.example(4)))
    return trainer


def refuse_mixing(trainer: Trainer) -> None:
    """Tries on random images whether a defense lets one example of a batch change another: a private rule could not bound it.

    Raises:
        UserError: it does.
    """
    one, other = trainer.example(4), trainer.example(4, negated=slice(1, None))
    for name in ("images", "labels", "timesteps", "noise", "captions", "latents", "text", "pooled", "tokens"):
        first, second = getattr(one, name), getattr(other, name)
        if first is not None and not _alike(first[:1], second[:1]):
            raise UserError(
                "defenses", f"one of them mixes the {name} of a batch, which a private run cannot have", "switch it off"
            )


def _alike(first: torch.Tensor | list[str], second: torch.Tensor | list[str]) -> bool:
    if isinstance(first, list):
        return first == second
    # what comes from an encoder differs by rounding with its batch
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)


def refuse_combinations(config: SimpleNamespace, defenses: list[Defense]) -> None:
    """Defenses that contradict each other or the kind of model.

    Raises:
        UserError: one that remembers records beside a private one, or one that needs text in a model without.
    """
    private = [defense.name for defense in defenses if defense.private]
    for defense in defenses:
        if private and defense.remembers:
            raise UserError(
                f"defenses.{defense.name}",
                f"what it does to one record depends on others, which the guarantee of {private[0]} cannot cover",
                "switch one of the two off",
            )
        if not families.of(config.model).captioned and (defense.needs_captions or defense.wants):
            raise UserError(
                f"defenses.{defense.name}",
                f"is for text-to-image models, not family {config.model.family}",
                "switch it off",
            )


def speed_up(model: nn.Module, settings: TrainConfig, defenses: list[Defense]) -> None:
    """Gradient checkpointing and compilation, in place.

    Raises:
        UserError: a defense that takes gradients per record cannot use it.
    """
    owners = [d.name for d in defenses if type(d).gradient_rule is not Defense.gradient_rule]
    for key in ("gradient_checkpointing", "compile"):
        if getattr(settings, key) and owners:
            raise UserError(f"train.{key}", f"does not work with gradients per record ({owners[0]})", "set it to false")
    if settings.gradient_checkpointing:
        for module in model.modules():
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
            elif hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        getattr(model, "unet", model).compile()


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
    )
    for defense in defenses:
        defense.begin(context)


def plan_and_rule(config: SimpleNamespace, rows: np.ndarray, defenses: list[Defense]) -> tuple[BatchPlan, GradientRule]:
    """How batches are drawn and how their losses become a gradient: the defenses' way, or the ordinary one.

    Raises:
        UserError: two defenses want the same, or settings that contradict the defense that does.
    """
    settings = config.train
    default = families.of(config.model).rule(settings)
    rule = registry.gradient_rule(defenses, default)
    plan = registry.batch_plan(defenses, rows, settings.batch_size, config.run.seed)
    if rule is default:
        if plan is not None:
            raise UserError(
                "defenses", "batches are drawn by a defense, but none of them owns the gradient", "switch it off"
            )
    elif settings.optimizer.max_grad_norm not in (None, "auto"):
        raise UserError(
            "train.optimizer.max_grad_norm",
            "a defense owns the gradient; clipping it once more would only rescale what it released",
            "set it to null",
        )
    return plan or EpochPlan(rows, settings.batch_size, config.run.seed, settings.accumulation), rule


def is_quiet(config: SimpleNamespace, defenses: list[Defense]) -> bool:
    """Whether what is measured on the records stays out of logs, checkpoints and decisions.

    Raises:
        UserError: a defense wants to decide on such measurements.
    """
    quiet = any(defense.private for defense in defenses) and not config.report.nonprivate_metrics
    watchers = [d.name for d in defenses if type(d).after_checkpoint is not Defense.after_checkpoint]
    if quiet and watchers:
        raise UserError(
            f"defenses.{watchers[0]}",
            "stops or chooses by looking at private records, which a DP guarantee does not cover",
            "switch it off, or accept it with report.nonprivate_metrics=true",
        )
    return quiet


def sampling_frequency(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense], names: list[str]
) -> np.ndarray:
    """Weight of every class in what is generated, int64 [classes]: as in training, or equal where that is private."""
    frequency = class_frequency(dataset, names)
    return np.ones_like(frequency) if is_quiet(config, defenses) else frequency


def start_trackers(config: SimpleNamespace, accelerator: Accelerator) -> None:
    """Opens the trackers that the accelerator was built with."""
    if config.train.trackers:
        settings = {"run": config.run.name, "steps": config.train.steps, "batch_size": config.train.batch_size}
        accelerator.init_trackers("deffuse", settings)


def release(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    accelerator: Accelerator,
    trainer: Trainer,
    names: list[str],
) -> dict[str, Any]:
    """Writes the EMA weights (or those of the checkpoint that a defense chose) as a pipeline folder."""
    state, family = trainer.state, families.of(config.model)
    released = family.released(state.model)
    facts = {
        "family": config.model.family,
        "parameters": parameter_count(released),
        "trainable_parameters": parameter_count(released, trainable=True),
        "steps": state.step,
        "images_seen": state.images_seen,
        "train_seconds": state.seconds,
        "stopped_by": state.stopped_by,
        "released_step": state.release_step or state.step,
        "defenses": [describe(defense, config) for defense in trainer.defenses],
        "defense_states": {defense.name: defense.state_dict() for defense in trainer.defenses},
        "classes": names,
        "class_frequency": sampling_frequency(config, dataset, trainer.defenses, names).tolist(),
        "image_size": config.data.image_size,
        "channels": config.data.channels,
        "precision": config.train.precision,
        "world_size": accelerator.num_processes,
        "peak_memory_bytes": peak_memory(accelerator),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if accelerator.is_main_process:
        model = released_model(state)
        if state.release_step is not None and state.release_step != state.step:
            model.load_state_dict(
                load_file(directory.checkpoints / f"step-{state.release_step}" / "ema.safetensors"), strict=False
            )
        family.save(directory.model, model, noise_schedule(config.train.diffusion))
        write_json(directory.path / RECORD, facts)
        write_sidecar(directory.model, config, facts)  # last: its presence says that training is complete
    accelerator.wait_for_everyone()
    return facts


def write_sidecar(model: Path, config: SimpleNamespace, facts: dict[str, Any]) -> None:
    """The facts beside a saved pipeline, without those that a private model must not carry."""
    private = registry.private(config.defenses)
    told = {key: value for key, value in facts.items() if not (private and key in FOR_THE_HOLDER)}
    write_json(model / SIDECAR, told)


def facts_at(directory: RunDirectory, step: int) -> dict[str, Any]:
    """What is known of a finished run, as of one of its checkpoints."""
    facts = json.loads((directory.path / RECORD).read_text())
    counters = json.loads((directory.checkpoints / f"step-{step}" / "state.json").read_text())
    now = {"steps": step, "released_step": step, "images_seen": counters["images_seen"], "stopped_by": None}
    return {**facts, **now, "train_seconds": counters["seconds"]}


def checkpoint_model(config: SimpleNamespace, directory: RunDirectory, step: int, classes: list[str]) -> nn.Module:
    """The network with the averaged weights of one checkpoint, on the CPU."""
    saved = directory.checkpoints / f"step-{step}"
    model = build_model(config, classes, directory.path)
    for part in ("model", "ema"):  # the averages are of the parameters alone, buffers come from the model
        model.load_state_dict(load_file(saved / f"{part}.safetensors"), strict=False)
    return model.eval()


def checkpoint_pipeline(config: SimpleNamespace, directory: RunDirectory, step: int, folder: Path) -> dict[str, Any]:
    """Writes the averaged weights of one checkpoint as the pipeline that would have been released then; one process calls it.

    Returns:
        `facts_at` that step, which are also the new pipeline's sidecar.
    """
    facts = facts_at(directory, step)
    model = checkpoint_model(config, directory, step, facts["classes"])
    families.of(config.model).save(folder, model, noise_schedule(config.train.diffusion))
    write_sidecar(folder, config, facts)
    return facts


def describe(defense: Defense, config: SimpleNamespace) -> dict[str, Any]:
    """Name, settings and claim, as in report.json."""
    settings = getattr(config.defenses, defense.name, None)
    return {
        "name": defense.name,
        "settings": asdict(settings) if settings else {},
        "claim": defense.claim(),
        "findings": defense.findings(),
    }


def peak_memory(accelerator: Accelerator) -> int:
    """Largest memory of this process so far: on the accelerator where there is one, else resident."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
