"""Canaries in the data: which rows there are, who may see them, and that nothing else changes."""

import csv
import math

import numpy as np
import pytest
from accelerate import Accelerator

from defenses.base import Defense
from defenses.errors import UserError
from tests.small import opened
from tests.smalldp import refused
from train.canaryconfig import CanariesConfig
from train.data import Dataset, prepare
from train.dataconfig import DataConfig
from train.manifest import summary, write_manifest
from train.phantom import PhantomConfig
from train.planting import drawn, heldout_blocks
from train.records import class_frequency, class_names, labels_of, pool_of, toss, trained_rows
from train.stage import begin

MANY = 120  # held-out pictures, enough to plant some of
NOISE = ["data.canaries.copies=[1,3]", "data.canaries.per_copies=2", "data.canaries.pool=32"]


def config(canaries: CanariesConfig | None, heldout: int = 6, **settings) -> DataConfig:
    phantom = PhantomConfig(pictures=24, copied=2, copies=3, outliers=2, heldout=heldout, calibration=2)
    return DataConfig(image_size=16, phantom=phantom, canaries=canaries, **settings)


def prepared(folder, canaries: CanariesConfig | None, heldout: int = 6, **settings) -> Dataset:
    return prepare(config(canaries, heldout, **settings), folder, Accelerator(cpu=True))


def few(**settings) -> CanariesConfig:
    return CanariesConfig(**({"copies": [1, 3], "per_copies": 2, "pool": 32} | settings))


def test_noise_has_as_many_rows_as_asked_for_and_is_uniform(tmp_path):
    data = prepared(tmp_path / "with", few(coins=5), group_key="patient", label_key="label")
    rows = {
        role: [r for r, record in enumerate(data.records) if record.canary == role]
        for role in ("planted", "coin", "pool")
    }
    assert {role: len(found) for role, found in rows.items()} == {"planted": 2 + 6, "coin": 5, "pool": 32}
    names = [data.records[row].source for row in rows["planted"]]
    assert names == [f"canary:noise/{each}" for each in "0000 0001 0002 0002/1 0002/2 0003 0003/1 0003/2".split()]
    assert (data.images[rows["planted"][2]] == data.images[rows["planted"][3:5]]).all()
    pixels = data.images[[*rows["pool"], *rows["coin"], *rows["planted"][:3]]].astype(float)
    assert len(np.unique(pixels.reshape(40, -1), axis=0)) == 40
    assert pixels.mean() == pytest.approx(127.5, abs=3) and pixels.std() == pytest.approx(256 / math.sqrt(12), rel=0.02)
    groups = [data.records[row].group for row in rows["planted"]]
    assert groups == [name[:17] for name in names]
    labels = {record.label for record in data.records if record.canary}
    assert len(labels) > 1 and labels <= {record.label for record in data.records if record.split == "train"}


def test_all_else_is_as_it_would_be_without(tmp_path):
    plain, data = prepared(tmp_path / "plain", None), prepared(tmp_path / "with", few(coins=5))
    count = len(plain.records)
    ours = [{**vars(record), "group": None} for record in data.records[:count]]
    assert ours == [{**vars(record), "group": None} for record in plain.records]
    assert (data.images[:count] == plain.images).all() and len(data.images) == len(data.records) == count + 8 + 5 + 32
    assert len({record.record_id for record in data.records}) == len(data.records)
    assert not {r.cluster for r in data.records[count:]} & {r.cluster for r in plain.records}
    known, now = summary(plain), summary(data)
    assert known.pop("canaries") is None
    assert now.pop("canaries") == {"pictures": 4, "records": 8, "coins": 5, "pool": 32, "set_aside": 0}
    assert known == now


def test_more_canaries_leave_the_others_as_they_are(tmp_path):
    one, two = prepared(tmp_path / "one", few(coins=3)), prepared(tmp_path / "two", few(coins=9, pool=40))
    picture = {record.source: data.images[row] for data in [one] for row, record in enumerate(data.records)}
    again = {record.source: two.images[row] for row, record in enumerate(two.records)}
    assert picture.keys() < again.keys() and all((picture[name] == again[name]).all() for name in picture)
    other = prepared(tmp_path / "other", few(coins=3, seed=1))
    assert all(a.pixel_hash != b.pixel_hash for a, b in zip(one.records, other.records, strict=True) if a.canary)


def test_held_out_pictures_leave_their_split_with_their_patients(tmp_path):
    plain = prepared(tmp_path / "plain", None, MANY, group_key="patient")
    data = prepared(tmp_path / "with", few(kinds=["heldout"], coins=3), MANY, group_key="patient", label_key="label")
    counts = summary(data)
    set_aside = counts["canaries"]["set_aside"]
    assert counts["canaries"] == {"pictures": 4, "records": 8, "coins": 3, "pool": 0, "set_aside": set_aside}
    assert (
        counts["found"] == counts["train"] + counts["calibration"] + counts["heldout"] + set_aside == len(plain.records)
    )
    stayed = {data.records[row].block for row in data.rows("heldout")}
    planted = [(row, record) for row, record in enumerate(data.records) if record.source.startswith("canary:")]
    assert len(planted) == 11 and len({record.block for _, record in planted}) == 7
    assert not stayed & {record.block for _, record in planted}
    origin = {
        record.reason.rpartition(" ")[2]: row
        for row, record in enumerate(data.records)
        if "planted as" in record.reason
    }
    for row, record in planted:
        source = origin[record.group]
        assert (data.images[row] == data.images[source]).all() and data.records[source].label == record.label
    assert all(not data.records[row].kept and data.records[row].canary == "origin" for row in origin.values())
    pool = drawn(data.records, "heldout", few(kinds=["heldout"], coins=3))[7:]
    assert set(pool.tolist()) <= set(data.rows("heldout").tolist())
    assert len({data.records[row].block for row in pool}) == len(pool) == min(32, len(stayed))


