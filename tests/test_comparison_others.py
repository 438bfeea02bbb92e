"""Comparisons of prompted arms and of the attacks beside the main one: what is compared, what stands at which path, what is absent."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from eval import comparison_table
from eval.arms import read_training
from eval.comparison import assemble
from eval.comparison_page import render
from eval.otherattacks import ATTACKS
from eval.standings import standing, standing_guard_off
from eval.verdict import verdict
from tests.comparison_checks import check_paths, check_prose, check_rounding
from tests.comparisons import SEEDS, edit_report, write_comparison
from tests.fabricate_attacks import fabricate_attacks
from tests.test_comparison import at
from tests.test_report import Page
from train.files import write_csv

CAPTIONS = {"prompts": 12, "candidates": 9, "verified": 1, "pictures": 8, "tested": 9, "own": 1, "reason": None}
CAPTIONS |= {"training": {"prompts": 12, "candidates": 9, "tested": 11, "own": 7, "verified": 7}, "p_value": 0.0123}
CAPTIONS |= {"unit": "group", "test": "Fisher's exact test of whole units, one-sided"}
ASKED = {"losses": "trained", "prompts": "original", "rewritten_by": [], "asked_sha256": "aa" * 32}
GUARD = {"kind": "heuristic", "protects": "outputs", "statement": "Changes embeddings."}


@pytest.fixture
def planted(tmp_path):
    """Arms by name and the keywords of `assemble`, the attack prompted in all of them."""
    arms, options = write_comparison(tmp_path / "planted", images=False)
    for run in (run for arm in arms for run in arm.runs if run.status == "done"):
        report = json.loads((run.directory / "report.json").read_text())
        report["privacy"]["captions"] = dict(ASKED)
        for part in ("extraction", "extraction_guard_off"):
            if report["privacy"][part] is not None:
                report["privacy"][part] |= {"protocol": "prompted", "prompts": 12, "by_correlation": None}
                report["privacy"][part]["control"] |= {"captions": dict(CAPTIONS), "captions_reason": None}
        (run.directory / "report.json").write_text(json.dumps(report))
    return {arm.name: arm for arm in arms}, options


def compared(planted):
    result = assemble(list(planted[0].values()), **planted[1])
    json.dumps(result, allow_nan=False)
    return result, {arm["name"]: arm for arm in result["arms"]}


def edit(arm, dotted, value):
    for run in arm.runs:
        if run.status == "done":
            edit_report(run, dotted, value)


def attacked(planted, tmp_path):
    """The same with every attack beside the main one in the two runs of "none"; numbers of the seeds differ."""
    for run in planted[0]["none"].runs:
        report = json.loads((run.directory / "report.json").read_text())
        (tmp_path / f"attacks{run.seed}" / "attack").mkdir(parents=True, exist_ok=True)
        found = fabricate_attacks(tmp_path / f"attacks{run.seed}")
        found["membership"][1]["auc"] -= 0.02 * run.seed
        found["finetuning"]["weights"][1]["verified"] += 4 * run.seed
        report["privacy"] |= found
        (run.directory / "report.json").write_text(json.dumps(report))
    return compared(planted)


def test_arms_that_were_asked_alike_are_tested_pair_by_pair(planted):
    """As many units as in the untargeted comparison differ, all one way: the sign test of six."""
    found = compared(planted)[1]["dedup"]
    assert found["comparable"] is True and found["asked_otherwise"] is None
    assert found["versus_reference"]["verified"]["p_value"] == pytest.approx(binomtest(0, 6).pvalue)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("privacy.captions.asked_sha256", "bb" * 32, "seed 0: it was asked other prompts"),
        ("privacy.extraction.prompts", 11, "seed 0: it was asked 11 prompts, the reference 12"),
        ("privacy.extraction.generations", 31, "seed 0: it was asked for 31 images, the reference for 32"),
    ],
)
def test_arms_that_were_asked_otherwise_are_not_compared(planted, path, value, said):
    edit(planted[0]["dedup"], path, value)
    result, arms = compared(planted)
    found = arms["dedup"]
    assert found["comparable"] is False and found["why"].startswith(said) and found["why"] == found["asked_otherwise"]
    test = found["versus_reference"]["verified"]
    assert test["differences"] == [None, None] and test["mean"] is test["p_value"] is test["p_value_holm"] is None
    assert said in test["test"] and said in found["matched"]["note"] and not found["matched"]["reached"]
    for front in result["fronts"].values():
        assert "dedup" not in front["front"] and "none" in front["front"]
        assert next(point for point in front["points"] if point["arm"] == "dedup")["comparable"] is False
    assert found["versus_reference"]["kid"]["mean"] == pytest.approx(np.mean([0.0052, 0.0057]) - 0.0066)


def test_one_seed_asked_otherwise_is_enough(planted):
    edit_report(planted[0]["dedup"].runs[1], "privacy.captions.asked_sha256", "bb" * 32)
    assert compared(planted)[1]["dedup"]["why"].startswith("seed 1: it was asked other prompts")


@pytest.mark.parametrize(("rewritten", "alike"), [(["scrub"], False), ([], True)])
@pytest.mark.parametrize("newer", [{}, {"asked_sha256": "aa" * 32}])
def test_reports_of_an_older_version_are_judged_by_who_rewrote(planted, rewritten, alike, newer):
    for name, digest in (("none", {}), ("dedup", newer)):
        rewriters = rewritten if name == "dedup" else []
        told = {"losses": "trained", "prompts": "trained", "rewritten_by": rewriters} | digest
        edit(planted[0][name], "privacy.captions", told)
    chosen = {name: planted[0][name] for name in ("none", "dedup")}
    found = compared((chosen, planted[1]))[1]["dedup"]
    assert found["comparable"] is alike
    if not alike:
        assert "as scrub rewrote them, the reference as no defense did" in found["why"]
        assert "attack.captions=original" in found["why"]


def test_a_comparison_that_varies_the_attack_may_ask_otherwise(planted):
    arms, options = planted
    edit(arms["dedup"], "privacy.captions.asked_sha256", "bb" * 32)
    chosen = [dataclasses.replace(arms[name], level=level) for name, level in (("none", 8), ("dedup", 16))]
    found = assemble(chosen, **options | {"factor": "generate.max_prompts"})
    assert [arm["asked_otherwise"] for arm in found["arms"]] == [None, None]


@pytest.mark.parametrize(("captions", "level"), [(0.0123, "leak"), (0.2, "unclear"), (None, "leak")])
def test_an_arm_leaks_as_the_page_of_its_run_says(planted, captions, level):
    """The verdict of the comparison is that of each run's own page: hits beyond chance must be beyond the caption, too."""
    for part in ("extraction", "extraction_guard_off"):
        for name in ("none", "filter"):
            if part == "extraction" or name == "filter":
                edit(planted[0][name], f"privacy.{part}.control.captions.p_value", captions)
                edit(planted[0][name], f"privacy.{part}.control.captions.reason", None if captions else "too few")
    _, arms = compared(planted)
    assert standing(arms["none"]) == standing_guard_off(arms["filter"]) == level
    for run in planted[0]["none"].runs:
        assert verdict(json.loads((run.directory / "report.json").read_text()))["level"] == level


