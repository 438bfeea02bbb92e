import copy
import re

import numpy as np
import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from eval import comparison_plots, plot_labels, plots
from tests.fabricate_comparison import ARMS, fabricate
from tests.test_plots import svg, texts


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("plots") / "phantom")[0]


def test_plane_names_every_measured_arm(comparison):
    for stage in ("weights", "outputs"):
        themed = comparison_plots.plane(comparison, stage)
        found = texts(themed["light"])
        assert set(ARMS) - {"gan"} <= {name.removesuffix(" *") for name in found} and "gan" not in found
        assert {"stated utility", "KID (lower is better)", "distinct pictures extracted"} <= set(found)
        assert plots.ARMS[0][0] in svg(themed["light"]) and plots.ARMS[0][1] in svg(themed["dark"])
        assert plots.ARMS[0][0] not in svg(themed["dark"])
    assert "output_filter *" in texts(comparison_plots.plane(comparison, "outputs")["light"])
    empty = {"x": "kid", "y": "verified", "front": [], "points": []}
    assert comparison_plots.plane(comparison | {"fronts": {"weights": empty}}, "weights") is None


def test_no_theme_colour_is_another_one():
    """The dark figure is made by replacing colours one after the other: none may turn into one that is replaced later."""
    light = [*plots.LIGHT.values(), *(pair[0] for pair in plots.ARMS)]
    dark = [*plots.DARK.values(), *(pair[1] for pair in plots.ARMS)]
    assert len(set(light)) == len(light) and not set(light) & set(dark)


def test_along_ends_with_the_released_model(comparison):
    arm = copy.deepcopy(next(arm for arm in comparison["arms"] if arm["name"] == "none"))
    points = comparison_plots.along(arm, "kid")
    assert [point["images_seen"] for point in points] == [32000, 64000, 96000, 128704]
    assert points[-1] == {"images_seen": 128704, "verified": 7.5, "kid": pytest.approx(0.0121)}
    for run in arm["runs"]:
        run["values"]["model.released_step"] = 1000  # of 2011: what comes later is not this arm
    points = comparison_plots.along(arm, "kid")
    assert [point["images_seen"] for point in points] == [32000, pytest.approx(128704 * 1000 / 2011)]
    failed = next(arm for arm in comparison["arms"] if arm["name"] == "gan")
    assert comparison_plots.along(failed, "kid") == [] and comparison_plots.copies(failed) is None


def test_copies_add_up_over_seeds(comparison):
    found = texts(
        comparison_plots.copies(comparison["arms"][0])["light"]
    )  # 8 and 7 of 40, six of them at most repeated
    assert {"3/64", "12/16"} <= set(found)


def test_curves_are_left_out_where_nothing_was_measured_along(comparison):
    for quantity in ("verified", "kid"):
        assert "images seen in training" in texts(comparison_plots.over_images(comparison, quantity)["light"])
    assert "KID (lower is better)" in texts(comparison_plots.trajectories(comparison)["light"])
    late = copy.deepcopy(comparison)
    for run in (run for arm in late["arms"] for run in arm["runs"]):
        run["along"] = []
    assert comparison_plots.over_images(late, "verified") is None and comparison_plots.trajectories(late) is None


@pytest.mark.parametrize("levels", [[1, 4, 16], ["small", "$x^2$", "large"]])
def test_trend_of_numbers_and_of_names(comparison, levels):
    block = comparison["trend"] | {"levels": levels, "low": [None, 1.1, 5.9], "high": [None, 6.2, 9.1]}
    found = texts(comparison_plots.trend(block)["light"])
    assert {str(level) for level in levels} <= set(found) and "data.phantom.copies" in found
    assert comparison_plots.trend(block | {"verified": [None] * 3}) is None


def test_early_stop_curve(comparison):
    finding = next(arm for arm in comparison["arms"] if arm["name"] == "early_stop")["runs"][0]["findings"][0]
    assert {"training pictures", "calibration"} <= set(texts(comparison_plots.early_stop(finding)["light"]))
    assert comparison_plots.early_stop({"curve": []}) is None and comparison_plots.early_stop({}) is None


@pytest.mark.parametrize("place", [plot_labels.beside, plot_labels.at_the_right])
def test_names_of_crowded_points_stay_apart(place):
    figure = Figure(figsize=comparison_plots.PLANE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    rng = np.random.default_rng(0)
    points = [(x, y, f"arm-{i}", "#000000") for i, (x, y) in enumerate(rng.uniform(0, 0.3, (8, 2)))]
    axes.plot([0, 1], [0, 1])
    place(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line that leads to the point
    overlaps = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 8 and not any(overlaps)


def test_many_arms_have_a_style_each():
    styles = [comparison_plots.style(i) for i in range(8)]
    assert len(set(styles)) == 8 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour, _ in styles)
