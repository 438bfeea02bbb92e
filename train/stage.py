"""Builds the trainer from the configuration, trains, and saves the model that is released."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, reduce
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from defenses import registry
from defenses.base import Batch, CheckpointView, Defense, Pool
from defenses.errors import UserError
from defenses.seeding import RecordRandom, derive
from train import checkpoint
from train.data import Dataset
from train.diffusion import autocast, noise_schedule, per_example_loss
from train.files import write_json
from train.loop import Trainer, TrainState, averaged_weights, released_model
from train.models import build, memory_format, parameter_count, save_pipeline
from train.optim import MeanGradient, build_optimizer, build_schedule
from train.plan import EpochPlan
from train.ranks import together
from train.runlog import RunDirectory
from train.sampling import SamplerConfig, blocks, class_of_sample, sample, save_grid

SIDECAR = "deffuse.json"  # beside model_index.json: what diffusers' format has no place for


def select_records(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense], accelerator: Accelerator
) -> None:
    """Seam 1: lets every defense remove training records, and notes each removal in the record.

    Raises:
        UserError: nothing is left to train on, or a training record has no label for a class-conditional model.
    """
    class_names(dataset, config.data.label_key)
    for defense in defenses:
        for removal in on_main(accelerator, lambda defense=defense: defense.select(pool_of(dataset))):
            record = dataset.records[removal.row]
            record.kept, record.reason, record.distance = False, f"{defense.name}: {removal.reason}", removal.distance
            if removal.duplicate_of is not None:
                record.duplicate_of = dataset.records[removal.duplicate_of].record_id
    if not len(dataset.rows("train", kept=True)):
        raise UserError("defenses", "no training record is left", "loosen the defenses that remove records")


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """The result of ``work`` from the main process, on every rank: for what is quick and must agree to the bit."""
    result = together(accelerator, lambda: work() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]


def pool_of(dataset: Dataset) -> Pool:
    """The kept training records as the defenses see them."""
    records = dataset.records
    return Pool(
        images=dataset.images,
        rows=dataset.rows("train", kept=True),
        pixel_hash=[record.pixel_hash for record in records],
        group=[record.group for record in records],
    )


def class_names(dataset: Dataset, label_key: str | None) -> list[str]:
    """Sorted labels of all usable records; empty for an unconditional model.

    Raises:
        UserError: a training record has no label.
    """
    if label_key is None:
        return []
    rows = dataset.rows("train", kept=True)
    unlabelled = sum(dataset.records[row].label is None for row in rows)
    if unlabelled:
        raise UserError(
            "data.label_key",
            f"{unlabelled} training records have no {label_key}",
            "label them, or set data.label_key=null",
        )
    return sorted({dataset.records[row].label for row in rows})


def labels_of(dataset: Dataset, rows: np.ndarray, names: list[str]) -> torch.Tensor | None:
    """Class indices, int64 [n]; None for unconditional models. Labels unseen in training count as class 0."""
    if not names:
        return None
    index = {name: position for position, name in enumerate(names)}
    return torch.tensor([index.get(dataset.records[row].label, 0) for row in rows], dtype=torch.int64)


def build_model(config: SimpleNamespace, names: list[str]) -> nn.Module:
    """The network with initial weights that depend on run.seed alone."""
    torch.manual_seed(derive(config.run.seed, "weights"))
    return build(config.model, config.data.image_size, config.data.channels, len(names))


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
    if (directory.model / SIDECAR).exists():
        return json.loads((directory.model / SIDECAR).read_text())
    names = class_names(dataset, config.data.label_key)
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, names)
    newest = checkpoint.latest(directory.checkpoints)
    if newest is not None:
        trainer.resume(newest)
    else:
        directory.truncate_metrics(0)
    accelerator.wait_for_everyone()
    start_trackers(config, accelerator)
    trainer.train()
    accelerator.end_training()
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
    rows = dataset.rows("train", kept=True)
    if settings.batch_size < accelerator.num_processes * settings.accumulation:
        raise UserError(
            "train.batch_size",
            f"{settings.batch_size} is less than {accelerator.num_processes} processes x {settings.accumulation} micro-batches",
            "raise it, or lower train.accumulation",
        )
    model = build_model(config, names).to(accelerator.device, memory_format=memory_format(accelerator.device)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(settings.optimizer, trainable, settings.learning_rate)
    ema = EMAModel(model.parameters(), decay=settings.ema_decay)
    state = TrainState(model=model, optimizer=optimizer, ema=ema)
    schedule = noise_schedule(settings.diffusion)
    rule = registry.gradient_rule(defenses, MeanGradient())
    plans = [plan for d in defenses if (plan := d.plan(rows, settings.batch_size, config.run.seed)) is not None]
    heldout = heldout_batches(config, dataset, names, accelerator)

    def fetch(batch_rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.from_numpy(dataset.images[batch_rows]), labels_of(dataset, batch_rows, names)

    def draw_samples(indices) -> torch.Tensor:
        return sample_on_all_ranks(config, dataset, state, schedule, names, indices, accelerator)

    def preview(step: int) -> None:
        images = draw_samples(range(settings.preview_count))
        if accelerator.is_main_process:
            save_grid(directory.samples / f"step-{step}.png", images)

    def view(step: int) -> CheckpointView:
        return CheckpointView(step, draw_samples, pool_of(dataset), dataset.rows("calibration"))

    return Trainer(
        config=settings,
        seed=config.run.seed,
        state=state,
        wrapped=accelerator.prepare_model(model) if rule.prepares_model else model,
        schedule=schedule,
        plan=plans[0] if plans else EpochPlan(rows, settings.batch_size, config.run.seed),
        fetch=fetch,
        rule=rule,
        defenses=defenses,
        lr_schedule=build_schedule(settings.optimizer, optimizer, settings.steps),
        accelerator=accelerator,
        directory=directory,
        evaluate=lambda: heldout_losses(config, state, schedule, heldout, accelerator),
        preview=preview,
        view=view,
    )


def heldout_batches(
    config: SimpleNamespace, dataset: Dataset, names: list[str], accelerator: Accelerator
) -> dict[str, list[Batch]]:
    """Fixed batches with fixed noise at evenly spread timesteps: this rank's share of held-out and of training records."""
    settings = config.train
    if not settings.heldout_every:
        return {}
    result = {}
    for name, rows in (("heldout_loss", dataset.rows("heldout")), ("train_loss", dataset.rows("train", kept=True))):
        order = np.random.Generator(np.random.Philox(derive(0, name))).permutation(rows)[: settings.heldout_records]
        share, batches = order[accelerator.process_index :: accelerator.num_processes], []
        for start in range(0, len(share), settings.batch_size):
            part = share[start : start + settings.batch_size]
            images = torch.from_numpy(dataset.images[part]).float() / 127.5 - 1
            random = RecordRandom(0, 0, part, np.zeros(len(part), dtype=int))
            # One stratum of the schedule per record: the spread over timesteps is even for any number of records.
            position = (np.searchsorted(np.sort(order), part) + 0.5) / len(order)
            timesteps = torch.from_numpy((position * settings.diffusion.timesteps).astype(np.int64))
            noise = random.normal("heldout", *images.shape[1:])
            batches.append(Batch(images, labels_of(dataset, part, names), random, timesteps, noise))
        if len(order):
            result[name] = batches
    return result


