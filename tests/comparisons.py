"""A finished comparison that was never run: every file that its statistics and its page read, with known contents.

Four arms, two seeds. 24 distinct training pictures of 12 patients (picture p belongs to patient p // 2); pictures 0 to 3
have 4 copies each, and one copy of picture 1 belongs to patient 1, so patients 0 and 1 are one independent unit. Picture p
is a flat grey of brightness 8 p with a mark; a generation that copies it is the same with a brighter corner.
"""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.arms import Arm, ArmRun, UtilityFloor

SEEDS = (0, 1)
PICTURES, COPIED, COPIES, GENERATIONS, SIDE = 24, 4, 4, 32, 16
# verified distinct pictures by arm and seed; the filter's are those that pass it, of the same training as "none"
LEAKED: dict[tuple[str, int], list[int]] = {
    ("none", 0): list(range(14)),
    ("none", 1): list(range(12)),
    ("dedup", 0): [2, 3],
    ("dedup", 1): [2],
    ("dpsgd", 0): [],
    ("filter", 0): [5],
    ("filter", 1): [],
}
KID = {"none": (0.0061, 0.0071), "dedup": (0.0052, 0.0057), "dpsgd": (0.0331, None), "filter": (0.0063, 0.0072)}
FAILED = ("dpsgd", 1)  # the only run that is not done
# (step, kid, verified) of the checkpoints before the released one, step 400
ALONG = {
    ("none", 0): [(100, 0.0401, 0), (200, 0.0151, 3), (300, 0.0081, 9)],
    ("none", 1): [(100, 0.0411, 0), (200, 0.0171, 2), (300, 0.0091, 7)],
    ("dedup", 0): [(100, 0.0403, 0), (200, 0.0143, 0), (300, 0.0083, 1)],
    ("dedup", 1): [(100, 0.0413, 0), (200, 0.0163, 0), (300, 0.0093, 1)],
    ("dpsgd", 0): [(100, 0.0605, 0), (200, 0.0505, 0), (300, 0.0405, 0)],
}
AT_MOST = 0.02
ERROR = "defenses.dpsgd.epsilon: 0.1 is out of reach in 400 steps (raise it)"
DEFENSES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "dedup": [{"kind": "heuristic", "statement": "Removes copies.", "removed": {"exact": 6, "near": 7}}],
    "dpsgd": [{"kind": "dp", "epsilon": 7.913, "delta": 1e-5, "unit": "group", "adjacency": "add-remove"}],
    "filter": [{"kind": "heuristic", "statement": "Protects the outputs, not the weights."}],
}
FINDINGS = {"filter": {"threshold": 0.731, "false_alarm_rate": 0.01, "replaced": 29, "withheld": 0}}


def write_comparison(folder: Path, images: bool = True) -> tuple[list[Arm], dict[str, Any]]:
    """Writes the run directories into ``folder``; returns what `eval.comparison.assemble` takes: arms and keywords.

    Args:
        images: generations and training pictures, too, which only a page needs.
    """
    arms = [_arm(folder, name, images) for name in DEFENSES]
    facts = {
        "started": "2026-11-24T20:00:00Z",
        "finished": "2026-11-24T21:07:00Z",
        "command": "python launch/compare.py --config configs/comparison.yaml",
        "config_sha256": "cd" * 32,
        "config": {"run": {"name": folder.name}, "utility": {"metric": "kid", "at_most": AT_MOST}},
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8 * 2**30, "accelerators": []},
        "versions": {"torch": "2.15.0"},
        "seconds": 4020.5,
    }
    floor = UtilityFloor(metric="kid", at_most=AT_MOST)
    return arms, {"name": folder.name, "reference": "none", "utility": floor, "factor": None, "facts": facts}


def edit_report(run: ArmRun, dotted: str, value: Any) -> None:
    """Changes one field of a run's report.json."""
    report = json.loads((run.directory / "report.json").read_text())
    part, *keys = report, *dotted.split(".")
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (run.directory / "report.json").write_text(json.dumps(report))


