"""What scores tell of membership: ROC curve, true-positive rate at a low false-positive rate, area under the curve.

A larger score means member. Equal scores are told apart by no threshold, so they enter a curve together and count 1/2 in an area.
Patients: `by_group` gives one score per patient and thereby figures per patient; figures per record take the ``groups`` of the
records, because pictures of one patient are not independent. docs/intervals.md measures how often every interval covers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, logit, ndtri, stdtr, stdtrit
from scipy.stats import rankdata

from eval.intervals import LEVEL, clopper_pearson, rate_interval

LEAST_FALSE_POSITIVES = (
    10  # that a target rate must allow, for a threshold to be more than the luck of a few non-members
)
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996

Groups = tuple[np.ndarray, np.ndarray]  # labels of the groups of the members and of the non-members, [n] and [m]


class Auc(NamedTuple):
    """Area under the curve with its 95 % interval and the name of the interval's method."""

    auc: float
    low: float
    high: float
    method: str


def roc_curve(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the empirical curve, from (0, 0) to (1, 1), one for each distinct score.

    Args:
        members: scores, float64 [n].
        nonmembers: scores, float64 [m].

    Returns:
        False- and true-positive rate of "score >= s" for every distinct score s, descending; both float64 [distinct + 1].

    Raises:
        ValueError: a side is empty or holds NaN.
    """
    members, nonmembers = _checked(members, nonmembers)
    scores, place = np.unique(np.concatenate([members, nonmembers]), return_inverse=True)
    split = len(members)
    rates = []
    for places in (place[split:], place[:split]):
        counts = np.bincount(places, minlength=len(scores))[::-1]
        rates.append(np.concatenate([[0.0], np.cumsum(counts) / len(places)]))
    return rates[0], rates[1]


def tpr_at_fpr(
    members: np.ndarray, nonmembers: np.ndarray, fpr: float, groups: Groups | None = None
) -> dict[str, Any] | None:
    """True-positive rate at the lowest threshold whose empirical false-positive rate is at most ``fpr``, never above it.

    Called a member is what scores *above* the (k + 1)-th largest non-member, k = floor(fpr m): of all thresholds that at
    most k non-members pass, this lets the most members pass.

    The threshold depends on the non-members alone, so given it the hits among independent members are binomial: the
    interval is for the rate of *this threshold* in the population of members, whatever the threshold's own false-positive
    rate in the population is. For that one there is an upper limit of its own.

    Args:
        members: scores, float64 [n].
        nonmembers: scores, float64 [m].
        fpr: target rate in (0, 1).
        groups: where given, members of one group are taken as dependent: bootstrap over groups instead of Clopper-Pearson.

    Returns:
        ``{"tpr", "ci95": [low, high], "method", "threshold", "fpr": the empirical rate, "fpr_upper95"}``, or None with fewer
        than 10 / fpr non-members, which do not resolve the rate. With a confidence of at least 95 % the threshold's
        false-positive rate in the population is below ``fpr_upper95``, ties or not (one-sided tolerance limit, Wilks 1941:
        of independent non-members, the share above the (k + 1)-th largest is at most Beta(k + 1, m - k)); None with groups.

    Raises:
        ValueError: the rate is not in (0, 1), a side is empty or holds NaN.
    """
    members, nonmembers = _checked(members, nonmembers)
    if not 0 < fpr < 1:
        raise ValueError("the false-positive rate must lie between 0 and 1")
    m = len(nonmembers)
    allowed = math.floor(fpr * m + _ROUNDING)
    if allowed < LEAST_FALSE_POSITIVES:
        return None
    threshold = np.partition(nonmembers, m - 1 - allowed)[m - 1 - allowed]
    caught = members > threshold
    if groups is None:
        low, high = clopper_pearson(int(caught.sum()), len(caught))
        method, upper = (
            f"Clopper-Pearson over {len(caught)} members",
            float(betaincinv(allowed + 1, m - allowed, LEVEL)),
        )
    else:
        low, high, method = rate_interval(caught, np.asarray(groups[0]), grouped=True)
        upper = None
    return {
        "tpr": float(caught.mean()),
        "ci95": [low, high],
        "method": method,
        "threshold": float(threshold),
        "fpr": float((nonmembers > threshold).mean()),
        "fpr_upper95": upper,
    }


def auc(members: np.ndarray, nonmembers: np.ndarray, groups: Groups | None = None) -> Auc:
    """P(member's score > non-member's) + P(equal) / 2, with an interval that stays in [0, 1].

    Variance by DeLong et al. (1988), computed from ranks (Sun and Xu 2014); with groups by Obuchowski (1997), whose unit is
    the group. The interval is taken on the logit scale, with the t quantile of Satterthwaite's degrees of freedom, and is
    never narrower than that of Newcombe (2006, method 5) for as many independent records as there are units: near 1, or with
    few members, DeLong's variance alone is too small (covers 90 % at AUC 0.99, 64 members, 1,000 non-members).

    Where all members score above all non-members DeLong's variance is 0. All of k = min(n, m) disjoint pairs are then in
    order, each with probability AUC: the exact binomial limit of k hits in k holds for any distribution. Where all scores are
    equal the limit is Hoeffding's (1963, section 5b) for k pairs.

    Args:
        members: scores, float64 [n].
        nonmembers: scores, float64 [m].
        groups: labels of the groups of both, e.g. patients; a label may occur on both sides.

    Raises:
        ValueError: a side is empty or holds NaN.
    """
    members, nonmembers = _checked(members, nonmembers)
    placements = _placements(members, nonmembers)
    area = float(placements[0].mean())
    units = _Units.of(placements, groups)
    if units.least < 2:
        return Auc(area, 0.0, 1.0, "none: a side has one unit only")
    variance, freedom = units.variance(*placements)
    if variance > 0:
        centre, half = logit(area), stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(variance) / (area * (1 - area))
        least_low, least_high = _newcombe(area, units.members, units.nonmembers)
        low, high = min(float(expit(centre - half)), least_low), max(float(expit(centre + half)), least_high)
        return Auc(area, low, high, f"{units.test}, logit scale, at least Newcombe's")
    if area in (0.0, 1.0):
        low, high = clopper_pearson(round(area) * units.least, units.least)
        return Auc(area, low, high, f"Clopper-Pearson over {units.least} disjoint pairs")
    half = math.sqrt(math.log(2 / (1 - LEVEL)) / (2 * units.least))
    return Auc(area, max(0.0, area - half), min(1.0, area + half), f"Hoeffding over {units.least} disjoint pairs")


def paired_delong(
    members_a: np.ndarray,
    nonmembers_a: np.ndarray,
    members_b: np.ndarray,
    nonmembers_b: np.ndarray,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Whether attack a has a larger area than attack b on the same records (DeLong et al. 1988; groups: Obuchowski 1997).

    Where the variance of the difference is 0, as where both attacks are perfect, the limits are Hoeffding's for
    k = min(n, m) disjoint pairs, whose differences lie in [-1, 1]; they hold for any distribution.

    Args:
        members_a, members_b: scores of the same members in the same order, float64 [n].
        nonmembers_a, nonmembers_b: scores of the same non-members in the same order, float64 [m].
        groups: as in `auc`.

    Returns:
        ``{"difference": AUC of a - AUC of b, "ci95": [low, high], "p_value": two-sided, "p_value_greater": for a > b,
        "method"}``.

    Raises:
        ValueError: the attacks differ in their number of records, a side is empty or holds NaN.
    """
    members_a, nonmembers_a = _checked(members_a, nonmembers_a)
    members_b, nonmembers_b = _checked(members_b, nonmembers_b)
    if len(members_a) != len(members_b) or len(nonmembers_a) != len(nonmembers_b):
        raise ValueError("paired attacks must score the same records")
    a, b = _placements(members_a, nonmembers_a), _placements(members_b, nonmembers_b)
    placements = a[0] - b[0], a[1] - b[1]
    difference = float(placements[0].mean())
    units = _Units.of(placements, groups)
    variance, freedom = units.variance(*placements) if units.least >= 2 else (0.0, 1.0)
    if variance > 0:
        error = math.sqrt(variance)
        half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
        two_sided = 2 * stdtr(freedom, -abs(difference) / error)
        greater = stdtr(freedom, -difference / error)
        method = f"paired {units.test}"
    else:
        half = math.sqrt(2 * math.log(2 / (1 - LEVEL)) / units.least)
        tail = math.exp(-units.least * difference**2 / 2)
        two_sided, greater = min(1.0, 2 * tail), tail if difference > 0 else 1.0
        method = f"Hoeffding over {units.least} disjoint pairs"
    return {
        "difference": difference,
        "ci95": [max(-1.0, difference - half), min(1.0, difference + half)],
        "p_value": float(two_sided),
        "p_value_greater": float(greater),
        "method": method,
    }


def by_group(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean score of every group's records, float64 [G], in the order of ``np.unique(groups)``; or [G, F] of [N, F] features."""
    scores = np.asarray(scores, dtype=np.float64)
    _, place, records = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(place) != len(scores):
        raise ValueError("every record needs the label of its group")
    sums = np.zeros((len(records), *scores.shape[1:]))
    np.add.at(sums, place, scores)
    return sums / records.reshape(-1, *[1] * (scores.ndim - 1))


class _Units(NamedTuple):
    """Which records are independent of each other."""

    member_unit: np.ndarray  # int64 [n]
    nonmember_unit: np.ndarray  # int64 [m]
    members: int  # units with a member
    nonmembers: int  # units with a non-member
    test: str

    @classmethod
    def of(cls, placements: tuple[np.ndarray, np.ndarray], groups: Groups | None) -> "_Units":
        n, m = map(len, placements)
        if groups is None:
            return cls(np.arange(n), np.arange(n, n + m), n, m, "DeLong")
        if (len(groups[0]), len(groups[1])) != (n, m):
            raise ValueError("every record needs the label of its group")
        _, unit = np.unique(np.concatenate([groups[0], groups[1]]), return_inverse=True)
        members, nonmembers = len(np.unique(unit[:n])), len(np.unique(unit[n:]))
        return cls(unit[:n], unit[n:], members, nonmembers, f"DeLong over {members} + {nonmembers} groups")

    @property
    def least(self) -> int:
        """Disjoint pairs of a member's and a non-member's unit."""
        return min(self.members, self.nonmembers)

    def variance(self, members: np.ndarray, nonmembers: np.ndarray) -> tuple[float, float]:
        """Variance of the mean placement (Obuchowski 1997, section 2; one record a unit: DeLong's) and degrees of freedom."""
        count = int(max(self.member_unit.max(), self.nonmember_unit.max())) + 1
        centre = members.mean()
        first = np.bincount(self.member_unit, (members - centre) / len(members), count)
        second = np.bincount(self.nonmember_unit, (nonmembers - centre) / len(nonmembers), count)
        of_members = float(first @ first) * self.members / (self.members - 1)
        of_nonmembers = float(second @ second) * self.nonmembers / (self.nonmembers - 1)
        shared = 2 * float(first @ second) * count / (count - 1)  # 0 unless a group has records on both sides
        apart = of_members + of_nonmembers
        if apart + shared <= 1e-14:  # placements that agree within rounding
            return 0.0, 1.0
        freedom = apart**2 / (of_members**2 / (self.members - 1) + of_nonmembers**2 / (self.nonmembers - 1))
        return apart + shared, freedom


def _placements(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of non-members below each member [n], and of members above each non-member [m]; equals count 1/2."""
    n, m = len(members), len(nonmembers)
    ranks = rankdata(np.concatenate([members, nonmembers]))
    return (ranks[:n] - rankdata(members)) / m, 1 - (ranks[n:] - rankdata(nonmembers)) / n


def _newcombe(area: float, n: int, m: int) -> tuple[float, float]:
    """Areas A that solve |area - A| = z sqrt(V(A)), V by Hanley and McNeil (1982) for equal halves (Newcombe 2006, method 5)."""
    z, half = ndtri((1 + LEVEL) / 2), (n + m) / 2 - 1

    def excess(a: float) -> float:
        variance = a * (1 - a) * (1 + half * ((1 - a) / (2 - a) + a / (1 + a))) / (n * m)
        return (area - a) ** 2 - z**2 * variance

    low = 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, area))
    high = 1.0 if excess(1.0) <= 0 else float(brentq(excess, area, 1.0))
    return low, high


def _checked(members: np.ndarray, nonmembers: np.ndarray) -> Groups:
    """Both as float64; infinite scores are in order, NaN is not."""
    members, nonmembers = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    for name, scores in (("members", members), ("non-members", nonmembers)):
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"scores of {name} must be a vector that is not empty")
        if np.isnan(scores).any():
            raise ValueError(f"scores of {name} hold NaN")
    return members, nonmembers
