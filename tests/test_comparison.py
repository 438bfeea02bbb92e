"""comparison.json of a planted comparison: copies of the reports' numbers, derived ones by hand, and what is refused."""

import csv
import dataclasses
import json
import shutil

import pytest
from scipy import stats

from defenses.errors import UserError
from eval.arms import numbers
from eval.comparison import assemble
from tests.comparisons import ERROR, KID, LEAKED, edit_report, rewrite, write_comparison


@pytest.fixture
def planted(tmp_path):
    """Arms by name, and the keywords of `assemble`."""
    folder = tmp_path / "planted"
    arms, options = write_comparison(folder, images=False)
    return {arm.name: arm for arm in arms}, options


@pytest.fixture
def compared(planted):
    """comparison.json, its arms by name."""
    arms, options = planted
    result = assemble(list(arms.values()), **options)
    json.dumps(result, allow_nan=False)
    return result, {arm["name"]: arm for arm in result["arms"]}


def at(report, path):
    """Value at a dotted path whose keys may themselves hold a dot ("at_l2.0.05")."""
    if path == "":
        return report
    if isinstance(report, list):
        head, _, rest = path.partition(".")
        return at(report[int(head)], rest)
    key = max((key for key in report if path == key or path.startswith(f"{key}.")), key=len)
    return at(report[key], path[len(key) + 1 :])


def test_every_number_of_a_run_is_in_its_report(planted, compared):
    for name, arm in planted[0].items():
        for run, told in zip(arm.runs, compared[1][name]["runs"], strict=True):
            if run.status != "done":
                assert told["values"] is told["by_copies"] is told["guard_off"] is None and told["along"] == []
                continue
            report = json.loads((run.directory / "report.json").read_text())
            assert len(told["values"]) > 50
            assert all(at(report, path) == value for path, value in told["values"].items())
            assert told["by_copies"] == report["privacy"]["extraction"]["by_copies"]
            for mine, theirs in zip(told["along"], report["along"], strict=True):
                assert mine["step"] == theirs["step"] and mine["images_seen"] == theirs["images_seen"]
                assert mine["control"] == theirs["extraction"]["control"]["verified"]
                for metric in ("kid", "fid", "precision", "recall"):
                    assert mine[metric] == theirs["utility"][metric]
                assert all(mine[key] == theirs["extraction"][key] for key in ("verified", "candidates", "rate"))
            if name == "filter":
                off = report["privacy"]["extraction_guard_off"]
                assert all(told["guard_off"][key] == off[key] for key in ("verified", "candidates", "by_copies"))
                assert told["guard_off"]["kid"] == report["utility"]["guard_off"]["kid"]
                correlated = off["by_correlation"]
                assert told["guard_off"]["by_correlation_candidates"] == correlated["candidates"]
                for key, path in (("train", "verified_train_m"), ("control", "verified"), ("n", "n")):
                    assert told["guard_off"][f"by_correlation_{key}"] == correlated["control"][path]
                assert told["findings"] == [{"name": "filter", **report["defenses"][0]["findings"]}]


def test_values_hold_what_the_page_shows(compared):
    values = compared[1]["filter"]["runs"][0]["values"]
    for path in (
        "verified verified_units candidates rate rate_ci95.0 rate_ci95.1 at_l2.0.05 control.verified control.n "
        "control.verified_train_m control.p_value control.background by_correlation.verified by_correlation.control.n"
    ).split():
        assert f"privacy.extraction.{path}" in values
    for path in "verified candidates control.verified control.verified_train_m control.n".split():
        assert f"privacy.extraction.by_correlation.{path}" in values
    for path in "kid kid_std fid precision recall downstream.accuracy downstream.train_on_real.accuracy".split():
        assert f"utility.{path}" in values
    assert {"cost.train_seconds", "model.released_step", "data.removed_by_dedup"} <= values.keys()
    assert not [path for path in values if "settings" in path or "guard_off" in path or "by_copies" in path]


def test_figures_are_finite_numbers_only():
    report = {"utility": {"kid": float("nan"), "fid": float("inf"), "n": 3, "same": True, "name": "x", "none": None}}
    assert numbers(report | {"data": {"reasons": {"odd <name>": 1}}}) == {"utility.n": 3}


