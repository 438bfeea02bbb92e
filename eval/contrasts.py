"""Arms against each other: paired with the reference, on the Pareto front, over a varied factor."""

from collections.abc import Mapping
from typing import Any

from eval.armfigures import (
    EXTRACTION,
    METRICS,
    VERIFIED,
    Loaded,
    done_of,
    guard_off,
    is_by_construction,
    mean_of,
    values_of,
)
from eval.arms import Arm, Outcome, Training, UtilityFloor
from eval.pairedtests import (
    holm,
    paired_t_test,
    sign_agreement,
    sign_flip_p_value,
    smallest_sign_flip_p_value,
    t_interval,
    trend_test,
    unit_differences,
)
from eval.tradeoff import front_with_marked
from eval.verdict import EVIDENCE_P

COMPARED = (*METRICS, "downstream.accuracy", "downstream.macro_auc")  # of ``utility``, against the reference
# figure -> how many images it was computed from: its bias depends on that number
SIZES = {"fid": "fid_n", "precision": "prc_n", "recall": "prc_n"}
BY_CONSTRUCTION = (
    "none: the filter uses the attack's own score, so that little or nothing is counted behind it by construction; see the "
    "figures with the guard off, and those by correlation"
)
NO_TEST = {"p_value": None, "units": None, "units_differing": None, "smallest_p_value": None, "by_copies": []}


def comparability(
    outcomes: list[Outcome], utility: UtilityFloor, otherwise: str | None = None
) -> tuple[bool | None, str | None]:
    """Whether an arm may be ranked, and why not; None where nothing was measured.

    Args:
        otherwise: why its counts cannot be held against the reference's (`eval.alike`); None: they can.
    """
    if not done_of(outcomes):
        return None, "no run of this arm finished"
    if otherwise:
        return False, otherwise
    mean = mean_of(values_of(outcomes, f"utility.{utility.metric}"))
    if mean is None:
        return None, f"utility.{utility.metric} was not measured"
    if utility.at_most is None or mean <= utility.at_most:
        return True, None
    return False, f"mean {utility.metric} over the seeds, {mean:.4g}, is above the stated {utility.at_most:.4g}"


def versus(outcomes: list[Outcome], base: list[Outcome], otherwise: str | None = None) -> dict[str, Any]:
    """Paired differences from the reference, seed by seed; of counts only where they can be held against each other (``otherwise``: why not)."""
    test = NO_TEST | {"test": f"none: {otherwise}"} if otherwise else _pictures_test(outcomes, base)
    counts = [None] * len(base) if otherwise else _differences(outcomes, base, VERIFIED)
    found = {"verified": _paired(counts) | test | {"p_value_holm": None, "smallest_p_value_holm": None, "note": None}}
    for metric in COMPARED:
        differences = _differences(outcomes, base, f"utility.{metric}")
        if any(difference is not None for difference in differences):
            sizes = _differences(outcomes, base, f"utility.{SIZES[metric]}") if metric in SIZES else [None] * len(base)
            found[metric] = _quality(differences, sizes)
    return found


def _quality(differences: list[float | None], sizes: list[float | None]) -> dict[str, Any]:
    """Paired differences of a figure of utility; none on seeds on which the two numbers of images (``sizes``) differ."""
    alike = [None if size else each for each, size in zip(differences, sizes, strict=True)]
    p_value, test = paired_t_test([each for each in alike if each is not None])
    if alike != differences:
        test += "; seeds are left out on which it comes from different numbers of images: its bias depends on them"
    return _paired(alike) | {"p_value": p_value, "test": test}


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


def _pictures_test(outcomes: list[Outcome], base: list[Outcome]) -> dict[str, Any]:
    """Sign flips over the independent units of the training pictures that both arms saw.

    Also for a prompted attack, where each prompt gives one picture at most: both arms were asked the same prompts, so that under the
    null hypothesis, that the defense changes nothing, the two results of a unit may change places. What one prompt brings of another
    unit's pictures moves two units at once, in opposite directions, which the flips of both by themselves only exaggerate.
    """
    if is_by_construction(outcomes) or is_by_construction(base):
        return NO_TEST | {"test": BY_CONSTRUCTION}
    pairs = [pair for pair in zip(outcomes, base, strict=True) if None not in (pair[0].verified, pair[1].verified)]
    if not pairs:
        return NO_TEST | {"test": "none: no seed on which both arms finished with an attack"}
    training = pairs[0][1].training
    if any(each.training.picture != training.picture for pair in pairs for each in pair):
        return NO_TEST | {"test": "none: the arms were not trained on the same pictures"}
    units = unit_differences([(mine.verified, theirs.verified) for mine, theirs in pairs], training.unit_of)
    differing = sum(value != 0 for value in units.values())
    seeds = f"{len(pairs)} seed{'' if len(pairs) == 1 else 's'}"
    return {
        "p_value": sign_flip_p_value(list(units.values())),
        "test": f"exact sign flips of {training.unit}, two-sided, summed over {seeds}",
        "units": len(units),
        "units_differing": differing,
        "smallest_p_value": smallest_sign_flip_p_value(differing),
        "by_copies": _by_copies(pairs, training),
    }


