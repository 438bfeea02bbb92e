"""The report's figures: SVG data URIs, drawn once for light and once for dark pages."""

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from eval.evidence import Match
from eval.wording import percent

# text, grid, first and second series; the series differ in lightness too, for prints and colour-blind readers
LIGHT = {"text": "#3b4754", "grid": "#dde3e9", "first": "#0b6e99", "second": "#c2571a"}
DARK = {"text": "#b6c2cf", "grid": "#323c47", "first": "#58b7e0", "second": "#f0a35e"}

# (light, dark) of the arms of a comparison, in their order; none is a colour of `LIGHT` or one that `DARK` puts in its place
ARMS = [
    ("#1f5f9e", "#7db8f0"),
    ("#b5480f", "#f5a56b"),
    ("#2b7a4b", "#79cc9b"),
    ("#86449c", "#cda2e4"),
    ("#a82a5c", "#f28fb5"),
    ("#6f6200", "#d6c850"),
    ("#3f4fae", "#9aa8ff"),
    ("#0f6f72", "#66cdd0"),
]
SIZE = (5.6, 3.1)
MOST_POINTS = 2000  # of one kind in a scatter plot

Draw = Callable[[Axes, dict[str, str]], None]
Themed = dict[str, str]  # "light" and "dark": data URI


def training_curves(rows: list[dict[str, float]]) -> Themed | None:
    """Training and held-out loss over optimizer steps; None without rows."""
    series = {
        name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in ("loss", "heldout_loss")
    }
    if not series["loss"]:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        steps, losses = np.array(series["loss"], dtype=float).T
        axes.plot(steps, losses, color=colours["first"], alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=colours["first"], label="training (running mean)")
        if series["heldout_loss"]:
            steps, losses = np.array(series["heldout_loss"], dtype=float).T
            axes.plot(
                steps, losses, color=colours["second"], marker="o", markersize=3, linestyle="--", label="held-out"
            )
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        legend(axes, colours)

    return render(draw)


def memorisation_curve(curve: list[dict[str, float]], released_step: int | None = None) -> Themed | None:
    """Share of generations that copy training pictures, and calibration pictures by chance, over optimizer steps.

    Args:
        curve: as in `defenses.earlystop.EarlyStop.findings`.
        released_step: marked by a line; None: none.

    Returns:
        None without points.
    """
    if not curve:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        steps = [point["step"] for point in curve]
        for key, colour, style, label in (
            ("copies", "second", "-", "training pictures"),
            ("copies_control", "first", "--", "calibration pictures (chance)"),
        ):
            shares = [point[key] for point in curve]
            axes.plot(steps, shares, color=colours[colour], linestyle=style, marker="o", markersize=3, label=label)
        if released_step is not None:
            axes.axvline(released_step, color=colours["text"], linestyle=":")
            right = 2 * released_step <= steps[0] + steps[-1]  # where there is room for a word
            axes.annotate(
                "released",
                (released_step, 1),
                xycoords=axes.get_xaxis_transform(),  # steps, and share of the height
                xytext=(5 if right else -5, -2),
                textcoords="offset points",
                ha="left" if right else "right",
                va="top",
                color=colours["text"],
            )
        top = max(point[key] for point in curve for key in ("copies", "copies_control"))
        axes.set(xlabel="optimizer step", ylabel="share of copies", ylim=(0, max(0.05, 1.15 * top)))
        axes.yaxis.set_major_formatter(lambda value, _: percent(value) if value <= 1 else "")
        legend(axes, colours)

    return render(draw)


