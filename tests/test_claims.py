import math
import re
from pathlib import Path

import pytest
from scipy.stats import norm

from defenses import dpclaim
from defenses.ledger import Mechanism, Segment
from eval import claims
from eval.card import model_card
from eval.report import ReportConfig, render
from tests.fabricate import Fabricated, fabricate_claim, fabricate_report

FORBIDDEN = re.compile(r"\b(anonymous|anonymi[sz]ed|safe|compliant)\b", re.IGNORECASE)
NARROW = "\N{NARROW NO-BREAK SPACE}"


def outputs(folder: Path, change) -> tuple[str, str]:
    """(visible text of the page, model card) of a report whose claim was changed."""
    run = Fabricated(folder / "run")
    change(run.report["defenses"][1]["claim"])
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
    source = (run.folder / "report.html").read_text()
    page = source[: source.index("Every field of report.json")]
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)), (run.folder / "MODEL_CARD.md").read_text()


def test_a_claim_as_an_officer_needs_it(tmp_path):
    claim = fabricate_claim()
    page, card = outputs(tmp_path, lambda claim: None)
    for text in (page, card):
        assert claim["statement"] in text and "NOT PRIVATE" not in text and not FORBIDDEN.search(text)
        for part in ("7.913", "1e-05", "7.921", "PRV", "PLD", "0.0173", "1.371", "1.25", "17.5", "2,011 of 2,017"):
            assert part in text
        for part in ("16.27", "84.21", "tuning runs", "side channels", "Poisson over patients", "opacus 1.6.0"):
            assert part in text
        assert "upper bound" in text and "computed from the private" in text and "were logged" not in text
        assert text.index(claim["statement"]) < text.index("1.371")  # the sentence comes first
    assert "epsilon 7.913 at delta 1e-05 per patient, add-remove adjacency" in card


def test_not_private_is_unmistakable(tmp_path):
    def change(claim):
        claim |= {"epsilon": None, "epsilon_crosscheck": None, "not_private": ["a test seed", "no noise"]}

    page, card = outputs(tmp_path, change)
    for text in (page, card):
        assert "NOT PRIVATE" in text and "a test seed" in text and "no noise" in text
        assert "7.913" not in text.replace(fabricate_claim()["statement"], "") and "16.27" not in text
        assert "upper bound on what" not in text and "tuning runs" in text
    assert page.index("NOT PRIVATE") < page.index("gives training pictures away")  # above everything else
    assert page.count("NOT PRIVATE") == 3  # on top, among the key numbers, in the defense's own part
    assert "not-private" in card.split("---")[1]


def test_no_epsilon_is_not_private():
    words = claims.in_words(fabricate_claim() | {"epsilon": None})
    assert not words["private"] and words["reasons"] and words["group"] == words["accountants"] == []


def test_logged_metrics_are_said(tmp_path):
    for text in outputs(tmp_path, lambda claim: claim.update(nonprivate_metrics=True)):
        assert "Losses and held-out metrics of private data were logged" in text


def test_an_empty_list_of_gaps_is_not_passed_over(tmp_path):
    for text in outputs(tmp_path, lambda claim: claim.update(not_covered=[])):
        assert "Not covered" in text and "names nothing" in text


@pytest.mark.parametrize(("value", "text"), [(7.913, "7.913"), (7.91301, "7.914"), (0.0, "0"), (84.21049, "84.22")])
def test_epsilon_is_never_shown_below_its_value(value, text):
    assert claims.upward(value) == text and float(text) >= value
    assert claims.upward(None) == claims.upward(math.inf) == "not computed"


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_membership_bound_is_tight_for_randomized_response(epsilon):
    """Randomized response attains the two lines that bound every (epsilon, 0) test: one each side of its corner."""
    corner = 1 / (1 + math.exp(epsilon))  # false alarms of the answer itself; it recognises 1 - corner
    assert claims.membership_bound(epsilon, 0.0, corner) == pytest.approx(1 - corner)
    assert claims.membership_bound(epsilon, 0.0, corner / 2) == pytest.approx((1 - corner) / 2)
    assert claims.membership_bound(epsilon, 0.0, (1 + corner) / 2) == pytest.approx(1 - corner / 2)