def _by_copies(pairs: list[tuple[Outcome, Outcome]], training: Training) -> list[dict[str, Any]]:
    """The same test among pictures that occur equally often, fewest copies first: a defense may take away what copies leak and nothing
    else. Descriptive: nothing corrects for the number of rows.

    Args:
        pairs: runs of the arm and of the reference, seed by seed.
    """
    rows = []
    for copies, pictures in training.by_copies().items():
        some = [tuple(each.verified & pictures for each in pair) for pair in pairs]
        units = unit_differences(some, {picture: training.unit_of[picture] for picture in pictures})
        counts = {
            name: sum(len(pair[place]) for pair in some) / len(some)
            for place, name in enumerate(("mean", "reference_mean"))
        }
        differing = sum(value != 0 for value in units.values())
        p_value = sign_flip_p_value(list(units.values()))
        rows.append(
            {"copies": copies, "pictures": len(pictures), **counts, "units_differing": differing, "p_value": p_value}
        )
    return rows


def adjust(described: list[dict[str, Any]]) -> None:
    """Holm's adjustment over the arms that are comparable and tested, and what the tests could have shown at best."""
    held = [(entry, entry["versus_reference"]["verified"]) for entry in described if entry["versus_reference"]]
    tests = [(entry, test) for entry, test in held if test["p_value"] is not None]
    family = [test for entry, test in tests if entry["comparable"]]
    p_values = [test["p_value"] for test in family]
    for place, (test, adjusted) in enumerate(zip(family, holm(p_values), strict=True)):
        test["p_value_holm"] = adjusted
        # the other tests as they are; times the size of the family would be too much for all but the smallest
        at_best = [*p_values[:place], test["smallest_p_value"], *p_values[place + 1 :]]
        test["smallest_p_value_holm"] = holm(at_best)[place]
    for _, test in tests:
        test["note"] = _at_best(test, len(family))


def _at_best(test: dict[str, Any], family: int) -> str | None:
    """Says where the test cannot reach `EVIDENCE_P`, however large the effect."""
    count, adjusted = test["units_differing"], test["smallest_p_value_holm"]
    if count == 0:
        return "the two arms gave away the same pictures, so the test has nothing to speak of"
    if max(test["smallest_p_value"], adjusted or 0.0) <= EVIDENCE_P:
        return None
    said = f"{count} {'unit that differs' if count == 1 else 'units that differ'} cannot give less than p = "
    said += f"{test['smallest_p_value']:.3g}"
    if adjusted is not None:
        said += f" ({adjusted:.3g} after Holm over {family} test{'' if family == 1 else 's'})"
    return f"{said}: even if all of them point one way, {EVIDENCE_P} is out of reach"


def front(
    loaded: Loaded, utility: UtilityFloor, guard: bool, otherwise: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Arms in the plane of utility and leakage, means over seeds; the front holds only those that are comparable.

    Comparable arms are drawn over the seeds that all of them have, the others over their own. Behind an output filter the count
    is small by construction: such a point is marked, and takes no arm off the front (`front_with_marked`).

    Args:
        guard: count what output filters let through; otherwise what the weights give away.
        otherwise: see `comparability`, by arm.
    """
    otherwise = otherwise or {}

    def ranks(arm: Arm, outcomes: list[Outcome]) -> bool:
        return bool(comparability(outcomes, utility, otherwise.get(arm.name))[0])

    figures = {arm.name: _figures(outcomes, utility.metric, guard) for arm, outcomes in loaded}
    ranked = {arm.name for arm, outcomes in loaded if figures[arm.name] and ranks(arm, outcomes)}
    common = set.intersection(*(set(figures[name]) for name in ranked)) if ranked else set()
    points = []
    for arm, outcomes in loaded:
        # without a seed in common nothing can be ranked, and every arm is drawn over its own
        seeds = sorted(common if common and arm.name in ranked else figures[arm.name])
        if seeds:
            x, y = (mean_of(figures[arm.name][seed][axis] for seed in seeds) for axis in (0, 1))
            full = arm.name in ranked and (utility.at_most is None or x <= utility.at_most)
            counted = {"n": len(seeds), "seeds": seeds, "by_construction": guard and is_by_construction(outcomes)}
            points.append({"arm": arm.name, "x": x, "y": y, "comparable": full, **counted})
    best = {point["arm"]: (point["x"], point["y"]) for point in points if point["comparable"] and common}
    marked = [point["arm"] for point in points if point["by_construction"]]
    return {"x": utility.metric, "y": "verified", "front": front_with_marked(best, marked), "points": points}


def _figures(outcomes: list[Outcome], metric: str, guard: bool) -> dict[int, tuple[float, float]]:
    """Seed -> (metric, verified), where both were measured."""
    found = {}
    for outcome in done_of(outcomes):
        pair = outcome.values.get(f"utility.{metric}"), outcome.values.get(VERIFIED)
        if outcome.guarded and not guard:
            off = guard_off(outcome.report)
            pair = off[metric], off["verified"]
        if None not in pair:
            found[outcome.run.seed] = pair
    return found


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
        "control": [mean_of(values_of(outcomes, f"{EXTRACTION}.control.verified")) for _, outcomes in loaded],
        "test": tests[0],
        "test_rate": tests[1],
    }
