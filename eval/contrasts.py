"""Arms against each other: paired with the reference, at matched utility, on the Pareto front, over a varied factor."""

from collections.abc import Sequence
from typing import Any

from eval.armfigures import EXTRACTION, METRICS, VERIFIED, Loaded, checkpoint, done_of, guard_off, mean_of, values_of
from eval.arms import Outcome, UtilityFloor
from eval.pairedtests import (
    holm,
    paired_t_test,
    sign_agreement,
    sign_flip_p_value,
    t_interval,
    trend_test,
    unit_differences,
)
from eval.tradeoff import Point, matched_level, pareto_front, reach

COMPARED = (*METRICS, "downstream.accuracy", "downstream.macro_auc")  # of ``utility``, against the reference


def comparability(outcomes: list[Outcome], utility: UtilityFloor) -> tuple[bool | None, str | None]:
    """Whether an arm may be ranked, and why not; None where nothing was measured."""
    if not done_of(outcomes):
        return None, "no run of this arm finished"
    mean = mean_of(values_of(outcomes, f"utility.{utility.metric}"))
    if mean is None:
        return None, f"utility.{utility.metric} was not measured"
    if utility.at_most is None or mean <= utility.at_most:
        return True, None
    return False, f"mean {utility.metric} over the seeds, {mean:.4g}, is above the stated {utility.at_most:.4g}"


def versus(outcomes: list[Outcome], base: list[Outcome]) -> dict[str, Any]:
    """Paired differences from the reference, seed by seed."""
    differences = _differences(outcomes, base, VERIFIED)
    p_value, test, units = _pictures_test(outcomes, base)
    found = {"verified": _paired(differences) | {"p_value": p_value, "p_value_holm": None, "test": test} | units}
    for metric in COMPARED:
        differences = _differences(outcomes, base, f"utility.{metric}")
        if any(difference is not None for difference in differences):
            p_value, test = paired_t_test([each for each in differences if each is not None])
            found[metric] = _paired(differences) | {"p_value": p_value, "test": test}
    return found


def _paired(differences: list[float | None]) -> dict[str, Any]:
    known = [each for each in differences if each is not None]
    interval = t_interval(known)
    return {
        "differences": differences,
        **sign_agreement(known),
        **{key: interval[key] for key in ("mean", "low", "high")},
    }


def _differences(outcomes: list[Outcome], base: list[Outcome], path: str) -> list[float | None]:
    pairs = zip(values_of(outcomes, path), values_of(base, path), strict=True)
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def _pictures_test(outcomes: list[Outcome], base: list[Outcome]) -> tuple[float | None, str, dict[str, int | None]]:
    """Sign flips over the independent units of the training pictures that both arms saw: p-value, test, units."""
    none = {"units": None, "units_differing": None}
    pairs = [pair for pair in zip(outcomes, base, strict=True) if None not in (pair[0].verified, pair[1].verified)]
    if not pairs:
        return None, "none: no seed on which both arms finished with an attack", none
    training = pairs[0][1].training
    if any(each.training.picture != training.picture for pair in pairs for each in pair):
        return None, "none: the arms were not trained on the same pictures", none
    units = unit_differences([(mine.verified, theirs.verified) for mine, theirs in pairs], training.unit_of)
    counts = {"units": len(units), "units_differing": sum(value != 0 for value in units.values())}
    seeds = f"{len(pairs)} seed{'' if len(pairs) == 1 else 's'}"
    test = f"exact sign flips of {training.unit}, two-sided, summed over {seeds}"
    return sign_flip_p_value(list(units.values())), test, counts


def adjust(described: list[dict[str, Any]]) -> None:
    """Holm's adjustment over all arms that are held against the reference."""
    tests = [entry["versus_reference"]["verified"] for entry in described if entry["versus_reference"]]
    for test, adjusted in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_value_holm"] = adjusted


def level_of(loaded: Loaded, utility: UtilityFloor) -> float | None:
    """The level of the metric at which arms are compared."""
    ranked = [outcomes for _, outcomes in loaded if comparability(outcomes, utility)[0]]
    runs = [_points(outcome, utility.metric) for outcomes in ranked for outcome in outcomes]
    return matched_level([run for run in runs if run], utility.at_most)


