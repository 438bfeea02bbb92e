"""A finished run directory that was never run: every file that the report reads, with known contents."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HOSTILE = '<script>alert("x")</script>.png'


class Fabricated:
    """Eight of 40 pictures leak: picture i < 8 comes back as generation i, with a little noise; the rest is noise.

    Attributes:
        report: contents of report.json.
        training: uint8 [40, 1, 32, 32] by row; record "rec%03d".
        generations: uint8 [48, 1, 32, 32].
        asked: record ids that the report asked for.
    """

    def __init__(self, folder: Path, seed: int = 0, verified: int = 8):
        self.folder, self.asked = folder, []
        rng = np.random.Generator(np.random.Philox(seed))
        self.training = np.stack([_picture(rng) for _ in range(40)])
        noise = np.stack([_picture(rng) for _ in range(48)])
        self.generations = noise.copy()
        copies = self.training[:verified] + rng.normal(0, 5, self.training[:verified].shape)
        self.generations[:verified] = np.clip(copies, 0, 255).astype(np.uint8)
        self.verified = verified
        self.report = fabricate_report(verified)
        self._write()

    def image(self, record_id: str) -> np.ndarray:
        self.asked.append(record_id)
        return self.training[int(record_id.removeprefix("rec"))]

    def _write(self) -> None:
        for name in ("generations", "attack"):
            (self.folder / name).mkdir(parents=True)
        matches, files = [], []
        for index, pixels in enumerate(self.generations):
            name = f"{index:06d}.png"
            Image.fromarray(pixels[0]).save(self.folder / "generations" / name)
            files.append({"file": name, "index": index})
            distances = np.sqrt(((self.training / 255.0 - pixels / 255.0) ** 2).mean(axis=(1, 2, 3)))
            nearest = int(distances.argmin())
            score = distances[nearest] / (0.5 * distances.mean())
            flag = "true" if index < self.verified else "false"
            row = (name, f"rec{nearest:03d}", f"{distances[nearest]:.6g}", f"{score:.6g}", "", flag)
            matches.append(
                dict(zip(("generation", "record_id", "l2", "adaptive_score", "clique", "verified"), row, strict=True))
            )
        _csv(self.folder / "generations" / "index.csv", files)
        _csv(self.folder / "attack" / "matches.csv", matches)
        manifest = [
            {
                "record_id": f"rec{i:03d}",
                "source": f"a/{i}.png",
                "split": "train",
                "copies": 12 if i < 8 else 1,
                "kept": "true",
            }
            | {"reason": ""}
            for i in range(40)
        ]
        rejected = {"record_id": "bad", "source": HOSTILE, "split": "", "copies": 0, "kept": "false"}
        manifest.append(rejected | {"reason": "cannot be decoded"})
        _csv(self.folder / "manifest.csv", manifest)
        rng = np.random.Generator(np.random.Philox(1))
        with (self.folder / "metrics.jsonl").open("w") as file:
            for step in range(0, 2000, 10):
                loss = 0.6 * np.exp(-step / 400) + 0.08 + rng.normal(0, 0.01)
                row = {"step": step, "loss": loss, "learning_rate": 2e-4, "images_per_second": 147.0}
                if step % 200 == 0:
                    row["heldout_loss"] = 0.6 * np.exp(-step / 400) + 0.1 + step * 2e-5
                file.write(json.dumps(row) + "\n")


def fabricate_report(verified: int = 8) -> dict[str, Any]:
    """A report.json as design.md fixes it; every number is unlike the others, so that a test can find it."""
    settings = {"alpha": 0.5, "n": 50, "n_effective": 37, "edge_threshold": 0.15, "verify_l2": 0.151}
    settings |= {"views": ["identity", "mirror", "shift +-1"], "permutations": 9999}
    control = {"verified": 0, "verified_train_m": 5, "n": 31, "p_value": 0.0013, "background": 0.0312}
    extraction = {
        "protocol": "untargeted",
        "tier": "smoke",
        "settings": settings,
        "generations": 4871,
        "candidates": 133,
        "verified": verified,
        "verified_units": verified and 7,
        "verified_identity_view": verified and 6,
        "verified_paper_rule": verified and 2,
        "rate": verified / 40,
        "rate_ci95": [0.105, 0.348] if verified else [0.0, 0.075],
        "rate_ci95_method": "Wilson" if verified else "rule of three",
        "at_l2": {"0.05": 3, "0.10": 9, "0.15": 14},
        "control": control,
        "by_copies": {"1": {"pictures": 32, "verified": 0}, "12": {"pictures": 8, "verified": verified}},
        "sampler": {"name": "ddim", "steps": 25},
        "seconds": 41.7,
    }
    dedup = {
        "kind": "heuristic",
        "statement": "Removes copies: no picture is trained on more often than others.",
    }
    private = fabricate_claim()
    return {
        "schema": 1,
        "run": {
            "name": "phantom-demo",
            "started": "2026-11-21T18:00:00Z",
            "finished": "2026-11-21T18:06:00Z",
            "seed": 3,
            "command": "accelerate launch train/run.py --config configs/quickstart.yaml defenses.dedup={}",
            "config_sha256": "ab" * 32,
            "versions": {"torch": "2.15.0", "diffusers": "0.42.1"},
            "hardware": {"cpu": "Test CPU", "cores": 2, "memory_bytes": 8 * 2**30, "accelerators": []},
            "world_size": 1,
        },
        "data": {"source": "phantom", "found": 217, "rejected": 1, "train": 128, "calibration": 19, "heldout": 61}
        | {
            "clusters": 40,
            "units": 34,
            "unit": "patient",
            "removed_by_dedup": 88,
            "reasons": {f"cannot be decoded {HOSTILE}": 1},
        },
        "defenses": [
            {"name": "dedup", "settings": {"threshold": 0.046}, "claim": dedup},
            {"name": "dpsgd", "settings": {"epsilon": 8.0}, "claim": private},
        ],
        "model": {
            "family": "pixel",
            "parameters": 1063457,
            "trainable_parameters": 1063457,
            "steps": 2011,
            "images_seen": 128704,
        },
        "privacy": {"extraction": extraction, "membership": None, "inpainting": None, "canaries": None, "audit": None},
        "utility": {"features": "random-conv", "features_dim": 64, "weights_sha256": None, "reference": "heldout"}
        | {"n_reference": 61, "n_generated": 4871, "fid": 0.2345, "fid_n": 61, "kid": 0.00678, "kid_std": 0.00091}
        | {"kid_subset_size": 61, "precision": 0.871, "recall": 0.642, "neighbourhood": 3, "downstream": None},
        "cost": {"train_seconds": 203.4, "images_per_second": 146.9, "generate_seconds": 25.3, "attack_seconds": 41.7}
        | {"peak_memory_bytes": 1234567890},
    }


def fabricate_claim() -> dict[str, Any]:
    """A claim of differential privacy with every field that one can have."""
    claim = {"kind": "dp", "statement": "One patient changes any outcome by a factor of at most e^7.913."}
    claim |= {"epsilon": 7.913, "delta": 1e-5, "unit": "patient", "units": 34, "adjacency": "add-remove"}
    claim |= {"accountant": "PRV", "epsilon_crosscheck": 7.921, "crosscheck_accountant": "PLD"}
    claim |= {"sampling": "Poisson over patients", "sample_rate": 0.0173, "noise_multiplier": 1.371, "clip_norm": 1.25}
    claim |= {"batch_size": 17.5, "multiplicity": 6, "images_per_group": 4, "largest_group": None}
    claim |= {"steps": 2011, "planned_steps": 2017, "segments": 2, "resumes": 1}
    claim |= {"group_epsilon": {"2": 16.27, "8": 84.21, "32": None}, "queries": "noisy sums of clipped gradients"}
    claim |= {"trust_model": "central: whoever trains is trusted", "libraries": {"opacus": "1.6.0"}}
    claim |= {"not_private": [], "nonprivate_metrics": False, "not_covered": ["tuning runs", "side channels"]}
    return claim


def fabricate_downstream() -> dict[str, Any]:
    """``utility.downstream`` of a classifier with three classes."""
    real = {"accuracy": 0.9016, "accuracy_ci95": [0.8012, 0.9541], "accuracy_ci95_method": "Wilson"}
    real |= {"macro_auc": 0.9712, "n_train": 123}
    settings = {
        "steps": 500,
        "batch_size": 64,
        "learning_rate": 0.001,
        "seed": 0,
        "largest_side": 64,
        "weights": "last",
    }
    found = {"task": "classification", "classes": 3, "n": 59, "n_unlabelled": 2, "most_frequent": 0.4068}
    found |= {"accuracy": 0.7288, "accuracy_ci95": [0.6042, 0.8254], "accuracy_ci95_method": "Wilson"}
    return found | {"macro_auc": 0.8534, "n_train": 123, "train_on_real": real, "settings": settings}


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A smooth random picture, uint8 [1, 32, 32]."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
    return np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC))[None]


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