def rewrite(path: Path, change: Callable[[dict[str, str]], dict[str, Any]]) -> None:
    """Changes every row of a table."""
    with path.open(newline="") as file:
        rows = [change(row) for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(number: int) -> np.ndarray:
    """Training picture, uint8 [1, 16, 16]."""
    pixels = np.full((1, SIDE, SIDE), 8 * number, dtype=np.uint8)
    pixels[0, 4:12, number % 12] = 255
    return pixels


def manifest_rows(salt: str) -> list[dict[str, Any]]:
    """manifest.csv: 24 + 12 training records, 4 for calibration, 8 held out, 1 rejected."""
    rows = [_record(f"train/{p:02d}-{c}.png", p, _patient(p, c), "train", salt) for p, c in _copies()]
    rows += [_record(f"cal/{i}.png", 100 + i, 50 + i // 2, "calibration", salt) for i in range(4)]
    rows += [_record(f"held/{i}.png", 200 + i, 70 + i // 2, "heldout", salt) for i in range(8)]
    return [*rows, _record("broken.png", -1, None, "", salt) | {"kept": "false", "reason": "cannot be decoded"}]


def report_of(arm: str, seed: int) -> dict[str, Any]:
    """report.json of a finished run."""
    leaked, kid = LEAKED[arm, seed], KID[arm][seed]
    extraction = extraction_of(leaked, seed)
    guarded = arm == "filter"
    privacy = {"extraction": extraction, "membership": None, "inpainting": None, "canaries": None, "audit": None}
    privacy["extraction_guard_off"] = extraction_of(LEAKED["none", seed], seed) if guarded else None
    utility = quality(kid) | {"downstream": downstream(arm, seed), "downstream_reason": None}
    defenses = [{"name": arm, "settings": {}, "claim": claim, "findings": FINDINGS.get(arm)} for claim in DEFENSES[arm]]
    return {
        "schema": 1,
        "run": {"name": f"{arm}-s{seed}", "seed": seed, "command": f"accelerate launch {arm}", "world_size": 1}
        | {"hardware": {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8 * 2**30, "accelerators": []}},
        "data": {"source": "phantom", "found": 49, "rejected": 1, "train": 36, "calibration": 4, "heldout": 8}
        | {"clusters": PICTURES, "units": 12, "unit": "group", "removed_by_dedup": 12 if arm == "dedup" else 0}
        | {"reasons": {"cannot be decoded": 1}, "ignored_files": 0, "notes": {}, "restricted": False},
        "defenses": defenses,
        "model": {"family": "pixel", "parameters": 1062497, "trainable_parameters": 1062497, "steps": 400}
        | {"images_seen": 25600, "classes": ["a", "b"], "released_step": 400, "stopped_by": None},
        "privacy": privacy,
        "utility": utility | ({"guard_off": quality(KID["none"][seed])} if guarded else {}),
        "cost": {"train_seconds": 400.25 + 30 * seed + len(arm), "images_per_second": 61.5, "generate_seconds": 95.5}
        | {"attack_seconds": 1.75 + seed, "peak_memory_bytes": 1498763264},
        "along": [_along(*point, seed) for point in ALONG.get((arm, seed), [])],
    }


def extraction_of(leaked: list[int], seed: int) -> dict[str, Any]:
    """``privacy.extraction`` where these distinct pictures came back, each in one generation."""
    hits, copied = len(leaked), sum(p < COPIED for p in leaked)
    settings = {"alpha": 0.5, "n": 50, "n_effective": 24, "views": ["identity", "mirror"], "edge_threshold": None}
    control = {"verified": 0, "verified_train_m": hits // 3, "n": 8, "p_value": 0.0034 if hits > 2 else 1.0}
    return {
        "protocol": "untargeted",
        "tier": "smoke",
        "settings": settings | {"clique_size": None, "permutations": 9999},
        "generations": GENERATIONS,
        "candidates": hits,
        "verified": hits,
        "verified_units": len({p // 2 for p in leaked}),
        "verified_identity_view": hits,
        "verified_paper_rule": hits // 2,
        "rate": hits / PICTURES,
        "rate_ci95": [max(0.0, hits / PICTURES - 0.1), min(1.0, hits / PICTURES + 0.125)],
        "rate_ci95_method": "bootstrap over 12 groups, at least Wilson's",
        "at_l2": {"0.05": hits, "0.10": hits, "0.15": min(hits + 3, PICTURES)},
        "control": control | {"background": 0.125, "neighbours": 8, "unit": "group", "permutations": 9999},
        "by_copies": {
            "1": {"pictures": PICTURES - COPIED, "verified": hits - copied},
            str(COPIES): {"pictures": COPIED, "verified": copied},
        },
        "by_correlation": {"threshold": 0.95, "verified": min(hits, 9), "candidates": hits + 2}
        | {"control": {"verified": 3, "verified_train_m": 4 + hits // 3, "n": 8, "background": 0.125}},
        "sampler": {"name": "ddim", "steps": 25, "precision": "fp32"},
        "seconds": 1.75 + seed,
    }


def quality(kid: float) -> dict[str, Any]:
    """The quality part of ``utility``."""
    sizes = {"n_reference": 8, "n_generated": GENERATIONS, "kid_subset_size": 8, "fid_n": 8, "prc_n": 8}
    return {"features": "random-conv", "features_dim": 64, "weights_sha256": None, "reference": "heldout"} | {
        "fid": round(15 * kid, 6),
        "kid": kid,
        "kid_std": round(kid / 4, 6),
        "precision": round(0.9 - 8 * kid, 6),
        "recall": round(0.6 - 9 * kid, 6),
        "neighbourhood": 3,
        **sizes,
    }


def downstream(arm: str, seed: int) -> dict[str, Any]:
    """``utility.downstream``."""
    real = {"accuracy": 0.9016 + 0.01 * seed, "accuracy_ci95": [0.8012, 0.9541], "macro_auc": 0.9712, "n_train": 32}
    accuracy = {"none": 0.72, "dedup": 0.75, "dpsgd": 0.55, "filter": 0.71}[arm] + 0.02 * seed
    found = {"task": "classification", "classes": 2, "n": 8, "accuracy": round(accuracy, 4), "n_train": 32}
    found |= {
        "accuracy_ci95": [0.6042, 0.8254],
        "accuracy_ci95_method": "Wilson",
        "macro_auc": round(accuracy + 0.1, 4),
    }
    return found | {"train_on_real": real, "settings": {"steps": 500, "learning_rate": 0.001}}


def _arm(folder: Path, name: str, images: bool) -> Arm:
    shares = "none" if name == "filter" else None
    runs = []
    for seed in SEEDS:
        trained = folder / f"{shares or name}-s{seed}"
        directory = trained / "eval" / name if shares else trained
        failed = (name, seed) == FAILED
        if not failed:
            _write_run(directory, trained, name, seed, images)
        runs.append(
            ArmRun(
                seed=seed,
                directory=directory,
                manifest=trained / "manifest.csv",
                command=f"accelerate launch train/run.py run.name={name}-s{seed} run.seed={seed}",
                status="failed" if failed else "done",
                error=ERROR if failed else None,
            )
        )
    overrides = [] if name == "none" else [f"defenses.{name}={{}}"]
    return Arm(name=name, overrides=overrides, shares=shares, runs=runs)


def _write_run(directory: Path, trained: Path, arm: str, seed: int, images: bool) -> None:
    (directory / "attack").mkdir(parents=True)
    if directory == trained:
        rows = manifest_rows(salt=f"{arm}{seed}")
        _table(trained / "manifest.csv", rows)
        if images:
            _write_prepared(trained / "prepared", rows)
    leaked = LEAKED[arm, seed]
    _table(directory / "attack" / "matches.csv", [_match(index, leaked) for index in range(GENERATIONS)])
    if images:
        _write_generations(directory / "generations", leaked)
    (directory / "report.json").write_text(json.dumps(report_of(arm, seed), indent=1, allow_nan=False))


def _match(index: int, leaked: list[int]) -> dict[str, Any]:
    """Row of matches.csv: generation ``index`` copies the index-th leaked picture, or none."""
    copied = index < len(leaked)
    number = leaked[index] if copied else index % PICTURES
    copy = number % COPIES if number < COPIED else 0  # any member of the cluster may be the nearest
    row = {"generation": f"{index:06d}.png", "record_id": _id(f"train/{number:02d}-{copy}.png")}
    score = 0.4 + index / 100 if copied else 1.2 + index / 100
    return row | {"l2": score / 10, "adaptive_score": score, "clique": "", "verified": str(copied).lower()}


def _write_generations(folder: Path, leaked: list[int]) -> None:
    folder.mkdir()
    for index in range(GENERATIONS):
        copied = index < len(leaked)
        pixels = picture(leaked[index]) if copied else 255 - picture(index % PICTURES)
        pixels[0, :4, :4] = 200
        Image.fromarray(pixels[0]).save(folder / f"{index:06d}.png")


def _write_prepared(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    pixels = np.zeros((len(rows), 1, SIDE, SIDE), dtype=np.uint8)
    with (folder / "records.jsonl").open("w") as file:
        for index, row in enumerate(rows):
            pixels[index] = picture(row["cluster"] % PICTURES)
            record = {
                key: row[key] for key in ("record_id", "source", "sha256", "split", "cluster", "copies", "reason")
            }
            record |= {"group": row["group"] or None, "kept": row["kept"] == "true", "block": row["cluster"]}
            file.write(json.dumps(record) + "\n")
    np.save(folder / "pixels.npy", pixels)
    (folder / "prepared.json").write_text(json.dumps({"digest": "", "salt": "", "ignored": 0, "notes": {}}))


def _copies() -> list[tuple[int, int]]:
    return [(p, c) for p in range(PICTURES) for c in range(COPIES if p < COPIED else 1)]


def _patient(number: int, copy: int) -> int:
    return 1 if (number, copy) == (1, 3) else number // 2


def _record(source: str, cluster: int, patient: int | None, split: str, salt: str) -> dict[str, Any]:
    group = "" if patient is None else hashlib.sha256(f"{salt}{patient}".encode()).hexdigest()[:12]
    copies = COPIES if 0 <= cluster < COPIED else int(cluster >= 0)
    row = {"record_id": _id(source), "source": source, "sha256": "", "group": group, "split": split}
    row |= {"copies": copies, "cluster": cluster, "kept": "true"}
    return row | {"reason": "", "duplicate_of": "", "distance": ""}


def _along(step: int, kid: float, verified: int, seed: int) -> dict[str, Any]:
    extraction = extraction_of(list(range(verified)), seed)
    return {"step": step, "images_seen": 64 * step, "extraction": extraction, "utility": quality(kid)}


def _id(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
