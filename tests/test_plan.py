"""Batches: every record once an epoch, a pure function of (seed, step)."""

import numpy as np
import pytest

from train.plan import EpochPlan, repeats

ROWS = np.array([3, 5, 8, 13, 21, 34, 55])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_record_once_per_epoch(batch_size):
    plan = EpochPlan(ROWS, batch_size, seed=1)
    drawn = np.concatenate([plan.batch(step) for step in range(7 * 3)])
    for epoch in range(len(drawn) // 7):
        assert sorted(drawn[epoch * 7 : epoch * 7 + 7]) == ROWS.tolist()


def test_a_step_does_not_depend_on_earlier_calls():
    straight = EpochPlan(ROWS, 4, seed=1)
    for step in range(20):
        straight.batch(step)
    np.testing.assert_array_equal(EpochPlan(ROWS, 4, seed=1).batch(20), straight.batch(20))


def test_epochs_and_seeds_differ():
    plan = EpochPlan(np.arange(100), 100, seed=1)
    assert not np.array_equal(plan.batch(0), plan.batch(1))
    assert not np.array_equal(plan.batch(0), EpochPlan(np.arange(100), 100, seed=2).batch(0))


def test_positions_are_uniform():
    """Each of 7 records comes first in 1/7 of 7,000 epochs: 1,000 +- 5 standard deviations (29.3)."""
    plan = EpochPlan(ROWS, 7, seed=0)
    first = np.bincount([plan.batch(epoch)[0] for epoch in range(7000)], minlength=56)[ROWS]
    assert np.all(np.abs(first - 1000) < 5 * 29.3)


def test_repeats_counts_earlier_occurrences():
    np.testing.assert_array_equal(repeats(np.array([4, 7, 4, 4, 7])), [0, 0, 1, 2, 1])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 3), (3, 2)])
def test_microbatches_hold_every_place_once(world_size, accumulation):
    plan = EpochPlan(ROWS, 7, seed=0, accumulation=accumulation)
    parts = [plan.microbatches(ROWS, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate([place for rank in parts for place in rank])) == list(range(7))
    sizes = [sum(map(len, rank)) for rank in parts]
    assert max(sizes) - min(sizes) <= 1 and all(len(rank) <= accumulation for rank in parts)
