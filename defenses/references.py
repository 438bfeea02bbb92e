"""Some pictures of a pool as references: rows that are read when they are needed, and draws that keep people together."""

from typing import Any

import numpy as np


class Rows:
    """Some rows of an array or memory map, read when they are indexed."""

    def __init__(self, images: Any, rows: np.ndarray):
        self.images, self.rows = images, rows
        self.dtype, self.shape = images.dtype, (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.images[self.rows[index]]


def shuffled(block: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Places 0..P-1 in an order in which the blocks stand at random and each block stays together, int64 [P]."""
    _, unit = np.unique(block, return_inverse=True)
    return np.argsort(random.permutation(unit.max() + 1)[unit], kind="stable")