@pytest.mark.parametrize(
    ("stratified", "alone", "level"), [(0.03, 0, "leak"), (0.3, 0, "unclear"), (0.3, 2, "leak"), (None, 0, "leak")]
)
def test_a_control_among_equally_many_copies_decides_where_it_can(planted, stratified, alone, level):
    """The larger of both p-values; Fisher's alone where a picture that came back has no counterpart with as many copies."""
    part = {"p_value": stratified, "strata": [], "without_counterpart": {"tested": 3, "own": alone}}
    edit(planted[0]["none"], "privacy.extraction.control.captions.stratified", part)
    assert standing(compared(planted)[1]["none"]) == level


def test_the_page_shows_the_p_value_that_decides(planted):
    """Fisher's 0.0123 alone would contradict the badge: among pictures with equally many copies it is 0.3456."""
    part = {"p_value": 0.3456, "strata": [], "without_counterpart": {"tested": 3, "own": 0}}
    edit(planted[0]["none"], "privacy.extraction.control.captions.stratified", part)
    result, arms = compared(planted)
    assert standing(arms["none"]) == "unclear"
    folder = planted[0]["none"].runs[0].directory.parent
    render(folder, result, restricted=False, images=None)
    source = " ".join(Page(folder / "comparison.html").source.split())
    verdict_part = source[source.index('id="verdict"') : source.index('id="table"')]
    assert len(
        re.findall(r"by captions p = <data[^>]*>0\.012</data> \(by copies <data[^>]*>0\.35</data>\)", verdict_part)
    ) == len(SEEDS)
    assert "the larger of p (Fisher's test) and p by copies" in source


