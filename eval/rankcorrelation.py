"""Spearman's rank correlation with an interval, also where the pictures of a patient are not independent."""

from typing import Any

import numpy as np
from scipy.stats import norm, rankdata, t

from defenses.seeding import derive
from eval.intervals import LEVEL

LEAST = 10  # independent units below which nothing is said
_RESAMPLES = 1000
_CELLS = 2**20  # of the largest array
_ONE = 1 - 1e-9  # its atanh is finite


def spearman(x: np.ndarray, y: np.ndarray, block: np.ndarray, grouped: bool, seed: int = 0) -> dict[str, Any]:
    """Rank correlation of two figures of the same pictures.

    The interval is taken on Fisher's scale, atanh(rho), with the standard error of Bonett and Wright (2000),
    sqrt((1 + rho^2 / 2) / (n - 3)), and the p-value from t = rho sqrt((n - 2) / (1 - rho^2)). With groups both rest on the standard
    deviation of atanh(rho) over resampled groups and the t quantile of groups - 1 degrees of freedom. Coverage: docs/risk.md.

    Args:
        x, y: float64 [N], finite.
        block: independent unit of each picture, int64 [N].
        grouped: whether blocks hold groups.

    Returns:
        ``{"rho", "ci95", "p_value" (two-sided), "n", "method"}``; None where there are fewer than LEAST units or a figure is constant.
    """
    _, unit = np.unique(block, return_inverse=True)
    n = len(np.unique(unit)) if grouped else len(x)
    found = {
        "rho": None,
        "ci95": None,
        "p_value": None,
        "n": len(x),
        "method": f"none: fewer than {LEAST} independent units",
    }
    if n < LEAST:
        return found
    rho = _rho(x, y)
    if rho is None:
        return found | {"method": "none: one of the figures is the same for all pictures"}
    z = np.arctanh(np.clip(rho, -_ONE, _ONE))
    if grouped:
        error = _bootstrap_error(x, y, unit, seed)
        half, p_value = t.ppf((1 + LEVEL) / 2, n - 1) * error, 2 * t.sf(abs(z) / max(error, 1e-12), n - 1)
        method = f"bootstrap over {n} groups, Fisher's scale"
    else:
        half = norm.ppf((1 + LEVEL) / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
        p_value = 2 * t.sf(abs(rho) * np.sqrt((n - 2) / max(1 - rho**2, 1e-12)), n - 2)
        method = "Fisher's scale, standard error of Bonett and Wright"
    limits = [float(np.tanh(z - half)), float(np.tanh(z + half))]
    return found | {"rho": rho, "ci95": limits, "p_value": float(p_value), "method": method}


def _rho(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson correlation of the ranks, ties at their mean; None where one of them is constant."""
    a, b = rankdata(x) - (len(x) + 1) / 2, rankdata(y) - (len(y) + 1) / 2
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else None


def _bootstrap_error(x: np.ndarray, y: np.ndarray, unit: np.ndarray, seed: int) -> float:
    """Standard deviation of atanh(rho) over resampled groups; resamples in which a figure is constant are left out."""
    groups = int(unit.max()) + 1
    drawn = np.random.default_rng(derive(seed, "attack/spearman")).multinomial(
        groups, [1 / groups] * groups, _RESAMPLES
    )
    values = []
    for start in range(0, _RESAMPLES, step := max(1, _CELLS // len(x))):
        weight = drawn[start : start + step][:, unit].astype(np.float64)  # how often each picture was drawn [B, N]
        a, b = _centred_ranks(x, weight), _centred_ranks(y, weight)
        size = np.sqrt((weight * a * a).sum(1) * (weight * b * b).sum(1))
        varies = size > 0
        values.append((weight * a * b).sum(1)[varies] / size[varies])
    return float(np.std(np.arctanh(np.clip(np.concatenate(values), -_ONE, _ONE)), ddof=1))


def _centred_ranks(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Rank of each value, less the mean rank, where value i occurs weight[:, i] times and ties have their mean, [B, N]."""
    _, first, place = np.unique(np.sort(x), return_index=True, return_inverse=True)
    order = np.argsort(x, kind="stable")
    counts = np.add.reduceat(weight[:, order], first, axis=1)  # of each distinct value, ascending
    ranks = np.cumsum(counts, axis=1) - counts / 2
    result = np.empty_like(weight)
    result[:, order] = ranks[:, place]
    return result - weight.sum(1, keepdims=True) / 2
