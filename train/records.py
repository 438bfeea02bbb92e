"""Which records are trained on, and their classes."""

from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator

from defenses.base import Defense, Pool
from defenses.canaries import LEFT_OUT, included
from defenses.errors import UserError
from defenses.ranks import on_main
from train.data import Dataset
from train.planting import SPLIT


def select_records(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense], accelerator: Accelerator
) -> None:
    """Tosses the canaries' coins; then seam 1: lets every defense remove training records. Notes each removal in the record.

    Raises:
        UserError: nothing is left to train on, or a training record has no label for a class-conditional model.
    """
    class_names(dataset, config.data.label_key)
    toss(dataset, config.run.seed)
    for defense in defenses:
        for removal in on_main(accelerator, lambda defense=defense: defense.select(pool_of(dataset, config.run.seed))):
            record = dataset.records[removal.row]
            record.kept, record.reason, record.distance = False, f"{defense.name}: {removal.reason}", removal.distance
            if removal.duplicate_of is not None:
                record.duplicate_of = dataset.records[removal.duplicate_of].record_id
    if not len(dataset.rows("train", kept=True)):
        raise UserError("defenses", "no training record is left", "loosen the defenses that remove records")


def toss(dataset: Dataset, seed: int) -> None:
    """Leaves out each canary whose coin, a function of ``run.seed`` and its name, says so."""
    for record in dataset.records:
        if record.canary == "coin" and not included(seed, record.source):
            record.kept, record.reason = False, f"canary: {LEFT_OUT}"


def trained_rows(dataset: Dataset) -> np.ndarray:
    """Rows of all records that are trained on, canaries among them, ascending, int64."""
    return np.sort(np.concatenate([dataset.rows(split, kept=True) for split in ("train", SPLIT)]))


def pool_of(dataset: Dataset, seed: int) -> Pool:
    """The kept training records, canaries apart, as the defenses see them."""
    records = dataset.records
    return Pool(
        images=dataset.images,
        rows=dataset.rows("train", kept=True),
        pixel_hash=[record.pixel_hash for record in records],
        group=[record.group for record in records],
        record_id=[record.record_id for record in records],
        seed=seed,
        picture=[record.cluster for record in records],
        caption=[record.caption for record in records],
        more_captions=[record.more_captions for record in records],
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


def class_frequency(dataset: Dataset, names: list[str]) -> np.ndarray:
    """Training records per class, int64 [classes]."""
    if not names:
        return np.zeros(0, dtype=np.int64)
    labels = labels_of(dataset, dataset.rows("train", kept=True), names)
    return np.bincount(labels.numpy(), minlength=len(names))
