"""Membership of a set: do many pictures together show that a model was trained on them, and how many does that take?

After copyrighted data identification (Dubinski et al. 2024): a single picture of a well-trained model is hardly told from a
held-out one, but the scores of a set add up. Suspects P and held-out U must come from one random split. Each unit has F
features of membership (losses, errors of inversions, gradient norms); a linear classifier, fitted on the other folds, turns
the features of a unit into a score, and the suspects' scores are compared with the held-out ones.

The paper then takes Welch's one-sided t-test for that comparison. It is not valid here: every label serves to fit the
classifiers of the other folds, so the scores are not independent of each other, and the test rejects 2 to 4 times too often
(docs/intervals.md). Our p-value permutes the labels and fits all anew; Welch's stands beside it for comparison. So that a
thousand fits cost nothing, the classifier is Fisher's linear discriminant instead of a logistic regression.
"""

from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata, ttest_ind

from defenses.seeding import derive
from eval.roc import Groups, by_group

ALPHA = 0.01  # below it a set counts as recognised (Dubinski et al. 2024)
FOLDS = 5  # and the fewest units on a side
_PERMUTATIONS = 999
_SUBSETS = 100  # of every size
_RIDGE = 1.0  # added to the scatter matrix, whose diagonal is about the number of units
_SIZES = (5, 7, *(step * 10**power for power in range(5) for step in (10, 15, 20, 30, 50, 70)))


def set_report(
    suspects: np.ndarray, heldout: np.ndarray, groups: Groups | None = None, *, seed: int = 0
) -> dict[str, Any] | None:
    """Set-level test of all suspects, and how many of them would have been enough.

    Args:
        suspects: features of the training records, float64 [n, F].
        heldout: features of held-out records, float64 [m, F].
        groups: labels of the groups of both. Then the unit is the group, with the mean of its records' features, because
            pictures of one patient are not independent.
        seed: of folds, permutations and subsets.

    Returns:
        ``{"p_value", "welch_p_value", "records_needed_50", "records_needed_99", "alpha", "features", "suspects", "heldout",
        "suspect_records", "unit": "record" | "group", "permutations", "subsets", "curve": [{"n", "share_significant"}]}``, where
        suspects, heldout, records_needed and n count units; None with fewer than `FOLDS` units on a side.

    Raises:
        ValueError: matrices that do not fit together, NaN, or a group on both sides.
    """
    records = len(suspects)
    if groups is not None:
        if np.intersect1d(groups[0], groups[1]).size:
            raise ValueError("a group must not be suspect and held out")
        suspects, heldout = by_group(suspects, groups[0]), by_group(heldout, groups[1])
    suspects, heldout = _checked(suspects, heldout)
    if min(len(suspects), len(heldout)) < FOLDS:
        return None
    p_value = set_test(suspects, heldout, seed=seed)
    curve = significance_curve(suspects, heldout, seed=seed)
    if p_value < ALPHA and not (curve and curve[-1]["share_significant"] == 1):
        curve.append(
            {"n": len(suspects), "share_significant": 1.0}
        )  # all of them, the one set that was tested as it is
    needed = {share: units_needed(curve, share) if p_value < ALPHA else None for share in (0.5, 0.99)}
    return {
        "p_value": p_value,
        "welch_p_value": welch_p_value(*cross_fitted_scores(suspects, heldout, seed=seed)),
        "records_needed_50": needed[0.5],
        "records_needed_99": needed[0.99],
        "alpha": ALPHA,
        "features": suspects.shape[1],
        "suspects": len(suspects),
        "heldout": len(heldout),
        "suspect_records": records,
        "unit": "record" if groups is None else "group",
        "permutations": _PERMUTATIONS,
        "subsets": _SUBSETS,
        "curve": curve,
    }