def test_missing_controls_by_captions_are_told(planted):
    edit(planted[0]["none"], "privacy.extraction.control.captions", None)
    edit(planted[0]["none"], "privacy.extraction.control.captions_reason", "the prompts are from a file")
    said = [text for text in compared(planted)[0]["not_measured"] if "captions does. There is none" in text]
    assert len(said) == 1 and said[0].endswith("the prompts are from a file.")


@pytest.mark.parametrize("claim", [{"uses_attack_score": False}, {"uses_attack_score": True}, {}])
def test_a_guard_that_does_not_use_the_score_of_the_attack_is_tested(planted, claim):
    """With the same counts behind it, the guard of another rule is a measurement: units of pictures 0 to 13 but for 5."""
    edit(planted[0]["filter"], "defenses", [{"name": "guard", "claim": GUARD | claim, "findings": None}])
    measured = claim == {"uses_attack_score": False}
    result, arms = compared(planted)
    test = arms["filter"]["versus_reference"]["verified"]
    assert arms["filter"]["protects"] == "outputs" and arms["filter"]["by_construction"] is not measured
    points = {point["arm"]: point for point in result["fronts"]["outputs"]["points"]}
    assert points["filter"]["by_construction"] is not measured
    if not measured:
        assert test["p_value"] is None and "own score" in test["test"]
        return
    training = read_training(planted[0]["none"].runs[0].manifest)
    differing = {training.unit_of[p] for p in range(14)}  # picture 5 leaks in one seed of two: its unit still differs
    assert test["units_differing"] == len(differing) == 6
    assert test["p_value"] == pytest.approx(binomtest(0, 6).pvalue)
    assert result["fronts"]["outputs"]["front"] == ["dedup", "filter"]


def test_every_number_of_another_attack_is_in_the_report(planted, tmp_path):
    _, arms = attacked(planted, tmp_path)
    for run, told in zip(planted[0]["none"].runs, arms["none"]["runs"], strict=True):
        report = json.loads((run.directory / "report.json").read_text())
        assert list(told["other_attacks"]) == list(ATTACKS)
        seen = 0
        for name, part in told["other_attacks"].items():
            if name in ("captions_guard_off", "audit"):
                assert part is None
                continue
            for path, value in part["figures"].items():
                if value is not None:
                    assert at(report, f"{part['at']}.{path}") == value
                    seen += 1
        assert seen > 40
    figures = arms["none"]["runs"][1]["other_attacks"]
    assert figures["captions"]["figures"] == {
        "training.own": 7, "training.tested": 11, "own": 1, "tested": 9, "p_value": 0.0123,
        "stratified.p_value": None, "stratified.without_counterpart.own": None,
    }  # fmt: skip
    assert figures["membership"]["at"] == "privacy.membership.1" and figures["membership"]["name"] == "lira-strong"
    assert figures["membership"]["figures"]["tpr_at_fpr.0.01"] == pytest.approx(0.4234)
    assert figures["membership_groups"]["at"] == "privacy.membership.2"
    assert figures["canaries"]["figures"]["one_run.epsilon_lower_bound"] == 0.834
    assert figures["canaries"]["figures"]["kinds.noise.by_copies.64.median"] == 8.765
    assert figures["risk"]["figures"]["by_copies.0.recognised.rate"] == pytest.approx(1 / 3)


