"""Privacy against utility: arms at matched utility, and the Pareto front. Lower is better for both."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One checkpoint of a run: its optimizer step, utility metric (lower is better) and verified distinct pictures."""

    step: float
    metric: float
    verified: float


@dataclass(frozen=True)
class Match:
    """Where a run first reaches a level of the metric.

    Attributes:
        step, verified: there, by linear interpolation between two checkpoints.
        at_first: the first checkpoint was already there, and these are its numbers: the run came by earlier, nobody knows with
            how many verified (a censored value).
    """

    step: float
    verified: float
    at_first: bool


def pair_level(one: Sequence[Point], other: Sequence[Point]) -> float | None:
    """The best level of the metric that both runs reach: the worse of their best values; None where one has no checkpoint."""
    if not one or not other:
        return None
    return max(min(point.metric for point in run) for run in (one, other))


def reach(points: Sequence[Point], level: float) -> Match | None:
    """Where the metric first falls to ``level``, between consecutive checkpoints in the order of steps; None: nowhere."""
    points = sorted(points, key=lambda point: point.step)
    place = next((place for place, point in enumerate(points) if point.metric <= level), None)
    if place is None:
        return None
    after = points[place]
    if place == 0:
        return Match(after.step, after.verified, at_first=True)
    before = points[place - 1]
    share = (before.metric - level) / (before.metric - after.metric)
    step = before.step + share * (after.step - before.step)
    return Match(step, before.verified + share * (after.verified - before.verified), at_first=False)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other dominates, in the given order.

    A point dominates another that is not better in either number and worse in at least one, so equal points stay together.
    """

    def dominated(mine: tuple[float, float]) -> bool:
        return any(x <= mine[0] and y <= mine[1] and (x, y) != mine for x, y in points.values())

    return [name for name, point in points.items() if not dominated(point)]


def front_with_marked(points: Mapping[str, tuple[float, float]], marked: Collection[str]) -> list[str]:
    """The front where some counts are no measurements: a marked point is on it if no point dominates it, but removes none.

    Args:
        marked: names of points that are small by construction.

    Returns:
        Names in the given order.
    """
    measured = {name: point for name, point in points.items() if name not in marked}
    kept = {*pareto_front(measured), *(name for name in pareto_front(points) if name in marked)}
    return [name for name in points if name in kept]
