"""Matched utility and the Pareto front on worked examples."""

import numpy as np
import pytest

from eval.tradeoff import Match, Point, front_with_marked, pair_level, pareto_front, reach

RUN = [Point(100, 0.04, 0), Point(200, 0.02, 4), Point(300, 0.01, 9), Point(400, 0.015, 14)]


def test_interpolation_by_hand():
    assert reach(RUN, 0.03) == Match(pytest.approx(150), pytest.approx(2), at_first=False)
    assert reach(RUN, 0.0125) == Match(pytest.approx(275), pytest.approx(7.75), at_first=False)
    assert reach(RUN, 0.02) == Match(200, 4, at_first=False)
    assert reach(RUN, 0.01) == Match(300, 9, at_first=False)


def test_order_of_steps_counts_not_of_rows():
    assert reach(RUN[::-1], 0.03) == reach(RUN, 0.03)


def test_already_there_and_never_there():
    assert reach(RUN, 0.04) == reach(RUN, 0.5) == Match(100, 0, at_first=True)
    assert reach(RUN, 0.009) is None and reach([], 1.0) is None


def test_first_crossing_where_the_metric_rises_again():
    """Utility that gets worse and better again: the first time it is good enough decides."""
    run = [Point(1, 0.5, 0), Point(2, 0.1, 3), Point(3, 0.6, 5), Point(4, 0.05, 9)]
    assert reach(run, 0.3) == Match(pytest.approx(1.5), pytest.approx(1.5), at_first=False)


def test_level_of_a_pair_is_the_worse_of_two_bests():
    other = [Point(100, 0.05, 0), Point(200, 0.018, 2)]
    assert pair_level(RUN, other) == pair_level(other, RUN) == 0.018
    assert pair_level(RUN, RUN) == 0.01 and pair_level(RUN, RUN[:2]) == 0.02
    assert pair_level([], RUN) is None and pair_level(RUN, []) is None


@pytest.mark.parametrize("seed", range(20))
def test_both_runs_of_a_pair_reach_their_level(seed):
    """And at no better one: whatever lies below the level, one of the two never reaches."""
    random = np.random.default_rng(seed)
    runs = [[Point(step, *random.random(2)) for step in range(random.integers(1, 6))] for _ in range(2)]
    level = pair_level(*runs)
    assert all(reach(run, level) for run in runs)
    assert any(reach(run, np.nextafter(level, 0)) is None for run in runs)


def test_a_marked_point_takes_nobody_off_the_front():
    points = {"none": (1.0, 9.0), "filter": (1.0, 0.0), "dedup": (2.0, 3.0), "worse": (3.0, 3.0), "ruin": (4.0, 0.0)}
    assert pareto_front(points) == ["filter"]
    assert front_with_marked(points, ["filter"]) == ["none", "filter", "dedup", "ruin"]
    assert front_with_marked(points, ["ruin"]) == ["filter"]  # dominated by a measured point
    assert front_with_marked(points, []) == pareto_front(points) and front_with_marked({}, []) == []


def test_front_by_hand():
    points = {"a": (1.0, 5.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (3.0, 2.0), "e": (4.0, 0.0), "f": (2.0, 2.0)}
    assert pareto_front(points) == ["a", "b", "e", "f"]
    assert pareto_front({}) == [] and pareto_front({"only": (1, 1)}) == ["only"]


@pytest.mark.parametrize("seed", range(10))
def test_front_by_sweeping(seed):
    """Sorted by x, the front is where y falls to a new low (random points without ties)."""
    points = {str(i): tuple(xy) for i, xy in enumerate(np.random.default_rng(seed).random((30, 2)))}
    expected, low = set(), np.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < low:
            expected.add(name)
            low = y
    assert set(pareto_front(points)) == expected
