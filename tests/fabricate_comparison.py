"""A comparison.json with everything that one can hold, and the run directories beside it; for the page alone.

`tests.comparisons` has the small one whose statistics are checked; this one is filled in by hand, so that the page meets every
case: shared trainings, a filter, an early stop, a failed seed, an arm below the utility, one that never finished.
"""

from pathlib import Path
from typing import Any

import numpy as np

from eval.comparisonwords import P_VALUES
from eval.otherattacks import others, over_seeds
from eval.wording import flatten
from tests.fabricate import Fabricated, fabricate_claim, fabricate_downstream, fabricate_report
from tests.fabricate_attacks import fabricate_attacks

ATTACKED = ("none", "dedup")  # arms with the attacks beside the main one
ABOVE = 0.031  # KID that an arm may have at most
HEURISTIC = {"kind": "heuristic", "statement": "It helped elsewhere."}
# name: (shares, kind, claims, verified by seed, KID by seed, training seconds); None: that seed failed
ARMS: dict[str, Any] = {
    "none": (None, "none", [], (8, 7), (0.0123, 0.0119), 203.4),
    "dedup": (None, "heuristic", ["dedup"], (2, 1), (0.0131, 0.0127), 201.7),
    "augment": (None, "heuristic", ["augment"], (5, 6), (0.0117, 0.0142), 211.2),
    "dedup+augment": (None, "heuristic", ["dedup", "augment"], (1, 0), (0.0152, 0.0149), 209.9),
    "dpsgd-eps8": (None, "dp", ["dpsgd"], (0, 0), (0.0261, 0.0272), 1893.0),
    "dpsgd-eps1": (None, "dp", ["dpsgd"], (0, None), (0.1213, None), 1911.0),
    "early_stop": ("none", "heuristic", ["early_stop"], (2, 3), (0.0189, 0.0193), 203.4),
    "output_filter": ("none", "heuristic", ["output_filter"], (0, 1), (0.0126, 0.0122), 203.4),
    "gan": (None, "none", [], (None, None), (None, None), None),
}
CURVE = [
    {
        "step": 500 * i,
        "images_seen": 32000 * i,
        "copies": (0.0, 0.003, 0.019, 0.071)[i - 1],
        "copies_control": 0.002 * (i > 2),
    }
    for i in range(1, 5)
]
FINDINGS = {
    "early_stop": {"curve": CURVE, "released_step": 1000, "onset_step": 1500, "rule": "Copies of more than 1.00%."},
    "output_filter": {
        "threshold": 0.7316,
        "false_alarm_rate": 0.0102,
        "redrawn": 119,
        "withheld": 3,
        "filter_seconds_per_image": 0.0047,
    },
}


