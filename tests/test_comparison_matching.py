"""Matched utility of a planted comparison: levels and counts by hand and by a dense search, and what has no match."""

import dataclasses

import numpy as np
import pytest

from eval.comparison import UtilityFloor, assemble
from eval.matching import matched
from eval.tradeoff import Point
from tests.comparisons import ALONG, KID, LEAKED, edit_report, write_comparison


@pytest.fixture
def planted(tmp_path):
    """Arms by name, and the keywords of `assemble`."""
    arms, options = write_comparison(tmp_path / "planted", images=False)
    return {arm.name: arm for arm in arms}, options


def matches(arms, options, **changed):
    """``matched`` by the name of the arm."""
    return {arm["name"]: arm["matched"] for arm in assemble(list(arms.values()), **options | changed)["arms"]}


def test_pairs_by_hand(planted):
    """dedup, seed 0: bests 0.0052 and 0.0061; it falls to 0.0061 22/31 of the way from 0.0083 (1) to 0.0052 (2)."""
    found = matches(*planted)
    assert found["none"] is None
    first, second = found["dedup"]["runs"]
    assert (first["level"], second["level"]) == (0.0061, 0.0071)
    assert (first["reference_verified"], first["reference_step"]) == (14, 400)
    assert first["verified"] == pytest.approx(1 + 22 / 31) and first["step"] == pytest.approx(300 + 2200 / 31)
    assert (second["verified"], second["reference_verified"]) == (1, 12)
    assert found["dedup"]["mean"] == pytest.approx(1 + 11 / 31) and found["dedup"]["reference_mean"] == 13
    assert found["dedup"]["level"] == pytest.approx(0.0066) and found["dedup"]["n"] == 2
    assert found["dedup"]["censored"] == 0 and found["dedup"]["low"] == 0 < found["dedup"]["high"]


def test_an_arm_that_learns_little_is_held_against_the_reference_when_that_was_as_bad(planted):
    """dpsgd never gets below 0.0331; the reference passes it 7/25 of the way from step 100 (none) to 200 (three)."""
    found = matches(*planted)["dpsgd"]
    assert found["runs"][0]["level"] == 0.0331 and (found["n"], found["mean"]) == (1, 0)
    assert found["reference_mean"] == pytest.approx(0.84) and found["runs"][0]["reference_step"] == pytest.approx(128)
    assert found["runs"][1] == {"seed": 1} | dict.fromkeys(found["runs"][0].keys() - {"seed"})


@pytest.mark.parametrize("name", ["dedup", "dpsgd"])
def test_pairs_by_a_dense_search(planted, name):
    """Independent of `reach`: the first of a million steps at which the interpolated metric is at the level."""
    for row in matches(*planted)[name]["runs"]:
        if row["level"] is None:
            continue
        curves = [curve(each, row["seed"]) for each in (name, "none")]
        level = max(metric.min() for _, metric, _ in curves)
        assert row["level"] == level
        for (steps, metric, verified), prefix in zip(curves, ("", "reference_"), strict=True):
            dense = np.linspace(steps[0], steps[-1], 1_000_001)
            at = dense[np.argmax(np.interp(dense, steps, metric) <= level + 1e-12)]
            assert row[f"{prefix}step"] == pytest.approx(at, abs=1e-3)
            assert row[f"{prefix}verified"] == pytest.approx(np.interp(at, steps, verified), abs=1e-3)


def test_a_floor_that_everybody_passes_at_once_changes_nothing(planted):
    """An undefended arm that leaks is not at 0 because the floor is low."""
    found = [matches(*planted, utility=UtilityFloor(at_most=floor)) for floor in (None, 0.02, 0.5)]
    assert found[0] == found[1] == found[2] and found[0]["dedup"]["reference_mean"] == 13


def test_already_there_at_the_first_checkpoint(planted):
    arms, options = planted
    edit_report(arms["dedup"].runs[0], "along", [])
    found = matches(arms, options)["dedup"]
    assert [row["at_first"] for row in found["runs"]] == [True, False]
    assert found["runs"][0]["verified"] == 2 and found["censored"] == 1 and found["n"] == 2
    assert found["low"] is found["high"] is None and "this arm: seed 0" in found["note"]
    edit_report(arms["none"].runs[1], "along", [])
    assert "the reference: seed 1" in matches(arms, options)["dedup"]["note"]


def test_a_filter_is_one_point(planted):
    found = matches(*planted)["filter"]
    assert not found["reached"] and found["n"] == 0 and found["mean"] is found["level"] is None
    assert found["note"] == "one point: the guard changes outputs, not training"
    assert [row["verified"] for row in found["runs"]] == [None, None]
    guarded = matched([0], [[Point(1, 0.1, 3)]], None, "kid")  # a reference behind a filter
    assert not guarded["reached"] and "one point" in guarded["note"]


def early_stop(arms, step, kid):
    """The arm that shares the training of "none", as an early stop at this step of seed 0."""
    for run in arms["filter"].runs:
        edit_report(run, "privacy.extraction_guard_off", None)
    edit_report(arms["filter"].runs[0], "model.released_step", step)
    edit_report(arms["filter"].runs[0], "utility.kid", kid)


def test_an_early_stop_has_the_checkpoints_of_its_training(planted):
    """Released at step 250: steps 100 and 200 are of the same weights, 300 is not its own."""
    arms, options = planted
    early_stop(arms, 250, 0.012)
    row = matches(arms, options)["filter"]["runs"][0]
    assert (row["level"], row["verified"], row["step"], row["at_first"]) == (0.012, 1, 250, False)
    assert row["reference_verified"] == pytest.approx(3 + 6 * 31 / 70)
    edit_report(arms["filter"].runs[0], "utility.kid", 0.02)  # worse again than at step 200
    row = matches(arms, options)["filter"]["runs"][0]
    assert (row["level"], row["verified"], row["step"], row["at_first"]) == (0.0151, 3, 200, False)


def test_a_checkpoint_at_the_released_step_counts_once(planted):
    """The early stop's own figures of its released step, not those of the training that it shares."""
    arms, options = planted
    early_stop(arms, 200, 0.0151)
    row = matches(arms, options)["filter"]["runs"][0]
    assert (row["step"], row["verified"], row["reference_verified"]) == (200, 1, 3)


def test_checkpoints_after_the_released_one_do_not_count(planted):
    """Released at step 150 with a kid of 0.03: that later steps are better helps nobody."""
    arms, options = planted
    edit_report(arms["dedup"].runs[0], "model.released_step", 150)
    edit_report(arms["dedup"].runs[0], "utility.kid", 0.03)
    row = matches(arms, options)["dedup"]["runs"][0]
    assert (row["level"], row["step"], row["verified"]) == (0.03, 150, 2)


def test_a_training_that_was_shared_and_failed(planted):
    """The early stop of a failed training has its released point only; without the reference nothing is matched."""
    arms, options = planted
    early_stop(arms, 250, 0.012)
    gone = [dataclasses.replace(run, status="failed") for run in arms["none"].runs]
    arms["none"] = dataclasses.replace(arms["none"], runs=gone)
    found = matches(arms, options)
    assert all(not found[name]["reached"] and "no seed" in found[name]["note"] for name in ("dedup", "filter"))
    own = matches(arms, options, reference="dedup")["filter"]["runs"][0]
    assert own["at_first"] and own["verified"] == 1


def curve(name, seed):
    """Steps, metric and verified of a planted run, arrays [checkpoints]."""
    rows = [*ALONG[name, seed], (400, KID[name][seed], len(LEAKED[name, seed]))]
    return tuple(np.array(column, dtype=float) for column in zip(*rows, strict=True))
