import base64
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from eval import plots
from eval.evidence import Match


def svg(uri: str) -> str:
    text = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()
    ET.fromstring(text)
    return text


def texts(uri: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg(uri))


def heights(uri: str, colour: str) -> np.ndarray:
    """Vertical places of the points of the first line of this colour, downwards, float64 [n]."""
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: {colour}', svg(uri))[1]
    return np.array([float(point.split()[1]) for point in re.split("[ML]", path)[1:]])


def match(score, l2=0.2):
    return Match("g", "r", l2, score, "", False)


def test_curves():
    rows = [{"step": i, "loss": 1 / (i + 1), "learning_rate": 1e-4} for i in range(200)]
    assert "held-out" not in texts(plots.training_curves(rows)["light"])
    rows[100]["heldout_loss"] = 0.5
    themed = plots.training_curves(rows)
    assert {"held-out", "optimizer step", "loss"} <= set(texts(themed["light"]))
    assert plots.LIGHT["first"] in svg(themed["light"]) and plots.DARK["first"] in svg(themed["dark"])
    assert plots.training_curves([]) is None and plots.training_curves([{"step": 1}]) is None
    assert plots.training_curves(rows) == themed  # the same bytes every time


def test_memorisation_curve():
    curve = [{"step": s, "copies": s / 400, "copies_control": 0.0} for s in (50, 100, 150, 200)]
    themed = plots.memorisation_curve(curve, 150)
    found = texts(themed["light"])
    expected = {
        "training pictures",
        "calibration pictures (chance)",
        "released",
        "optimizer step",
        "50.0\u202f%",
    }
    assert expected <= set(found), found
    copies, control = (heights(themed["light"], plots.LIGHT[name]) for name in ("second", "first"))
    assert np.ptp(control) == 0  # at zero: the others are measured from there
    np.testing.assert_allclose((control - copies) / (control - copies)[-1], [0.25, 0.5, 0.75, 1.0], rtol=1e-4)
    assert themed == plots.memorisation_curve(curve, 150)  # the same bytes every time
    assert "released" not in texts(plots.memorisation_curve(curve)["dark"])
    assert plots.memorisation_curve([]) is None
    assert "released" in texts(plots.memorisation_curve(curve[:1], 50)["light"])


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=173)
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(173)]
    np.testing.assert_allclose(plots._running_mean(values), expected)


@pytest.mark.parametrize("count", [5, 3000])
def test_histogram_of_scores_or_distances(count):
    scores = [match(value) for value in np.linspace(0.1, 1.8, count)]
    assert "adaptive score to the nearest training picture" in texts(plots.match_histogram(scores, 0.15)["light"])
    distances = [match(None, value) for value in np.linspace(0.0, 0.4, count)]
    assert "l2 to the nearest training picture" in texts(plots.match_histogram(distances, 0.15)["dark"])
    assert plots.match_histogram([], 0.15) is None
    assert plots.match_histogram([match(float("inf"))], 0.15) is None


def test_bars_carry_their_counts():
    found = texts(
        plots.copies_bars({"40": {"pictures": 8, "verified": 7}, "1": {"pictures": 392, "verified": 1}})["light"]
    )
    assert {"7/8", "1/392", "1", "40"} <= set(found) and found.index("1/392") < found.index("7/8")
    many = {str(i): {"pictures": 2, "verified": i % 2} for i in range(1, 21)}
    counts = [text.split("/") for text in texts(plots.copies_bars(many)["light"]) if "/" in text]
    assert len(counts) == 8 and np.array(counts, dtype=int).sum(axis=0).tolist() == [10, 40]
    assert plots.copies_bars({}) is None


def risk_row(outlierness, score, verified=False, copies=1, l2=0.2):
    return {"outlierness": outlierness, "adaptive_score": score, "verified": verified, "copies": copies, "l2": l2}


def points(themed) -> int:
    """Marks of a scatter plot in its first colour, the one in the legend among them; ticks have other colours."""
    return len(re.findall(rf"<use [^>]*fill: {plots.LIGHT['first']}", svg(themed["light"])))


def test_risk_scatter():
    rows = [risk_row(0.1, 1.5), risk_row(0.3, 0.5, True), risk_row(0.2, 0.6, True, 4), risk_row(None, 0.5)]
    themed = plots.risk_scatter(rows)
    found = set(texts(themed["light"]))
    assert {"not extracted", "extracted", "extracted, several copies", "adaptive score"} <= found
    assert "l2 to the nearest generation" in texts(plots.risk_scatter([risk_row(0.1, None)])["light"])
    assert plots.risk_scatter([]) is None and plots.risk_scatter([risk_row(None, 0.5)]) is None
    many = [risk_row(0.1 + i / 1e5, 1.5) for i in range(9000)]
    assert points(plots.risk_scatter(many)) - points(plots.risk_scatter(many[:1])) == 1800 - 1  # every fifth
    assert points(plots.risk_scatter(many[:3])) - points(plots.risk_scatter(many[:1])) == 2


def test_roc_curves():
    perfect = (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    weak = (np.array([0.0, 0.001, 0.1, 1.0]), np.array([0.0, 0.01, 0.3, 1.0]))
    themed = plots.roc_curves({"loss": weak, "lira": perfect})
    assert {"loss", "lira", "chance", "false-positive rate", "true-positive rate"} <= set(texts(themed["light"]))
    chance = heights(themed["light"], plots.LIGHT["text"])
    curve = heights(themed["light"], plots.ARMS[0][0])
    decade = np.ptp(chance) / 3  # from 0.001 to 1
    assert chance[0] - curve.min() == pytest.approx(3 * decade, rel=1e-3)  # it ends at (1, 1)
    at_tenth = chance[0] - 3 * decade - decade * np.log10(0.3)
    assert np.abs(curve - at_tenth).min() < 0.02 * decade  # and passes 0.3
    assert plots.roc_curves({}) is None
