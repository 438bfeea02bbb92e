"""Tests of a comparison against enumeration, scipy, worked examples and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from eval.pairedtests import (
    holm,
    paired_t_test,
    sign_agreement,
    sign_flip_p_value,
    smallest_sign_flip_p_value,
    t_interval,
    trend_test,
    unit_differences,
)


def enumerated(differences):
    """P(|sum s d| >= |sum d|) by writing out all signs."""
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(sum(differences)))


@pytest.mark.parametrize("seed", range(30))
def test_sign_flips_are_all_sign_flips(seed):
    random = np.random.default_rng(seed)
    differences = random.integers(-5, 6, size=random.integers(1, 12)).tolist()
    assert sign_flip_p_value(differences) == pytest.approx(enumerated(differences), rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_without_groups_it_is_mcnemars_exact_test(seed):
    random = np.random.default_rng(seed)
    differences = random.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=random.integers(5, 400))
    less, more = int((differences < 0).sum()), int((differences > 0).sum())
    expected = stats.binomtest(less, less + more).pvalue if less + more else 1.0
    assert sign_flip_p_value(differences) == pytest.approx(expected, rel=1e-9)


def test_extremes():
    assert sign_flip_p_value([]) == sign_flip_p_value([0, 0]) == sign_flip_p_value([3, -3]) == 1.0
    assert sign_flip_p_value([-7]) == 1.0
    assert sign_flip_p_value([-1] * 40) == pytest.approx(2**-39, rel=1e-9)
    assert 0 < sign_flip_p_value([2] * 5000) < 1e-300


def test_the_p_value_is_valid_under_the_null():
    """Two arms that leak alike, alike within patients: p <= 0.05 in at most 5 % of cases, within simulation error."""
    random, small, cases = np.random.default_rng(0), 0, 2000
    for _ in range(cases):
        patient = random.beta(0.5, 2, size=20)  # chance that this patient's pictures leak
        leaked = random.random((2, 20, 3)) < patient[:, None]
        small += sign_flip_p_value((leaked[0].astype(int) - leaked[1]).sum(axis=1)) <= 0.05
    assert small / cases <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / cases)
    assert small / cases >= 0.02  # it is not so cautious that it never speaks


def test_patients_who_leak_as_a_whole_do_not_count_as_many():
    """A patient's ten pictures leak together: counted one by one, the null would be rejected far too often."""
    random, by_unit, by_picture = np.random.default_rng(1), 0, 0
    for _ in range(500):
        difference = random.choice([-1, 0, 1], size=12)
        by_unit += sign_flip_p_value(10 * difference) <= 0.05
        by_picture += sign_flip_p_value(np.repeat(difference, 10)) <= 0.05
    assert by_unit / 500 <= 0.08 < 0.3 < by_picture / 500


def test_a_real_difference_is_found():
    """Leaks of 30 % against 10 % of 60 patients: the exact test has the power of McNemar's."""
    random, found = np.random.default_rng(2), 0
    for _ in range(300):
        difference = (random.random(60) < 0.1).astype(int) - (random.random(60) < 0.3)
        found += sign_flip_p_value(difference) <= 0.05
    assert 0.65 < found / 300 < 0.85  # normal approximation: 0.76


@pytest.mark.parametrize("units", range(9))
def test_smallest_sign_flip_p_value_by_enumeration(units):
    """The largest effect: every unit that differs does so in one direction."""
    assert smallest_sign_flip_p_value(units) == pytest.approx(enumerated([-1] * units), rel=1e-12)
    differences = [[sign * (1 + k) for k in range(units)] for sign in (-1, 1)]
    assert all(enumerated(each) == pytest.approx(smallest_sign_flip_p_value(units)) for each in differences)


@pytest.mark.parametrize("units", [6, 20, 40])
def test_the_largest_effect_has_the_smallest_p_value_to_the_bit(units):
    assert sign_flip_p_value([-3] * (units - 1) + [-2]) == smallest_sign_flip_p_value(units) == 2.0 ** (1 - units)


def test_unit_differences_by_hand():
    unit_of = {10: 0, 11: 0, 12: 1, 13: 2}
    seeds = [(frozenset({11, 13}), frozenset({10, 12, 13})), (frozenset(), frozenset({10, 12, 11}))]
    assert unit_differences(seeds, unit_of) == {0: -2, 1: -2, 2: 0}
    assert unit_differences([], unit_of) == {0: 0, 1: 0, 2: 0}
    with pytest.raises(KeyError):
        unit_differences([(frozenset({99}), frozenset())], unit_of)


