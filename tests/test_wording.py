import pytest

from eval import attackwords, wording
from eval.verdict import verdict
from tests.fabricate import fabricate_report

NARROW = "\N{NARROW NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0"), (1.0, "100.0"), (0.0204, "2.0"), (0.00123, "0.12"), (0.0001, "0.010"), (0.12345, "12.3")],
)
def test_percent(share, text):
    assert wording.percent(share) == f"{text}{NARROW}%"


def test_units():
    assert wording.duration(41.7) == "42 s" and wording.duration(203.4) == "3 min 23 s"
    assert wording.duration(3.14) == "3.1 s" and wording.duration(7384) == "2 h 3 min"
    assert wording.size(1536) == "1.5 KiB" and wording.size(2**30) == "1 GiB" and wording.size(12) == "12 bytes"
    assert wording.number(1234567) == "1,234,567" and wording.number(0.00123456) == "0.001235"
    assert wording.number([1, 2.5]) == "1, 2.5" and wording.number({"a": True}) == "a yes"
    assert {f(None) for f in (wording.number, wording.percent, wording.duration, wording.size)} == {"not measured"}


def test_flatten_keeps_every_field():
    rows = wording.flatten({"a": {"b": 1, "c": []}, "d": [{"e": None}], "f": {}})
    assert rows == [("a.b", 1), ("a.c", []), ("d.0.e", None), ("f", {})]


@pytest.mark.parametrize(
    ("verified", "control", "level"),
    [
        (8, {"p_value": 0.0001}, "leak"),
        (8, {"p_value": 0.05}, "leak"),
        (8, {"p_value": 0.051}, "unclear"),
        (8, {"p_value": None}, "unclear"),
        (8, None, "unclear"),
        (0, {"p_value": 1.0}, "none"),
        (0, None, "unclear"),
    ],
)
def test_level_of_the_verdict(verified, control, level):
    report = fabricate_report(verified)
    extraction = report["privacy"]["extraction"]
    extraction["control"] = None if control is None else extraction["control"] | control
    outcome = verdict(report)
    assert outcome["level"] == level
    assert ("no control" in " ".join(outcome["sentences"])) == (control is None)


AUC = {
    "attack": "loss-strong",
    "unit": "record",
    "auc": 0.9,
    "auc_ci95": [0.8, 0.95],
    "members": 50,
    "nonmembers": 2000,
}
RATES = {"tpr_at_fpr": {"0.01": 0.4, "0.001": None}, "tpr_ci95": {"0.01": [0.3, 0.5], "0.001": None}}


@pytest.mark.parametrize(
    ("low", "passed", "level", "title"),
    [
        (0.8, True, "unclear", "it can be told"),
        (0.49, True, "none", "No training picture was extracted by this attack"),  # within chance
        (0.8, False, "none", "No training picture was extracted by this attack"),  # another camera, say: no evidence
        (0.8, None, "none", "No training picture was extracted by this attack"),  # too few to tell
    ],
)
def test_members_that_can_be_recognised_are_no_clean_outcome(low, passed, level, title):
    report = fabricate_report(0)
    report["privacy"]["membership"] = [AUC | RATES | {"auc_ci95": [low, 0.95]}]
    report["privacy"]["membership_check"] = {"passed": passed, "note": "the sides differ"}
    outcome = verdict(report)
    assert outcome["level"] == level and title in outcome["title"]
    text = " ".join(outcome["sentences"])
    assert f"0.900 (95 %: {low:.3f} to 0.950" in text and f"40.0{NARROW}% of the training pictures" in text
    assert ("no evidence: the sides differ" in text) == (passed is False)


def canaries(trend: float, most: float) -> dict:
    """``privacy.canaries`` with these p-values: of the trend, and of the canaries planted most often."""
    rows = {copies: {"p_value": p, "median": 3.0} for copies, p in (("0", 0.5), ("2", 0.5), ("16", most))}
    return {"kinds": {"noise": {"by_copies": rows, "trend": {"p_value": trend}, "ceiling": 10.0}}}


def finetuning(verified: int, p_value: float | None) -> dict:
    """``privacy.finetuning`` with one weight beside the model alone."""
    control = None if p_value is None else {"verified": 0, "n": 30, "p_value": p_value}
    entry = {"weight": 3.0, "verified": verified, "p_value_holm": p_value, "rate_ci95": [0.0, 0.3], "control": control}
    entry |= {"versus_baseline": {"gain": 0.01, "gain_p_value": None if p_value is None else 0.2}}
    return {"pictures": 40, "weights": [entry | {"weight": 1.0, "verified": 0, "p_value_holm": None}, entry]}


@pytest.mark.parametrize(
    ("verified", "p_value", "level"), [(5, 0.01, "leak"), (5, 0.2, "none"), (5, None, "none"), (0, 0.01, "none")]
)
def test_what_the_fine_tuning_gives_away_counts_against_its_control_alone(verified, p_value, level):
    report = fabricate_report(0)
    report["privacy"]["finetuning"] = finetuning(verified, p_value)
    outcome = verdict(report)
    assert outcome["level"] == level and ("gives training pictures away" in outcome["title"]) == (level == "leak")
    text = " ".join(outcome["sentences"])
    assert f"(w = 3), {verified} of 40 distinct training pictures" in text
    assert ("no control: not evidence" in text) == (p_value is None)


