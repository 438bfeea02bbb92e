"""Intervals against scipy, closed forms and simulated coverage."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from eval.intervals import clopper_pearson, rate_interval, wilson

CASES = [(0, 1), (1, 1), (0, 400), (3, 400), (8, 400), (50, 100), (399, 400), (7, 9)]


@pytest.mark.parametrize(("hits", "n"), CASES)
def test_wilson_solves_its_equation(hits, n):
    """The bounds p solve |hits/n - p| = z sqrt(p (1 - p) / n) (Wilson 1927), z = 1.959964."""
    for bound in wilson(hits, n):
        assert abs(hits / n - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / n) ** 0.5, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("hits", "n"), CASES)
def test_clopper_pearson_leaves_half_the_error_on_either_side(hits, n):
    low, high = clopper_pearson(hits, n)
    assert low == 0 if hits == 0 else binom.sf(hits - 1, n, low) == pytest.approx(0.025)
    assert high == 1 if hits == n else binom.cdf(hits, n, high) == pytest.approx(0.025)
    assert (low, high) == pytest.approx(tuple(binomtest(hits, n).proportion_ci(method="exact")), abs=1e-9)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_clopper_pearson_never_covers_less_than_it_says(n):
    """Coverage is summed over all numbers of hits; Wilson's falls below 95 % at some rates (docs/intervals.md)."""
    hits, rates = np.arange(n + 1), np.linspace(0.001, 0.999, 999)[:, None]
    coverage = []
    for interval in (clopper_pearson, wilson):
        low, high = np.array([interval(int(k), n) for k in hits]).T
        coverage.append((binom.pmf(hits, n, rates) * ((low <= rates) & (rates <= high))).sum(axis=1).min())
    assert coverage[0] >= 0.95 > coverage[1]


def test_zero_hits_are_never_zero():
    """Rule of three: the 95 % bound solves (1 - p)^n = 0.05, about 3/n."""
    low, high, method = rate_interval(np.zeros(300, bool), np.arange(300) // 3, grouped=True)
    assert (low, high) == (0, 0.03) and method == "rule of three over 100 groups"
    assert high == pytest.approx(1 - 0.05 ** (1 / 100), rel=0.02)
    low, high, method = rate_interval(np.zeros(300, bool), np.arange(300) // 3, grouped=False)
    assert (low, high) == (0, 0.01) and method == "rule of three over 300 pictures"
    assert rate_interval(np.zeros(2, bool), np.arange(2), grouped=False)[1] == 1.0
    assert rate_interval(np.ones(40, bool), np.arange(40) // 4, grouped=True)[:2] == (0.7, 1.0)


def test_without_groups_it_is_wilson():
    flags = np.arange(400) < 8
    assert rate_interval(flags, np.zeros(400, int), grouped=False) == (*wilson(8, 400), "Wilson")


def test_bootstrap_has_the_width_of_the_number_of_groups():
    """100 groups of 10 pictures that are all verified or all not: as wide as 100 draws, not as 1000."""
    flags, block = np.repeat(np.arange(100) < 30, 10), np.repeat(np.arange(100), 10)
    low, high, method = rate_interval(flags, block, grouped=True)
    assert method == "bootstrap over 100 groups, at least Wilson's"
    expected = 2 * 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert high - low == pytest.approx(expected, rel=0.12)
    assert rate_interval(flags, block, grouped=True) == (low, high, method)


def test_bootstrap_covers_the_true_rate():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        sizes = random.integers(1, 5, 80)
        block = np.repeat(np.arange(80), sizes)
        chance = np.repeat(random.beta(0.6, 2.4, 80), sizes)  # mean 0.2, strongly alike within a group
        low, high, _ = rate_interval(random.random(len(block)) < chance, block, grouped=True)
        covered += low <= 0.2 <= high
    assert covered >= 34  # 38 expected; fewer than 34 has a chance below 1 % at a true coverage of 95 %


def test_interval_covers_a_rate_of_few_hits():
    """Three hits expected in 100 patients of one picture each: the percentile bootstrap alone covers about 80 %."""
    random, covered = np.random.default_rng(1), 0
    for trial in range(200):
        low, high, _ = rate_interval(random.random(100) < 0.03, np.arange(100), grouped=True, seed=trial)
        covered += low <= 0.03 <= high
    assert covered >= 182  # 190 expected at 95 %; fewer than 182 has a chance of about 1 %


def test_one_group_says_little():
    low, high, _ = rate_interval(np.arange(10) < 1, np.zeros(10, int), grouped=True)
    assert high - low > 0.5


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(hits, n):
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ValueError):
            interval(hits, n)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError):
        rate_interval(np.zeros(0, bool), np.zeros(0, int), grouped=True)