def test_membership_bound_holds_for_the_gaussian_mechanism():
    """Its test at noise 1 (sensitivity 1) has power Phi(Phi^-1(rate) + 1); (epsilon, delta) by Balle and Wang 2018."""
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        delta = norm.cdf(0.5 - epsilon) - math.exp(epsilon) * norm.cdf(-0.5 - epsilon)
        for rate in (0.001, 0.01, 0.1, 0.3, 0.6):
            power = norm.cdf(norm.ppf(rate) + 1)
            assert power <= claims.membership_bound(epsilon, delta, rate) + 1e-12
        touched = norm.cdf(-0.5 - epsilon)  # where the line of this epsilon touches the curve
        power = norm.cdf(norm.ppf(touched) + 1)
        assert claims.membership_bound(epsilon, delta, touched) == pytest.approx(power)


def test_group_table():
    rows = claims.in_words(fabricate_claim() | {"epsilon": 1.0, "group_epsilon": {"8": 9.5, "2": 2.0, "32": None}})[
        "group"
    ]
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "2"), ("8", "9.5"), ("32", "not computed")]
    assert [row[2] for row in rows] == ["2.72", "7.39", "13,400", "over 1,000,000: no protection"]


def test_audit_is_shown_and_can_contradict(tmp_path):
    block = {"kind": "one-run canary audit", "epsilon_lower_bound": 1.234, "confidence": 0.95, "canaries": 1003}
    block |= {"guesses": 401, "correct": 333, "ceiling": 4.321, "claimed_epsilon": 7.913, "note": "White box."}
    report = fabricate_report()
    report["privacy"]["audit"] = block
    card = model_card(report)
    for text in ("one-run canary audit", "1.234", "1,003", "333", "4.321", "White box", "never proves privacy"):
        assert text in card
    assert "NOT PRIVATE" not in card and "No audit" not in card
    run = Fabricated(tmp_path / "run")
    run.report["privacy"]["audit"] = block | {"epsilon_lower_bound": 8.1}
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
    page = (run.folder / "report.html").read_text()
    assert "NOT PRIVATE as claimed" in page and "The audit contradicts the claim" in page


@pytest.mark.parametrize(
    ("unit", "noise", "test"), [("record", 4.0, False), ("group", 4.0, False), ("record", 0.0, True)]
)
def test_the_claim_that_the_defense_makes(tmp_path, unit, noise, test):
    """Every sentence of the mechanism's own claim is on both pages, none of the forbidden words is."""
    mechanism = Mechanism(
        unit=unit, copies=1, adjacency="zero-out", sample_rate=0.02, noise_multiplier=noise, clip_norm=1e-3,
        divisor=20.0, settings="abc", test=test,
    )  # fmt: skip
    made = dpclaim.build(
        [Segment(mechanism, 20)], delta=1e-5, units=1000, planned_steps=20, multiplicity=4,
        images_per_group=4 if unit == "group" else None, drawn=unit, largest_group=5, starts=2,
        nonprivate_metrics=False,
    )  # fmt: skip

    def change(claim):
        claim.clear()
        claim |= made

    page, card = outputs(tmp_path, change)
    card = card.replace("\\", "")
    for text in (page, card):
        assert all(" ".join(line.split()) in text.replace("&#39;", "'") for line in made["not_covered"])
        assert not FORBIDDEN.search(text) and ("NOT PRIVATE" in text) == test
        if not test:
            assert claims.upward(made["epsilon"]) in text and claims.upward(made["group_epsilon"]["32"]) in text
    assert claims.membership_sentence(1.0, 1e-5, unit).endswith(
        f"2.7{NARROW}% where it wrongly accuses 1.0{NARROW}% of outsiders and 0.27{NARROW}% where it wrongly accuses "
        f"0.10{NARROW}% of outsiders."
    )