def test_what_an_arm_is(compared):
    result, arms = compared
    assert [arms[name]["kind"] for name in arms] == ["none", "heuristic", "dp", "heuristic"]
    assert [arms[name]["protects"] for name in arms] == ["weights", "weights", "weights", "outputs"]
    assert arms["filter"]["shares"] == "none" and arms["filter"]["runs"][1]["directory"] == "none-s1/eval/filter"
    assert arms["dpsgd"]["claims"][0]["epsilon"] == 7.913
    assert result["comparison"]["name"] == "planted" and result["comparison"]["seconds"] == 4020.5
    design = result["design"]
    assert design["seeds"] == [0, 1] and design["training_pictures"] == 24 and design["tier"] == "smoke"
    assert design["sampler"]["name"] == "ddim" and design["unit"] == "group" and result["trend"] is None


def test_the_weakest_claim_of_the_seeds_is_told(planted):
    arms, options = planted
    shutil.copytree(arms["dpsgd"].runs[0].directory, arms["dpsgd"].runs[1].directory)
    both = dataclasses.replace(
        arms["dpsgd"], runs=[arms["dpsgd"].runs[0], dataclasses.replace(arms["dpsgd"].runs[1], status="done")]
    )
    for epsilon in (8.125, None):
        claim = {"kind": "dp", "epsilon": epsilon, "delta": 1e-5}
        edit_report(both.runs[1], "defenses", [{"name": "dpsgd", "claim": claim, "findings": None}])
        found = assemble([arms["none"], both], **options)["arms"][1]["claims"]
        assert [claim["epsilon"] for claim in found] == [epsilon]


def test_every_statement_of_a_heuristic_is_kept(planted):
    arms, options = planted
    said = {"kind": "heuristic", "statement": "No checkpoint without copies was seen."}
    edit_report(arms["dedup"].runs[1], "defenses", [{"name": "dedup", "claim": said, "findings": None}])
    found = assemble(list(arms.values()), **options)["arms"][1]
    assert [(claim["statement"], claim["seeds"]) for claim in found["claims"]] == [
        ("Removes copies.", [0]),
        ("No checkpoint without copies was seen.", [1]),
    ]
    assert found["kind"] == "heuristic" and found["defenses"] == ["dedup"]


def test_mean_and_interval_over_seeds(compared):
    summary = compared[1]["none"]["summary"]
    interval = stats.ttest_1samp(KID["none"], 0).confidence_interval(0.95)
    assert summary["utility.kid"]["mean"] == pytest.approx(0.0066)
    assert (summary["utility.kid"]["low"], summary["utility.kid"]["high"]) == pytest.approx(
        (interval.low, interval.high)
    )
    verified = summary["privacy.extraction.verified"]
    assert (verified["mean"], verified["n"]) == (13, 2)
    assert (verified["low"], verified["high"]) == pytest.approx((13 - 12.7062, 13 + 12.7062), abs=1e-3)
    assert compared[1]["filter"]["summary"]["privacy.extraction.verified"]["low"] == 0  # no less than none
    assert compared[1]["dpsgd"]["summary"]["utility.kid"]["low"] is None
    assert not [path for path in summary if "p_value" in path or "ci95" in path or "_std" in path]


def test_failed_runs_are_kept(compared):
    result, arms = compared
    run = arms["dpsgd"]["runs"][1]
    assert (run["status"], run["error"], run["values"]) == ("failed", ERROR, None)
    assert arms["dpsgd"]["versus_reference"]["verified"]["differences"] == [-14, None]
    assert any("dpsgd, seed 1: failed" in sentence and ERROR in sentence for sentence in result["not_measured"])


def test_an_arm_of_which_nothing_finished(planted):
    arms, options = planted
    gone = [dataclasses.replace(run, status="missing") for run in arms["dedup"].runs]
    arms["dedup"] = dataclasses.replace(arms["dedup"], runs=gone)
    result = assemble(list(arms.values()), **options)
    json.dumps(result, allow_nan=False)
    found = result["arms"][1]
    assert found["comparable"] is None and found["kind"] is found["protects"] is None and found["why"]
    assert found["versus_reference"]["verified"]["p_value"] is None and found["summary"] == {}
    assert found["matched"]["reached"] is False and "dedup" not in str(result["fronts"])


