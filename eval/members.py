"""Members and non-members: who is asked about, drawn alike from the training and from the held-out split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import fisher_exact

from defenses.references import shuffled
from defenses.seeding import derive
from eval.denoiser import Denoiser
from train.data import Dataset, Record


@dataclass
class Candidates:
    """Records whose membership is asked, one per distinct picture; copies of one picture are asked about once.

    Attributes:
        rows: row in the data set, int64 [N].
        member: whether the picture was trained on, bool [N].
        block: independent unit (`train.splits`), int64 [N]; no unit has members and non-members.
        records: the record of each row.
    """

    rows: np.ndarray
    member: np.ndarray
    block: np.ndarray
    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def grouped(self) -> bool:
        """Whether any of the records has a group (patient)."""
        return any(record.group is not None for record in self.records)

    def side(self, member: bool) -> "Candidates":
        """The members, or the non-members."""
        some = np.flatnonzero(self.member == member)
        records = [self.records[place] for place in some]
        return replace(self, rows=self.rows[some], member=self.member[some], block=self.block[some], records=records)


def candidates(dataset: Dataset, most: int | None, seed: int) -> Candidates:
    """Distinct pictures of the training split that were trained on, and of the held-out split.

    A picture of which a defense kept one copy counts as trained on; one that was taken out wholly (an audit's coin) is
    left out on both sides, and so is a held-out picture of a block that was trained on, such as the mirror image of a training
    picture in a split that the user made.

    Args:
        most: pictures of either side at most, whole blocks drawn at random; None: all.
    """
    known = {dataset.records[row].block for row in dataset.rows("train")}
    unseen = np.array(
        [dataset.records[row].block not in known for row in dataset.rows("heldout", kept=True)], dtype=bool
    )
    splits = {"train": dataset.rows("train", kept=True), "heldout": dataset.rows("heldout", kept=True)[unseen]}
    sides = [_drawn(dataset, rows, most, derive(seed, "attack/members", split)) for split, rows in splits.items()]
    rows = np.concatenate(sides)
    records = [dataset.records[row] for row in rows]
    block = np.array([record.block for record in records], dtype=np.int64)
    return Candidates(rows, np.arange(len(rows)) < len(sides[0]), block, records)


def distinct(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """The first row of each picture, ascending, int64."""
    pictures = np.array([dataset.records[row].cluster for row in rows], dtype=np.int64)
    return rows[np.sort(np.unique(pictures, return_index=True)[1])]


def _drawn(dataset: Dataset, rows: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """The first row of each picture, ascending; at most ``most``."""
    first = distinct(dataset, rows)
    if most is None or len(first) <= most:
        return first
    block = np.array([dataset.records[row].block for row in first], dtype=np.int64)
    return np.sort(first[shuffled(block, np.random.default_rng(seed))[:most]])


def told_alike(denoiser: Denoiser, who: Candidates) -> bool:
    """Whether conditions that the model knows are as frequent among members as among non-members (Fisher's exact test, 1 %).

    Otherwise the one side is asked under its own label or caption and the other under a stand-in, and every loss tells them apart.
    """
    if denoiser.kind == "none":
        return True
    known = np.array([bool(_known(denoiser, record)) for record in who.records])
    table = [[int((known & side).sum()), int((~known & side).sum())] for side in (who.member, ~who.member)]
    return float(fisher_exact(table).pvalue) >= 0.01


def _known(denoiser: Denoiser, record: Record) -> bool:
    return bool(record.caption) if denoiser.kind == "caption" else record.label in denoiser.classes


def told(denoiser: Denoiser, records: Sequence[Record]) -> str:
    """Whether `conditions` are the records' own, in words for the report."""
    if denoiser.kind == "caption":
        return "own" if any(_known(denoiser, record) for record in records) else "empty: there are no captions"
    if denoiser.kind == "class":
        known = any(_known(denoiser, record) for record in records)
        return "own" if known else "class 0: which class is which is not known"
    return "none"


def conditions(denoiser: Denoiser, records: Sequence[Record]) -> list[Any]:
    """What the model is told of each record: its class index, its caption, or None.

    A label that the model does not know counts as class 0, a missing caption as the empty one.
    """
    if denoiser.kind == "caption":
        return [record.caption or "" for record in records]
    if denoiser.kind == "class":
        index = {name: place for place, name in enumerate(denoiser.classes)}
        return [index.get(record.label, 0) for record in records]
    return [None] * len(records)
