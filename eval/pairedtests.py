"""Statistics of a comparison: paired tests on pictures and on seeds, intervals over seeds, trends. Numbers in, numbers out.

Two sources of chance are kept apart. The test on pictures takes the trained models as they are and asks whether one gives
away other pictures than the other; the figures over seeds say how much another training would change.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom, rankdata, t

LEVEL = 0.95  # of every interval
MOST_LEVELS = 12  # of a factor in the exact trend test: its work grows as 2^levels
_COUNTABLE = 40  # units of which a double still counts the sign patterns one by one
_SPREAD = 1e-12  # relative standard deviation below which values differ by rounding only


def unit_differences(
    pairs: Sequence[tuple[frozenset[int], frozenset[int]]], unit_of: Mapping[int, int]
) -> dict[int, int]:
    """Verified in the arm minus verified in the reference, summed over seeds and over the pictures of each unit.

    Args:
        pairs: for each seed the distinct pictures verified in the arm and in the reference.
        unit_of: independent unit (block) of every distinct training picture.

    Returns:
        Difference of every unit, zeros among them.

    Raises:
        KeyError: a verified picture is not in ``unit_of``.
    """
    difference = dict.fromkeys(unit_of.values(), 0)
    for arm, reference in pairs:
        for picture in arm - reference:
            difference[unit_of[picture]] += 1
        for picture in reference - arm:
            difference[unit_of[picture]] -= 1
    return difference


def sign_flip_p_value(differences: Sequence[int] | np.ndarray) -> float:
    """Exact two-sided p-value of the paired permutation test (Fisher 1935, section 21): P(|sum of s_i d_i| >= |sum of d_i|).

    Under the null hypothesis the two arms could change places within any unit, so all 2^U signs s are equally likely. Their
    sum is built up by convolution, one binomial for each size of difference, so any number of units is exact. With
    differences of -1, 0 and 1 it is McNemar's exact test. Below the smallest normal float it returns that float.

    Args:
        differences: integers, one for each independent unit; zeros change nothing.

    Returns:
        p in (0, 1]; 1 where no unit differs.
    """
    differences = np.asarray(differences, dtype=np.int64)
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    distribution = np.ones(1)  # of the sum, over -total..total
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        term = np.zeros(2 * size * count + 1)
        term[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, term)
    p_value, units = _tails(distribution, int(differences.sum())), int(counts.sum())
    # a whole number of the 2^U sign patterns: rounding errors of the convolution go, where they are smaller than one pattern
    return round(p_value * 2**units) / 2**units if units <= _COUNTABLE else p_value


def smallest_sign_flip_p_value(differing: int) -> float:
    """The smallest value of `sign_flip_p_value` where this many units differ: all point one way, 2 of 2^U patterns."""
    return min(1.0, max(sys.float_info.min, 2.0 ** (1 - differing)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Step-down adjustment for the family-wise error (Holm 1979); None is no test and does not count.

    The k-th smallest of m p-values is multiplied by m - k + 1, never ends below a smaller one's, and is cut at 1.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    least = 0.0
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = least
    return adjusted


def t_interval(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval, mean +- t(n - 1) s / sqrt(n) (Student 1908), cut to what is possible.

    Args:
        values: one number for each seed.
        least, most: range of the quantity; an interval cut to it covers as often.

    Returns:
        ``{"mean", "low", "high", "n", "method"}``; low and high None for one seed, and where all seeds agree: equal counts
        leave no spread to judge by, and an interval of width 0 would claim to know the next seed. No seed: no mean either.
    """
    n = len(values)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0, "method": "no seed"}
    mean = float(np.mean(values))
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1, "method": "one seed: no interval"}
    deviation = float(np.std(values, ddof=1))
    if deviation <= _SPREAD * abs(mean):
        return {"mean": mean, "low": None, "high": None, "n": n, "method": f"{n} seeds without spread: no interval"}
    half = float(t.ppf((1 + LEVEL) / 2, n - 1) * deviation / math.sqrt(n))
    low, high = max(least, mean - half), min(most, mean + half)
    return {"mean": mean, "low": low, "high": high, "n": n, "method": f"t over {n} seeds"}


