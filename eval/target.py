"""What is evaluated: a finished run, somebody else's pipeline, somebody else's generations."""

import csv
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator

from defenses import registry
from defenses.base import Defense, SamplingContext
from eval.pictures import Pictures
from train.data import Dataset
from train.records import pool_of
from train.release import RECORD
from train.runlog import RunDirectory


@dataclass
class Target:
    """What is evaluated, and where the results go.

    Attributes:
        output: run directory, or a folder of its own for a second evaluation.
        pipeline: saved pipeline to sample; None where ``generations`` were made by somebody else.
        generations: folder of the images.
        facts: contents of the pipeline's sidecar (see `train.release.release`); empty for foreign models.
        removed: records that each defense took out of training.
        run: the run that trained the model; None for foreign models.
    """

    output: RunDirectory
    dataset: Dataset
    pipeline: Path | None
    generations: Path
    facts: dict[str, Any] = field(default_factory=dict)
    defenses: list[Defense] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    run: RunDirectory | None = None

    @property
    def guarded(self) -> bool:
        """Whether a defense stands between the model and its user."""
        return any(type(defense).wrap_sampler is not Defense.wrap_sampler for defense in self.defenses)


def target_of(directory: RunDirectory, output: RunDirectory, config: SimpleNamespace) -> Target:
    """A finished run as something to evaluate; ``output`` is where the results go."""
    with directory.manifest.open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file) if row["kept"] == "false" and row["split"] == "train"]
    removed: dict[str, int] = {}
    for reason in reasons:
        name = reason.partition(":")[0]
        removed[name] = removed.get(name, 0) + 1
    facts = json.loads((directory.path / RECORD).read_text())
    defenses = registry.build(config.defenses)
    for defense in defenses:
        if defense.name in facts["defense_states"]:
            defense.load_state_dict(facts["defense_states"][defense.name])
    dataset = Dataset.load(directory.prepared)
    restore_kept(dataset, directory.manifest)
    return Target(output, dataset, directory.model, output.generations, facts, defenses, removed, directory)


def restore_kept(dataset: Dataset, manifest: Path) -> None:
    """Takes out what the defenses of the run took out before training."""
    with manifest.open(newline="") as file:
        kept = {row["record_id"]: row["kept"] == "true" for row in csv.DictReader(file)}
    for record in dataset.records:
        record.kept = kept[record.record_id]


def sampling_context(target: Target, config: SimpleNamespace, accelerator: Accelerator) -> SamplingContext:
    """What defenses at seam 6 may use: all training records, those that a defense removed among them."""
    pool = replace(pool_of(target.dataset, config.run.seed), rows=target.dataset.rows("train"))
    control = target.dataset.rows("calibration")
    folder = (
        target.pipeline if target.run is not None else target.output.model
    )  # nothing is written into folders of others
    return SamplingContext(pool, control, folder, accelerator, records=target.output.path)


def pictures_of(dataset: Dataset, split: str) -> Pictures | None:
    """All usable records of one split, those that a defense removed among them; None where it is empty."""
    rows = dataset.rows(split)
    if not len(rows):
        return None
    records = [dataset.records[row] for row in rows]
    return Pictures(
        images=dataset.images[rows[0] : rows[-1] + 1] if len(rows) == rows[-1] - rows[0] + 1 else dataset.images[rows],
        record_id=[record.record_id for record in records],
        picture=np.array([record.cluster for record in records], dtype=np.int64),
        block=np.array([record.block for record in records], dtype=np.int64),
        group=[record.group for record in records],
        copies=np.array([record.copies for record in records], dtype=np.int64),
    )


@contextmanager
def timed(output: RunDirectory, stage: str, accelerator: Accelerator) -> Iterator[None]:
    """Adds the block's wall-clock seconds to the stage's record."""
    started = time.perf_counter()
    yield
    accelerator.wait_for_everyone()
    output.add_seconds(stage, time.perf_counter() - started)