def test_holm_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06], abs=1e-12)
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([None]) == [None] and holm([]) == []
    assert holm([0.02]) == [0.02]


def test_holm_keeps_the_family_wise_error():
    random = np.random.default_rng(3)
    wrong = np.mean([min(holm(random.random(5).tolist())) <= 0.05 for _ in range(4000)])
    assert wrong == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_t_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(3, 2, size=n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values.tolist())
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found["mean"] == pytest.approx(values.mean()) and found["method"] == f"t over {n} seeds"


def test_t_interval_of_little():
    assert t_interval([]) == {"mean": None, "low": None, "high": None, "n": 0, "method": "no seed"}
    assert t_interval([4]) == {"mean": 4.0, "low": None, "high": None, "n": 1, "method": "one seed: no interval"}
    flat = {"mean": 4.0, "low": None, "high": None, "n": 2, "method": "2 seeds without spread: no interval"}
    assert t_interval([4, 4]) == flat and t_interval([0, 0, 0])["low"] is None
    cut = t_interval([0.0, 1.0], least=0, most=1)
    assert (cut["low"], cut["high"]) == (0, 1)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_paired_t_test_is_scipys(n):
    arm, reference = np.random.default_rng(n).normal(size=(2, n))
    p, name = paired_t_test((arm - reference).tolist())
    assert p == pytest.approx(stats.ttest_rel(arm, reference).pvalue, rel=1e-9)
    assert name == f"paired t-test over {n} seeds, two-sided"


@pytest.mark.parametrize(
    ("differences", "reason"), [([0.1, 0.2], "needs 3"), ([0.1], "1 seed on"), ([0.1] * 3, "same"), ([0.0] * 3, "same")]
)
def test_no_paired_t_test_without_spread(differences, reason):
    p, name = paired_t_test(differences)
    assert p is None and reason in name


@pytest.mark.parametrize(
    ("differences", "sign", "ties", "agree"),
    [
        ([-3, -1], "less", 0, True),
        ([-3, 0], "less", 1, True),
        ([0, 2], "more", 1, True),
        ([0, 0], "equal", 2, True),
        ([-1, 2, 0], "mixed", 1, False),
        ([], None, 0, None),
    ],
)
def test_signs(differences, sign, ties, agree):
    assert sign_agreement(differences) == {"sign": sign, "ties": ties, "agree": agree}


@pytest.mark.parametrize(("seeds", "levels"), [(2, 3), (3, 4), (4, 5)])
def test_trend_is_pages_test(seeds, levels):
    """scipy's exact test is one-sided; the null distribution is symmetric, so a rising trend has twice its p."""
    random = np.random.default_rng(seeds)
    for _ in range(5):
        data = random.normal(size=(seeds, levels)) + 0.8 * np.arange(levels)
        one_sided = stats.page_trend_test(data, method="exact").pvalue
        falling = stats.page_trend_test(-data, method="exact").pvalue
        expected = min(1.0, 2 * min(one_sided, falling))
        assert trend_test(data.tolist())["p_value"] == pytest.approx(expected, rel=1e-9)


def test_trend_with_ties_and_gaps_by_enumeration():
    """Every order of each seed's values, written out; the second seed lacks the third level."""
    blocks = [[0, 0, 3, 5], [1, 1, None, 4]]

    def statistic(first, second):
        total = 0.0
        for values in (first, second):
            ranks = stats.rankdata(values)
            total += np.dot(np.arange(1, len(values) + 1) - (len(values) + 1) / 2, ranks)
        return total

    orders = itertools.product(itertools.permutations([0, 0, 3, 5]), itertools.permutations([1, 1, 4]))
    sums = np.abs([statistic(*order) for order in orders])
    observed = abs(statistic([0, 0, 3, 5], [1, 1, 4]))
    found = trend_test(blocks)
    assert found["p_value"] == pytest.approx(np.mean(sums >= observed - 1e-9), rel=1e-9)
    assert found["smallest_p_value"] == pytest.approx(np.mean(sums >= sums.max() - 1e-9), rel=1e-9)


def test_trend_says_what_it_cannot_show():
    """Three levels, two seeds: at best both in order, or both in reverse, of 36 equally likely."""
    found = trend_test([[1, 2, 3], [4, 5, 6]])
    assert found["p_value"] == found["smallest_p_value"] == pytest.approx(2 / 36)
    assert trend_test([[5, 5, 5]])["p_value"] == 1.0
    assert trend_test([[1], [None, 2]])["p_value"] is None
    assert trend_test([list(range(13))])["p_value"] is None
    assert trend_test([list(range(12))])["p_value"] == pytest.approx(2 / math.factorial(12), rel=1e-9)
