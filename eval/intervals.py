"""Intervals for a rate of extracted pictures, all at 95 %."""

import math

import numpy as np
from scipy import stats

_LEVEL = 0.95
_RESAMPLES = 2000


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Score interval for a binomial rate (Wilson 1927)."""
    _check(hits, n)
    z2 = float(stats.norm.ppf(0.5 + _LEVEL / 2)) ** 2
    rate = hits / n
    middle = rate + z2 / (2 * n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2)))
    low = 0.0 if hits == 0 else (middle - half) / (1 + z2 / n)
    high = 1.0 if hits == n else (middle + half) / (1 + z2 / n)
    return low, high


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """Exact interval for a binomial rate (Clopper and Pearson 1934): it covers at least 95 %, for any rate and n."""
    _check(hits, n)
    tail = (1 - _LEVEL) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def rate_text(hits: int, n: int) -> str:
    """A rate in words: "2.0 %", and for zero hits never zero but "< 3/n (95 %)" (rule of three, Hanley 1983)."""
    _check(hits, n)
    return f"< 3/{n} (95 %)" if hits == 0 else f"{100 * hits / n:.1f} %"


def rate_interval(verified: np.ndarray, block: np.ndarray, grouped: bool, seed: int = 0) -> tuple[float, float, str]:
    """Interval of mean(verified) over distinct pictures, and the name of the method.

    Pictures of one patient are not independent, so with groups whole blocks are drawn (bootstrap, percentiles); otherwise
    it is Wilson's. Where nothing was hit, and with groups also where everything was, resampling says nothing: the rule of
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
    _check(hits, len(verified))
    n = int(unit.max()) + 1 if grouped else len(verified)
    if hits == 0:
        return 0.0, min(1.0, 3 / n), f"rule of three over {n} {'groups' if grouped else 'pictures'}"
    if not grouped:
        return *wilson(hits, n), "Wilson"
    if hits == len(verified):
        return max(0.0, 1 - 3 / n), 1.0, f"rule of three over {n} groups"
    rates = _bootstrap(verified, unit, seed)
    low, high = np.quantile(rates, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high), f"percentile bootstrap over {n} groups"


def _bootstrap(verified: np.ndarray, unit: np.ndarray, seed: int) -> np.ndarray:
    """Rates over resampled blocks, float64 [resamples]."""
    pictures, hits = np.bincount(unit), np.bincount(unit, weights=verified)
    random = np.random.default_rng(seed)
    rates = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        drawn = random.integers(len(pictures), size=len(pictures))
        rates[index] = hits[drawn].sum() / pictures[drawn].sum()
    return rates


def _check(hits: int, n: int) -> None:
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n}: need 0 <= hits <= n and n > 0")