def paired_t_test(differences: Sequence[float]) -> tuple[float | None, str]:
    """Two-sided p-value of the paired t-test over seeds (Student 1908), or None, and the name of the test or the reason."""
    n = len(differences)
    if n < 3:
        return None, f"none: {n} seed{'' if n == 1 else 's'} on both sides, and a t-test over seeds needs 3"
    deviation, largest = float(np.std(differences, ddof=1)), float(np.max(np.abs(differences)))
    if deviation <= _SPREAD * largest:
        return None, "none: the difference is the same in all seeds, so there is no spread to hold it against"
    statistic = float(np.mean(differences)) / (deviation / math.sqrt(n))
    return max(sys.float_info.min, float(2 * t.sf(abs(statistic), n - 1))), f"paired t-test over {n} seeds, two-sided"


def sign_agreement(differences: Sequence[float]) -> dict[str, Any]:
    """Whether all seeds that differ do so in one direction.

    Returns:
        ``{"sign": "less" | "more" | "equal" | "mixed" or None without seeds, "ties": seeds without a difference,
        "agree": sign is not mixed, None without seeds}``.
    """
    if not len(differences):
        return {"sign": None, "ties": 0, "agree": None}
    less, more = any(d < 0 for d in differences), any(d > 0 for d in differences)
    sign = "mixed" if less and more else "less" if less else "more" if more else "equal"
    return {"sign": sign, "ties": sum(d == 0 for d in differences), "agree": sign != "mixed"}


def trend_test(blocks: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Exact two-sided test for a monotone trend over ordered levels, one block for each seed (Page 1963).

    Runs of one seed share data order, initial weights and noise, so levels are ranked within a seed and, under the null
    hypothesis, any order of a seed's values is equally likely. Spearman's rank correlation would take the seeds for
    independent, and a test for a trend in proportions (Cochran 1954, Armitage 1955) the pictures of one model. The statistic
    is sum over seeds and levels of (rank of the level) x (rank of the value), both centred; ties have mean ranks.

    Args:
        blocks: for each seed the values in the order of the levels; None where a run is missing, left out of its block.

    Returns:
        ``{"name", "p_value", "smallest_p_value"}``: the last is the smallest that so few runs can give; both None where
        no seed has two levels, or there are more than `MOST_LEVELS`.
    """
    present = [[value for value in block if value is not None] for block in blocks]
    present = [block for block in present if len(block) >= 2]
    if not present:
        return {"name": "none: no seed has two levels", "p_value": None, "smallest_p_value": None}
    if max(map(len, present)) > MOST_LEVELS:
        name = f"none: the exact test takes at most {MOST_LEVELS} levels"
        return {"name": name, "p_value": None, "smallest_p_value": None}
    distribution, observed = np.ones(1), 0
    for block in present:
        level = 2 * np.arange(len(block)) - len(block) + 1  # centred ranks, doubled: integers
        value = np.rint(2 * rankdata(block)).astype(np.int64) - len(block) - 1
        distribution = np.convolve(distribution, _permutations(level, value))
        observed += int(level @ value)
    possible = np.flatnonzero(distribution)[-1] - len(distribution) // 2
    return {
        "name": f"Page's test for a monotone trend, exact, two-sided, seeds as blocks ({len(present)})",
        "p_value": _tails(distribution, observed),
        "smallest_p_value": _tails(distribution, int(possible)),
    }


def _tails(distribution: np.ndarray, observed: int) -> float:
    """P(|S| >= |observed|) for probabilities over the integers -(L // 2)..L // 2."""
    values = np.arange(len(distribution)) - len(distribution) // 2
    return float(np.clip(distribution[np.abs(values) >= abs(observed)].sum(), sys.float_info.min, 1.0))


def _permutations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probabilities of sum of x_i y_p(i) over all permutations p, centred at 0; by subsets of y, in 2^k k steps."""
    k = len(x)
    largest = int(np.abs(x).sum() * np.abs(y).max())
    ways = np.zeros((2**k, 2 * largest + 1))  # subset of y used by the first x -> permutations of each sum
    ways[0, largest] = 1
    for subset in range(1, 2**k):
        members = [j for j in range(k) if subset >> j & 1]
        for j in members:
            ways[subset] += np.roll(ways[subset ^ 1 << j], int(x[len(members) - 1] * y[j]))
    return ways[-1] / math.factorial(k)
