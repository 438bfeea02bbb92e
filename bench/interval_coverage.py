"""How often the intervals and tests of the attacks hold what they promise, on data whose truth is known; Markdown tables.

python bench/interval_coverage.py [--repetitions 500]

Scores are binormal unless stated: non-members N(0, 1), members N(d, 1), so that AUC = Phi(d / sqrt 2) and the true-positive
rate above a threshold s is Phi(d - s). The tables of docs/intervals.md are the output of the default.
"""

import argparse
import os
import sys
from collections.abc import Callable

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from scipy.special import expit, logit
from scipy.stats import binom, norm, rankdata

from defenses.seeding import derive
from eval.intervals import clopper_pearson, rate_interval, wilson
from eval.roc import auc, paired_delong, tpr_at_fpr
from eval.setlevel import cross_fitted_scores, set_test, welch_p_value

AUCS = (0.5, 0.8, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500, help="data sets for each cell")
    repetitions = parser.parse_args().repetitions
    for table in (binomial_rates, grouped_rates, tpr, areas, grouped_areas, differences, set_tests):
        table(repetitions)


def heading(title: str, *columns: str) -> None:
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def row(*cells: str | float) -> None:
    print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.1%}" for cell in cells) + " |", flush=True)


def means(repetitions: int, name: str, trial: Callable[[np.random.Generator, int], tuple[float, ...]]) -> np.ndarray:
    """Mean of every result of a trial, each with random numbers of its own."""
    results = [trial(np.random.default_rng(derive(0, name, index)), index) for index in range(repetitions)]
    return np.mean(np.array(results, dtype=np.float64), axis=0)


def separation(area: float) -> float:
    """Distance d of the two normals that have this area."""
    return float(norm.ppf(area) * np.sqrt(2))


def binomial_rates(_: int) -> None:
    heading(
        "Rate of n independent records, every rate in turn (summed, not simulated)", "n", "method", "lowest", "mean"
    )
    rates = np.linspace(0.002, 0.998, 499)

    def plain(hits: int, n: int) -> tuple[float, float]:
        return rate_interval(np.arange(n) < hits, np.arange(n), grouped=False)[:2]

    methods = (("Clopper-Pearson", clopper_pearson), ("Wilson", wilson), ("`rate_interval` without groups", plain))
    for n in (20, 100, 1000):
        for name, method in methods:
            low, high = np.array([method(hits, n) for hits in range(n + 1)]).T
            chance = binom.pmf(np.arange(n + 1), n, rates[:, None])
            covered = (chance * ((low <= rates[:, None]) & (rates[:, None] <= high))).sum(axis=1)
            row(str(n), name, covered.min(), covered.mean())


