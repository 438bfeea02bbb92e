"""Canaries of the trainer under DP-SGD: each is a unit like others, and nothing that is told depends on the coins."""

import json

import numpy as np
import pytest
from accelerate import Accelerator

from defenses import canaries
from defenses.base import Pool, RunContext
from defenses.dpsgd import DPSGD, DPSGDConfig
from tests.small import opened
from tests.smalldp import finish, quick
from train.stage import begin, train_model

PLANT = ["data.canaries.copies=[1,3]", "data.canaries.per_copies=2", "data.canaries.pool=32", "data.canaries.coins=30"]
CHEAP = ["defenses.dpsgd.noise_multiplier=1", "defenses.dpsgd.delta=1e-3", "train.heldout_every=0"]


@pytest.fixture(autouse=True)
def quickly():
    with quick():
        yield


def begun(folder, planted: int, left_out: int, groups: list[str] | None = None, **settings) -> DPSGD:
    """The defense alone, on 20 records and some canaries of the trainer's."""
    count = 20 + planted
    pool = Pool(np.zeros((count, 1, 2, 2), np.uint8), np.arange(20), [""] * count, groups or [None] * count)
    run = {"steps": 7, "batch_size": 10, "accumulation": 1, "precision": "fp32", "seed": 0, "checkpoint_every": 7}
    context = RunContext(
        pool=pool,
        control=np.arange(0),
        nonprivate_metrics=False,
        folder=folder,
        accelerator=Accelerator(cpu=True),
        planted=np.arange(20, count),
        left_out=left_out,
        **run,
    )
    defense = DPSGD(DPSGDConfig(noise_multiplier=1.0, delta=1e-3, **settings))
    defense.begin(context)
    return defense


def test_units_rate_and_noise_do_not_depend_on_the_coins(tmp_path):
    few, many = begun(tmp_path / "few", 3, 9), begun(tmp_path / "many", 10, 2)
    assert few.units == many.units == 20 + 12
    assert few.sample_rate == many.sample_rate == 10 / 32 and few.divisor == many.divisor == 10
    assert few.mechanism == many.mechanism
    assert [len(each._units) for each in (few, many)] == [23, 30]  # but trained on are those that are in


def test_a_canary_is_a_unit_whatever_its_copies(tmp_path):
    groups = [f"p{row // 2}" for row in range(20)] + ["canary:noise/0000"] * 3 + ["canary:noise/0001"]
    patients = begun(tmp_path / "groups", 4, 1, groups, unit="group", group_cap=2)
    assert patients.units == 10 + 2 + 1 and sorted(map(len, patients._units)) == [1] + [2] * 10 + [3]
    records = begun(tmp_path / "records", 4, 1, groups)
    assert records.units == 20 + 4 + 1 and records._largest_group == 2  # of people: canaries are none
    capped = begun(
        tmp_path / "capped", 4, 1, groups, unit="group", group_cap=2, group_sampling="records", sample_rate=0.5, batch_size=10, units=13
    )  # fmt: skip
    assert capped.units == 13 and len(capped._units) == 20 + 2 + 1


def test_training_draws_them_and_an_audit_of_training_units_never_does(tmp_path):
    settings = ["defenses.dpsgd.canaries=20", "data.group_key=null", *PLANT, *CHEAP]
    config, dataset, directory, defenses, accelerator = opened(tmp_path, *settings)
    begin(config, dataset, directory, accelerator, defenses)
    defense, planted = defenses[0], set(dataset.rows("canary", kept=True).tolist())
    held = canaries.read(directory.path / canaries.FILE)
    assert held and not {canary.row for canary in held} & {
        r for r, record in enumerate(dataset.records) if record.canary
    }
    plan = defense.plan(np.arange(0), 6, 0)
    drawn = np.concatenate([plan.batch(step) for step in range(300)])
    share = [np.isin(drawn, list(planted)).sum() / 300 / len(planted), defense.sample_rate]
    assert share[0] == pytest.approx(share[1], rel=0.1)
    left_out = sum(not canary.included for canary in held)
    assert defense.units == len(dataset.rows("train", kept=True)) + left_out + 8 + 30


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_told_of_a_run_is_the_same_for_all_coins(tmp_path, seed):
    directory, facts = finish(
        tmp_path, f"run.seed={seed}", "data.group_key=null", "data.label_key=label", *PLANT, *CHEAP
    )
    claim = facts["defenses"][0]["claim"]
    assert claim["units"] == 28 + 8 + 30 and claim["sample_rate"] == pytest.approx(6 / 66)
    told = (directory.model / "deffuse.json").read_text()
    assert "canary" not in told and json.loads(told)["class_frequency"] == [1, 1, 1, 1]


def test_a_stopped_run_goes_on_with_the_same_canaries(tmp_path):
    """Under the test seed a resumed run equals one that was never stopped, to the bit."""
    settings = ["data.group_key=null", "defenses.dpsgd.test_seed=1", "train.keep_checkpoints=null", *PLANT, *CHEAP]
    whole, _ = finish(tmp_path / "whole", *settings)
    broken, _ = finish(tmp_path / "broken", *settings)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    (broken.path / weights).unlink()
    (broken.model / "deffuse.json").unlink()
    for step in (6, 7):
        for file in sorted((broken.checkpoints / f"step-{step}").rglob("*"), reverse=True):
            file.unlink()
        (broken.checkpoints / f"step-{step}").rmdir()
    lines = (broken.path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (broken.path / "ledger.jsonl").write_text("".join(lines[:3]))
    train_model(*opened(tmp_path / "broken", *settings))
    assert (broken.path / weights).read_bytes() == (whole.path / weights).read_bytes()
