"""Records to attack, as distinct pictures and as the people behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defenses.references import Rows, shuffled


@dataclass
class Pictures:
    """Records of one split. Copies of one picture share its id.

    Attributes:
        images: uint8 [R, C, H, W], array or memory map.
        record_id: id of each record.
        picture: picture id, int64 [R].
        block: id of the independent unit (records connected by group or by copies), int64 [R].
        group: group (patient) of each record or None.
        copies: number of copies of the record's picture in the training split before any defense, int64 [R].
    """

    images: Any
    record_id: Sequence[str]
    picture: np.ndarray
    block: np.ndarray
    group: Sequence[str | None]
    copies: np.ndarray

    def __post_init__(self):
        lengths = {
            len(part) for part in (self.images, self.record_id, self.picture, self.block, self.group, self.copies)
        }
        if len(lengths) != 1 or not len(self.images):
            raise ValueError("Pictures need at least one record and columns of equal length")
        self.ids, self.first = np.unique(self.picture, return_index=True)  # distinct pictures, and a record of each

    @property
    def grouped(self) -> bool:
        """Whether any record has a group."""
        return any(group is not None for group in self.group)

    def units(self, ids: np.ndarray) -> int:
        """Distinct groups that hold one of these pictures; a record without group is a unit of its own."""
        rows = np.flatnonzero(np.isin(self.picture, ids))
        return len({(self.group[row] is None, self.group[row] or self.record_id[row]) for row in rows})

    def by_copies(self, ids: np.ndarray) -> dict[str, dict[str, int]]:
        """Number of pictures, and how many of them are among ``ids``, for each number of copies."""
        copies, hit = self.copies[self.first], np.isin(self.ids, ids)
        return {
            str(count): {"pictures": int((copies == count).sum()), "verified": int((hit & (copies == count)).sum())}
            for count in np.unique(copies).tolist()
        }

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """``count`` picture ids, drawn block by block; the last block is cut where it overshoots."""
        return self.ids[shuffled(self.block[self.first], np.random.default_rng(seed))[:count]]

    def subset(self, ids: np.ndarray) -> Rows:
        """The images of all records of these pictures, read from the original when they are indexed."""
        return Rows(self.images, np.flatnonzero(np.isin(self.picture, ids)))