@pytest.mark.parametrize(("beyond", "level"), [(0.04, "leak"), (0.06, "none"), (None, "leak")])
def test_what_the_fine_tuning_gives_away_must_be_beyond_the_caption(beyond, level):
    report = fabricate_report(0)
    part = finetuning(5, 0.01)
    counts = {"tested": 8, "own": 1, "training": {"tested": 8, "own": 6}, "unit": "picture", "reason": "so"}
    part["weights"][1]["captions"] = counts | {"p_value": beyond, "p_value_holm": beyond}
    report["privacy"]["finetuning"] = part
    outcome = verdict(report)
    assert outcome["level"] == level
    assert "of 8 training pictures with a caption of their own, 6 came back by it" in " ".join(outcome["sentences"])


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"inpainting": {"p_value": 0.0001, "difference": 0.1}}, "completed from their halves"),
        ({"inpainting": {"p_value": 0.0001, "difference": 0.1, "baseline": {"mean": {"p_value": 0.01}}}}, "by this attack"),
        ({"inpainting": {"p_value": 0.2, "difference": 0.1}}, "by this attack"),
        ({"canaries": canaries(0.001, 0.001)}, "planted pictures are remembered"),
        ({"canaries": canaries(0.001, 0.2)}, "by this attack"),  # a trend among pictures that are known no better than others
        ({"canaries": canaries(0.2, 0.001)}, "by this attack"),
        ({"membership": [AUC | RATES | {"auc_ci95": [0.4, 0.6], "fpr_upper95": {"0.01": 0.017}}]}, "it can be told"),
        ({"membership": [AUC | RATES | {"auc_ci95": [0.4, 0.6], "fpr_upper95": {"0.01": 0.31}}]}, "by this attack"),
        ({"membership": [AUC | RATES | {"auc_ci95": [0.4, 0.6]}], "set_test": {"p_value": 0.001, "alpha": 0.01}}, "it can be told"),
    ],
)  # fmt: skip
def test_whatever_an_attack_shows_is_no_clean_outcome(change, title):
    """Also a few pictures that are recognised nearly without false alarms, where the area says nothing."""
    report = fabricate_report(0)
    report["privacy"] |= {"membership_check": {"passed": True, "note": ""}} | change
    assert title in verdict(report)["title"]


def test_the_attack_that_stands_for_all_is_fixed_beforehand():
    """The best of several, chosen after looking, flatters."""
    best = AUC | RATES | {"attack": "gsa-norm", "auc": 0.99}
    privacy = {"membership": [best, AUC | RATES, AUC | RATES | {"attack": "lira-strong", "unit": "group"}]}
    assert attackwords.primary(privacy)["attack"] == "loss-strong"
    assert attackwords.primary(privacy, "group")["attack"] == "lira-strong"


def test_zero_hits_follow_the_unit_of_the_interval():
    """With 12 patients the bound is 3/12, however many pictures they have."""
    assert wording.zero_hits([0.0, 0.25], 400) == f"rate < 3/12 = 25.0{NARROW}%, 95 %"
    assert wording.zero_hits(None, 300) == f"rate < 3/300 = 1.0{NARROW}%, 95 %"
    assert wording.zero_hits([0.0, 1.0], 2) == f"rate < 3/3 = 100.0{NARROW}%, 95 %"


def test_what_was_not_measured_shrinks():
    report = fabricate_report()
    before = wording.not_measured(report)
    report["privacy"]["membership"] = []
    after = wording.not_measured(report)
    assert len(before) == 7 and set(before) - set(after) == {wording.NOT_MEASURED["privacy.membership"]}
    assert any("8,192 generations" in line for line in before)  # the next tier after smoke
    report["privacy"]["extraction"] |= {"protocol": "prompted", "tier": "small"}
    assert any("1,000 prompts with 500 each;" in line for line in wording.not_measured(report))


def test_only_inception_is_fid():
    assert wording.distance_name("inception") == "FID"
    assert "FID" not in wording.distance_name("random-conv") + wording.distance_name("dinov2")


def test_the_control_of_a_prompted_attack_is_qualified():
    """A model that draws what captions of training pictures say passes it without having seen a picture."""

    def qualified() -> list[str]:
        return [line for line in wording.not_measured(report) if line.startswith("Captions alone")]

    report = fabricate_report()
    extraction = report["privacy"]["extraction"]
    extraction["protocol"] = "prompted"
    assert len(qualified()) == 1
    extraction["control"] |= {"captions": None, "captions_reason": "no held-out picture has a caption"}
    assert "no held-out picture has a caption." in qualified()[0]
    extraction["control"]["captions"] = {"p_value": 0.3, "reason": None}
    assert qualified() == []
    extraction["control"]["captions"] = None
    extraction["protocol"] = "untargeted"
    assert qualified() == []
