"""The table of single pictures: every figure against loops or a planted truth."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from eval.extraction import Extraction, ExtractionConfig, PictureFindings, untargeted
from eval.risk import COLUMNS, membership_attack, outlierness, risk_report, risk_table
from tests.reference import brute_force, fabricated


def found(l2, score, verified) -> Extraction:
    """An extraction that has found this of each picture."""
    names = [f"g{index}" for index in range(len(l2))]
    score = None if score is None else np.asarray(score, dtype=float)
    return Extraction(
        {}, [], PictureFindings(np.asarray(l2, dtype=float), names, score, np.asarray(verified, dtype=bool))
    )


def asked(ids, fpr, member=True):
    return [
        {"record_id": name, "picture": 0, "member": member, "group": "", "loss": -rate, "loss_fpr": 0.5,
         "loss-strong": -rate, "loss-strong_fpr": rate}
        for name, rate in zip(ids, fpr, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [4, 14])
def test_outlierness_equals_loops_over_other_pictures(count):
    images = fabricated.blobs(1, count, side=8)
    images = np.concatenate([images, fabricated.noisy(images[:2], 0.02)])  # second copies of two pictures
    picture = np.array([*range(count), 0, 1]) + 7
    values = outlierness(fabricated.pictures(images, picture))
    for number in range(count):
        near = [row[0] for row in brute_force.distinct(images[number], images, picture) if row[1] != number + 7]
        assert values[number] == pytest.approx(np.mean(near[:10]), rel=1e-5)


def test_a_lonely_picture_and_equal_pictures():
    assert np.isnan(outlierness(fabricated.pictures(fabricated.blobs(1, 1)))).all()
    same = np.repeat(fabricated.blobs(1, 1), 15, axis=0)
    assert outlierness(fabricated.pictures(same)).tolist() == [0] * 15


def test_every_column_is_the_planted_one():
    images = fabricated.blobs(2, 6)
    images = np.concatenate([images, images[[3]]])  # record r6 is a second copy of picture 3
    training = fabricated.pictures(images, [0, 1, 2, 3, 4, 5, 3], group=["a", "a", "b", "c", "d", "e", "c"])
    extraction = found([0.3, 0.01, 0.2, 0.02, 0.4, np.inf], [1.5, 0.1, 1.2, 0.2, 1.8, np.inf], [0, 1, 0, 1, 0, 0])
    membership = asked(["r0", "r1", "r2", "r6"], [0.0, 0.01, 0.5, 0.0]) + asked(["h0"], [0.9], member=False)
    inpainting = [{"record_id": "r6", "member": True, "l2": 0.07}, {"record_id": "h0", "member": False, "l2": 0.2}]
    metrics = [
        {"name": "ssim", "threshold": 0.9, "direction": ">"},
        {"name": "tiled_l2", "threshold": 0.1, "direction": "<"},
        {"name": "sscd", "threshold": None, "direction": ">"},
    ]
    judged = [
        {"record_id": "r1", "ssim": 0.95, "tiled_l2": 0.3, "sscd": None},
        {"record_id": "r1", "ssim": 0.95, "tiled_l2": 0.05, "sscd": None},
        {"record_id": "r6", "ssim": 0.5, "tiled_l2": 0.02, "sscd": 0.99},
        {"record_id": "r5", "ssim": None, "tiled_l2": 0.1, "sscd": None},
    ]
    rows = risk_table(training, extraction, membership, inpainting, ({"metrics": metrics}, judged))
    assert [set(row) for row in rows] == [set(COLUMNS)] * 6
    # verified first, of them the one that membership recognises at the lower rate; then r0, r2, r4 and r5
    assert [row["record_id"] for row in rows] == ["r3", "r1", "r0", "r2", "r4", "r5"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    by_id = {row["record_id"]: row for row in rows}
    assert by_id["r3"] | {"outlierness": 0} == {
        "rank": 1, "record_id": "r3", "group": "c", "copies": 2, "outlierness": 0, "l2": 0.02, "generation": "g3",
        "adaptive_score": 0.2, "verified": True, "membership": 0.0, "membership_fpr": 0.0, "inpainting_l2": 0.07,
        "copy_metrics": "tiled_l2",
    }  # fmt: skip
    assert by_id["r1"]["copy_metrics"] == "ssim tiled_l2" and by_id["r5"]["copy_metrics"] == ""
    assert by_id["r5"]["l2"] is None and by_id["r4"]["membership_fpr"] is None and by_id["r0"]["inpainting_l2"] is None
    json.dumps(risk_report(rows, training, membership), allow_nan=False)


def test_what_was_not_run_is_null():
    training = fabricated.pictures(fabricated.blobs(2, 12))
    row = risk_table(training, None)[0]
    assert {name for name, value in row.items() if value is None} == set(COLUMNS) - {
        "rank", "record_id", "copies", "outlierness",
    }  # fmt: skip
    report = risk_report(risk_table(training, None), training)
    assert report["by_outlierness"][0]["verified"] is None and report["by_copies"][0]["recognised"] is None
    assert report["correlation"] == [] and report["membership_attack"] is None
    prompted = risk_table(training, found(np.linspace(0.1, 0.5, 12), None, [False] * 12))
    assert [row["l2"] for row in prompted] == sorted(row["l2"] for row in prompted)


def test_the_strongest_known_attack_stands_for_a_picture():
    row = {"record_id": "r", "member": True, "loss": 1.0, "loss_fpr": 0.1, "loss-strong": 1.0, "loss-strong_fpr": 0.1}
    assert membership_attack([row]) == "loss-strong"
    assert membership_attack([row | {"lira-strong": 1.0, "lira-strong_fpr": 0.0}]) == "lira-strong"
    assert membership_attack([{"record_id": "r", "member": True, "pia": 1.0, "pia_fpr": 0.1}]) == "pia"


def crowd(count: int = 120, seed: int = 0):
    """Pictures of which the unusual are extracted: noise on a common ground, more of it the later."""
    random = np.random.default_rng(seed)
    ground = fabricated.blobs(seed, 1, side=8)[0].astype(float)
    noise = random.normal(size=(count, 1, 8, 8)) * np.linspace(2, 60, count)[:, None, None, None]
    return np.clip(np.rint(ground + noise), 0, 255).astype(np.uint8)


def test_outliers_that_were_extracted_show_in_tenths_and_correlation():
    training = fabricated.pictures(crowd())
    score = np.linspace(2, 0.2, 120) + 0.2 * np.random.default_rng(1).normal(size=120)
    verified = np.arange(120) >= 96
    rows = risk_table(training, found(score / 5, score, verified))
    report = risk_report(rows, training)
    tenths = report["by_outlierness"]
    assert [part["pictures"] for part in tenths] == [12] * 10
    assert all(a["to"] <= b["from"] for a, b in zip(tenths, tenths[1:], strict=False))
    assert sum(part["verified"]["count"] for part in tenths) == 24
    assert tenths[-1]["verified"]["rate"] > 0.8 > 0.1 > tenths[0]["verified"]["rate"]
    assert tenths[0]["verified"]["method"].startswith("rule of three")
    result = next(row for row in report["correlation"] if (row["x"], row["y"]) == ("outlierness", "adaptive_score"))
    by_id = {row["record_id"]: row for row in rows}
    expected = spearmanr([by_id[f"r{i}"]["outlierness"] for i in range(120)], score)
    assert result["rho"] == pytest.approx(expected.statistic) and result["rho"] < -0.8 and result["p_value"] < 1e-9
    assert report["top"] == [{key: row[key] for key in row if key != "group"} for row in rows[:20]]
    assert all(row["verified"] for row in report["top"])


def test_copies_and_recognised_members_are_counted_by_hand():
    images = fabricated.blobs(3, 20)
    images = np.concatenate([images, np.repeat(images[:4], 2, axis=0)])
    training = fabricated.pictures(images, [*range(20), 0, 0, 1, 1, 2, 2, 3, 3])
    rows = risk_table(
        training, found([0.1] * 20, [0.5] * 20, np.arange(20) < 3), members := asked([f"r{i}" for i in range(20)], [0.0] * 5 + [0.2] * 15)
    )  # fmt: skip
    report = risk_report(rows, training, members + asked([f"h{i}" for i in range(1000)], [0.5] * 1000, member=False))
    assert report["recognised_fpr"] == 0.01
    one, three = report["by_copies"]
    assert (one["copies"], one["pictures"], one["verified"]["count"], one["recognised"]["count"]) == (1, 16, 0, 1)
    assert (three["copies"], three["pictures"], three["verified"]["count"], three["recognised"]["count"]) == (
        3,
        4,
        3,
        4,
    )
    few = risk_report(rows, training, members + asked([f"h{i}" for i in range(99)], [0.5] * 99, member=False))
    assert few["recognised_fpr"] is None and few["by_copies"][0]["recognised"] is None


def test_it_takes_what_the_extraction_attack_gives():
    training = fabricated.blobs(4, 30)
    generations = np.concatenate([fabricated.noisy(training[:3], 0.01), fabricated.blobs(5, 10)])
    pictures = fabricated.pictures(training)
    attack = untargeted(generations, pictures, None, ExtractionConfig(permutations=9), exchangeable=True, seed=0)
    rows = risk_table(pictures, attack)
    assert {row["record_id"] for row in rows[:3]} == {"r0", "r1", "r2"} and all(row["verified"] for row in rows[:3])
    assert {row["record_id"]: row["generation"] for row in rows[:3]} == {"r0": "000000", "r1": "000001", "r2": "000002"}