def grouped_rates(repetitions: int) -> None:
    heading(
        "Rate of records in groups of 1 to 4, chance of a hit beta distributed over groups", "groups", "rate", "covers"
    )
    for groups in (20, 100):
        for rate in (0.02, 0.2):

            def trial(random, index, groups=groups, rate=rate):
                block = np.repeat(np.arange(groups), random.integers(1, 5, groups))
                hits = random.random(len(block)) < random.beta(3 * rate, 3 * (1 - rate), groups)[block]
                low, high, _ = rate_interval(hits, block, grouped=True, seed=index)
                return (low <= rate <= high,)

            row(str(groups), str(rate), *means(repetitions // 10, f"rates {groups} {rate}", trial))


def tpr(repetitions: int) -> None:
    heading(
        "True-positive rate at a threshold, AUC 0.8",
        *("members", "non-members", "FPR at most", "TPR: covers", "FPR of the threshold <= `fpr_upper95`"),
    )
    d = separation(0.8)
    for n, m, target in ((20, 100, 0.1), (100, 1000, 0.01), (1000, 1000, 0.01), (1000, 10000, 0.001)):

        def trial(random, _, n=n, m=m, target=target):
            found = tpr_at_fpr(random.normal(d, 1, n), random.normal(0, 1, m), target)
            truth, low, high = norm.sf(found["threshold"] - d), *found["ci95"]
            return low <= truth <= high, norm.sf(found["threshold"]) <= found["fpr_upper95"]

        row(str(n), str(m), str(target), *means(repetitions, f"tpr {n} {m}", trial))


def areas(repetitions: int) -> None:
    heading(
        "AUC of independent records", "members", "non-members", "AUC", "covers", "mean width", "DeLong alone: covers"
    )
    for n, m in ((20, 20), (20, 200), (64, 1000), (200, 200), (1000, 1000)):
        for area in AUCS:

            def trial(random, _, n=n, m=m, area=area):
                members, nonmembers = random.normal(separation(area), 1, n), random.normal(0, 1, m)
                found, (low, high) = auc(members, nonmembers), delong_alone(members, nonmembers)
                return found.low <= area <= found.high, found.high - found.low, low <= area <= high

            covers, width, alone = means(repetitions, f"area {n} {m} {area}", trial)
            row(str(n), str(m), str(area), covers, f"{width:.3f}", alone)


def delong_alone(members: np.ndarray, nonmembers: np.ndarray) -> tuple[float, float]:
    """DeLong et al. (1988) on the logit scale with the normal quantile; an area of 1 has no width."""
    n, m = len(members), len(nonmembers)
    ranks = rankdata(np.concatenate([members, nonmembers]))
    above, below = (ranks[:n] - rankdata(members)) / m, (ranks[n:] - rankdata(nonmembers)) / n
    area = above.mean()
    if area in (0, 1):
        return area, area
    error = np.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m) / (area * (1 - area))
    return expit(logit(area) - 1.96 * error), expit(logit(area) + 1.96 * error)


def grouped_areas(repetitions: int) -> None:
    heading(
        "AUC of records in groups of 1 to 6, correlation 0.7 within a group",
        *("groups of members", "of non-members", "AUC", "covers", "as if independent: covers"),
    )
    for first, second in ((10, 10), (20, 100), (100, 100)):
        for area in AUCS:

            def trial(random, _, first=first, second=second, area=area):
                (a, group_a), (b, group_b) = grouped_scores(random, first), grouped_scores(random, second)
                found = auc(a + separation(area), b, (group_a, first + group_b))
                plain = auc(a + separation(area), b)
                return found.low <= area <= found.high, plain.low <= area <= plain.high

            covers = means(repetitions, f"grouped {first} {second} {area}", trial)
            row(str(first), str(second), str(area), *covers)


def grouped_scores(random: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal scores of 1 to 6 records of each group, correlated by 0.7, and their groups."""
    group = np.repeat(np.arange(groups), random.integers(1, 7, groups))
    return np.sqrt(0.7) * random.standard_normal(groups)[group] + np.sqrt(0.3) * random.standard_normal(
        len(group)
    ), group


def differences(repetitions: int) -> None:
    heading(
        "Two attacks of equal AUC on the same records, scores correlated by 0.5",
        *("members", "non-members", "AUC", "difference: covers", "p < 0.05", "one-sided p < 0.05"),
    )
    for n, m in ((20, 20), (64, 1000), (200, 200)):
        for area in AUCS[1:]:

            def trial(random, _, n=n, m=m, area=area):
                noise = random.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], n + m)
                noise[:n] += separation(area)
                found = paired_delong(noise[:n, 0], noise[n:, 0], noise[:n, 1], noise[n:, 1])
                low, high = found["ci95"]
                return low <= 0 <= high, found["p_value"] < 0.05, found["p_value_greater"] < 0.05

            row(str(n), str(m), str(area), *means(repetitions, f"paired {n} {m} {area}", trial))


def set_tests(repetitions: int) -> None:
    heading(
        "Set-level test without a difference (suspects and held-out units of one distribution)",
        *("suspects", "held out", "features", "p < 0.01", "p <= 0.05", "Welch, p < 0.01", "Welch, p <= 0.05"),
    )
    for n, m, features in ((5, 50, 5), (20, 100, 10), (50, 100, 20), (200, 200, 10)):

        def trial(random, index, n=n, m=m, features=features):
            suspects, heldout = random.standard_normal((n, features)), random.standard_normal((m, features))
            exact = set_test(suspects, heldout, seed=index)
            welch = welch_p_value(*cross_fitted_scores(suspects, heldout, seed=index))
            return exact < 0.01, exact <= 0.05, welch < 0.01, welch <= 0.05

        row(str(n), str(m), str(features), *means(repetitions, f"set {n} {m} {features}", trial))


if __name__ == "__main__":
    main()