def test_a_comparison_of_failures_only(planted):
    arms, options = planted
    gone = [
        dataclasses.replace(arm, runs=[dataclasses.replace(run, status="failed") for run in arm.runs])
        for arm in arms.values()
    ]
    result = assemble(gone, **options)
    assert len(result["not_measured"]) == 8 and result["fronts"]["weights"]["front"] == []
    assert result["arms"][0]["matched"] is None and result["arms"][1]["matched"]["level"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.train", 37),
        ("privacy.extraction.generations", 64),
        ("privacy.extraction.tier", "small"),
        ("privacy.extraction.protocol", "prompted"),
        ("privacy.extraction.settings.alpha", 0.4),
        ("privacy.extraction.sampler.steps", 50),
        ("utility.features", "inception"),
        ("utility.n_reference", 9),
        ("utility.downstream.settings.steps", 400),
    ],
)
def test_reports_that_were_not_measured_alike_are_refused(planted, field, value):
    arms, options = planted
    edit_report(arms["dedup"].runs[1], field, value)
    with pytest.raises(UserError, match=r"arm none \(seed 0\) has .*, arm dedup \(seed 1\) has ") as error:
        assemble(list(arms.values()), **options)
    assert error.value.key == field and str(value) in error.value.problem


def test_another_split_is_refused(planted):
    arms, options = planted
    rewrite(arms["dedup"].runs[0].manifest, lambda row: row | ({"split": "train"} if row["split"] == "heldout" else {}))
    with pytest.raises(UserError, match="arm none .* arm dedup") as error:
        assemble(list(arms.values()), **options)
    assert error.value.key.startswith("manifest.csv, record ")


def test_an_arm_may_lack_what_its_family_has_not(planted):
    arms, options = planted
    edit_report(arms["dedup"].runs[0], "privacy.extraction.sampler", None)
    edit_report(arms["dedup"].runs[0], "utility.downstream", None)
    found = assemble(list(arms.values()), **options)["arms"][1]["versus_reference"]["downstream.accuracy"]
    assert found["differences"] == [None, pytest.approx(0.03)]


def test_a_filter_may_withhold_images(planted):
    arms, options = planted
    edit_report(arms["filter"].runs[0], "privacy.extraction.generations", 30)
    result = assemble(list(arms.values()), **options)
    assert result["design"]["generations"] == 32
    assert any("30 of 32 generations passed" in sentence for sentence in result["not_measured"])


@pytest.mark.parametrize("change", ["gone", "broken", "nan", "count", "stranger", "manifest"])
def test_broken_files_are_refused(planted, change):
    arms, options = planted
    run = arms["dedup"].runs[0]
    report, matches = run.directory / "report.json", run.directory / "attack" / "matches.csv"
    if change == "gone":
        report.unlink()
    elif change == "broken":
        report.write_text(report.read_text()[:100])
    elif change == "nan":
        edit_report(run, "utility.kid", float("nan"))
    elif change == "count":
        rewrite(matches, lambda row: row | {"verified": "false"})
    elif change == "stranger":
        rewrite(matches, lambda row: row | {"record_id": "0123456789ab"})
    else:
        run.manifest.unlink()
    with pytest.raises(UserError) as error:
        assemble(list(arms.values()), **options)
    assert "dedup-s0" in error.value.key


@pytest.mark.parametrize(("options", "key"), [({"reference": "nobody"}, "reference"), ({"factor": "a.b"}, "factor")])
def test_wrong_arms_are_refused(planted, options, key):
    with pytest.raises(UserError) as error:
        assemble(list(planted[0].values()), **planted[1] | options)
    assert error.value.key == key


def test_different_seeds_are_refused(planted):
    arms, options = planted
    arms["dedup"] = dataclasses.replace(arms["dedup"], runs=arms["dedup"].runs[:1])
    with pytest.raises(UserError, match="seeds"):
        assemble(list(arms.values()), **options)


