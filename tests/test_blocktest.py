"""The permutation test of means against enumeration, and its level where records of a block resemble each other."""

from itertools import combinations

import numpy as np
import pytest

from eval.blocktest import lower_mean_p_value


def enumerated(values, member, block) -> float:
    """P(difference >= observed) over every choice of as many blocks."""
    blocks = np.unique(block)
    mine = [b for b in blocks if member[block == b].all()]

    def difference(chosen):
        inside = np.isin(block, chosen)
        return values[~inside].mean() - values[inside].mean()

    observed = difference(mine)
    return np.mean([difference(chosen) >= observed - 1e-12 for chosen in combinations(blocks, len(mine))])


@pytest.mark.parametrize("sizes", [[1] * 9, [3, 1, 2, 1, 4, 2, 1, 1, 2]])
def test_p_values_approach_those_of_all_permutations(sizes):
    random = np.random.default_rng(len(sizes) + sum(sizes))
    block = np.repeat(np.arange(len(sizes)), sizes)
    member = block < 4
    values = random.normal(size=len(block)) - 0.8 * member
    exact = enumerated(values, member, block)
    found = lower_mean_p_value(values, member, block, 20_000, seed=1)
    assert 0.005 < exact < 0.5 and found == pytest.approx(exact, abs=4 * (exact / 20_000) ** 0.5 + 1e-4)


def test_equal_values_and_one_sided_direction():
    member, block = np.arange(40) < 20, np.arange(40)
    assert lower_mean_p_value(np.ones(40), member, block, 99, 0) == 1
    apart = np.where(member, 0.0, 1.0)
    assert lower_mean_p_value(apart, member, block, 999, 0) == 1 / 1000
    assert lower_mean_p_value(-apart, member, block, 999, 0) == 1
    assert lower_mean_p_value(apart[:20], member[:20], block[:20], 9, 0) is None


def test_a_block_on_both_sides_is_refused():
    with pytest.raises(ValueError, match="members and non-members"):
        lower_mean_p_value(np.zeros(4), np.array([1, 0, 0, 0], bool), np.array([0, 0, 1, 2]), 9, 0)


def test_the_level_holds_for_patients_with_many_alike_pictures():
    random, blocks = np.random.default_rng(0), 30
    by_block, by_record = 0, 0
    for trial in range(300):
        block = np.repeat(np.arange(blocks), random.integers(1, 8, blocks))
        values = random.normal(size=blocks)[block] + 0.2 * random.normal(size=len(block))
        member = block < 15
        by_block += lower_mean_p_value(values, member, block, 99, trial) <= 0.05
        by_record += lower_mean_p_value(values, member, np.arange(len(block)), 99, trial) <= 0.05
    assert 0.02 < by_block / 300 < 0.09  # 0.05 within 3 standard errors
    assert by_record / 300 > 0.13  # what taking pictures for independent would cost
