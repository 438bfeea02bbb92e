"""Spearman's correlation against scipy, and how often its intervals cover."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from eval import rankcorrelation
from eval.rankcorrelation import spearman


def truth(p: float) -> float:
    """Spearman's rho of two normal figures with correlation p (Pearson 1907)."""
    return 6 / np.pi * np.arcsin(p / 2)


@pytest.mark.parametrize("ties", [False, True])
def test_rho_and_p_value_are_those_of_scipy(ties):
    random = np.random.default_rng(0)
    x = random.normal(size=60)
    y = 0.4 * x + random.normal(size=60)
    if ties:
        x, y = np.round(x), np.round(y)
    found, expected = spearman(x, y, np.arange(60), False), spearmanr(x, y)
    assert found["rho"] == pytest.approx(expected.statistic) and found["p_value"] == pytest.approx(expected.pvalue)
    half = 1.959964 * np.sqrt((1 + expected.statistic**2 / 2) / 57)
    assert np.arctanh(found["ci95"]) == pytest.approx(np.arctanh(expected.statistic) + np.array([-half, half]))


def test_the_interval_covers_for_independent_pictures():
    random, hits = np.random.default_rng(1), 0
    for _ in range(600):
        x = random.normal(size=40)
        y = 0.7 * x + np.sqrt(1 - 0.7**2) * random.normal(size=40)
        low, high = spearman(x, y, np.arange(40), False)["ci95"]
        hits += low <= truth(0.7) <= high
    assert 0.92 < hits / 600 < 0.98


def test_the_interval_covers_for_patients_where_independence_would_not(monkeypatch):
    monkeypatch.setattr(rankcorrelation, "_RESAMPLES", 200)
    random, groups, hits, naive = np.random.default_rng(2), 30, 0, 0
    for trial in range(200):
        block = np.repeat(np.arange(groups), random.integers(1, 8, groups))

        def alike(block=block):
            return 0.95 * random.normal(size=groups)[block] + 0.3 * random.normal(size=len(block))

        x, y = alike(), alike()
        low, high = spearman(x, y, block, True, trial)["ci95"]
        hits += low <= 0 <= high
        low, high = spearman(x, y, block, False)["ci95"]
        naive += low <= 0 <= high
    assert hits / 200 > 0.91 and naive / 200 < 0.8


def test_ranks_of_a_resample_are_those_of_its_rows():
    random = np.random.default_rng(3)
    x = np.round(random.normal(size=25), 1)
    weight = random.integers(0, 4, (6, 25))
    found = rankcorrelation._centred_ranks(x, weight.astype(float))
    for row, times in zip(found, weight, strict=True):
        expected = rankdata(np.repeat(x, times)) - (times.sum() + 1) / 2
        assert np.repeat(row, times) == pytest.approx(expected)


def test_what_cannot_be_said_is_null():
    few = spearman(np.arange(9.0), np.arange(9.0), np.arange(9), False)
    constant = spearman(np.ones(30), np.arange(30.0), np.arange(30), False)
    patients = spearman(np.arange(30.0), np.arange(30.0), np.arange(30) // 4, True)
    for found in (few, constant, patients):
        assert found["rho"] is None and found["ci95"] is None and found["p_value"] is None
    perfect = spearman(np.arange(30.0), np.arange(30.0), np.arange(30), False)
    assert perfect["rho"] == pytest.approx(1) and perfect["p_value"] < 1e-12
