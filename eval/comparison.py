"""comparison.json: what each arm leaks, what it is good for and what it costs, against one reference arm.

Every number of a run is a copy of one in its report.json; all others are computed here from them.
"""

import math
from typing import Any

from defenses.errors import UserError
from eval.alike import asked_otherwise, check_alike, nothing_left
from eval.armfigures import EXTRACTION, Loaded, checkpoint, common, done_of, guard_off, is_by_construction, is_guarded
from eval.arms import Arm, ArmRun, Outcome, UtilityFloor, lookup, read_outcomes
from eval.comparisonwords import P_VALUES, not_measured
from eval.contrasts import adjust, comparability, front, trend, versus
from eval.matching import curves, matched
from eval.otherattacks import others, over_seeds
from eval.pairedtests import t_interval

__all__ = ["Arm", "ArmRun", "UtilityFloor", "assemble"]

NO_MEAN = ("p_value", "_std", "_ci95")  # endings of figures whose mean over seeds means nothing
NEVER_NEGATIVE = (
    f"{EXTRACTION}.",
    "cost.",
    "utility.fid",
    "utility.precision",
    "utility.recall",
    "utility.downstream.",
)
SHARES = ("rate", "precision", "recall", "accuracy", "macro_auc", "background", "most_frequent")


def assemble(
    arms: list[Arm], *, name: str, reference: str, utility: UtilityFloor, factor: str | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """comparison.json, schema 1, from the files of the runs.

    Args:
        arms: at least one; every arm with the same seeds in the same order.
        reference: name of the arm that the others are held against.
        utility: the metric, and the level below which an arm is not comparable.
        factor: dotted key that the comparison varies, and every arm's ``level`` is its value; None: defenses.
        facts: put under ``comparison`` as they are.

    Returns:
        Contents of comparison.json; no NaN and no infinity among its numbers.

    Raises:
        UserError: the reference or a level is missing, a file is missing or broken, or reports were not measured alike.
    """
    _check_arms(arms, reference, factor)
    loaded = read_outcomes(arms)
    check_alike(loaded, factor)
    base = next(outcomes for arm, outcomes in loaded if arm.name == reference)
    seeds = [run.seed for run in loaded[0][0].runs]
    checkpoints = curves(loaded, utility.metric)
    otherwise = {} if varied(factor) else {arm.name: asked_otherwise(outcomes, base) for arm, outcomes in loaded}
    empty = {arm.name: nothing_left(outcomes) for arm, outcomes in loaded}
    described = [_describe(arm, outcomes, otherwise.get(arm.name), empty[arm.name]) for arm, outcomes in loaded]
    otherwise = {name: empty[name] or otherwise.get(name) for name in empty}
    for entry, (arm, outcomes) in zip(described, loaded, strict=True):
        entry["comparable"], entry["why"] = comparability(outcomes, utility, otherwise[arm.name])
        other = arm.name != reference
        why = otherwise[arm.name] or (empty[reference] and f"the reference, {empty[reference]}")
        pair = checkpoints[arm.name], checkpoints[reference]
        entry["versus_reference"] = versus(outcomes, base, why) if other else None
        entry["matched"] = matched(seeds, *pair, utility.metric, why) if other else None
    adjust(described)
    result = {
        "schema": 1,
        "comparison": {"name": name, **facts},
        "design": _design(loaded, base, reference, utility, factor),
        "arms": described,
        "fronts": {
            "weights": front(loaded, utility, guard=False, otherwise=otherwise),
            "outputs": front(loaded, utility, guard=True, otherwise=otherwise),
        },
        "trend": trend(loaded, factor) if factor else None,
        "p_values": P_VALUES,
    }
    return result | {"not_measured": not_measured(loaded, result)}


def _check_arms(arms: list[Arm], reference: str, factor: str | None) -> None:
    names = [arm.name for arm in arms]
    if reference not in names:
        raise UserError("reference", f"{reference!r} is none of the arms", f"take one of {', '.join(names)}")
    if len({tuple(run.seed for run in arm.runs) for arm in arms}) > 1:
        raise UserError("seeds", "the arms have different seeds", "give all arms the same")
    levels = [arm.level for arm in arms]
    if factor and (None in levels or len(set(levels)) < len(levels)):
        raise UserError(
            "factor", f"{factor} needs a level of its own in every arm, and has {levels}", "one arm a level"
        )


def _design(
    loaded: Loaded, base: list[Outcome], reference: str, utility: UtilityFloor, factor: str | None
) -> dict[str, Any]:
    """What all arms have in common; null where they differ, or no run is done. Steps and images are the reference's."""
    reports = [outcome.report for outcome in done_of(outcome for _, outcomes in loaded for outcome in outcomes)]
    # an output filter may have withheld images from the attack
    plain = [report for report in reports if report["privacy"].get("extraction_guard_off") is None]
    trained = [outcome.report for outcome in done_of(base)]
    return {
        "reference": reference,
        "seeds": [run.seed for run in loaded[0][0].runs],
        "factor": factor,
        "utility": {"metric": utility.metric, "at_most": utility.at_most},
        "generations": common(plain, f"{EXTRACTION}.generations"),
        "sampler": common(trained, f"{EXTRACTION}.sampler"),
        "protocol": common(plain, f"{EXTRACTION}.protocol"),
        "prompts": common(plain, f"{EXTRACTION}.prompts"),
        "tier": common(plain, f"{EXTRACTION}.tier"),
        "steps": common(trained, "model.steps"),
        "images_seen": common(trained, "model.images_seen"),
        "training_pictures": common(reports, "data.clusters"),
        "training_records": common(reports, "data.train"),
        "heldout_records": common(reports, "data.heldout"),
        "unit": common(reports, "data.unit"),
        "features": common(reports, "utility.features"),
    }


def varied(factor: str | None) -> bool:
    """Whether the comparison varies on purpose what is asked of the models, or for how many images."""
    return factor is not None and factor.startswith(("data.", "generate.", "attack."))


def _describe(arm: Arm, outcomes: list[Outcome], otherwise: str | None, empty: str | None) -> dict[str, Any]:
    """One arm without what it is compared with.

    Args:
        otherwise, empty: why its counts cannot be held against others, see `eval.alike`; None: they can.
    """
    done = done_of(outcomes)
    defenses = done[0].report["defenses"] if done else []
    return {
        "name": arm.name,
        "level": arm.level,
        "overrides": list(arm.overrides),
        "shares": arm.shares,
        "defenses": [defense["name"] for defense in defenses],
        "claims": _claims(done),
        "kind": _kind(done),
        "protects": ("outputs" if is_guarded(done) else "weights") if done else None,
        "runs": [_run(outcome) for outcome in outcomes],
        "summary": _summary(done),
        "other_attacks": over_seeds([others(outcome.report) for outcome in done]),
        "by_construction": is_by_construction(done),
        "asked_otherwise": otherwise,
        "nothing_left": empty,
    }


def _run(outcome: Outcome) -> dict[str, Any]:
    run, report = outcome.run, outcome.report
    told = {"seed": run.seed, "status": run.status, "error": run.error, "directory": run.path, "command": run.command}
    if report is None:
        return told | {
            "values": None,
            "by_copies": None,
            "along": [],
            "guard_off": None,
            "findings": [],
            "other_attacks": None,
        }
    measured = [defense for defense in report["defenses"] if defense.get("findings") is not None]
    return told | {
        "values": outcome.values,
        "by_copies": lookup(report, f"{EXTRACTION}.by_copies"),
        "along": [checkpoint(point) for point in report.get("along") or []],
        "guard_off": guard_off(report) if outcome.guarded else None,
        "findings": [{"name": defense["name"], **defense["findings"]} for defense in measured],
        "other_attacks": others(report),
    }


def _claims(done: list[Outcome]) -> list[dict[str, Any]]:
    """Claims of an arm: every statement of a heuristic with its ``seeds``; of privacy budgets that differ, the weakest."""
    claims: dict[tuple[str, str | None], dict[str, Any]] = {}
    for outcome in done:
        for defense in outcome.report["defenses"]:
            claim = {"name": defense["name"], **defense["claim"]}
            private = claim["kind"] == "dp"
            key = claim["name"], None if private else claim.get("statement")
            if not private:
                claims.setdefault(key, claim | {"seeds": []})["seeds"].append(outcome.run.seed)
            elif key not in claims or _budget(claim) > _budget(claims[key]):
                claims[key] = claim
    return list(claims.values())


def _budget(claim: dict[str, Any]) -> float:
    """Epsilon of a claim of differential privacy, infinite where it has no number."""
    return math.inf if claim.get("epsilon") is None else claim["epsilon"]


def _kind(done: list[Outcome]) -> str | None:
    kinds = {claim["kind"] for claim in _claims(done)}
    return None if not done else "dp" if "dp" in kinds else "heuristic" if kinds else "none"


def _summary(done: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Mean and interval over seeds of every figure that has one."""
    paths = dict.fromkeys(path for outcome in done for path in outcome.values)
    kept = [path for path in paths if not any(part.endswith(NO_MEAN) for part in path.split("."))]
    found = {path: [outcome.values[path] for outcome in done if path in outcome.values] for path in kept}
    return {path: t_interval(values, *_range(path)) for path, values in found.items()}


def _range(path: str) -> tuple[float, float]:
    least = 0.0 if path.startswith(NEVER_NEGATIVE) else -math.inf
    return least, 1.0 if path.rpartition(".")[2] in SHARES else math.inf
