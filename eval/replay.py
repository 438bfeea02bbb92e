"""A finished run under a defense that works after training, as if it had been on from the start.

Early stopping only looks at checkpoints, an output filter only at generations: whoever kept the checkpoints need not train again.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from defenses.base import CheckpointView, Defense, Verdict
from defenses.errors import UserError
from defenses.ranks import on_main
from defenses.registry import CLASSES
from eval.target import Target, target_of
from train.checkpoint import all_steps
from train.combinations import is_quiet, sampling_frequency
from train.data import Dataset
from train.diffusion import noise_schedule
from train.files import whole_folder, write_json
from train.models import memory_format
from train.monitor import sample_on_all_ranks
from train.records import pool_of
from train.release import RECORD, SIDECAR, checkpoint_model, checkpoint_pipeline, describe, facts_at, write_sidecar
from train.runlog import RunDirectory
from train.stage import begin
from train.textstage import preview_prompts


def added(directory: RunDirectory, config: SimpleNamespace, defenses: list[Defense]) -> list[Defense]:
    """Those of ``defenses`` that need no training and that the run was trained without, or with other settings."""
    known = json.loads((directory.path / RECORD).read_text())["defenses"]
    settings = {entry["name"]: entry["settings"] for entry in known}
    later = [each for each in defenses if each.after_training]
    gone = settings.keys() & {name for name, kind in CLASSES.items() if kind.after_training} - {d.name for d in later}
    if gone:
        raise UserError(
            f"defenses.{min(gone)}",
            "was on when the run was trained, and its claim would stay in the report",
            "leave it on: the report has the figures with a filter switched off beside the others",
        )
    return [each for each in later if settings.get(each.name) != describe(each, config)["settings"]]


def replayed(
    directory: RunDirectory, output: RunDirectory, config: SimpleNamespace, accelerator: Accelerator
) -> Target:
    """The run as something to evaluate, with the model that the added defenses would have released in ``output/model``.

    Raises:
        UserError: a defense refuses the run, or wants a checkpoint that was removed.
    """
    target = target_of(directory, output, config)
    new = added(directory, config, target.defenses)
    if not new:
        return target
    begin(config, target.dataset, directory, accelerator, new)
    is_quiet(config, target.defenses)  # refuses to choose among checkpoints of a private run by looking at its records
    outcome = ask(new, target.defenses, directory, config, target.dataset, accelerator)
    facts = on_main(accelerator, lambda: write_model(directory, output, config, new, outcome))
    target.pipeline, target.facts = output.model, facts
    return target


@dataclass
class Outcome:
    """What the defenses at seam 5 decided: who ended training at which step, and the step to release; None: nothing."""

    stopped_by: str | None = None
    stop: int | None = None
    release: int | None = None


def ask(
    new: Sequence[Defense],
    everyone: list[Defense],
    directory: RunDirectory,
    config: SimpleNamespace,
    dataset: Dataset,
    accelerator: Accelerator,
) -> Outcome:
    """Shows the checkpoints to seam 5 of the new defenses in order, as the training loop would have.

    Args:
        everyone: all defenses of the run, who decide what may be told of its records.
    """
    outcome, listeners = Outcome(), [d for d in new if type(d).after_checkpoint is not Defense.after_checkpoint]
    steps = on_main(accelerator, lambda: all_steps(directory.checkpoints)) if listeners else []
    expected = range(config.train.checkpoint_every, config.train.steps, config.train.checkpoint_every or 1)
    if listeners and not set(expected) <= set(steps):
        raise UserError(
            f"defenses.{listeners[0].name}",
            f"{directory.path} kept only the checkpoints of steps {', '.join(map(str, steps))}",
            "train again with train.keep_checkpoints=null, or with the defense switched on",
        )
    # a kill leaves a checkpoint where it came: training would not have asked there
    for step in (step for step in steps if step in expected or step == steps[-1]):
        view = view_of(step, everyone, directory, config, dataset, accelerator)
        for defense in listeners:
            mine = defense.after_checkpoint(view)  # every rank looks, the main process decides
            verdict = on_main(accelerator, lambda mine=mine: mine) or Verdict()
            outcome.release = verdict.release_step or outcome.release
            if verdict.stop:
                outcome.stopped_by, outcome.stop = defense.name, step
        if outcome.stop is not None:
            break
    return outcome


def view_of(
    step: int,
    everyone: list[Defense],
    directory: RunDirectory,
    config: SimpleNamespace,
    dataset: Dataset,
    accelerator: Accelerator,
) -> CheckpointView:
    """What the defense would have seen after this checkpoint: the same images from the same weights."""
    facts, device = facts_at(directory, step), accelerator.device
    model = checkpoint_model(config, directory, step, facts["classes"])
    model = model.to(device, memory_format=memory_format(device))
    schedule = noise_schedule(config.train.diffusion)
    frequency = sampling_frequency(config, dataset, everyone, facts["classes"])
    prompts = preview_prompts(config, dataset, everyone)

    @torch.no_grad()
    def draw(indices: Sequence[int]) -> torch.Tensor:
        return sample_on_all_ranks(config, model, schedule, frequency, indices, accelerator, prompts)

    pool, control = pool_of(dataset, config.run.seed), dataset.rows("calibration")
    return CheckpointView(step, draw, pool, control, facts["images_seen"])


def write_model(
    directory: RunDirectory,
    output: RunDirectory,
    config: SimpleNamespace,
    new: list[Defense],
    outcome: Outcome,
) -> dict[str, Any]:
    """The pipeline that is released now, with the facts that training would have recorded."""
    facts = json.loads((directory.path / RECORD).read_text())
    ended, chosen = outcome.stop or facts["steps"], outcome.release or facts["released_step"]
    same, written = (ended, chosen) == (facts["steps"], facts["released_step"]), dict(facts)
    if not same:
        whole = {key: facts_at(directory, ended)[key] for key in ("steps", "images_seen", "train_seconds")}
        written = facts_at(directory, chosen) | {**whole, "stopped_by": outcome.stopped_by}
    names = {each.name for each in new}
    entries = [entry for entry in facts["defenses"] if entry["name"] not in names]
    written |= {"defenses": entries + [describe(each, config) for each in new]}
    written |= {"defense_states": facts["defense_states"] | {each.name: each.state_dict() for each in new}}
    write_json(output.path / RECORD, written)
    if (output.model / SIDECAR).exists():  # of the same command, stopped later on; a filter's index lies in it
        return written
    if same:
        with whole_folder(output.model) as folder:
            shutil.copytree(directory.model, folder, dirs_exist_ok=True)
            write_sidecar(folder, config, written)
    else:
        checkpoint_pipeline(config, directory, chosen, output.model, written)
    return written