def heldout_losses(
    config: SimpleNamespace,
    state: TrainState,
    schedule: DDPMScheduler,
    batches: dict[str, list[Batch]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Deterministic mean losses of the EMA weights; the gap between the two is the onset of memorisation."""
    device, result = accelerator.device, {}
    with averaged_weights(state) as model:
        for name, parts in batches.items():
            sums = torch.zeros(2, device=device)
            for part in parts:
                labels = None if part.labels is None else part.labels.to(device)
                moved = Batch(
                    part.images.to(device), labels, part.random, part.timesteps.to(device), part.noise.to(device)
                )
                with autocast(device, config.train.precision):
                    losses = per_example_loss(model, moved, schedule, config.train.diffusion.snr_gamma)
                sums += torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=device)])
            total, count = reduce(sums, "sum").tolist()
            result[name] = total / count
    return result


def sample_on_all_ranks(config, dataset, state, schedule, names, indices, accelerator) -> torch.Tensor:
    """Images of the EMA weights for sample indices, drawn in whole blocks by all ranks, float32 [n, C, H, W] in [0, 1]."""
    sampler = SamplerConfig(steps=25, batch_size=8)  # small blocks, so that every rank has some
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    frequency = class_frequency(dataset, names)
    drawn = []
    with averaged_weights(state) as model:
        for block in blocks(len(indices), sampler.batch_size, accelerator.process_index, accelerator.num_processes):
            chosen = [indices[i] for i in block]
            labels = torch.from_numpy(class_of_sample(chosen, frequency, config.run.seed)) if names else None
            images = sample(
                model,
                schedule.config,
                sampler,
                chosen,
                shape,
                seed=config.run.seed,
                labels=labels,
                precision=config.train.precision,
            )
            drawn.append((block.start, images))
    gathered = sorted(gather_object(drawn), key=lambda pair: pair[0])
    return torch.cat([images for _, images in gathered])


def class_frequency(dataset: Dataset, names: list[str]) -> np.ndarray:
    """Training records per class, int64 [classes]."""
    if not names:
        return np.zeros(0, dtype=np.int64)
    labels = labels_of(dataset, dataset.rows("train", kept=True), names)
    return np.bincount(labels.numpy(), minlength=len(names))


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
    """Writes the EMA weights (or those of the checkpoint that a defense chose) as a diffusers pipeline."""
    state = trainer.state
    facts = {
        "family": config.model.family,
        "parameters": parameter_count(state.model),
        "trainable_parameters": parameter_count(state.model, trainable=True),
        "steps": state.step,
        "images_seen": state.images_seen,
        "train_seconds": state.seconds,
        "stopped_by": state.stopped_by,
        "released_step": state.release_step or state.step,
        "defenses": [describe(defense, config) for defense in trainer.defenses],
        "defense_states": {defense.name: defense.state_dict() for defense in trainer.defenses},
        "classes": names,
        "class_frequency": class_frequency(dataset, names).tolist(),
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
        save_pipeline(directory.model, model, trainer.schedule)
        write_json(directory.model / SIDECAR, facts)  # last: its presence says that training is complete
    accelerator.wait_for_everyone()
    return facts


def describe(defense: Defense, config: SimpleNamespace) -> dict[str, Any]:
    """Name, settings and claim, as in report.json."""
    settings = getattr(config.defenses, defense.name, None)
    return {"name": defense.name, "settings": asdict(settings) if settings else {}, "claim": defense.claim()}


def peak_memory(accelerator: Accelerator) -> int:
    """Largest memory of this process so far: on the accelerator where there is one, else resident."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
