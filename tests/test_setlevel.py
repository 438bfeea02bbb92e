"""Set-level test against the power of Hotelling's T^2, uniform p-values without a difference, and refitting by hand."""

import numpy as np
import pytest
from scipy.stats import f, kstest, ncf, norm, rankdata, ttest_ind

from eval import setlevel
from eval.roc import auc
from eval.setlevel import cross_fitted_scores, set_report, set_test, significance_curve, units_needed, welch_p_value


def normal(seed: int, n: int, m: int, features: int, distance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Suspects and held-out units, correlated features, the given Mahalanobis distance of the means."""
    random = np.random.default_rng(seed)
    suspects, heldout = random.standard_normal((n, features)), random.standard_normal((m, features))
    suspects[:, 0] += distance
    mixing = np.eye(features) + 0.5 * np.eye(features, k=1)
    return suspects @ mixing, heldout @ mixing


def hotelling_power(n: int, m: int, features: int, distance: float, alpha: float) -> float:
    rest = n + m - features - 1
    return ncf.sf(f.isf(alpha, features, rest), features, rest, distance**2 * n * m / (n + m))


def test_statistic_is_the_difference_of_refitted_scores():
    """Every labelling, every fold: Fisher's discriminant by the normal equations of the labels' regression."""
    suspects, heldout = normal(0, 23, 41, 4, 0.8)
    fold, labels = setlevel._folds(23, 41, seed=5)
    permuted = setlevel._permuted(fold, labels, seed=5)[:, :4]
    units = np.concatenate([suspects, heldout])
    features = norm.ppf(rankdata(units, axis=0) / 65)
    expected = []
    for column in permuted.T:
        score = np.empty(64)
        for k in range(5):
            x, y = features[fold != k], column[fold != k]
            centred, n, m = x - x.mean(0), y.sum(), (1 - y).sum()
            regressed = np.linalg.inv(centred.T @ centred + np.eye(4)) @ centred.T @ (y - y.mean())
            score[fold == k] = (features[fold == k] - x.mean(0)) @ regressed * (n + m) ** 2 / (n * m)
        expected.append(score[column == 1].mean() - score[column == 0].mean())
    assert setlevel._statistics(setlevel._normal_scores(units), fold, permuted) == pytest.approx(np.array(expected))
    scores = cross_fitted_scores(suspects, heldout, seed=5)
    assert scores[0].mean() - scores[1].mean() == pytest.approx(expected[0])


def test_folds_are_even_and_labels_stay_in_their_fold():
    fold, labels = setlevel._folds(13, 52, seed=1)
    permuted = setlevel._permuted(fold, labels, seed=1)
    assert np.ptp(np.bincount(fold[labels])) <= 1 and np.ptp(np.bincount(fold[~labels])) <= 1
    for k in range(5):
        assert (permuted[fold == k].sum(axis=0) == labels[fold == k].sum()).all()
    assert len(np.unique(permuted, axis=1).T) > 990


def test_no_unit_helps_to_judge_itself():
    """Forty features of fifty units would be told apart perfectly by a classifier that has seen them."""
    areas = [auc(*cross_fitted_scores(*normal(seed, 50, 50, 40), seed=seed)).auc for seed in range(30)]
    assert 0.42 < np.mean(areas) < 0.53


@pytest.mark.parametrize(("n", "m", "features"), [(5, 30, 3), (40, 60, 12)])
def test_without_a_difference_p_is_uniform_and_welchs_is_not(n, m, features):
    """At a level of 1 % the t-test of the cross-fitted scores rejects 3 to 4 times as often (docs/intervals.md)."""
    pairs = [normal(seed, n, m, features) for seed in range(300)]
    p_values = np.array([set_test(*pair, seed=seed) for seed, pair in enumerate(pairs)])
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert (p_values < 0.01).sum() <= 8  # 3 expected; more than 8 has a chance of 0.4 %
    welch = [welch_p_value(*cross_fitted_scores(*pair, seed=seed)) for seed, pair in enumerate(pairs)]
    assert np.mean(np.array(welch) < 0.05) > 0.07


@pytest.mark.parametrize(("n", "m", "features", "distance"), [(50, 200, 1, 0.5), (20, 200, 10, 1.0), (60, 60, 4, 0.65)])
def test_power_is_nearly_that_of_hotellings_test(n, m, features, distance):
    """Which is the most powerful invariant test of normal features; five folds and ranks cost a little."""
    rejected = [set_test(*normal(seed, n, m, features, distance), seed=seed) < 0.01 for seed in range(150)]
    best = hotelling_power(n, m, features, distance, 0.01)
    assert 0.55 < best < 0.85
    assert best - 0.17 < np.mean(rejected) < best + 0.08  # standard deviation 0.04


def test_as_many_units_are_needed_as_the_power_says():
    suspects, heldout = normal(3, 400, 150, 3, 1.0)
    report = set_report(suspects, heldout, seed=1)
    half, nearly_all = (
        next(n for n in range(5, 400) if hotelling_power(n, 150, 3, 1.0, 0.01) >= share) for share in (0.5, 0.99)
    )
    assert 0.65 * half < report["records_needed_50"] < 1.6 * half
    assert 0.65 * nearly_all < report["records_needed_99"] < 1.8 * nearly_all
    assert report["p_value"] == 0.001 and report["curve"][-1]["share_significant"] == 1
    assert (report["suspects"], report["heldout"], report["features"], report["unit"]) == (400, 150, 3, "record")
    for point in report["curve"]:
        assert point["share_significant"] == pytest.approx(hotelling_power(point["n"], 150, 3, 1.0, 0.01), abs=0.25)


def test_nobody_is_recognised_where_nothing_differs():
    for seed in range(2):
        report = set_report(*normal(100 + seed, 60, 60, 3), seed=seed)
        assert report["records_needed_50"] is report["records_needed_99"] is None and report["p_value"] >= 0.01
        assert [point["n"] for point in report["curve"]] == [5, 7, 10, 15, 20, 30, 50]
        assert max(point["share_significant"] for point in report["curve"]) < 0.2


def test_curve_decides_like_the_test():
    """The short cut over a tenth of the permutations changes no decision."""
    for seed in range(40):
        suspects, heldout = normal(seed, 20, 60, 3, 0.9)
        fold, labels = setlevel._folds(20, 60, seed)
        decided = setlevel._significant(
            np.concatenate([suspects, heldout]), fold, setlevel._permuted(fold, labels, seed)
        )
        assert decided == (set_test(suspects, heldout, seed=seed) < 0.01)


def test_needed_is_the_start_of_a_lasting_share():
    curve = [{"n": n, "share_significant": share} for n, share in ((5, 0.6), (7, 0.4), (10, 0.5), (15, 0.9), (20, 1.0))]
    assert units_needed(curve, 0.5) == 10 and units_needed(curve, 0.99) == 20
    assert units_needed(curve[:2], 0.5) is None and units_needed([], 0.5) is None


def test_pictures_of_one_patient_count_once():
    """Four pictures of each of 15 + 25 patients: alike, they are one observation; p stays uniform where patients differ."""
    suspects, heldout = normal(7, 15, 25, 3, 1.0)
    groups = np.repeat(np.arange(15), 4), 50 + np.repeat(np.arange(25), 4)
    report = set_report(suspects.repeat(4, axis=0), heldout.repeat(4, axis=0), groups, seed=2)
    assert report["p_value"] == set_test(suspects, heldout, seed=2)
    assert (report["unit"], report["suspects"], report["heldout"], report["suspect_records"]) == ("group", 15, 25, 60)
    alone = [set_test(*(side.repeat(4, axis=0) for side in normal(seed, 15, 25, 3)), seed=seed) for seed in range(60)]
    assert np.mean(np.array(alone) <= 0.05) > 0.3  # taken as independent, no difference at all is often significant


def test_an_outlier_does_not_hide_a_difference():
    suspects, heldout = normal(8, 60, 100, 2, 1.2)
    heldout[0] = 1e9, -np.inf
    assert set_test(suspects, heldout) == 0.001


def test_report_is_a_function_of_the_seed():
    pair = normal(9, 14, 40, 3, 0.8)
    assert set_report(*pair, seed=4) == set_report(*pair, seed=4)
    assert significance_curve(*pair, seed=4) != significance_curve(*pair, seed=5)
    scores = cross_fitted_scores(*pair, seed=4)
    expected = ttest_ind(*scores, equal_var=False, alternative="greater").pvalue
    assert set_report(*pair, seed=4)["welch_p_value"] == expected


def test_too_few_units_and_impossible_features():
    few = normal(1, 4, 30, 2)
    assert set_report(*few) is None
    with pytest.raises(ValueError, match="at least 5"):
        set_test(*few)
    with pytest.raises(ValueError, match="same features"):
        set_test(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="NaN"):
        set_test(np.full((9, 2), np.nan), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="suspect and held out"):
        set_report(np.zeros((9, 2)), np.zeros((9, 2)), (np.arange(9), np.arange(8, 17)))
