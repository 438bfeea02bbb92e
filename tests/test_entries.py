"""Entries, risks and curves of membership attacks: against counts by hand."""

import json

import numpy as np
import pytest

from eval.entries import Scores, curves, entries, risks
from tests.test_exchangeable import candidates


def scores(values, name="loss", **options):
    return Scores(name, np.asarray(values, np.float64), 1, {"draws": 1}, **options)


def area(members, nonmembers):
    """Share of pairs in order, equal ones half."""
    pairs = np.asarray(members)[:, None] - np.asarray(nonmembers)
    return float((pairs > 0).mean() + (pairs == 0).mean() / 2)


def test_an_entry_holds_the_figures_of_its_scores():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(1, 1, 200), random.normal(0, 1, 1000)]).round(2)
    (entry,) = entries(scores(values, more={"vs_loss": None}), candidates(200, 1000))
    assert entry["unit"] == "record" and (entry["members"], entry["nonmembers"]) == (200, 1000)
    assert entry["auc"] == pytest.approx(area(values[:200], values[200:]))
    assert entry["auc_ci95"][0] < entry["auc"] < entry["auc_ci95"][1]
    threshold = np.sort(values[200:])[::-1][10]
    assert entry["tpr_at_fpr"] == {"0.01": pytest.approx((values[:200] > threshold).mean()), "0.001": None}
    assert entry["tpr_ci95"]["0.01"][0] < entry["tpr_at_fpr"]["0.01"] < entry["tpr_ci95"]["0.01"][1]
    assert entry["tpr_ci95"]["0.001"] is None and "Clopper" in entry["tpr_method"]["0.01"]
    assert entry["access"] == "weights" and entry["settings"] == {"draws": 1} and "vs_loss" in entry
    json.dumps(entry, allow_nan=False)


def test_patients_have_an_entry_of_their_own_with_the_mean_of_their_records():
    random = np.random.default_rng(1)
    who = candidates(60, 90, per_block=3, grouped=True)
    values = random.normal(size=150)
    record, group = entries(scores(values), who)
    assert (group["unit"], group["members"], group["nonmembers"]) == ("group", 20, 30)
    means = values.reshape(50, 3).mean(1)
    assert group["auc"] == pytest.approx(area(means[:20], means[20:]))
    assert record["auc"] == pytest.approx(area(values[:60], values[60:])) and "20 + 30 groups" in record["auc_method"]


def test_scores_that_are_no_numbers_give_no_figures():
    values = np.r_[np.nan, np.arange(9.0)]
    (entry,) = entries(scores(values), candidates(5, 5))
    assert entry["auc"] is None and entry["auc_ci95"] is None and "no numbers" in entry["auc_method"]
    assert curves([scores(values)], candidates(5, 5))[1] == []
    json.dumps(entry, allow_nan=False)


def test_risk_is_the_false_positive_rate_at_which_a_record_is_recognised():
    who = candidates(3, 4)
    columns, rows = risks([scores([5, 2, 2.5, 1, 2, 2, 4]), scores(np.arange(7), "pia")], who)
    assert columns == ["record_id", "picture", "member", "group", "loss", "loss_fpr", "pia", "pia_fpr"]
    assert [row["loss_fpr"] for row in rows] == [0, 0.75, 0.25, 1, 0.75, 0.75, 0.25]
    assert [row["member"] for row in rows] == [True] * 3 + [False] * 4 and rows[1]["record_id"] == "1"
    assert [row["pia_fpr"] for row in rows] == [1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_curves_have_the_area_of_the_entry_and_no_idle_points():
    who, random = candidates(40, 60, per_block=2, grouped=True), np.random.default_rng(2)
    attack = scores(random.normal(size=100).round(1))
    columns, rows = curves([attack], who)
    assert columns == ["attack", "unit", "fpr", "tpr"]
    for entry in entries(attack, who):
        points = np.array([(row["fpr"], row["tpr"]) for row in rows if row["unit"] == entry["unit"]])
        assert points[0].tolist() == [0, 0] and points[-1].tolist() == [1, 1]
        assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(entry["auc"])
        steps = np.diff(points, axis=0) > 0
        assert not (~steps[:-1] & ~steps[1:]).any()  # no two steps in a row lead in the same direction
