"""Exposure of planted canaries, and the one-run bound from those that a coin decided."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import permutation_test

from eval.audit import one_run_lower_bound
from eval.exposure import COLUMNS, exposures, measure, report, standardised, trend
from tests.small import opened
from train import models
from train.data import Dataset
from train.stage import train_model


def line(score, role="planted", copies=1, included=None, kind="noise", exposure=0.0):
    included = role == "planted" if included is None else included
    exposure = None if role == "pool" else exposure
    return {
        "canary": f"{role}", "kind": kind, "role": role, "copies": copies, "included": included, "score": score, "exposure": exposure
    }  # fmt: skip


def test_exposure_is_the_published_formula():
    pool = np.arange(1024.0)
    assert exposures(np.array([-1.0, 0.5, 510.5, 2000.0]), pool) == pytest.approx(
        [10, 9, 10 - math.log2(512), 10 - math.log2(1025)]
    )


def test_exposure_is_that_of_ranks_counted_one_by_one():
    random = np.random.default_rng(0)
    pool, scores = random.integers(0, 20, 50).astype(float), random.integers(0, 20, 30).astype(float)
    ranks = [1 + sum(other < one for other in pool) + sum(other == one for other in pool) / 2 for one in scores]
    assert exposures(scores, pool) == pytest.approx(np.log2(50) - np.log2(ranks))


def test_what_was_never_shown_has_the_exposure_of_chance():
    random = np.random.default_rng(1)
    bits = exposures(random.normal(size=20_000), random.normal(size=20_000))
    assert np.median(bits) == pytest.approx(1, abs=0.05)
    assert (bits > 5).mean() == pytest.approx(1 / 32, rel=0.15)


def test_timesteps_weigh_alike_and_the_pool_sets_the_scale():
    losses = np.array([[1.0, 100.0], [3.0, 300.0], [0.0, 0.0], [9.0, -900.0]])
    pool = np.array([True, True, False, False])
    assert standardised(losses, pool) == pytest.approx([-1, 1, -2, (7 - 11) / 2])
    assert standardised(np.ones((3, 2)), np.array([True, True, False])).tolist() == [0, 0, 0]


def test_p_value_is_that_of_the_permutations():
    random = np.random.default_rng(2)
    pool, found = random.normal(size=40), np.array([-1.5, -0.9])
    lines = [line(score, "pool") for score in pool] + [line(score, copies=4) for score in found]
    lines += [line(score) for score in pool.min() - np.array([3, 2, 1])]
    figures = report(lines, {})["kinds"]["noise"]["by_copies"]
    exact = permutation_test(
        (found, pool), lambda x, y: sum((a > y).sum() for a in x), alternative="less", n_resamples=np.inf
    )
    assert figures["4"]["p_value"] == pytest.approx(exact.pvalue)
    assert figures["1"]["p_value"] == pytest.approx(1 / math.comb(43, 3))


def test_figures_by_copies():
    lines = [line(float(score), "pool") for score in range(64)]
    lines += [line(0.0, copies=2, exposure=bits) for bits in (6.0, 4.0, 5.5)] + [line(0.0, exposure=1.0)]
    lines += [line(9.0, "coin", included=True, exposure=2.0), line(9.0, "coin", included=False, exposure=0.5)]
    found = report(lines, {})["kinds"]["noise"]
    assert found["pool"] == 64 and found["ceiling"] == 6
    assert {copies: each["canaries"] for copies, each in found["by_copies"].items()} == {"0": 1, "1": 2, "2": 3}
    assert found["by_copies"]["2"] | {"p_value": 0} == {
        "canaries": 3,
        "median": 5.5,
        "max": 6.0,
        "above_5_bits": 2 / 3,
        "p_value": 0,
    }
    assert found["by_copies"]["1"]["median"] == 1.5 and found["trend"]["spearman"] > 0.8
    assert report(lines[:65], {})["kinds"]["noise"]["trend"] is None


def test_growth_with_copies_is_not_seen_where_there_is_none():
    """5 % of runs without memorisation have a p-value of growth below 5 %."""
    random, copies = np.random.default_rng(3), np.repeat(2 ** np.arange(6), 3)
    small = sum(trend(copies, random.exponential(size=18))["p_value"] < 0.05 for _ in range(400))
    assert 7 <= small <= 35  # 20 are expected


def test_the_bound_rests_on_coins_alone():
    random = np.random.default_rng(4)
    included = random.random(1000) < 0.5
    scores = random.normal(size=1000) - 2.5 * included
    coins = [line(score, "coin", included=bool(coin)) for score, coin in zip(scores, included, strict=True)]
    others = [line(float(score), "pool") for score in random.normal(size=64)] + [
        line(-50.0, copies=64) for _ in range(100)
    ]
    claim = {"epsilon": 1.5, "delta": 1e-5, "unit": "record"}
    found = report(others + coins, claim)["one_run"]
    assert found["epsilon_lower_bound"] == one_run_lower_bound(-scores, included, 1e-5).epsilon > 1.5
    assert (found["canaries"], found["included"], found["claimed_epsilon"]) == (1000, included.sum(), 1.5)
    assert "planted by coin" in found["kind"] and report(others, claim)["one_run"] is None
    noise = [line(random.normal(), "coin", included=bool(coin)) for coin in included]
    assert report(others + noise, claim)["one_run"]["epsilon_lower_bound"] < 1
    assert report(others + noise, {})["one_run"]["claimed_epsilon"] is None


def test_a_run_without_canaries_has_none(tmp_path):
    assert (
        measure(tmp_path, SimpleNamespace(data=SimpleNamespace(canaries=None)), Dataset([], np.zeros(0)), None) is None
    )


PLANT = ["data.canaries.pool=40", "data.canaries.coins=12", "data.phantom.heldout=64", "data.group_key=null"]
QUICK = ["model.size=nano", "train.steps=2", "train.heldout_every=0"]


def test_both_kinds_in_a_class_conditional_run(tmp_path):
    arguments = opened(
        tmp_path,
        *PLANT,
        *QUICK,
        "data.canaries.kinds=[noise,heldout]",
        "data.canaries.copies=[1,3]",
        "data.label_key=label",
    )
    config, dataset, directory, _, accelerator = arguments
    train_model(*arguments)
    found = measure(directory.path, config, dataset, accelerator)
    json.dumps(found.report, allow_nan=False)
    by_kind = {kind: [each for each in found.table if each["kind"] == kind] for kind in ("noise", "heldout")}
    assert all(list(each) == COLUMNS for each in found.table)
    for kind, lines in by_kind.items():
        roles = [each["role"] for each in lines]
        assert [roles.count(role) for role in ("planted", "coin", "pool")] == [4, 12, 40]
        assert found.report["kinds"][kind]["pool"] == 40
        assert sum(each["canaries"] for each in found.report["kinds"][kind]["by_copies"].values()) == 16
    coins = [each for each in found.table if each["role"] == "coin"]
    assert found.report["one_run"]["canaries"] == 24
    assert found.report["one_run"]["included"] == sum(each["included"] for each in coins)
    kept = {record.source: record.kept for record in dataset.records}
    assert all(each["included"] == kept[each["canary"]] for each in coins)


@pytest.mark.slow
def test_exposure_grows_with_copies_on_an_undefended_run(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "nano", ((16, 16, 16), 1, ()))
    arguments = opened(
        tmp_path,
        "data.canaries.copies=[1,2,4,8,16,32]",
        "data.canaries.per_copies=3",
        "data.canaries.pool=256",
        "data.group_key=null",
        "model.size=nano",
        "train.steps=100",
        "train.batch_size=32",
        "train.learning_rate=3e-3",
        "train.ema_decay=0.95",
        "train.heldout_every=0",
        "train.checkpoint_every=0",
    )
    config, dataset, directory, _, accelerator = arguments
    train_model(*arguments)
    found = measure(directory.path, config, dataset, accelerator).report["kinds"]["noise"]
    median = [found["by_copies"][str(copies)]["median"] for copies in (1, 2, 4, 8, 16, 32)]
    assert found["trend"]["spearman"] > 0.5 and found["trend"]["p_value"] < 0.01
    assert median[5] > 5 > median[0] and found["by_copies"]["32"]["p_value"] < 0.01