def set_test(suspects: np.ndarray, heldout: np.ndarray, *, seed: int = 0) -> float:
    """Permutation test of "the suspects are not told from the held-out units": p-value in (0, 1], a multiple of 1/1000.

    Exact for any number of units and any distribution: if both sides come from one distribution, the labels within a fold
    may be exchanged, and P(p <= a) <= a (Phipson and Smyth 2010). The statistic is the difference of the mean cross-fitted
    scores. Its power is nearly that of Hotelling's T^2, which knows that the features are normal (tests).

    Args:
        suspects: float64 [n, F], one row for each independent unit.
        heldout: float64 [m, F].
        seed: of folds and permutations.

    Raises:
        ValueError: fewer than `FOLDS` rows on a side, matrices that do not fit together, NaN.
    """
    suspects, heldout = _checked(suspects, heldout)
    fold, labels = _folds(len(suspects), len(heldout), seed)
    features = _normal_scores(np.concatenate([suspects, heldout]))
    return _reaching(_statistics(features, fold, _permuted(fold, labels, seed))) / (1 + _PERMUTATIONS)


def significance_curve(suspects: np.ndarray, heldout: np.ndarray, *, seed: int = 0) -> list[dict[str, float]]:
    """How often a part of the suspects would do: share of 100 random subsets of size n with p < `ALPHA`, for growing n.

    The owner of a subset has nothing but its n units and all held-out ones, so classifiers are fitted on those alone. Subsets
    overlap, the more the nearer n comes to all suspects: the curve speaks of the suspects at hand.

    Returns:
        ``[{"n", "share_significant"}]`` up to the first n at which all subsets are significant, or all suspects.
    """
    suspects, heldout = _checked(suspects, heldout)
    curve = []
    for n in (size for size in _SIZES if size < len(suspects)):
        fold, labels = _folds(n, len(heldout), derive(seed, "subset", n))
        permuted = _permuted(fold, labels, derive(seed, "subset", n))  # valid for each subset, so drawn once for all
        random = np.random.default_rng(derive(seed, "subset", n, "units"))
        hits = 0
        for _ in range(_SUBSETS):
            units = random.choice(len(suspects), n, replace=False)
            hits += _significant(np.concatenate([suspects[units], heldout]), fold, permuted)
        curve.append({"n": n, "share_significant": hits / _SUBSETS})
        if hits == _SUBSETS:
            break
    return curve


def units_needed(curve: list[dict[str, float]], share: float) -> int | None:
    """Smallest n of the curve from which on at least this share of the subsets is significant; None where there is none."""
    needed = None
    for point in reversed(curve):
        if point["share_significant"] < share:
            break
        needed = int(point["n"])
    return needed


