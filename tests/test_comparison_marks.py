"""What the comparison page says beside its numbers: by construction, at most, at best, beside which control."""

import html
import re

import pytest

from tests.comparison_checks import make
from tests.fabricate_comparison import ARMS


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return make(tmp_path_factory.mktemp("opened"))


def row_of(page, number):
    """Visible text of an arm's row in the table."""
    row = re.search(rf'<tr role="row" id="arm-{number}">.*?</tr>', page.source, re.DOTALL).group()
    return re.sub(r"\s+", " ", " ".join(re.findall(r">([^<]*)<", row)))


def test_a_count_behind_a_filter_is_marked_wherever_it_stands(opened):
    _, _, page = opened
    number = list(ARMS).index("output_filter")
    said = "few by construction: the filter uses the attack's own score"
    assert html.unescape(row_of(page, number)).count(said) == 2  # extracted, and instead of a test
    assert "not matched" in row_of(page, number) and "one point" in row_of(page, number)
    verdict = html.unescape(re.search(r'<section class="verdict.*?</section>', page.source, re.DOTALL).group())
    assert f"output_filter ({said})" in verdict and f"That is {said}" in verdict
    assert "by construction" not in row_of(page, 0)


def test_nothing_behind_a_filter_is_zero_by_construction(tmp_path):
    def change(comparison):
        for run in comparison["arms"][list(ARMS).index("output_filter")]["runs"]:
            run["values"]["privacy.extraction.verified"] = 0

    assert "0 by construction" in make(tmp_path, change=change)[2].source


def test_a_censored_match_is_at_most(opened):
    _, _, page = opened
    row = row_of(page, 1)  # dedup, whose second seed was at the level at its first checkpoint
    assert re.search(r"at most 1\.24 none: 6\.31 at KID 0\.0168", row)
    assert re.search(r"seed 1 : dedup at the first checkpoint", row) and "seed 0 : dedup at" not in row
    assert "at its first checkpoint, step 912" in page.visible and "at step 912" in page.visible


def test_correlation_stands_beside_its_control(opened):
    comparison, _, page = opened
    section = re.search(r'<section id="correlation">.*?</section>', page.source, re.DOTALL).group()
    paths = re.findall(r'data-path="arms\.(\d+)\.runs\.(\d+)\.([^"]*)"', section)
    finished = sum(run["status"] == "done" for arm in comparison["arms"] for run in arm["runs"])
    for key in ("verified", "candidates", "control.verified", "control.verified_train_m", "control.n"):
        found = [path for *_, path in paths if path == f"values.privacy.extraction.by_correlation.{key}"]
        assert len(found) == finished
    for key in ("", "_candidates", "_train", "_control", "_n"):
        assert [path for *_, path in paths].count(f"guard_off.by_correlation{key}") == 2
    assert "There is no p-value for it" in section and "loose" in section


def test_a_guarantee_behind_a_filter_covers_the_weights_alone(tmp_path):
    def change(comparison):
        comparison["arms"][4] |= {"protects": "outputs"}
        comparison["arms"][4]["claims"][0]["nonprivate_metrics"] = True

    _, _, page = make(tmp_path, change=change)
    said = "the guarantee holds for the weights, not for images that passed the filter"
    assert page.visible.count(said) == 2 and said in row_of(page, 4)
    assert "Losses and held-out metrics of private data were logged" in page.visible


def test_every_statement_of_a_heuristic_is_shown(tmp_path):
    def change(comparison):
        claims = comparison["arms"][6]["claims"]
        claims[0]["seeds"] = [0]
        claims.append({"name": "early_stop", "kind": "heuristic", "statement": "Nothing clean was seen.", "seeds": [1]})

    _, _, page = make(tmp_path, change=change)
    shown = re.sub(r"\s+", " ", page.visible)
    assert "Claim of early_stop (seed 0 ): It helped elsewhere." in shown
    assert "Claim of early_stop (seed 1 ): Nothing clean was seen." in shown
    assert "no guarantee (early_stop)" in row_of(page, 6)


def test_what_a_test_could_show_at_best(opened):
    _, _, page = opened
    assert "8 units give no less than p = 0.0547" in page.visible
    assert "at best 0.055" in re.sub(r"\s+", " ", row_of(page, 1))


def test_a_trend_has_its_control(opened):
    _, _, page = opened
    for level in range(3):
        assert page.source.count(f'data-path="trend.control.{level}"') == 1
