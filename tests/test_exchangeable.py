"""The i.i.d. check: false alarms where both sides are drawn alike, alarms where they are not."""

import numpy as np
import pytest
from accelerate import Accelerator
from scipy.optimize import minimize
from scipy.stats import norm

from eval import roc
from eval.exchangeable import _fitted, blind_check, cross_fitted
from eval.members import Candidates
from train.data import Record


def candidates(members, nonmembers, per_block=1, grouped=False):
    count = members + nonmembers
    block = np.concatenate([np.arange(members) // per_block, 1000 + np.arange(nonmembers) // per_block])
    records = [Record(str(row), str(row), group=str(block[row]) if grouped else None) for row in range(count)]
    return Candidates(np.arange(count), np.arange(count) < members, block, records)


def area(described, who, seed=0):
    scores = cross_fitted(described, who.member, who.block, seed)
    return roc.auc(scores[who.member], scores[~who.member])


def test_no_difference_is_rarely_called_one_and_gives_half_on_average():
    random, found = np.random.default_rng(0), []
    for seed in range(60):
        who = candidates(60, 40)
        found.append(area(random.normal(size=(100, 12)), who, seed))
    assert np.mean([each.auc for each in found]) == pytest.approx(0.5, abs=0.03)
    assert sum(each.low > 0.5 for each in found) <= 5  # 2.5 % are 1.5; 5 of 60 have a chance of 2 %


def test_a_known_difference_is_found_as_theory_says():
    """Two normal clouds at distance 1: the best classifier has an area of Phi(1 / sqrt(2)) = 0.760."""
    who = candidates(400, 400)
    described = np.random.default_rng(1).normal(size=(800, 5))
    described[who.member, 0] += 1
    found = area(described, who)
    assert found.auc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.05) and found.low > 0.6


def test_blocks_are_never_cut():
    """Features that only name the block: seen blocks are learnt by heart, unseen ones cannot be told."""
    who = candidates(200, 200, per_block=20)
    random = np.random.default_rng(2)
    names = random.normal(size=(2000, 50))
    described = names[who.block]
    alone = candidates(200, 200)
    assert area(described, alone).auc > 0.95
    assert abs(area(described, who).auc - 0.5) < 0.3


def test_the_fit_minimises_the_penalised_loss():
    """Against a generic optimiser without derivatives."""
    random = np.random.default_rng(3)
    x, member = random.normal(size=(50, 2)), np.arange(50) < 20
    x[member] += 0.8
    z, sign = (x - x.mean(0)) / x.std(0), np.where(member, 1, -1)
    weight = np.where(member, 50 / 40, 50 / 60)

    def loss(w):
        return weight @ np.log1p(np.exp(-sign * (z @ w[1:] + w[0]))) + (w[1:] ** 2).sum() / 2

    expected = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).x
    assert _fitted(x, member, x) == pytest.approx(z @ expected[1:], abs=1e-3)


def test_pictures_of_one_population_pass_and_another_source_is_named():
    random, accelerator = np.random.default_rng(4), Accelerator(cpu=True)
    who = candidates(60, 60)
    images = random.integers(0, 256, (120, 1, 16, 16), dtype=np.uint8)
    alike = blind_check(images, who, True, 0, accelerator)
    assert alike["passed"] and alike["note"] == "" and alike["blind_ci95"][0] <= 0.5
    images[60:] = images[60:] // 2 + 64  # the held-out side has been through a weaker contrast
    apart = blind_check(images, who, True, 0, accelerator)
    assert not apart["passed"] and apart["blind_auc"] > 0.95 and "never saw the model" in apart["note"]


def test_pictures_of_another_source_never_pass():
    images = np.random.default_rng(5).integers(0, 256, (60, 1, 16, 16), dtype=np.uint8)
    found = blind_check(images, candidates(30, 30), False, 0, Accelerator(cpu=True))
    assert not found["passed"] and not found["exchangeable"] and "not split off at random" in found["note"]


def test_too_few_people_are_not_judged():
    images = np.zeros((80, 1, 16, 16), np.uint8)
    found = blind_check(images, candidates(40, 40, per_block=5, grouped=True), True, 0, Accelerator(cpu=True))
    assert found["passed"] is None and found["blind_auc"] is None and "fewer than 10" in found["note"]