def test_a_factor_and_its_trend(planted):
    """Three levels given out of order, two seeds: leaks rise 0, 1.5 (dedup), 13 (none), so Page's test gives 2/36."""
    arms, options = planted
    low = arms["filter"]
    levels = [(arms["none"], 40), (low, 1), (arms["dedup"], 8)]
    edit_report(arms["none"].runs[0], "privacy.extraction.control.verified", 3)
    for run in low.runs:  # plain runs at the lowest level, on other data
        edit_report(run, "privacy.extraction_guard_off", None)
        edit_report(run, "data.clusters", 30)
        edit_report(run, "privacy.extraction.settings.n_effective", 30)
    chosen = [dataclasses.replace(arm, level=level) for arm, level in levels]
    result = assemble(chosen, **options | {"factor": "data.phantom.copies"})
    trend = result["trend"]
    assert trend["levels"] == [1, 8, 40] and trend["arms"] == ["filter", "dedup", "none"]
    assert trend["control"] == [0, 0, 1.5]
    assert trend["verified"] == [0.5, 1.5, 13] and trend["test"]["p_value"] == pytest.approx(2 / 36)
    assert trend["test"]["p_value"] == trend["test"]["smallest_p_value"]
    assert result["design"]["training_pictures"] is None and result["design"]["training_records"] == 36
    with pytest.raises(UserError, match="data.clusters"):
        assemble(chosen, **options | {"factor": "model.size"})


def test_a_factor_may_not_vary_within_an_arm(planted):
    arms, options = planted
    chosen = [dataclasses.replace(arms[name], level=level) for name, level in (("none", 1), ("dedup", 2))]
    edit_report(chosen[1].runs[1], "data.train", 37)
    with pytest.raises(UserError, match=r"arm dedup \(seed 0\) has 36, arm dedup \(seed 1\) has 37"):
        assemble(chosen, **options | {"factor": "data.phantom.copies"})


def test_levels_that_are_names_keep_their_order(planted):
    arms, options = planted
    chosen = [dataclasses.replace(arms[name], level=level) for name, level in (("none", "tiny"), ("dedup", "base"))]
    trend = assemble(chosen, **options | {"factor": "model.size"})["trend"]
    assert trend["levels"] == ["tiny", "base"] and trend["verified"] == [13, 1.5]


def test_what_was_not_measured_is_said(compared):
    said = " ".join(compared[0]["not_measured"])
    for words in ("Membership was not measured", "tier smoke", "8,192", "2 seeds", "very wide", "Pareto front"):
        assert words in said
    assert "Extraction was not measured" not in said and "floor" not in said and "hardware" not in said


def test_limits_of_times_seeds_and_crossings_are_said(planted):
    arms, options = planted
    said = " ".join(assemble(list(arms.values()), **options)["not_measured"])
    for words in ("one data set and one split", "kid_std", "comes too early", "no p-value"):
        assert words in said
    for words in ("side by side", "cost of looking", "is that cap"):
        assert words not in said
    facts = options["facts"] | {"config": {"launcher": {"parallel": 2}}}
    claim = {"kind": "dp", "epsilon": 7.9, "delta": 1e-5, "images_per_group": 4}
    stop = {"name": "early_stop", "claim": {"kind": "heuristic", "statement": "Stops."}, "findings": None}
    edit_report(arms["dpsgd"].runs[0], "defenses", [{"name": "dpsgd", "claim": claim, "findings": None}, stop])
    said = " ".join(assemble(list(arms.values()), **options | {"facts": facts})["not_measured"])
    for words in ("side by side", "cost of looking", "is that cap"):
        assert words in said


def test_other_budgets_and_machines_are_said(planted):
    arms, options = planted
    edit_report(arms["dedup"].runs[0], "model.images_seen", 12800)
    edit_report(arms["dedup"].runs[0], "run.hardware", {"cpu": "another"})
    said = " ".join(assemble(list(arms.values()), **options)["not_measured"])
    assert "Arm dedup saw 12,800 and 25,600 images in training, the reference 25,600" in said
    assert "different hardware" in said


def test_planted_leaks_agree_with_their_tables(planted):
    """The test data are consistent: verified rows of matches.csv are the pictures of LEAKED."""
    for name, arm in planted[0].items():
        for run in arm.runs:
            if run.status == "done":
                with (run.directory / "attack" / "matches.csv").open() as file:
                    assert sum(row["verified"] == "true" for row in csv.DictReader(file)) == len(LEAKED[name, run.seed])
