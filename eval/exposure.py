"""What the planted canaries say: how far training moved each away from pictures of the same draw that were never shown.

Exposure after Carlini et al. 2019 ("The Secret Sharer", section 4), with the ranks of Carlini et al. 2023 for diffusion models;
a lower bound on epsilon after Steinke, Nasr and Jagielski 2023 from the canaries that a coin decided.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.stats import mannwhitneyu, spearmanr

from defenses.errors import UserError
from eval.audit import DRAWS, released_losses, summary
from train.data import Dataset
from train.planting import drawn
from train.release import RECORD

COLUMNS = ["canary", "kind", "role", "copies", "included", "score", "exposure"]
HIGH = 5.0  # bits: 1 in 32 pictures that were never shown has so much or more
AUDIT = "one run, canaries planted by coin (Steinke, Nasr and Jagielski 2023)"
NOTE = (
    "Exposure is log2(pool) - log2(rank) of a canary's loss among the pool of pictures of its kind that were never shown; log2(pool) "
    "is the most that can be seen, and 1 bit the median of a model that learned nothing. It is that of one run, and of these losses: "
    "a better attack may see more. The bound on epsilon rests on the canaries of one copy that a coin decided; what is seen of c "
    "copies is to be held against the guarantee for c records at once."
)


@dataclass(kw_only=True)
class ExposureConfig:
    """Section ``attack.canaries``: how the canaries that ``data.canaries`` planted are looked at."""

    draws: int = DRAWS  # of the noise, in each loss

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError("attack.canaries.draws", f"{self.draws} is less than 1", "2 is usual")


def exposures(scores: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Exposure in bits, float64 [n]: log2(m) - log2(rank) among m pictures of the pool (Carlini et al. 2019, section 4).

    The rank of a canary is 1 where none of the pool has its score, m + 1 where all have more; those that tie with it count half.

    Args:
        scores: float64 [n], smaller for pictures that are better known.
        pool: float64 [m], of pictures that were never shown.
    """
    ordered = np.sort(pool)
    places = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return np.log2(len(pool)) - np.log2(1 + np.mean(places, axis=0))


@dataclass
class Planted:
    """``report``: the part ``privacy.canaries`` of report.json; ``table``: a line per canary (`COLUMNS`)."""

    report: dict[str, Any]
    table: list[dict[str, Any]]


def measure(
    folder: Path,
    config: SimpleNamespace,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    model: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> Planted | None:
    """Losses of the released weights on canaries and pool, and what they show. All ranks take part.

    Args:
        folder: run directory of the training, with its ``model/``.
        dataset: its records, ``kept`` as in its manifest: the coins are read there.
        model, facts: another checkpoint of the same training and what is known of it; None: what the training released.

    Returns:
        None where the run had no canaries.
    """
    if config.data.canaries is None:
        return None
    facts = facts or json.loads((folder / RECORD).read_text())
    claim = next((entry["claim"] for entry in facts["defenses"] if entry["name"] == "dpsgd"), {})
    kinds = {kind: drawn(dataset.records, kind, config.data.canaries) for kind in config.data.canaries.kinds}
    rows = np.unique(np.concatenate(list(kinds.values())))
    losses = released_losses(
        model or folder / "model", config, dataset, rows, facts["classes"], accelerator, config.attack.canaries.draws
    )
    table = [
        line
        for kind, some in kinds.items()
        for line in _lines(kind, some, losses[np.searchsorted(rows, some)], dataset)
    ]
    return Planted(report(table, claim), table)


def _lines(kind: str, rows: np.ndarray, losses: np.ndarray, dataset: Dataset) -> list[dict[str, Any]]:
    """The table of one kind.

    Args:
        losses: float64 [rows, timesteps].
    """
    records = [dataset.records[row] for row in rows]
    lines = [
        {
            "canary": record.source,
            "kind": kind,
            "role": record.canary or "pool",
            "copies": record.copies if record.canary else 1,
            "included": bool(record.canary) and record.kept,
        }
        for record in records
    ]
    pool = np.array([line["role"] == "pool" for line in lines])
    scores = standardised(losses, pool)
    bits = exposures(scores, scores[pool])
    for line, score, exposure in zip(lines, scores.tolist(), bits.tolist(), strict=True):
        line |= {"score": score, "exposure": None if line["role"] == "pool" else exposure}
    return lines


def standardised(losses: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Mean over the timesteps of the loss in standard deviations of the pool, float64 [n]: no timestep outweighs the others.

    The canaries that were planted, and their coins, have no part in the scale.

    Args:
        losses: float64 [n, timesteps].
        pool: bool [n].
    """
    spread = losses[pool].std(0)
    return ((losses - losses[pool].mean(0)) / np.where(spread > 0, spread, 1.0)).mean(1)


def report(table: list[dict[str, Any]], claim: dict[str, Any]) -> dict[str, Any]:
    """``privacy.canaries`` of report.json.

    Args:
        claim: of differential privacy; {} where there is none, else its ``epsilon`` may be None (NOT PRIVATE).
    """
    kinds = list(dict.fromkeys(line["kind"] for line in table))
    coins = [line for line in table if line["role"] == "coin"]
    scores = np.array([-line["score"] for line in coins])
    included = np.array([line["included"] for line in coins], dtype=bool)
    return {
        "kinds": {kind: _of_kind([line for line in table if line["kind"] == kind]) for kind in kinds},
        "one_run": summary(scores, included, claim, AUDIT) if coins else None,
        "note": NOTE,
    }


def _of_kind(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Exposure by number of copies; that of canaries which a coin left out stands at 0 copies."""
    pool = np.array([line["score"] for line in lines if line["role"] == "pool"])
    others = [line for line in lines if line["role"] != "pool"]
    copies = np.array([line["copies"] if line["included"] else 0 for line in others])
    scores, bits = (np.array([line[name] for line in others]) for name in ("score", "exposure"))
    return {
        "pool": len(pool),
        "ceiling": float(np.log2(len(pool))),
        "by_copies": {
            str(count): _figures(scores[copies == count], bits[copies == count], pool) for count in np.unique(copies)
        },
        "trend": trend(copies, bits),
    }


def _figures(scores: np.ndarray, bits: np.ndarray, pool: np.ndarray) -> dict[str, Any]:
    """Canaries of one number of copies against the pool. ``p_value``: Mann-Whitney U, one-sided (better known than the pool), exact
    up to 8 canaries without ties, else by its normal approximation."""
    return {
        "canaries": len(bits),
        "median": float(np.median(bits)),
        "max": float(bits.max()),
        "above_5_bits": float((bits >= HIGH).mean()),
        "p_value": float(mannwhitneyu(scores, pool, alternative="less").pvalue),
    }


def trend(copies: np.ndarray, bits: np.ndarray) -> dict[str, float] | None:
    """Spearman's correlation of exposure and copies, with the one-sided p-value of growth (Student's t); None where one is constant."""
    if len(np.unique(copies)) < 2 or len(np.unique(bits)) < 2:
        return None
    found = spearmanr(copies, bits, alternative="greater")
    return {"spearman": float(found.statistic), "p_value": float(found.pvalue)}
