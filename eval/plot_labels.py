"""Names written directly beside the points and lines of a figure, where they hide least."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes

_SIDES = [(1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)]
_PLACES = [(side, far) for far, side in product((8, 18, 30, 44), _SIDES)]  # (side, points away from the point)


def beside(
    axes: Axes,
    points: list[tuple[float, float, str, str]],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    font: float = 10.0,
) -> None:
    """Names beside their points (x, y, name, colour): of a few places around each the one that hides least, ``lines`` too."""
    axes.figure.draw_without_rendering()  # the layout is known only now
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    low, high = np.array([frame.x0, frame.y0]) * scale, np.array([frame.x1, frame.y1]) * scale
    at = axes.transData.transform([(x, y) for x, y, _, _ in points]) * scale
    taken = [(*(spot - 5), *(spot + 5)) for spot in at]
    for line in lines:
        bends = axes.transData.transform(line) * scale
        stops = np.linspace(0, len(bends) - 1, 12 * len(bends))
        on_line = [np.interp(stops, range(len(bends)), bends[:, side]) for side in (0, 1)]
        taken += [(*(spot - 1.5), *(spot + 1.5)) for spot in np.stack(on_line, axis=1)]
    for spot, (x, y, name, colour) in zip(at, points, strict=True):
        size = np.array([0.56 * font * len(name), 1.2 * font])
        boxes = [(*(corner := _corner(spot, size, side, far)), *(corner + size)) for side, far in _PLACES]
        costs = [_cost(box, taken, low, high) + 0.5 * far for box, (_, far) in zip(boxes, _PLACES, strict=True)]
        best = int(np.argmin(costs))
        box, far = np.array(boxes[best]), _PLACES[best][1]
        taken.append(boxes[best])
        axes.annotate(
            name, (x, y), (box[:2] - spot + (0, 0.25 * font)), textcoords="offset points", color=colour, fontsize=font,
            parse_math=False, annotation_clip=False, va="baseline",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far > 12 else None,
        )  # fmt: skip


def at_the_right(axes: Axes, points: list[tuple[float, float, str, str]], font: float = 10.0) -> None:
    """Names right of the axes, each joined to its point (x, y, name, colour), apart from each other."""
    axes.figure.draw_without_rendering()
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for x, y, _, _ in points]))[:, 1]
    gap = 1.25 * font / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    order = np.argsort(heights, kind="stable")
    place = heights[order].copy()
    for k in range(1, len(place)):
        place[k] = max(place[k], place[k - 1] + gap)
    place -= max(0.0, place[-1] - 1)  # all of them below the top
    for k in range(len(place) - 2, -1, -1):
        place[k] = min(place[k], place[k + 1] - gap)
    for k, height in zip(order, place, strict=True):
        x, y, name, colour = points[k]
        axes.annotate(
            name, (x, y), (1.05, height), textcoords="axes fraction", color=colour, fontsize=font, va="center",
            parse_math=False, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def _corner(spot: np.ndarray, size: np.ndarray, side: tuple[int, int], far: float) -> np.ndarray:
    """Lower left corner of a box of this size on this side of a point."""
    return spot + far * np.array(side) + size * (np.array(side) - 1) / 2


def _cost(box: tuple[float, ...], taken: list[tuple[float, ...]], low: np.ndarray, high: np.ndarray) -> float:
    """Area that a box (x0, y0, x1, y1) shares with others, and much for what sticks out of the frame."""
    shared = sum(
        max(0.0, min(box[2], x1) - max(box[0], x0)) * max(0.0, min(box[3], y1) - max(box[1], y0))
        for x0, y0, x1, y1 in taken
    )
    outside = max(0.0, low[0] - box[0]) + max(0.0, low[1] - box[1])
    return shared + 20 * (outside + max(0.0, box[2] - high[0]) + max(0.0, box[3] - high[1]))
