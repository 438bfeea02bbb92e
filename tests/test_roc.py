"""ROC statistics against brute force over pairs and thresholds, closed forms and simulated truth."""

import numpy as np
import pytest
from scipy.stats import binom, mannwhitneyu, norm, t

from eval.intervals import clopper_pearson
from eval.roc import auc, by_group, paired_delong, roc_curve, tpr_at_fpr


def normal(seed: int, n: int, m: int, area: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores with AUC = Phi(d / sqrt 2)."""
    random = np.random.default_rng(seed)
    return random.normal(norm.ppf(area) * 2**0.5, 1, n), random.normal(0, 1, m)


def tied(seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(2, 9, n).astype(float), random.integers(0, 8, m).astype(float)


def order(members: np.ndarray, nonmembers: np.ndarray) -> np.ndarray:
    """1, 1/2 or 0 for every pair, [n, m]."""
    return (members[:, None] > nonmembers) + 0.5 * (members[:, None] == nonmembers)


def delong_variance(pairs: np.ndarray) -> float:
    return pairs.mean(1).var(ddof=1) / pairs.shape[0] + pairs.mean(0).var(ddof=1) / pairs.shape[1]


@pytest.mark.parametrize("scores", [tied(0, 40, 60), normal(0, 30, 50, 0.8)], ids=["ties", "continuous"])
def test_curve_counts_what_reaches_each_threshold(scores):
    members, nonmembers = scores
    fpr, tpr = roc_curve(members, nonmembers)
    thresholds = sorted({*members, *nonmembers}, reverse=True)
    assert (fpr[0], tpr[0]) == (0, 0) and len(fpr) == len(thresholds) + 1
    for place, threshold in enumerate(thresholds, start=1):
        assert fpr[place] == pytest.approx(sum(nonmembers >= threshold) / len(nonmembers))
        assert tpr[place] == pytest.approx(sum(members >= threshold) / len(members))
    assert np.trapezoid(tpr, fpr) == pytest.approx(
        auc(members, nonmembers).auc
    )  # ties are diagonals, so they count 1/2


@pytest.mark.parametrize("scores", [tied(1, 80, 200), normal(1, 80, 200, 0.9)], ids=["ties", "continuous"])
@pytest.mark.parametrize("target", [0.05, 0.07, 0.11, 0.29, 0.5])
def test_rate_is_the_best_of_all_thresholds_within_the_target(scores, target):
    members, nonmembers = scores
    allowed = [s for s in {*members, *nonmembers, np.inf} if (nonmembers >= s).mean() <= target + 1e-12]
    found = tpr_at_fpr(members, nonmembers, target)
    assert found["tpr"] == max((members >= s).mean() for s in allowed)
    assert found["fpr"] == (nonmembers > found["threshold"]).mean() <= target + 1e-12


def test_threshold_never_exceeds_the_target_where_the_nearest_would():
    """11 of 1,000 non-members share the largest score: 1.1 % is nearest to 1 %, but above it."""
    nonmembers = np.r_[np.full(11, 5.0), np.linspace(0, 1, 989)]
    found = tpr_at_fpr(np.r_[np.full(30, 5.0), np.full(20, 6.0)], nonmembers, 0.01)
    assert found["fpr"] == 0 and found["tpr"] == 0.4 and found["threshold"] == 5


def test_all_false_positives_that_the_target_allows_are_used():
    """0.29 x 100 is below 29 in floating point."""
    found = tpr_at_fpr(np.array([70.5, 71.5]), np.arange(100.0), 0.29)
    assert found["fpr"] == 0.29 and found["threshold"] == 70 and found["tpr"] == 1


@pytest.mark.parametrize(("m", "fpr", "known"), [(999, 0.01, False), (1000, 0.01, True), (9999, 0.001, False)])
def test_too_few_nonmembers_resolve_nothing(m, fpr, known):
    assert (tpr_at_fpr(np.arange(5.0), np.arange(float(m)), fpr) is not None) == known
    assert tpr_at_fpr(np.arange(5.0), np.arange(10000.0), 0.001)["fpr"] == 0.001


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [20, 100])
def test_interval_covers_the_rate_of_its_threshold(seed, n):
    """Given the threshold hits are binomial: coverage summed over all their numbers, for members of any strength."""
    _, nonmembers = normal(seed, 1, 1000, 0.5)
    threshold = tpr_at_fpr(np.zeros(n), nonmembers, 0.01)["threshold"]
    found = [tpr_at_fpr(np.where(np.arange(n) < k, 1e9, -1e9), nonmembers, 0.01) for k in range(n + 1)]
    assert all(result["threshold"] == threshold for result in found)
    low, high = np.array([result["ci95"] for result in found]).T
    for d in np.linspace(0, 5, 41):
        rate = norm.sf(threshold - d)
        covered = binom.pmf(np.arange(n + 1), n, rate)[(low <= rate) & (rate <= high)].sum()
        assert covered >= 0.95
    assert found[n // 2]["method"] == f"Clopper-Pearson over {n} members"
    assert found[n // 2]["ci95"] == list(clopper_pearson(n // 2, n))


def test_upper_limit_of_the_false_positive_rate_holds_as_often_as_it_says():
    """Continuous scores: in exactly 95 % of the sets of non-members; with ties in no fewer."""
    random, held, held_with_ties = np.random.default_rng(0), 0, 0
    for _ in range(600):
        scores = random.random(300)
        found = tpr_at_fpr(np.zeros(2), scores, 0.05)
        held += 1 - found["threshold"] <= found["fpr_upper95"]
        found = tpr_at_fpr(np.zeros(2), np.ceil(20 * scores), 0.05)
        held_with_ties += 1 - found["threshold"] / 20 <= found["fpr_upper95"] + 1e-12
    assert 553 <= held <= 586  # 570 expected, standard deviation 5.3
    assert held_with_ties >= 553


def test_dependent_members_widen_the_interval():
    members, nonmembers = np.repeat(np.arange(40.0) < 20, 10).astype(float) * 9, np.linspace(0, 1, 1000)
    alone = tpr_at_fpr(members, nonmembers, 0.01)
    grouped = tpr_at_fpr(members, nonmembers, 0.01, (np.repeat(np.arange(40), 10), np.arange(1000)))
    assert grouped["tpr"] == alone["tpr"] == 0.5 and grouped["method"].startswith("bootstrap over 40 groups")
    assert np.diff(grouped["ci95"])[0] > 2.5 * np.diff(alone["ci95"])[0]  # sqrt 10 is expected
    assert grouped["fpr_upper95"] is None and alone["fpr_upper95"] > 0.01


@pytest.mark.parametrize("scores", [tied(2, 40, 70), normal(2, 30, 50, 0.8)], ids=["ties", "continuous"])
def test_area_counts_pairs(scores):
    members, nonmembers = scores
    area = auc(members, nonmembers).auc
    assert area == pytest.approx(order(members, nonmembers).mean())
    assert area == pytest.approx(mannwhitneyu(members, nonmembers).statistic / (len(members) * len(nonmembers)))
    assert auc(nonmembers, members).auc == pytest.approx(1 - area)


@pytest.mark.parametrize("scores", [tied(3, 60, 50), normal(3, 40, 90, 0.6)], ids=["ties", "continuous"])
def test_interval_has_delongs_variance(scores):
    """Computed from all pairs. A constant second attack adds nothing to it, so the paired limits show it undisguised."""
    members, nonmembers = scores
    n, m = len(members), len(nonmembers)
    pairs = order(members, nonmembers)
    parts = pairs.mean(1).var(ddof=1) / n, pairs.mean(0).var(ddof=1) / m
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1))
    found = paired_delong(members, nonmembers, np.zeros(n), np.zeros(m))
    half = t.ppf(0.975, freedom) * sum(parts) ** 0.5
    assert found["difference"] == pytest.approx(pairs.mean() - 0.5)
    assert found["ci95"] == pytest.approx([pairs.mean() - 0.5 - half, pairs.mean() - 0.5 + half])
    area, low, high, method = auc(members, nonmembers)
    assert method == "DeLong, logit scale, at least Newcombe's"
    reach = half / (area * (1 - area))
    assert np.log(low / (1 - low)) <= np.log(area / (1 - area)) - reach + 1e-9
    assert np.log(high / (1 - high)) >= np.log(area / (1 - area)) + reach - 1e-9


def test_interval_near_one_is_newcombes():
    """One pair of 20 x 200 out of order: the lower limit A solves |area - A| = z sqrt(V(A)) (Newcombe 2006, method 5)."""
    area, low, high, _ = auc(np.r_[0.5, np.arange(2, 21)], np.r_[1, -np.arange(199)])
    assert area == pytest.approx(1 - 1 / 4000) and area < high < 1
    n, m, half = 20, 200, 220 / 2 - 1
    variance = low * (1 - low) * (1 + half * (1 - low) / (2 - low) + half * low / (1 + low)) / (n * m)
    assert area - low == pytest.approx(1.959964 * variance**0.5, rel=1e-6)


def test_separated_scores_get_an_exact_limit():
    """k disjoint pairs are in order with probability at most AUC^k."""
    area, low, high, method = auc(np.arange(64) + 1.0, -np.arange(1000.0))
    assert (area, high, method) == (1, 1, "Clopper-Pearson over 64 disjoint pairs")
    assert low == pytest.approx(0.025 ** (1 / 64))
    assert auc(-np.arange(1000.0), np.arange(64) + 1.0)[:3] == pytest.approx((0, 0, 1 - 0.025 ** (1 / 64)))


def test_equal_scores_and_single_records_say_little():
    area, low, high, method = auc(np.zeros(50), np.zeros(80))
    assert area == 0.5 and method == "Hoeffding over 50 disjoint pairs"
    assert 2 * np.exp(-2 * 50 * (high - 0.5) ** 2) == pytest.approx(0.05) and low == pytest.approx(1 - high)
    assert auc(np.ones(1), np.arange(9.0))[1:3] == (0, 1)


@pytest.mark.parametrize(("n", "m", "area"), [(20, 20, 0.5), (20, 200, 0.99), (64, 1000, 0.95)])
def test_interval_covers_the_true_area(n, m, area):
    """DeLong alone covers 91 % in the second case (docs/intervals.md)."""
    found = [auc(*normal(seed, n, m, area)) for seed in range(300)]
    covered = sum(result.low <= area <= result.high for result in found)
    assert covered >= 278  # 285 at 95 %; fewer than 278 has a chance of about 5 %, and what we measure is 96.5 to 99 %


def test_width_is_that_of_the_spread_of_the_area():
    found = [auc(*normal(seed, 150, 150, 0.7)) for seed in range(300)]
    spread = np.std([result.auc for result in found])
    assert np.mean([result.high - result.low for result in found]) == pytest.approx(2 * 1.96 * spread, rel=0.12)


def test_groups_of_one_change_nothing_and_copies_add_nothing():
    members, nonmembers = normal(5, 25, 40, 0.7)
    groups = np.arange(25), 100 + np.arange(40)
    alone = auc(members, nonmembers)
    assert auc(members, nonmembers, groups)[:3] == pytest.approx(alone[:3])
    copies = auc(np.repeat(members, 5), np.repeat(nonmembers, 3), (np.repeat(groups[0], 5), np.repeat(groups[1], 3)))
    assert copies[:3] == pytest.approx(alone[:3]) and copies.method.startswith("DeLong over 25 + 40 groups")


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "on both sides"])
def test_grouped_variance_is_that_of_repeated_studies(shared):
    """60 groups of 4 members, 60 of 2 non-members; a group on both sides lifts both, which steadies the area."""
    areas, errors = [], []
    for seed in range(250):
        random = np.random.default_rng(seed)
        effect = random.normal(0, 1, (2, 60))
        first, second = np.repeat(np.arange(60), 4), np.repeat(np.arange(60), 2)
        members = 0.8 + effect[0][first] + random.normal(0, 0.5, 240)
        nonmembers = effect[0 if shared else 1][second] + random.normal(0, 0.5, 120)
        groups = first, second if shared else 100 + second
        found = paired_delong(members, nonmembers, np.zeros(240), np.zeros(120), groups)
        areas.append(found["difference"])
        errors.append((found["ci95"][1] - found["ci95"][0]) / 2 / 1.98)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.12)


def test_difference_of_two_attacks():
    """Against the covariance over all pairs, and the p-values against each other."""
    random = np.random.default_rng(6)
    a, b = normal(6, 50, 60, 0.85), normal(7, 50, 60, 0.7)
    b = b[0] + 0.7 * a[0], b[1] + 0.7 * a[1]
    difference = order(*a) - order(*b)
    found = paired_delong(*a, *b)
    assert found["difference"] == pytest.approx(auc(*a).auc - auc(*b).auc)
    error = delong_variance(difference) ** 0.5
    assert np.diff(found["ci95"])[0] / 2 == pytest.approx(1.985 * error, rel=0.01)
    z = found["difference"] / error
    assert found["p_value_greater"] == pytest.approx(norm.sf(z), abs=0.004)
    assert found["p_value"] == pytest.approx(2 * min(found["p_value_greater"], 1 - found["p_value_greater"]))
    other = paired_delong(*b, *a)
    assert other["p_value_greater"] == pytest.approx(1 - found["p_value_greater"])
    shuffled = random.permutation(50)
    assert paired_delong(a[0][shuffled], a[1], b[0][shuffled], b[1])["p_value"] == pytest.approx(found["p_value"])


@pytest.mark.parametrize("area", [0.8, 0.68], ids=["equal", "unequal"])
def test_paired_test_rejects_as_often_as_the_spread_of_differences_says(area):
    """AUC 0.8 against 0.8 or 0.68, scores correlated by 0.5: P(|N(mean / sd, 1)| > 1.96), about 5 % and 70 %."""
    found = []
    for seed in range(300):
        noise = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 160)
        noise[:80] += norm.ppf([0.8, area]) * 2**0.5
        found.append(paired_delong(noise[:80, 0], noise[80:, 0], noise[:80, 1], noise[80:, 1]))
    differences = np.array([result["difference"] for result in found])
    distance = (0.8 - area) / differences.std()
    expected = norm.sf(1.96 - distance) + norm.cdf(-1.96 - distance)
    assert np.mean([result["p_value"] < 0.05 for result in found]) == pytest.approx(expected, abs=0.04)
    covered = np.mean([result["ci95"][0] <= 0.8 - area <= result["ci95"][1] for result in found])
    assert 0.92 <= covered <= 0.98


def test_attacks_without_variance_are_not_told_apart_with_certainty():
    perfect = np.arange(30) + 1.0, -np.arange(90.0)
    same = paired_delong(*perfect, *perfect)
    assert same["difference"] == 0 and same["p_value"] == same["p_value_greater"] == 1
    assert same["ci95"][1] == pytest.approx((2 * np.log(40) / 30) ** 0.5)
    better = paired_delong(*perfect, np.zeros(30), np.zeros(90))
    assert better["difference"] == 0.5 and better["p_value_greater"] == pytest.approx(np.exp(-30 / 8))


def test_group_scores_are_means():
    groups = np.array(["b", "a", "b", "c"])
    assert by_group(np.array([1.0, 5.0, 3.0, -2.0]), groups).tolist() == [5, 2, -2]
    assert by_group(np.array([[1.0, 0], [5, 1], [3, 4], [2, 2]]), groups).tolist() == [[5, 1], [2, 2], [2, 2]]


def test_infinite_scores_are_in_order():
    assert auc(np.array([np.inf, 1.0]), np.array([-np.inf, 0.0])).auc == 1


@pytest.mark.parametrize("members", [[], [1.0, np.nan], [[1.0]]])
def test_impossible_scores_are_refused(members):
    for function in (auc, roc_curve, lambda a, b: tpr_at_fpr(a, b, 0.1), lambda a, b: paired_delong(b, b, b, a)):
        with pytest.raises(ValueError):
            function(np.array(members), np.arange(200.0))


def test_records_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same records"):
        paired_delong(np.zeros(3), np.zeros(4), np.zeros(3), np.zeros(5))
    with pytest.raises(ValueError, match="label of its group"):
        auc(np.zeros(3), np.zeros(4), (np.zeros(3), np.zeros(3)))
    with pytest.raises(ValueError, match="label of its group"):
        by_group(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="between 0 and 1"):
        tpr_at_fpr(np.zeros(3), np.zeros(4), 1.0)