def match_histogram(matches: list[Match], verify_l2: float) -> Themed | None:
    """Adaptive score (or l2 where there is none) of every generation, with the threshold; None without matches."""
    scored = any(match.score is not None for match in matches)
    values = np.array([v for m in matches if (v := m.score if scored else m.l2) is not None], dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    threshold = 1.0 if scored else verify_l2

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        bins = np.linspace(0, max(values.max(), threshold) * 1.02, 61)
        tallest = axes.hist(values[values > threshold], bins, color=colours["first"], label="above the threshold")[
            0
        ].max()
        tallest = max(
            tallest, axes.hist(values[values <= threshold], bins, color=colours["second"], label="below")[0].max()
        )
        axes.axvline(threshold, color=colours["text"], linestyle=":")
        label = "adaptive score to the nearest training picture" if scored else "l2 to the nearest training picture"
        axes.set(xlabel=label, ylabel="generations", xlim=(0, None), ylim=(0, None))
        if tallest > 50:  # a few copies among many generations: keep them visible
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        else:
            axes.yaxis.get_major_locator().set_params(integer=True)
        legend(axes, colours)

    return render(draw)


def copies_bars(
    by_copies: dict[str, dict[str, int]],
    size: tuple[float, float] = SIZE,
    xlabel: str = "copies of the picture in the training split",
) -> Themed | None:
    """Share of distinct pictures extracted, by the number of their copies in the training split."""
    rows = sorted((int(copies), row["pictures"], row["verified"]) for copies, row in by_copies.items())
    rows = _grouped([row for row in rows if row[1]])
    if not rows:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        shares = [verified / pictures for _, pictures, verified in rows]
        axes.bar(range(len(rows)), shares, color=colours["second"], width=0.6)
        for x, (_, pictures, verified) in enumerate(rows):
            axes.annotate(f"{verified}/{pictures}", (x, shares[x]), ha="center", va="bottom", color=colours["text"])
        axes.set_xticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set(xlabel=xlabel, ylabel="share extracted", ylim=(0, 1.15))
        axes.yaxis.set_major_formatter(lambda value, _: percent(value) if value <= 1 else "")

    return render(draw, size)


def risk_scatter(rows: list[dict[str, Any]], size: tuple[float, float] = SIZE) -> Themed | None:
    """Adaptive score (l2 in the prompted protocol) of every training picture over its outlierness; None where neither is known.

    Args:
        rows: as `eval.risk.risk_table` gives them. Of many pictures that were not extracted, evenly chosen ones are drawn.
    """
    sign = "adaptive_score" if any(row["adaptive_score"] is not None for row in rows) else "l2"
    known = [row for row in rows if row[sign] is not None and row["outlierness"] is not None]
    if not known:
        return None
    extracted = [row for row in known if row["verified"]]
    rest = [row for row in known if not row["verified"]]
    rest = rest[:: max(1, math.ceil(len(rest) / MOST_POINTS))]

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        for part, colour, label in ((rest, "first", "not extracted"), (extracted, "second", "extracted")):
            for copied, marker in ((False, "o"), (True, "^")):
                some = [row for row in part if (row["copies"] > 1) == copied]
                if some:
                    x, y = ([row[name] for row in some] for name in ("outlierness", sign))
                    shown = f"{label}, several copies" if copied else label
                    axes.scatter(x, y, 10, color=colours[colour], marker=marker, linewidths=0, alpha=0.8, label=shown)
        if sign == "adaptive_score":
            axes.axhline(1, color=colours["text"], linestyle=":")
        axes.set(xlabel="outlierness: mean l2 to the nearest other training pictures", ylim=(0, None))
        axes.set_ylabel("adaptive score" if sign == "adaptive_score" else "l2 to the nearest generation")
        legend(axes, colours)

    return render(draw, size)


def roc_curves(curves: dict[str, tuple[np.ndarray, np.ndarray]], size: tuple[float, float] = SIZE) -> Themed | None:
    """True- over false-positive rate on logarithmic axes, with the line of chance; None without curves.

    Args:
        curves: attack -> both rates, ascending (`eval.roc.roc_curve`). Those after the eighth are left out.
    """
    shown = list(curves.items())[: len(ARMS)]
    least = min((rates[rates > 0].min() for _, pair in shown for rates in pair if (rates > 0).any()), default=None)
    if least is None:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        axes.plot([least, 1], [least, 1], color=colours["text"], linestyle=":", label="chance")
        for (name, (fpr, tpr)), (colour, _) in zip(shown, ARMS, strict=False):
            # a rate of 0 lies outside of the axes: the curve comes in from the left
            axes.step(np.maximum(fpr, least / 2), np.maximum(tpr, least / 2), where="post", color=colour, label=name)
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xscale="log", yscale="log")
        axes.set(xlim=(least, 1), ylim=(least, 1.05))
        legend(axes, colours)

    return render(draw, size)


def _grouped(rows: list[tuple[int, int, int]], most: int = 8) -> list[tuple[str, int, int]]:
    """Rows (copies, pictures, verified) joined into at most ``most`` neighbouring ranges of copies."""
    groups = [list(part) for part in np.array_split(np.arange(len(rows)), min(most, len(rows)))] if rows else []
    joined = []
    for group in groups:
        low, high = rows[group[0]][0], rows[group[-1]][0]
        name = str(low) if low == high else f"{low}\N{EN DASH}{high}"
        joined.append((name, sum(rows[i][1] for i in group), sum(rows[i][2] for i in group)))
    return joined


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    start = np.maximum(np.arange(len(values)) - window + 1, 0)
    return (sums[1:] - sums[start]) / (np.arange(len(values)) + 1 - start)


def legend(axes: Axes, colours: dict[str, str]) -> None:
    """The legend of a figure, above its axes."""
    axes.legend(
        frameon=False, labelcolor=colours["text"], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0
    )


def render(draw: Draw, size: tuple[float, float] = SIZE) -> Themed:
    """Draws once; the dark version is the same SVG in other colours.

    Args:
        draw: gets the axes and the colours of `LIGHT`; may take those of `ARMS` too.
        size: width and height in inches.
    """
    light = _svg(draw, LIGHT, size)
    dark = light
    for colour, other in [*((LIGHT[name], DARK[name]) for name in LIGHT), *ARMS]:
        dark = dark.replace(colour, other)
    return {"light": _data_uri(light), "dark": _data_uri(dark)}


def _svg(draw: Draw, colours: dict[str, str], size: tuple[float, float]) -> str:
    settings = {"svg.fonttype": "none", "svg.hashsalt": "deffuse", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes, colours)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=colours["grid"])
        axes.tick_params(which="both", color=colours["grid"], labelcolor=colours["text"])
        axes.xaxis.label.set_color(colours["text"])
        axes.yaxis.label.set_color(colours["text"])
        axes.grid(axis="y", color=colours["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
