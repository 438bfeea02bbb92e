"""The model that is released, at the end of training or of a checkpoint, with what is known of it."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from defenses import registry
from defenses.base import Defense
from defenses.seeding import derive
from train import families, textstage
from train.combinations import sampling_frequency
from train.data import Dataset
from train.diffusion import noise_schedule
from train.families import build
from train.files import whole_folder, write_json
from train.loop import Trainer
from train.models import parameter_count
from train.runlog import RunDirectory
from train.state import released_model

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
        "autoencoder": textstage.autoencoder_facts(config, directory),
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
        write_json(directory.path / RECORD, facts)  # first: the model's presence says that training is complete
        with whole_folder(directory.model) as folder:
            family.save(folder, model, noise_schedule(config.train.diffusion))
            write_sidecar(folder, config, facts)
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


def checkpoint_pipeline(
    config: SimpleNamespace, directory: RunDirectory, step: int, folder: Path, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Writes the averaged weights of one checkpoint as the pipeline that would have been released then; it appears whole or not at
    all. One process calls it.

    Args:
        facts: the new pipeline's sidecar; None: `facts_at` that step.

    Returns:
        The sidecar.
    """
    facts = facts or facts_at(directory, step)
    model = checkpoint_model(config, directory, step, facts["classes"])
    with whole_folder(folder) as temporary:
        families.of(config.model).save(temporary, model, noise_schedule(config.train.diffusion))
        write_sidecar(temporary, config, facts)
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