def _points(outcome: Outcome, metric: str) -> list[Point]:
    """Checkpoints of a run up to the released one: what comes later, the arm never gives out."""
    if outcome.report is None or VERIFIED not in outcome.values:
        return []
    released = outcome.values.get("model.released_step", outcome.values.get("model.steps"))
    rows = [(row["step"], row[metric], row["verified"]) for row in map(checkpoint, outcome.report.get("along") or [])]
    rows = [row for row in rows if row[0] < released]
    rows.append((released, outcome.values.get(f"utility.{metric}"), outcome.values[VERIFIED]))
    return [Point(*row) for row in rows if None not in row]


def matched(outcomes: list[Outcome], metric: str, level: float | None) -> dict[str, Any]:
    """The arm where its metric first falls to the level, run by run."""
    runs = [_points(outcome, metric) for outcome in outcomes]
    found = [None if level is None else reach(run, level) for run in runs]
    known = [match for match in found if match is not None]
    interval = t_interval([match.verified for match in known], least=0.0)
    seeds = [outcome.run.seed for outcome in outcomes]
    rows = [
        {"seed": seed, "verified": match and match.verified, "step": match and match.step}
        for seed, match in zip(seeds, found, strict=True)
    ]
    missed = [seed for seed, run, match in zip(seeds, runs, found, strict=True) if run and match is None]
    at_first = [seed for seed, match in zip(seeds, found, strict=True) if match and match.at_first]
    return {
        "metric": metric,
        "level": level,
        "runs": rows,
        **{key: interval[key] for key in ("mean", "low", "high", "n")},
        "reached": bool(known) and not missed,
        "note": _matched_note(metric, level, missed, at_first) if any(runs) else "No run was measured.",
    }


def _matched_note(metric: str, level: float | None, missed: list[int], at_first: list[int]) -> str:
    if level is None:
        return "No arm is comparable, so there is no level to match."
    note = f"Verified pictures where {metric} first falls to {level:.4g}, linear between checkpoints."
    if at_first:
        note += f" The first checkpoint measured was already there, and its value is taken ({_named(at_first)})."
    return note + (f" Never reached ({_named(missed)})." if missed else "")


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def front(loaded: Loaded, utility: UtilityFloor, guard: bool) -> dict[str, Any]:
    """Arms in the plane of utility and leakage, means over seeds; the front holds only those that are comparable.

    Args:
        guard: count what output filters let through; otherwise what the weights give away.
    """
    points = []
    for arm, outcomes in loaded:
        off = not guard and any(outcome.guarded for outcome in outcomes)
        figures = [_figures(outcome, utility.metric, off) for outcome in done_of(outcomes)]
        x, y = (mean_of(column) for column in zip(*figures, strict=True)) if figures else (None, None)
        if x is not None and y is not None:
            comparable = utility.at_most is None or x <= utility.at_most
            points.append({"arm": arm.name, "x": x, "y": y, "comparable": comparable})
    ranked = {point["arm"]: (point["x"], point["y"]) for point in points if point["comparable"]}
    return {"x": utility.metric, "y": "verified", "front": pareto_front(ranked), "points": points}


def _figures(outcome: Outcome, metric: str, off: bool) -> tuple[float | None, float | None]:
    if off and outcome.guarded:
        found = guard_off(outcome.report)
        return found[metric], found["verified"]
    return outcome.values.get(f"utility.{metric}"), outcome.values.get(VERIFIED)


def trend(loaded: Loaded, factor: str) -> dict[str, Any]:
    """Leakage over the levels of the factor: in their own order where they are numbers, else in the order given."""
    if all(isinstance(arm.level, int | float) and not isinstance(arm.level, bool) for arm, _ in loaded):
        loaded = sorted(loaded, key=lambda pair: pair[0].level)
    columns = {path: [values_of(outcomes, path) for _, outcomes in loaded] for path in (VERIFIED, f"{EXTRACTION}.rate")}
    tests = [trend_test(list(zip(*column, strict=True))) for column in columns.values()]
    known = [[value for value in values if value is not None] for values in columns[VERIFIED]]
    intervals = [t_interval(values, least=0.0) for values in known]
    return {
        "factor": factor,
        "levels": [arm.level for arm, _ in loaded],
        "arms": [arm.name for arm, _ in loaded],
        "verified": [interval["mean"] for interval in intervals],
        "low": [interval["low"] for interval in intervals],
        "high": [interval["high"] for interval in intervals],
        "rate": [mean_of(values) for values in columns[f"{EXTRACTION}.rate"]],
        "test": tests[0],
        "test_rate": tests[1],
    }
