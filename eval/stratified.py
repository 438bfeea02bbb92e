"""Whether training units respond more often than held-out ones of the same kind: the exact conditional test over strata.

In stratum s there are N_s units, n_s of them on the training side, and K_s with S = 1. If within each stratum every way to put the
units on the sides is equally likely, then, given these numbers, the S = 1 on the training side are independent hypergeometric
X_s ~ H(N_s, K_s, n_s), and their sum is what Mantel and Haenszel (1959) compare with its mean. Its distribution is the convolution of
theirs, so p = P(sum X_s >= observed) is exact (Birch 1964; Cox 1970): Fisher's test where there is one stratum. A stratum with
one side alone has X_s = K_s in every permutation: it says nothing, and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom


@dataclass(frozen=True)
class Stratum:
    """Units of one kind.

    Attributes:
        kind: what they have in common, e.g. the number of copies.
        training, heldout: units on either side.
        training_own, heldout_own: those of them with S = 1.
    """

    kind: int
    training: int
    training_own: int
    heldout: int
    heldout_own: int


@dataclass(frozen=True)
class Outcomes:
    """What is known of the units of one side, S bool [U] and the kind of each int64 [U]."""

    own: np.ndarray
    kind: np.ndarray


def strata(training: Outcomes, heldout: Outcomes) -> list[Stratum]:
    """Counts of every kind that occurs, descending by kind."""

    def counts(side: Outcomes, kind: int) -> tuple[int, int]:
        own = side.own[side.kind == kind]
        return len(own), int(own.sum())

    kinds = np.unique(np.concatenate([training.kind, heldout.kind]))[::-1].tolist()
    return [Stratum(kind, *counts(training, kind), *counts(heldout, kind)) for kind in kinds]


def p_value(parts: Sequence[Stratum]) -> float | None:
    """P(sum of S on the training side >= observed), one-sided; None where no stratum has units on both sides."""
    both = [part for part in parts if part.training and part.heldout]
    if not both:
        return None
    chances = np.ones(1)  # of 0, 1, 2, ... units with S = 1 on the training side
    for part in both:
        units, hits = part.training + part.heldout, part.training_own + part.heldout_own
        support = np.arange(min(hits, part.training) + 1)
        chances = np.convolve(chances, hypergeom.pmf(support, units, hits, part.training))
    observed = sum(part.training_own for part in both)
    return float(min(1.0, chances[observed:][::-1].sum()))


def decisive(fisher: float | None, within: float | None, alone: int | None) -> float | None:
    """The p-value that a verdict rests on: the larger one of Fisher's test of all units and the stratified one; Fisher's alone where a
    training unit with S = 1 is in a stratum without held-out units, of which the stratified test says nothing. None: there is none.

    The chance of a value up to the level is at most the level if every stratum of training units has held-out ones, or if strata came
    after the sides were drawn and fell on any unit alike. Where some strata came before and some after, it is not: Fisher's test is wrong
    for the former, and one S = 1 among the latter leaves the decision to it.

    Args:
        fisher, within: both p-values.
        alone: training units with S = 1 in strata without held-out units; None: not known.
    """
    return fisher if None in (fisher, within) or alone else max(fisher, within)