def test_the_table_has_every_number_of_every_run(planted, tmp_path):
    """Read back as a spreadsheet would: each number of report.json at its path, none of what was not measured."""
    result, _ = attacked(planted, tmp_path)
    write_csv(tmp_path / "comparison.csv", comparison_table.COLUMNS, comparison_table.rows(result))
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["arm"], row["seed"], row["path"]) for row in rows}) == len(rows) > 700
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm.name, str(run.seed)) for arm in planted[0].values() for run in arm.runs if run.status == "done"
    }
    reports = {
        (arm.name, str(run.seed)): json.loads((run.directory / "report.json").read_text())
        for arm in planted[0].values()
        for run in arm.runs
        if run.status == "done"
    }
    for row in rows:
        assert float(row["value"]) == pytest.approx(at(reports[row["arm"], row["seed"]], row["path"]), rel=1e-5)
    paths = {row["path"] for row in rows if (row["arm"], row["seed"]) == ("none", "0")}
    assert {"privacy.membership.1.auc", "privacy.extraction.control.captions.p_value", "utility.kid"} <= paths
    assert not [row for row in rows if row["arm"] == "dedup" and row["path"].startswith("privacy.membership")]


def test_mean_and_range_over_the_seeds(planted, tmp_path):
    _, arms = attacked(planted, tmp_path)
    found = arms["none"]["other_attacks"]
    expected = {"mean": pytest.approx(0.9134), "least": pytest.approx(0.9034), "most": pytest.approx(0.9234), "n": 2}
    assert found["membership"]["auc"] == expected
    assert found["finetuning"]["weights.1.verified"] == {"mean": 25, "least": 23, "most": 27, "n": 2}
    assert found["captions"]["training.own"] == {"mean": 7, "least": 7, "most": 7, "n": 2}
    every = [path for figures in found.values() if figures for path in figures]
    assert every and not [path for path in every if "p_value" in path or "ci95" in path]


def test_what_did_not_run_is_absent_and_never_zero(planted, tmp_path):
    _, arms = attacked(planted, tmp_path)
    dedup = arms["dedup"]["other_attacks"]
    assert [name for name in dedup if dedup[name] is not None] == ["captions"]
    assert arms["filter"]["other_attacks"]["captions_guard_off"]["own"]["n"] == len(SEEDS)
    assert arms["dpsgd"]["runs"][1]["other_attacks"] is None
    assert arms["dpsgd"]["other_attacks"]["captions"]["own"]["n"] == 1
    for run in planted[0]["none"].runs:
        entries = json.loads((run.directory / "report.json").read_text())["privacy"]["membership"]
        entries[1]["tpr_at_fpr"] = {"0.01": None, "0.001": None}  # too few held-out pictures
        edit_report(run, "privacy.membership", entries)
    rate = compared(planted)[1]["none"]["other_attacks"]["membership"]["tpr_at_fpr.0.01"]
    assert rate == {"mean": None, "least": None, "most": None, "n": 0}


def test_seeds_of_other_membership_attacks_have_no_mean(planted, tmp_path):
    attacked(planted, tmp_path)
    run = planted[0]["none"].runs[1]
    report = json.loads((run.directory / "report.json").read_text())
    del report["privacy"]["membership"][1]
    (run.directory / "report.json").write_text(json.dumps(report))
    found = compared(planted)[1]["none"]
    assert [each["other_attacks"]["membership"]["name"] for each in found["runs"]] == ["lira-strong", "loss-strong"]
    assert found["other_attacks"]["membership"] == {} and found["other_attacks"]["membership_groups"]["auc"]["n"] == 2


def test_the_page_quotes_them(planted, tmp_path):
    edit(planted[0]["dedup"], "privacy.captions.asked_sha256", "bb" * 32)
    result, _ = attacked(planted, tmp_path)
    folder = planted[0]["none"].runs[0].directory.parent
    render(folder, result, restricted=False, images=None)
    page = Page(folder / "comparison.html")
    assert check_paths(result, page.source) > 250
    check_prose(result, page.source)
    check_rounding(result, page.source)
    part = page.source[page.source.index('<section id="others">') : page.source.index('<section id="plane">')]
    assert (
        part.count("not measured") == 3 * 7 + 1
    )  # three arms have one of eight columns; recall at a tenth is not in the report
    assert "Not measured in any arm: Canaries of DP-SGD." in part and "guard OFF" in part
    assert re.search(r"; by captions p <data[^>]*>0\.038</data>", part)  # the attack on the fine-tuning must pass both
    assert "Not comparable: asked otherwise than none" in page.source
    assert "does not tell from chance, or from what captions bring back</h3>" in page.source  # the filter's single hits
