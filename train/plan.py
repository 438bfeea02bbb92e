"""Which records form the global batch of each step."""

import numpy as np

from defenses.seeding import derive


class EpochPlan:
    """Shuffled epochs laid end to end and cut into batches of constant size, so that no record is dropped.

    A pure function of (seed, step): the same on every rank, and nothing to store for resuming.

    Args:
        rows: rows of the training records, int64 [N], N >= 1.
        batch_size: global batch size.
        seed: ``run.seed``.
        accumulation: micro-batches per rank and step.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, accumulation: int = 1):
        self._rows, self._batch_size, self._accumulation = rows, batch_size, accumulation
        self.seed, self.images_per_step = seed, batch_size
        self._epoch, self._order = -1, rows

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of ``step`` (from 0), int64 [batch_size]."""
        position = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, offsets = np.divmod(position, len(self._rows))
        return np.concatenate([self._permutation(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def microbatches(self, rows: np.ndarray, rank: int, world_size: int) -> list[np.ndarray]:
        """Every W-th place, so that ranks differ by one record at most, cut into ``accumulation`` parts."""
        parts = np.array_split(np.arange(rank, len(rows), world_size), self._accumulation)
        return [part for part in parts if len(part)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(derive(self.seed, "epoch", int(epoch))))
            self._epoch, self._order = epoch, random.permutation(self._rows)
        return self._order


def repeats(rows: np.ndarray) -> np.ndarray:
    """How often each row occurred earlier in the same batch, int64 [b] (only batches larger than the data repeat)."""
    seen: dict[int, int] = {}
    counts = np.zeros(len(rows), dtype=np.int64)
    for position, row in enumerate(rows.tolist()):
        counts[position] = seen.get(row, 0)
        seen[row] = counts[position] + 1
    return counts