def cross_fitted_scores(suspects: np.ndarray, heldout: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores by classifiers that saw neither the unit nor its fold, float64 [n] and [m]; larger is more like a suspect."""
    suspects, heldout = _checked(suspects, heldout)
    fold, labels = _folds(len(suspects), len(heldout), seed)
    features, scores = _normal_scores(np.concatenate([suspects, heldout])), np.empty(len(fold))
    for k in range(FOLDS):
        rest = features[fold != k]
        suspect = labels[fold != k]
        direction = _discriminant(rest, rest[suspect].mean(axis=0) - rest[~suspect].mean(axis=0))
        scores[fold == k] = (features[fold == k] - rest.mean(axis=0)) @ direction
    return scores[labels], scores[~labels]


def welch_p_value(suspects: np.ndarray, heldout: np.ndarray) -> float:
    """Welch's one-sided t-test of scores, as in Dubinski et al. (2024): too small for cross-fitted scores, see above."""
    return float(ttest_ind(suspects, heldout, equal_var=False, alternative="greater").pvalue)


def _folds(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fold of every unit, int64 [n + m], evenly within each side, and which units are suspects, bool [n + m]."""
    if min(n, m) < FOLDS:
        raise ValueError(f"a set-level test needs at least {FOLDS} suspects and {FOLDS} held-out units")
    random = np.random.default_rng(derive(seed, "set-test", "folds"))
    fold = np.concatenate([random.permutation(n) % FOLDS, random.permutation(m) % FOLDS])
    return fold, np.arange(n + m) < n


def _permuted(fold: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels as they are (first column) and exchanged at random within every fold, float64 [N, 1 + permutations]."""
    random = np.random.default_rng(derive(seed, "set-test", "permutations"))
    permuted = np.repeat(labels[:, None].astype(np.float64), 1 + _PERMUTATIONS, axis=1)
    for k in range(FOLDS):
        permuted[fold == k, 1:] = random.permuted(permuted[fold == k, 1:], axis=0)
    return permuted


def _significant(units: np.ndarray, fold: np.ndarray, permuted: np.ndarray) -> bool:
    """Whether the p-value is below `ALPHA`; a tenth of the labellings mostly settles that it is not."""
    features, most = _normal_scores(units), ALPHA * permuted.shape[1]
    few = permuted[:, : permuted.shape[1] // 10]
    return all(_reaching(_statistics(features, fold, labels)) < most for labels in (few, permuted))


def _reaching(statistics: np.ndarray) -> int:
    """Labellings whose statistic is at least that of the first one, itself among them."""
    return int((statistics >= statistics[0] - 1e-9 * abs(statistics[0])).sum())  # equal labellings differ by rounding


def _statistics(features: np.ndarray, fold: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean cross-fitted score of suspects minus that of held-out units, for each column of labels (0 or 1), float64 [B].

    Scores are linear in the features, so sums of features over the suspects of each fold say all about them.
    """
    sums = np.stack([features[fold == k].T @ labels[fold == k] for k in range(FOLDS)])  # [K, F, B]
    totals = np.stack([features[fold == k].sum(axis=0) for k in range(FOLDS)])[:, :, None]  # [K, F, 1]
    n = np.bincount(fold, labels[:, 0], FOLDS)  # suspects of each fold, in every column
    m = np.bincount(fold, minlength=FOLDS) - n
    statistics = np.zeros(labels.shape[1])
    for k in range(FOLDS):
        suspects, everyone = sums.sum(axis=0) - sums[k], totals.sum(axis=0) - totals[k]
        n_rest, m_rest = n.sum() - n[k], m.sum() - m[k]
        direction = _discriminant(features[fold != k], suspects / n_rest - (everyone - suspects) / m_rest)
        offset = everyone / (n_rest + m_rest) * (n[k] / n.sum() - m[k] / m.sum())
        statistics += (direction * (sums[k] / n.sum() - (totals[k] - sums[k]) / m.sum() - offset)).sum(axis=0)
    return statistics


def _discriminant(features: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Fisher's (1936) direction (S + ridge / N)^-1 difference of means, for one difference [F] or many [F, B].

    S is the covariance of all units together, not within the sides: the same direction, and no label goes into it.
    """
    centred = features - features.mean(axis=0)
    scatter = centred.T @ centred + _RIDGE * np.eye(features.shape[1])
    return np.linalg.solve(scatter / len(features), difference)


def _normal_scores(units: np.ndarray) -> np.ndarray:
    """Every feature by its rank among all units, as a standard normal quantile (van der Waerden 1952), float64 [N, F].

    Losses and gradient norms have long tails, and one outlier must not decide a mean. Labels do not enter.
    """
    return ndtri(rankdata(units, axis=0) / (len(units) + 1))


def _checked(suspects: np.ndarray, heldout: np.ndarray) -> Groups:
    """Both as float64 matrices with the same features and without NaN."""
    suspects, heldout = np.asarray(suspects, dtype=np.float64), np.asarray(heldout, dtype=np.float64)
    if suspects.ndim != 2 or heldout.ndim != 2 or suspects.shape[1] != heldout.shape[1] or not suspects.shape[1]:
        raise ValueError("suspects and held-out units need matrices of the same features")
    if np.isnan(suspects).any() or np.isnan(heldout).any():
        raise ValueError("features hold NaN")
    return suspects, heldout
