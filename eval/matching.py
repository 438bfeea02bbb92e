"""Arms at matched utility: each run beside the reference's run of the same seed, where both are equally good.

Pairs of one seed are matched, not means over seeds: they share initial weights, batches and noise, both reach the level by
its definition, and no seed decides at which quality another is compared. A stated floor does not enter: a level that every run
passes at its first checkpoint would compare models that have learned nothing.
"""

from collections.abc import Sequence
from typing import Any

from eval.armfigures import VERIFIED, Loaded, checkpoint, is_guarded, mean_of
from eval.arms import Outcome
from eval.pairedtests import t_interval
from eval.tradeoff import Match, Point, pair_level, reach

ONE_POINT = "one point: the guard changes outputs, not training"
UNMEASURED = "no seed on which this arm and the reference were both measured"

Curves = list[list[Point]]  # checkpoints of every run of an arm, in the order of the seeds


def curves(loaded: Loaded, metric: str) -> dict[str, Curves | None]:
    """Checkpoints of every arm up to the released one; None for an arm whose filter makes one point of a training.

    An arm that stops another's training early has that training's earlier checkpoints: they are the same weights.
    """
    outcomes = {arm.name: found for arm, found in loaded}
    return {
        arm.name: None
        if is_guarded(found)
        else [_points(*pair, metric) for pair in zip(found, outcomes.get(arm.shares, found), strict=True)]
        for arm, found in loaded
    }


def _points(outcome: Outcome, trained: Outcome, metric: str) -> list[Point]:
    """Checkpoints of a run up to the released one: what comes later, the arm never gives out."""
    if outcome.report is None or VERIFIED not in outcome.values:
        return []
    released = outcome.values.get("model.released_step", outcome.values.get("model.steps"))
    along = (trained.report or {}).get("along") or []
    rows = [(row["step"], row[metric], row["verified"]) for row in map(checkpoint, along) if row["step"] < released]
    rows.append((released, outcome.values.get(f"utility.{metric}"), outcome.values[VERIFIED]))
    return [Point(*row) for row in rows if None not in row]


def matched(
    seeds: Sequence[int], mine: Curves | None, reference: Curves | None, metric: str, otherwise: str | None = None
) -> dict[str, Any]:
    """Verified pictures of an arm and of the reference where both are equally good.

    Args:
        mine, reference: their checkpoints by seed, see `curves`.
        otherwise: why the counts of both cannot be held against each other; None: they can.
        metric: of ``utility``, lower is better.

    Returns:
        ``matched`` of comparison.json. ``level``, ``mean`` and ``reference_mean`` are means over the ``n`` seeds that both
        have. ``low`` and ``high`` belong to ``mean``; None where some run was already there at its first checkpoint
        (``censored`` seeds), because its number is not that of the level.
    """
    alone = mine is None or reference is None or otherwise is not None
    pairs = [([], []) for _ in seeds] if alone else zip(mine, reference, strict=True)
    rows = [{"seed": seed} | _pair(*pair) for seed, pair in zip(seeds, pairs, strict=True)]
    known = [row for row in rows if row["level"] is not None]
    censored = sum(row["at_first"] or row["reference_at_first"] for row in known)
    interval = t_interval([row["verified"] for row in known], least=0.0)
    return {
        "metric": metric,
        "level": mean_of(row["level"] for row in known),
        "runs": rows,
        "mean": interval["mean"],
        "reference_mean": mean_of(row["reference_verified"] for row in known),
        **{key: None if censored else interval[key] for key in ("low", "high")},
        "n": len(known),
        "censored": censored,
        "reached": bool(known),
        "note": (otherwise or ONE_POINT) if alone else _note(known, metric) if known else UNMEASURED,
    }


def _pair(mine: list[Point], reference: list[Point]) -> dict[str, Any]:
    level = pair_level(mine, reference)
    sides = [None if level is None else reach(points, level) for points in (mine, reference)]
    return {"level": level} | _side("", sides[0]) | _side("reference_", sides[1])


def _side(prefix: str, match: Match | None) -> dict[str, Any]:
    return {f"{prefix}{key}": match and getattr(match, key) for key in ("verified", "step", "at_first")}


def _note(known: list[dict[str, Any]], metric: str) -> str:
    note = (
        f"verified pictures of each run, and of the reference's run of the same seed, where {metric} first falls to the worse of "
        "the two runs' best values, linear between checkpoints."
    )
    for key, name in (("at_first", "this arm"), ("reference_at_first", "the reference")):
        seeds = [row["seed"] for row in known if row[key]]
        if seeds:
            note += (
                f" Already there at the first checkpoint that was measured, {name}: {_named(seeds)}. What it gave away at the "
                "level is not known; the value of that checkpoint stands in its place, an upper bound if leakage only grows."
            )
    return note


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