def test_the_choice_among_held_out_patients_is_random_and_the_seeds(tmp_path):
    plain = prepared(tmp_path, None, MANY, group_key="patient")
    order, other = heldout_blocks(plain.records, 0), heldout_blocks(plain.records, 1)
    assert sorted(order) == sorted(other) and order != other and order != sorted(order)
    assert sorted(row for block in order for row in block) == plain.rows("heldout").tolist()


def test_both_kinds_at_once(tmp_path):
    settings = few(kinds=["heldout", "noise"], copies=[2], per_copies=1)
    data = prepared(tmp_path, settings, MANY)
    assert drawn(data.records, "noise", settings).size == 33
    assert [data.records[row].source for row in drawn(data.records, "heldout", settings)[:1]] == ["canary:heldout/0000"]
    assert len(trained_rows(data)) == len(data.rows("train")) + 4


def test_too_few_held_out_pictures_are_refused(tmp_path):
    settings = few(kinds=["heldout"], coins=100)
    refused("data.canaries.kinds", lambda: prepared(tmp_path, settings), "104 of", "32")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("kinds", {"kinds": []}),
        ("kinds", {"kinds": ["noise", "noise"]}),
        ("kinds", {"kinds": ["nois"]}),
        ("copies", {"copies": [0, 1]}),
        ("copies", {"copies": [2, 2]}),
        ("copies", {"copies": []}),
        ("per_copies", {"per_copies": 0}),
        ("coins", {"coins": -1}),
        ("coins", {"coins": 1}),
        ("pool", {"pool": 31}),
        ("seed", {"seed": -1}),
    ],
)
def test_settings_out_of_range(key, settings):
    with pytest.raises(UserError) as caught:
        CanariesConfig(**settings)
    assert caught.value.key == f"data.canaries.{key}"


def test_a_model_of_somebody_else_has_no_canaries(tmp_path):
    refused("data.canaries", lambda: prepare(config(few()), tmp_path, Accelerator(cpu=True), all_train=True), "planted")


def test_coins_are_fair_follow_the_seed_and_are_logged(tmp_path):
    data = prepared(tmp_path / "data", few(coins=400))
    coins = [record for record in data.records if record.canary == "coin"]
    toss(data, 3)
    kept = [record.kept for record in coins]
    assert abs(sum(kept) - 200) < 40  # four standard deviations
    write_manifest(data, tmp_path / "manifest.csv")
    with (tmp_path / "manifest.csv").open(newline="") as file:
        lines = {line["record_id"]: line for line in csv.DictReader(file)}
    assert {(lines[each.record_id]["kept"], lines[each.record_id]["reason"]) for each in coins} == {
        ("true", ""),
        ("false", "canary: left out by coin"),
    }
    again = Dataset.load(tmp_path / "data")
    toss(again, 3)
    assert [record.kept for record in again.records if record.canary == "coin"] == kept
    other = Dataset.load(tmp_path / "data")
    toss(other, 4)
    same = [a == record.kept for a, record in zip(kept, (r for r in other.records if r.canary == "coin"), strict=True)]
    assert abs(sum(same) - 200) < 40


def test_training_sees_them_and_nothing_else_does(tmp_path):
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, *NOISE, "data.canaries.coins=20", "data.label_key=label", "defenses.dedup={}"
    )
    ordinary, trained = dataset.rows("train", kept=True), trained_rows(dataset)
    planted = np.setdiff1d(trained, ordinary)
    assert (
        len(ordinary) == 24 < len(dataset.rows("train"))
    )  # the copies of the phantom went, those of the canaries stayed
    assert sum(dataset.records[row].canary == "planted" for row in planted) == 8
    assert 0 < sum(dataset.records[row].canary == "coin" for row in planted) < 20
    assert np.array_equal(pool_of(dataset, 0).rows, ordinary)
    assert not {
        dataset.records[row].canary for split in ("train", "calibration", "heldout") for row in dataset.rows(split)
    } - {""}
    names = class_names(dataset, "label")
    assert class_frequency(dataset, names).sum() == 24 and len(labels_of(dataset, planted, names)) == len(planted)
    seen = []

    class Witness(Defense):
        name = "witness"

        def begin(self, context):
            seen.append(context)

        def claim(self):
            return {}

    begin(config, dataset, directory, accelerator, [Witness()])
    assert np.array_equal(seen[0].pool.rows, ordinary) and np.array_equal(seen[0].planted, planted)
    assert seen[0].left_out == 20 - (len(planted) - 8)
