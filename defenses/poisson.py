"""Poisson sampling of units: every unit is in a step with probability q, independently of all others and of other steps.

This is the sampling that the accountant assumes (Abadi et al. 2016; Zhu, Dong and Wang 2022). Shuffled batches are not it:
their privacy can be several times worse (Chua et al. 2024).
"""

import numpy as np

from defenses.seeding import derive_wide


class PoissonPlan:
    """A pure function of (secret, step), so every rank that holds the secret draws the same batch.

    Args:
        units: rows of each unit, int64 [n_u].
        sample_rate: probability of a unit to be in a step, in (0, 1].
        cap: of the rows of a unit at most so many are used in a step, drawn anew each time.
        views: how often each row is repeated in the batch (independently changed and noised).
        physical: units per micro-batch.
        expected: units in a step on average, as it may be told: a constant of the settings, not of the data.
        secret: entropy shared by the ranks. Whoever knows it knows who was in every batch.
    """

    def __init__(
        self,
        units: list[np.ndarray],
        sample_rate: float,
        cap: int,
        views: int,
        physical: int,
        secret: int,
        expected: float,
    ):
        self._units, self._cap, self._views, self._physical = units, cap, views, physical
        self.sample_rate = sample_rate  # what the accountant is told
        self.seed = derive_wide(secret, "records")
        self._secret = derive_wide(secret, "sampling")
        self.images_per_step = expected
        self.unit_of_row = np.full(max(int(unit.max()) for unit in units) + 1, -1, dtype=np.int64)
        for index, unit in enumerate(units):
            self.unit_of_row[unit] = index

    def selected(self, step: int) -> np.ndarray:
        """Indices of the units in a step, ascending, int64; may be empty."""
        return np.flatnonzero(self._random(step, "units").random(len(self._units)) < self.sample_rate)

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch, unit by unit, each row ``views`` times in succession, int64 [b]."""
        random = self._random(step, "images")
        rows = [self._some(self._units[index], random) for index in self.selected(step)]
        return np.repeat(np.concatenate(rows), self._views) if rows else np.zeros(0, dtype=np.int64)

    def microbatches(self, rows: np.ndarray, rank: int, world_size: int) -> list[np.ndarray]:
        """Every W-th unit of the batch, ``physical`` units at a time; a unit is never cut."""
        if not len(rows):
            return []
        starts = np.flatnonzero(np.diff(self.unit_of_row[rows], prepend=-1))
        places = np.split(np.arange(len(rows)), starts[1:])[rank::world_size]
        return [np.concatenate(places[i : i + self._physical]) for i in range(0, len(places), self._physical)]

    def _some(self, unit: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return unit if len(unit) <= self._cap else np.sort(random.choice(unit, self._cap, replace=False))

    def _random(self, step: int, purpose: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(derive_wide(self._secret, purpose, step)))
