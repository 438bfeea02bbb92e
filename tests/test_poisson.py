"""Poisson sampling against the binomial distribution, and that its parts are what every rank needs."""

import numpy as np
import pytest
from scipy import stats

from defenses.poisson import PoissonPlan

RECORDS = [np.array([row]) for row in range(5, 65)]


def plan(units=RECORDS, rate=0.1, cap=1, views=1, physical=4, secret=7):
    return PoissonPlan(units, rate, cap, views, physical, secret, rate * len(units))


def masks(drawn: PoissonPlan, steps: int, units: int) -> np.ndarray:
    """bool [steps, units]"""
    found = np.zeros((steps, units), dtype=bool)
    for step in range(steps):
        found[step, drawn.selected(step)] = True
    return found


def test_every_unit_is_drawn_binomially_and_independently():
    """Counts per unit ~ Bin(T, q); batch sizes ~ Bin(N, q); units and successive steps are uncorrelated.

    A shuffled epoch would give equal counts; batches of a constant size have no variance; one draw reused for two steps would
    be correlated fully.
    """
    steps, rate = 4000, 0.1
    found = masks(plan(rate=rate), steps, 60)
    counts = found.sum(0)
    square = ((counts - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum()  # ~ chi2(60)
    assert stats.chi2.cdf(square, 60) == pytest.approx(0.5, abs=0.4999)
    sizes = found.sum(1)
    assert sizes.mean() == pytest.approx(60 * rate, abs=5 * np.sqrt(60 * rate * 0.9 / steps))
    assert sizes.var() == pytest.approx(60 * rate * (1 - rate), rel=5 * np.sqrt(2 / steps))
    centred = (found - rate) / np.sqrt(rate * (1 - rate))
    pairs = (centred.T @ centred / steps)[np.triu_indices(60, 1)]
    assert np.abs(pairs).max() < 5.5 / np.sqrt(steps)  # 1770 pairs
    assert abs((centred[1:] * centred[:-1]).mean()) < 5 / np.sqrt(steps * 60)


def test_empty_batches_occur_as_often_as_they_should():
    """(1 - q)^N = 0.9^20 = 0.1216; 3000 steps: 365 +- 5 x 17.9."""
    few = plan(RECORDS[:20])
    empty = sum(not len(few.batch(step)) for step in range(3000))
    assert abs(empty - 3000 * 0.9**20) < 5 * np.sqrt(3000 * 0.1216 * 0.8784)
    nothing = next(step for step in range(3000) if not len(few.batch(step)))
    assert few.microbatches(few.batch(nothing), 0, 2) == []


def test_the_same_on_every_rank_and_another_under_another_secret():
    one, two, other = masks(plan(), 50, 60), masks(plan(), 50, 60), masks(plan(secret=8), 50, 60)
    np.testing.assert_array_equal(one, two)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)
    assert plan().seed != plan(secret=8).seed


def test_a_step_does_not_depend_on_earlier_calls():
    drawn = plan()
    for step in range(9):
        drawn.batch(step)
    np.testing.assert_array_equal(drawn.batch(9), plan().batch(9))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_are_disjoint_and_complete_and_units_stay_whole(world_size):
    units = [np.arange(start, start + size) for start, size in [(0, 3), (3, 1), (4, 6), (10, 2), (12, 4)]]
    drawn = plan(units, rate=0.7, cap=3, views=2, physical=2)
    for step in range(40):
        rows = drawn.batch(step)
        parts = [drawn.microbatches(rows, rank, world_size) for rank in range(world_size)]
        places = [place for rank in parts for part in rank for place in part]
        assert sorted(places) == list(range(len(rows)))
        owners = [{int(u) for part in rank for u in drawn.unit_of_row[rows[part]]} for rank in parts]
        assert sum(map(len, owners)) == len(set().union(*owners)) == len(drawn.selected(step))
        assert all(len(set(drawn.unit_of_row[rows[part]])) <= 2 for rank in parts for part in rank)


def test_a_group_gives_at_most_cap_images_each_as_often_as_the_others():
    """From 6 images 2 are drawn: each in 1/3 of the steps; each row comes ``views`` times."""
    drawn = plan([np.arange(6)], rate=1.0, cap=2, views=3)
    counts = np.zeros(6)
    for step in range(3000):
        rows, times = np.unique(drawn.batch(step), return_counts=True)
        assert len(rows) == 2 and (times == 3).all()
        counts[rows] += 1
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(3000 * 2 / 9))


def test_the_rate_for_the_accountant_is_the_rate_of_the_sampling():
    assert plan(rate=0.37).sample_rate == 0.37 and plan(rate=0.37).images_per_step == pytest.approx(22.2)
