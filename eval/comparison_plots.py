"""Figures of a comparison, in the style of the report's."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from eval import plots
from eval.plot_labels import at_the_right, beside
from eval.plots import ARMS, Themed, legend, render
from eval.standings import VERIFIED

MARKERS = "osD^vPX*"
PLANE, LINES, PANEL = (4.6, 3.5), (4.8, 3.1), (2.7, 2.0)  # inches: the lettering is to be read on a phone
EXTRACTED = "distinct pictures extracted"


def style(index: int) -> tuple[str, str]:
    """Colour and marker of the arm with this index: the same in every figure."""
    return ARMS[index % len(ARMS)][0], MARKERS[index % len(MARKERS)]


def plane(comparison: dict[str, Any], stage: str) -> Themed | None:
    """Verified pictures over the utility metric, the front as a staircase; bars span the seeds, hollow: not comparable.

    Hollow with a star at its name: behind an output filter the count is small by construction.

    Args:
        stage: key of ``fronts``.
    """
    block, floor = comparison["fronts"][stage], comparison["design"]["utility"]["at_most"]
    points = [point for point in block["points"] if None not in (point["x"], point["y"])]
    if not points:
        return None
    index = {arm["name"]: number for number, arm in enumerate(comparison["arms"])}

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        steps = [p for p in points if p["arm"] in block["front"] and not p["by_construction"]]
        front = sorted((p["x"], p["y"]) for p in steps)
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=colours["grid"], linewidth=5, zorder=0)
        for point in points:
            number = index[point["arm"]]
            if point["arm"] in block["front"]:
                axes.plot(
                    point["x"], point["y"], marker="o", markersize=17, color=colours["grid"], clip_on=False, zorder=1
                )
            _spread(axes, comparison["arms"][number], point["seeds"], block["x"], stage, style(number)[0])
            _mark(axes, point, number, point["comparable"] and not point["by_construction"])
        _scale(axes, "x", [p["x"] for p in points] + ([floor] if floor else []))
        axes.margins(x=0.08)
        axes.set(xlabel=_name(block["x"]), ylabel=EXTRACTED, ylim=_from_zero(axes))
        if floor is not None:
            axes.axvline(floor, color=colours["text"], linestyle=":", linewidth=1)
            axes.annotate(
                "stated utility", (floor, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2), rotation=90,
                textcoords="offset points", ha="right", va="top", fontsize=9, color=colours["text"],
            )  # fmt: skip
        names = [p["arm"] + (" *" if p["by_construction"] else "") for p in points]
        ends = zip(points, names, strict=True)
        beside(axes, [(p["x"], p["y"], name, style(index[p["arm"]])[0]) for p, name in ends])

    return render(draw, PLANE)


def trajectories(comparison: dict[str, Any]) -> Themed | None:
    """Verified pictures over the utility metric along training, one line per arm, from the first checkpoint to the released."""
    metric = comparison["design"]["utility"]["metric"]
    return _curves(comparison, (metric, _name(metric)), ("verified", EXTRACTED), PLANE)


def over_images(comparison: dict[str, Any], quantity: str) -> Themed | None:
    """``quantity``, "verified" or a utility metric, over the images seen in training, one line per arm."""
    label = EXTRACTED if quantity == "verified" else _name(quantity)
    return _curves(comparison, ("images_seen", "images seen in training"), (quantity, label), LINES)


def copies(arm: dict[str, Any]) -> Themed | None:
    """Share extracted by the number of copies, over all seeds of an arm."""
    total: dict[str, dict[str, int]] = {}
    for count, part in (item for run in arm["runs"] if run["by_copies"] for item in run["by_copies"].items()):
        row = total.setdefault(count, {"pictures": 0, "verified": 0})
        for key in row:
            row[key] += part[key]
    return plots.copies_bars(total, PANEL, "copies in the data")


def trend(block: dict[str, Any]) -> Themed | None:
    """Verified pictures over the varied factor, with the interval over seeds."""
    rows = [
        row
        for row in zip(block["levels"], block["verified"], block["low"], block["high"], strict=True)
        if row[1] is not None
    ]
    if not rows:
        return None
    levels, means, low, high = zip(*rows, strict=True)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in levels)
    x = np.array(levels, dtype=float) if numeric else np.arange(len(levels))

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        bounds = [(at, a, b) for at, a, b in zip(x, low, high, strict=True) if None not in (a, b)]
        if bounds:
            axes.vlines(*zip(*bounds, strict=True), color=colours["second"], linewidth=1.5, alpha=0.6)
        axes.plot(x, means, color=colours["second"], marker="o")
        if numeric and x.min() > 0 and x.max() >= 10 * x.min():
            axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" if numeric else str(value) for value in levels], parse_math=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(block["factor"], parse_math=False)
        axes.set(ylabel=EXTRACTED, ylim=_from_zero(axes))

    return render(draw, LINES)


def early_stop(finding: dict[str, Any]) -> Themed | None:
    """What the early stop saw: share of generations that copy training pictures, and calibration pictures by chance."""
    curve = finding.get("curve") or []
    if not curve:
        return None
    x = [point["step"] for point in curve]

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        axes.plot(x, [p["copies"] for p in curve], color=colours["second"], marker="o", label="training pictures")
        axes.plot(
            x, [p["copies_control"] for p in curve], color=colours["first"], marker="s", linestyle="--",
            label="calibration",
        )  # fmt: skip
        if finding.get("released_step") is not None:
            axes.axvline(finding["released_step"], color=colours["text"], linestyle=":")
        axes.set(
            xlabel="optimizer step (dotted: released)", ylabel="generations that copy", ylim=_from_zero(axes, 0.05)
        )
        axes.yaxis.set_major_formatter(lambda value, _: plots.percent(value))
        legend(axes, colours)

    return render(draw, LINES)


def along(arm: dict[str, Any], metric: str) -> list[dict[str, float]]:
    """Checkpoints of an arm up to the released one, the last: images_seen, verified and the metric, means over seeds."""
    points: dict[float, list[dict[str, float]]] = {}
    for run in arm["runs"]:
        values = run["values"] or {}
        steps, seen = values.get("model.steps"), values.get("model.images_seen")
        released = values.get("model.released_step", steps)
        if None in (released, seen):
            continue
        end = {"images_seen": seen * released / steps, "verified": values.get(VERIFIED)}
        rows = [row for row in run["along"] if row["step"] < released]
        for row in [*rows, end | {metric: values.get(f"utility.{metric}")}]:
            found = {key: row.get(key) for key in ("images_seen", "verified", metric)}
            if None not in found.values():
                points.setdefault(found["images_seen"], []).append(found)
    return [{key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for _, rows in sorted(points.items())]


def _curves(
    comparison: dict[str, Any], across: tuple[str, str], up: tuple[str, str], size: tuple[float, float]
) -> Themed | None:
    """One line per arm; ``across`` and ``up``: key of `along` and label of the axis."""
    arms, utility = comparison["arms"], comparison["design"]["utility"]["metric"]
    lines = {number: points for number, arm in enumerate(arms) if (points := along(arm, utility))}
    if not any(len(points) > 1 for points in lines.values()):
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        ends = []
        for number, points in lines.items():
            colour, marker = style(number)
            x, y = ([point[key] for point in points] for key, _ in (across, up))
            axes.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=3)
            _mark(axes, {"x": x[-1], "y": y[-1]}, number, arms[number]["comparable"] is not False)
            ends.append((x[-1], y[-1], arms[number]["name"], colour))
        axes.set(xlabel=across[1], ylabel=up[1])
        for side, (key, _) in (("x", across), ("y", up)):
            if key == utility:
                _scale(axes, side, [point[key] for points in lines.values() for point in points])
            elif key == "verified":
                axes.set_ylim(_from_zero(axes))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if across[0] == utility:
            beside(axes, ends, [[(p[across[0]], p[up[0]]) for p in points] for points in lines.values()])
        else:
            at_the_right(axes, ends)

    return render(draw, size)


def _mark(axes: Axes, point: dict[str, Any], number: int, full: bool) -> None:
    colour, marker = style(number)
    axes.plot(
        point["x"], point["y"], marker=marker, markersize=8, color=colour, markerfacecolor=colour if full else "none",
        markeredgewidth=1.6, clip_on=False, zorder=3,
    )  # fmt: skip


def _spread(axes: Axes, arm: dict[str, Any], drawn: list[int], metric: str, stage: str, colour: str) -> None:
    """Bars from the lowest to the highest of the seeds that are drawn."""
    seeds = []
    for run in (run for run in arm["runs"] if run["seed"] in drawn):
        values, off = run["values"] or {}, run["guard_off"] if stage == "weights" else None
        x = off.get(metric) if off else values.get(f"utility.{metric}")
        seeds.append((x, off["verified"] if off else values.get(VERIFIED)))
    seeds = [seed for seed in seeds if None not in seed]
    if len(seeds) > 1:
        x, y = (np.array(side) for side in zip(*seeds, strict=True))
        axes.vlines(x.mean(), y.min(), y.max(), color=colour, linewidth=1.6)
        axes.hlines(y.mean(), x.min(), x.max(), color=colour, linewidth=1.6)


def _name(metric: str) -> str:
    return f"{metric.upper()} (lower is better)"


def _scale(axes: Axes, side: str, values: list[float]) -> None:
    """Logarithmic where the arms lie far apart, so that the good ones do not fall together."""
    axis = getattr(axes, f"{side}axis")
    if min(values) <= 0 or max(values) <= 8 * min(values):
        axis.set_major_locator(MaxNLocator(5))
        return
    axes.set(**{f"{side}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _from_zero(axes: Axes, least: float = 1.0) -> tuple[float, float]:
    """Limits of an axis that begins at 0 and, where nothing was found, still reaches ``least``."""
    top = max(axes.dataLim.y1, least)
    return min(axes.dataLim.y0, 0.0) - 0.04 * top, top * 1.12
