"""Intervals for a rate of pictures or of people, all at 95 %; docs/intervals.md measures how often they cover."""

import numpy as np
from scipy.special import betaincinv
from scipy.stats import binomtest

LEVEL = 0.95  # of every interval
_RESAMPLES = 2000


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Score interval for a binomial rate (Wilson 1927).

    Raises:
        ValueError: not 0 <= hits <= n with n > 0.
    """
    interval = binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Exact interval for a binomial rate (Clopper and Pearson 1934): covers at least 95 % whatever the rate.

    Raises:
        ValueError: not 0 <= hits <= n with n > 0.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError("hits must lie between 0 and n, and n above 0")
    tail = (1 - LEVEL) / 2
    low = betaincinv(hits, n - hits + 1, tail) if hits else 0.0
    high = betaincinv(hits + 1, n - hits, 1 - tail) if hits < n else 1.0
    return float(low), float(high)


def rate_interval(verified: np.ndarray, block: np.ndarray, grouped: bool, seed: int = 0) -> tuple[float, float, str]:
    """Interval of mean(verified) over distinct pictures, and the name of the method.

    Pictures of one patient are not independent, so with groups whole blocks are drawn (bootstrap, percentiles), and the
    interval is never narrower than Wilson's for as many independent trials as there are blocks: with a few hits
    resampling alone covers only 80 % (tests). Otherwise it is Wilson's. Where nothing was hit, and with groups also where everything was, resampling says nothing: the rule of
    three gives [0, 3/n] or [1 - 3/n, 1], n the number of independent units (blocks, or pictures without groups).

    Args:
        verified: bool [P], one entry per distinct picture.
        block: int64 [P], pictures of one block share it.
        grouped: whether blocks hold groups.
        seed: of the bootstrap.
    """
    verified = np.asarray(verified, dtype=bool)
    _, unit = np.unique(block, return_inverse=True)
    hits = int(verified.sum())
    if not len(verified):
        raise ValueError("there is no picture to take a rate of")
    n = int(unit.max()) + 1 if grouped else len(verified)
    if hits == 0:
        return 0.0, min(1.0, 3 / n), f"rule of three over {n} {'groups' if grouped else 'pictures'}"
    if not grouped:
        return *wilson(hits, n), "Wilson"
    if hits == len(verified):
        return max(0.0, 1 - 3 / n), 1.0, f"rule of three over {n} groups"
    rates = _bootstrap(verified, unit, seed)
    low, high = np.quantile(rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    least_low, least_high = wilson(min(max(1, round(verified.mean() * n)), n), n)
    return min(float(low), least_low), max(float(high), least_high), f"bootstrap over {n} groups, at least Wilson's"


def _bootstrap(verified: np.ndarray, unit: np.ndarray, seed: int) -> np.ndarray:
    """Rates over resampled blocks, float64 [resamples]."""
    pictures, hits = np.bincount(unit), np.bincount(unit, weights=verified)
    random = np.random.default_rng(seed)
    rates = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        drawn = random.integers(len(pictures), size=len(pictures))
        rates[index] = hits[drawn].sum() / pictures[drawn].sum()
    return rates