def fabricate(folder: Path, *, trend: bool = True) -> tuple[dict[str, Any], Fabricated]:
    """Writes the run directories; returns comparison.json and the run that holds the training pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    arms, pictures = [], None
    for name, row in ARMS.items():
        runs = [_run(folder, name, row, seed) for seed in (0, 1)]
        arms.append(_arm(name, row, [run for run, _ in runs]))
        pictures = pictures or next(made for _, made in runs if made)
    return _comparison(folder, arms, trend), pictures


def _run(folder: Path, name: str, row: tuple, seed: int) -> tuple[dict[str, Any], Fabricated | None]:
    shares, _, names, verified, kid, seconds = row
    directory = f"{shares}-s{seed}/eval/{name}" if shares else f"{name}-s{seed}"
    command = f"accelerate launch train/run.py --config configs/quickstart.yaml run.seed={seed} run.name={directory}"
    run = {
        "seed": seed,
        "status": "failed",
        "error": "out of memory in step 17",
        "directory": directory,
        "command": command,
    }
    run |= {"values": None, "by_copies": None, "along": [], "guard_off": None, "findings": [], "other_attacks": None}
    if verified[seed] is None:
        return run, None
    made = Fabricated(folder / directory, verified=verified[seed])
    if shares:
        (folder / directory / "manifest.csv").rename(folder / f"{shares}-s{seed}" / "manifest.csv")
    report = _report(verified[seed], kid[seed], seconds, seed, name)
    if name in ATTACKED:
        report["privacy"] |= _attacks(folder / directory, seed)
    run["other_attacks"] = others(report)
    extraction = report["privacy"]["extraction"]
    values = {
        key: value for key, value in flatten(report) if isinstance(value, int | float) and not isinstance(value, bool)
    }
    run |= {"status": "done", "error": None, "values": values, "by_copies": extraction["by_copies"]}
    run["findings"] = [{"name": part, **FINDINGS[part]} for part in names if part in FINDINGS]
    if not shares:
        run["along"] = [_along(step, verified[seed], kid[seed]) for step in (500, 1000, 1500)]
    if name == "output_filter":
        off = _extraction(ARMS["none"][3][seed])
        run["guard_off"] = {key: off[key] for key in ("verified", "verified_units", "candidates", "by_copies")}
        run["guard_off"] |= {"control": off["control"]["verified"], "kid": ARMS["none"][4][seed]}
        run["guard_off"] |= {"by_correlation": 13, "by_correlation_candidates": 29, "by_correlation_train": 12}
        run["guard_off"] |= {"by_correlation_control": 11, "by_correlation_n": 31}
    return run, made


def _report(verified: int, kid: float, seconds: float, seed: int, name: str) -> dict[str, Any]:
    report = fabricate_report(verified)
    report["privacy"]["extraction"] = _extraction(verified)
    report["utility"] |= {"kid": kid, "fid": round(15.3 * kid, 5), "precision": round(0.9 - 5 * kid, 4)}
    report["utility"] |= {"recall": round(0.7 - 4 * kid, 4), "downstream": fabricate_downstream()}
    report["cost"] |= {"train_seconds": seconds + 3.1 * seed, "images_per_second": round(29800 / seconds, 3)}
    return report


def _attacks(folder: Path, seed: int) -> dict[str, Any]:
    """Parts of ``privacy``; numbers of one seed are not those of the other."""
    found = fabricate_attacks(folder)
    found["canaries"]["one_run"] |= {"ceiling": 4.321, "canaries": 256, "epsilon_lower_bound": 0.834 + 0.3 * seed}
    found["prefilter"]["recall"]["flagged"]["0.1"] = 0.4567 + 0.12 * seed
    found["membership"][1]["auc"] += 0.011 * seed
    return found


def _extraction(verified: int) -> dict[str, Any]:
    extraction = fabricate_report(verified)["privacy"]["extraction"]
    once = max(0, verified - 6)
    extraction["by_copies"] = {
        "1": {"pictures": 32, "verified": once},
        "12": {"pictures": 8, "verified": verified - once},
    }
    extraction["control"] |= {
        "verified": int(verified == 1),
        "p_value": {0: 1.0, 1: 0.42, 2: 0.0313}.get(verified, 0.0013),
    }
    control = {"verified": 4, "verified_train_m": 6, "n": 31, "background": 0.0419}
    captions = {
        "tested": 33,
        "own": 4,
        "training": {"tested": 38, "own": verified + 3},
        "p_value": 0.0007,
        "reason": None,
    }
    captions["unit"] = "group"
    extraction["control"]["captions"] = captions if verified in (7, 8) else None
    return extraction | {"by_correlation": {"verified": max(0, verified - 1), "candidates": 17, "control": control}}


def _along(step: int, verified: int, kid: float) -> dict[str, Any]:
    share = step / 2011
    point = {"step": step, "images_seen": 64 * step, "verified": int(verified * share**2), "control": None}
    return point | {"kid": round(kid / share, 5), "fid": round(15 * kid / share, 4), "precision": 0.61, "recall": 0.4}


def _mean(values: list[float]) -> dict[str, Any]:
    n, mean = len(values), float(np.mean(values))
    half = 12.7062 * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "n": n, "method": "t interval over seeds"}


def _arm(name: str, row: tuple, runs: list[dict[str, Any]]) -> dict[str, Any]:
    shares, kind, names, verified, kid, _ = row
    found = [run["values"] for run in runs if run["values"]]
    claims = [
        {"name": part} | (fabricate_claim() if part == "dpsgd" else HEURISTIC | {"seeds": [0, 1]}) for part in names
    ]
    for claim in claims:
        if name == "dpsgd-eps1":
            claim |= {"epsilon": 0.9871}
    keys = found[0] if found else []
    arm = {"name": name, "level": None, "overrides": [f"defenses.{part}={{}}" for part in names], "shares": shares}
    arm |= {"defenses": names, "claims": claims, "kind": kind, "runs": runs}
    arm |= {"protects": "outputs" if name == "output_filter" else "weights"}
    arm["other_attacks"] = over_seeds([run["other_attacks"] for run in runs if run["values"]])
    arm |= {"by_construction": name == "output_filter", "asked_otherwise": None, "nothing_left": None}
    arm["summary"] = {key: _mean([values[key] for values in found]) for key in keys}
    below = bool(found) and _mean([values["utility.kid"] for values in found])["mean"] > ABOVE
    why = (
        f"mean kid over the seeds, 0.1213, is above the stated {ABOVE}"
        if below
        else None
        if found
        else "no run of this arm finished"
    )
    arm |= {"comparable": None if not found else not below, "why": why, "versus_reference": None}
    differences = [a - b for a, b in zip(verified, ARMS["none"][3], strict=True) if a is not None]
    if name != "none" and found:
        test = {"p_value": 0.0417, "p_value_holm": 0.0834, "test": "permutation of units", "units": 34}
        test |= {
            "smallest_p_value": 0.0078125,
            "smallest_p_value_holm": 0.0547,
            "note": "8 units give no less than p = 0.0547",
            "by_copies": [_stratum(1, 32, 0.5, 1.5, 3, 0.25), _stratum(12, 8, 1.25, 7.75, 6, 0.03125)],
        }
        if name == "output_filter":
            test |= {"p_value": None, "p_value_holm": None, "smallest_p_value": None, "smallest_p_value_holm": None}
            test |= {"test": "none: the filter uses the attack's own score", "note": None, "by_copies": []}
        arm["versus_reference"] = {
            "verified": {
                "differences": differences,
                "sign": "less",
                "ties": 0,
                "agree": True,
                **test,
                **_mean(differences),
            },
        }
    arm["matched"] = None if name == "none" else _matched(found if name != "output_filter" else [])
    return arm


def _stratum(copies: int, pictures: int, mean: float, reference: float, units: int, p_value: float) -> dict[str, Any]:
    row = {"copies": copies, "pictures": pictures, "mean": mean, "reference_mean": reference}
    return row | {"units_differing": units, "p_value": p_value}


def _matched(found: list[dict[str, Any]]) -> dict[str, Any]:
    """``matched`` of an arm; its second seed was at the level at its first checkpoint."""
    rows = []
    for seed, values in enumerate(found):
        verified = 0.83 * values["privacy.extraction.verified"]
        row = {
            "seed": seed,
            "level": 0.0163 + 0.0011 * seed,
            "verified": verified,
            "step": 911.5,
            "at_first": seed == 1,
        }
        rows.append(row | {"reference_verified": 6.31, "reference_step": 1207.25, "reference_at_first": False})
    figures = _mean([row["verified"] for row in rows]) if rows else {"mean": None, "n": 0}
    level = float(np.mean([row["level"] for row in rows])) if rows else None
    matched = {"metric": "kid", "level": level, "runs": rows, "mean": figures["mean"], "low": None, "high": None}
    matched |= {"reference_mean": 6.31 if rows else None, "n": figures["n"], "censored": int(len(rows) > 1)}
    return matched | {
        "reached": bool(rows),
        "note": "pairs of one seed" if rows else "one point: the filter changes outputs",
    }


def _comparison(folder: Path, arms: list[dict[str, Any]], trend: bool) -> dict[str, Any]:
    facts = {
        "name": folder.name,
        "started": "2026-11-24T20:00:00Z",
        "finished": "2026-11-24T21:07:00Z",
        "seconds": 4020.5,
    }
    facts |= {"command": "python launch/compare.py --config configs/comparison.yaml", "config_sha256": "cd" * 32}
    facts |= {"config": {"run": {"name": folder.name}}, "versions": {"torch": "2.15.0"}}
    facts |= {
        "hardware": {
            "cpu": "Test CPU",
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "accelerators": [{"name": "Test GPU", "memory_bytes": 85_000_000_000}],
        }
    }
    design = {"reference": "none", "seeds": [0, 1], "factor": None, "utility": {"metric": "kid", "at_most": ABOVE}}
    design |= {"generations": 4871, "sampler": {"name": "ddim", "steps": 25}, "tier": "smoke", "steps": 2011}
    design |= {"protocol": "untargeted", "prompts": None}
    design |= {
        "images_seen": 128704,
        "training_pictures": 40,
        "training_records": 128,
        "heldout_records": 61,
        "unit": "patient",
    }
    done = [arm for arm in arms if arm["comparable"] is not None]
    points = {stage: [_point(arm, stage) for arm in done] for stage in ("weights", "outputs")}
    fronts = {
        stage: {"x": "kid", "y": "verified", "front": _front(points[stage]), "points": points[stage]}
        for stage in points
    }
    drawn = {"factor": "data.phantom.copies", "levels": [1, 4, 16], "verified": [0.5, 3.5, 7.5], "low": [0.0, 1.1, 5.9]}
    drawn |= {"high": [2.3, 6.2, 9.1], "rate": [0.0125, 0.0875, 0.1875], "control": [0.0, 0.5, 1.5]}
    drawn |= {"test": {"name": "rank correlation, permutation of levels within seeds", "p_value": 0.0278}}
    lines = ["Membership was not measured.", "Attack size: tier smoke. The next one, small, means 8,192 generations."]
    return {
        "schema": 1,
        "comparison": facts,
        "design": design | {"features": "random-conv"},
        "arms": arms,
        "fronts": fronts,
    } | {
        "trend": drawn if trend else None,
        "p_values": P_VALUES,
        "not_measured": lines,
    }


def _point(arm: dict[str, Any], stage: str) -> dict[str, Any]:
    y = arm["summary"]["privacy.extraction.verified"]["mean"]
    if stage == "weights" and arm["protects"] == "outputs":
        y = float(np.mean([run["guard_off"]["verified"] for run in arm["runs"]]))
    seeds = [run["seed"] for run in arm["runs"] if run["values"]]
    counted = {"n": len(seeds), "seeds": seeds, "by_construction": stage == "outputs" and arm["protects"] == "outputs"}
    x = arm["summary"]["utility.kid"]["mean"]
    return {"arm": arm["name"], "x": x, "y": y, "comparable": arm["comparable"], **counted}


def _front(points: list[dict[str, Any]]) -> list[str]:
    ranked = [point for point in points if point["comparable"]]
    beaten = [any(b["x"] <= a["x"] and b["y"] <= a["y"] and b is not a for b in ranked) for a in ranked]
    return [point["arm"] for point, worse in zip(ranked, beaten, strict=True) if not worse]
