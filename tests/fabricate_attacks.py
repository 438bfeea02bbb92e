"""Parts of report.json and tables of the attacks beyond extraction, with numbers that no other part has."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.files import write_csv

SECRET = "rec017"  # a record id that restricted pages must not show


def fabricate_attacks(folder: Path) -> dict[str, Any]:
    """Parts of ``privacy``; the tables and pictures that the page reads are written below ``folder``."""
    (folder / "inpainting").mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(folder / "inpainting" / "000017.png")
    (folder / "finetuning" / "w-3").mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(folder / "finetuning" / "w-3" / "000005.png")
    curve = [{"attack": "loss-strong", "unit": "record", "fpr": x, "tpr": y} for x, y in ((0, 0), (0.02, 0.4), (1, 1))]
    write_csv(folder / "attack" / "roc.csv", ["attack", "unit", "fpr", "tpr"], curve)
    risk = [_risk(rank) for rank in range(1, 4)]
    write_csv(folder / "attack" / "risk.csv", list(risk[0]), risk)
    return {
        "membership": [
            _entry("loss-strong", 0.8123),
            _entry("lira-strong", 0.9234) | {"vs_loss": VS_LOSS},
            _entry("loss-strong", 0.8345) | {"unit": "group", "members": 29, "nonmembers": 23},
        ],
        "membership_check": {"passed": True, "note": "", "exchangeable": True}
        | {"blind_auc": 0.5123, "blind_ci95": [0.4567, 0.5678], "blind_method": "DeLong"},
        "set_test": {"p_value": 0.0021, "records_needed_50": 13, "records_needed_99": 57, "alpha": 0.01, "suspects": 39, "unit": "group"},
        "inpainting": _inpainting(),
        "finetuning": _finetuning(),
        "canaries": _canaries(),
        "copy_metrics": _copy_metrics(),
        "prefilter": _prefilter(),
        "risk": {
            "pictures": 3,
            "rank_rule": "verified first",
            "outlierness": "mean l2 to the nearest 10",
            "membership_attack": "lira-strong",
            "recognised_fpr": 0.01,
            "by_outlierness": [{"from": 0.1111, "to": 0.2222, "pictures": 3, "verified": RATE, "recognised": None}],
            "by_copies": [{"copies": 12, "pictures": 3, "verified": RATE, "recognised": RATE}],
            "correlation": [
                {"x": "outlierness", "y": "adaptive_score", "rho": 0.3456, "ci95": [0.21, 0.47], "p_value": 0.0043, "n": 37}
            ],
            "top": risk,
        },
    }  # fmt: skip


RATE = {"n": 3, "count": 1, "rate": 1 / 3, "ci95": [0.0614, 0.7923], "method": "Wilson"}
VS_LOSS = {
    "attack": "loss-strong",
    "difference": 0.1111,
    "ci95": [0.0712, 0.1513],
    "p_value": 2e-8,
    "p_value_greater": 1e-8,
}
METHODS = {
    "auc_method": "DeLong",
    "tpr_method": {"0.01": "Clopper-Pearson over 1,234 members", "0.001": None},
    "fpr_upper95": {"0.01": 0.0169, "0.001": None},
}


def _entry(attack: str, auc: float) -> dict[str, Any]:
    return METHODS | {
        "attack": attack,
        "unit": "record",
        "auc": auc,
        "auc_ci95": [auc - 0.0321, auc + 0.0321],
        "tpr_at_fpr": {"0.01": auc - 0.5, "0.001": None},
        "tpr_ci95": {"0.01": [auc - 0.55, auc - 0.45], "0.001": None},
        "members": 1234,
        "nonmembers": 2345,
        "queries": 40,
    }


def _inpainting() -> dict[str, Any]:
    def figures(member: float, other: float, p_value: float) -> dict[str, Any]:
        found = {"member_l2_mean": member, "nonmember_l2_mean": other, "difference": other - member, "p_value": p_value}
        return found | {"auc": 0.7654, "auc_ci95": [0.6543, 0.8432], "auc_method": "DeLong"}

    return figures(0.0987, 0.1654, 0.0008) | {
        "settings": {"fills": 321, "keep": 11},
        "reference": "shadow",
        "members": 25,
        "nonmembers": 26,
        "test": "permutation of whole groups",
        "hidden_half": figures(0.1396, 0.2339, 0.0009),
        "baseline": {"mirror": figures(0.1777, 0.1788, 0.4444), "mean": figures(0.2111, 0.2122, 0.5555)},
        "pairs": [[True, 0.2, 0.1], [False, 0.2, 0.2]],
        "examples": [{"record_id": SECRET, "member": True, "l2": 0.0432, "fill": "inpainting/000017.png"}],
        "note": None,
    }


def _finetuning() -> dict[str, Any]:
    def entry(weight: float, verified: int, p_value: float) -> dict[str, Any]:
        return {
            "weight": weight,
            "generations": 1357,
            "candidates": 83,
            "verified": verified,
            "rate_ci95": [0.0271, 0.1382],
            "mean_l2": 0.1543,
            "mean_l2_heldout": 0.1765,
            "control": {"verified": 4, "verified_train_m": verified, "n": 77, "p_value": p_value / 2},
            "p_value_holm": p_value,
            "versus_baseline": None,
            "sscd": None,
        }

    against = {"verified_only_here": 14, "verified_only_baseline": 6, "verified_p_value": 0.1153}
    against |= {"gain": 0.0234, "gain_p_value": 0.0456}
    similarity = {"average_similarity": 0.3692, "average_similarity_heldout": 0.2581}
    similarity |= {"success_rate_0.6": 0.2213, "success_rate_0.7": 0.1122}
    captions = {
        "tested": 27,
        "own": 3,
        "training": {"tested": 26, "own": 17},
        "p_value": 0.0166,
        "p_value_holm": 0.0377,
    }
    captions |= {"unit": "picture", "reason": None, "stratified": None}
    strata = [{"copies": 1, "tested": 27, "own": 3, "training": {"tested": 20, "own": 11}}]
    strata += [{"copies": 7, "tested": 0, "own": 0, "training": {"tested": 6, "own": 6}}]
    captions["stratified"] = {"p_value": 0.0299, "strata": strata, "without_counterpart": {"tested": 6, "own": 6}}
    return {
        "base": f"/somewhere/{SECRET}",
        "pictures": 346,
        "prompts": 29,
        "weights": [
            entry(1.0, 15, 0.0625),
            entry(3.5, 23, 0.0014) | {"versus_baseline": against, "sscd": similarity, "captions": captions},
        ],
        "examples": [{"weight": 3.5, "record_id": SECRET, "l2": 0.0321, "generation": "w-3/000005.png"}],
    }


def _canaries() -> dict[str, Any]:
    row = {"canaries": 6, "median": 2.718, "max": 9.876, "above_5_bits": 0.3333, "p_value": 0.0177}
    one_run = {
        "correct": 151,
        "guesses": 202,
        "epsilon_lower_bound": 0.834,
        "claimed_epsilon": 1.987,
        "note": "A note.",
    }
    kinds = {
        "noise": {
            "pool": 1024,
            "ceiling": 10.0,
            "by_copies": {"0": row, "1": row, "64": row | {"median": 8.765}},
            "trend": {"spearman": 0.654, "p_value": 0.0031},
        }
    }
    return {"kinds": kinds, "one_run": one_run, "note": "Exposure is log2(pool) - log2(rank)."}


def _prefilter() -> dict[str, Any]:
    recall, ci95 = {"0.01": 0.2345, "0.5": 0.8765}, {"0.01": [0.1357, 0.3468], "0.5": [0.7531, 0.9642]}
    return {
        "detector": "wen",
        "prompts": 4321,
        "attacked": 4320,
        "flagged": 87,
        "verified": 0,
        "recall": {"flagged": recall, "verified": None},
        "recall_ci95": {"flagged": ci95, "verified": None},
        "auc": {"flagged": {"auc": 0.9234, "ci95": [0.8123, 0.9753], "method": "Obuchowski"}, "verified": None},
        "reason": None,
        "seconds": 83.0,
        "note": "A note on it.",
    }


def _copy_metrics() -> dict[str, Any]:
    metric = {"threshold": 0.4321, "threshold_rule": "a rule", "direction": ">", "copies": 131, "pictures": 19}
    return {
        "metrics": [
            metric | {"name": "ssim", "background": 0.0543, "weights_sha256": None},
            metric | {"name": "sscd", "threshold": None, "copies": None, "pictures": None, "background": None},
        ],
        "agreement": [
            {"first": "nn_ratio", "second": "ssim", "both": 71, "only_first": 61, "only_second": 53, "neither": 4686}
        ],
        "disagreements": [{"generation": "000003.png", "record_id": SECRET, "l2": 0.1, "sscd_nearest": SECRET}],
        "sscd_search": {
            "threshold": 0.7654,
            "threshold_rule": "another rule",
            "copies": 143,
            "pictures": 23,
            "background": 0.0643,
            "same_as_l2": 0.381,
            "generation_train": {"50": 0.412, "75": 0.522, "90": 0.631, "95": 0.743},
            "train_train": {"50": 0.398, "75": 0.501, "90": 0.588, "95": 0.657},
        },
    }


def _risk(rank: int) -> dict[str, Any]:
    figures = {"outlierness": 0.1 * rank, "l2": 0.05 * rank, "adaptive_score": 0.6 * rank, "verified": rank == 1}
    rest = {"group": "", "generation": "000001.png", "membership": 1.5, "membership_fpr": 0.0123, "copy_metrics": ""}
    return {"rank": rank, "record_id": SECRET, "copies": 12, **figures, **rest, "inpainting_l2": None}
