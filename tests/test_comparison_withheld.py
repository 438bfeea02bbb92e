"""A comparison in which a guard lets no image out: there is nothing to measure, and the other arms are compared all the same."""

import json

import pytest

from defenses.errors import UserError
from eval.comparison import assemble
from eval.comparison_page import render
from tests.comparison_checks import check_paths, check_prose
from tests.comparisons import edit_report, rewrite, write_comparison
from tests.test_report import Page


def silence(run):
    """As `eval.stage` writes it where the guard withheld every image: nothing was found, and there is no quality."""
    report = json.loads((run.directory / "report.json").read_text())
    extraction = report["privacy"]["extraction"]
    extraction |= {"generations": 0, "candidates": 0, "verified": 0, "verified_units": 0, "rate": 0.0}
    (run.directory / "report.json").write_text(json.dumps(report | {"utility": None}))
    rewrite(run.directory / "attack" / "matches.csv", lambda row: row | {"verified": "false"})


@pytest.fixture
def planted(tmp_path):
    arms, options = write_comparison(tmp_path / "planted", images=False)
    return {arm.name: arm for arm in arms}, options


def compared(arms, options):
    result = assemble(list(arms.values()), **options)
    json.dumps(result, allow_nan=False)
    return result, {arm["name"]: arm for arm in result["arms"]}


@pytest.mark.parametrize("seeds", [(0, 1), (1,)])
def test_an_arm_whose_guard_lets_nothing_out_is_not_comparable_and_the_others_are(planted, seeds):
    arms, options = planted
    before = compared(arms, options)[1]
    for seed in seeds:
        silence(arms["filter"].runs[seed])
    result, after = compared(arms, options)
    found, why = after["filter"], f"seed {seeds[0]}: its guard withheld every image, so there is nothing to measure"
    assert (found["comparable"], found["why"], found["nothing_left"]) == (False, why, why)
    test = found["versus_reference"]["verified"]
    assert test["mean"] is test["p_value"] is None and test["differences"] == [None, None] and why in test["test"]
    assert "filter" not in result["fronts"]["outputs"]["front"] + result["fronts"]["weights"]["front"]
    for name in ("none", "dedup", "dpsgd"):
        assert after[name]["versus_reference"] == before[name]["versus_reference"]
        assert after[name]["comparable"] == before[name]["comparable"] and after[name]["nothing_left"] is None
    folder = arms["none"].runs[0].directory.parent
    render(folder, result, restricted=False, images=None)
    html = Page(folder / "comparison.html").source
    check_paths(result, html)
    check_prose(result, html)
    assert "Not comparable: nothing to measure" in html and why in html
    below = html.partition("Not comparable: below the stated utility")[2].partition("</ul>")[0]
    assert "dpsgd" in below and "filter" not in below


def test_the_first_arm_may_be_the_one_without_images(planted):
    """Features of the others are still held against each other."""
    arms, options = planted
    for run in arms["filter"].runs:
        silence(run)
    turned = {name: arms[name] for name in ("filter", "none", "dedup", "dpsgd")}
    assert compared(turned, options)[1]["filter"]["comparable"] is False
    edit_report(arms["dedup"].runs[0], "utility.features", "inception")
    with pytest.raises(UserError) as error:
        assemble(list(turned.values()), **options)
    assert error.value.key == "utility.features"


def test_quality_that_is_missing_for_another_reason_is_refused(planted):
    arms, options = planted
    edit_report(arms["dedup"].runs[0], "utility", None)
    with pytest.raises(UserError):
        assemble(list(arms.values()), **options)
