"""The risk of single pictures: what every attack found of each, beside what may explain it, outlierness and copies.

python -m eval.risk RUN_DIR RUN_DIR ... [--output FOLDER]: which pictures several runs memorise (`eval.overlap`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defenses.errors import UserError
from defenses.neighbours import search_sharded
from defenses.references import Rows
from defenses.seeding import derive
from eval.copymetrics import METRICS
from eval.entries import PRIMARY
from eval.extraction import Extraction
from eval.intervals import rate_interval
from eval.overlap import compare_runs
from eval.pictures import Pictures
from eval.rankcorrelation import spearman

COLUMNS = [
    "rank", "record_id", "group", "copies", "outlierness", "l2", "generation", "adaptive_score", "verified", "membership",
    "membership_fpr", "inpainting_l2", "copy_metrics",
]  # fmt: skip
RANK_RULE = (
    "verified pictures first; then by the false-positive rate at which membership recognises them; then by adaptive score "
    "(prompted: l2); then by inpainting l2; what was not measured comes last"
)
NEIGHBOURS = 10  # distinct pictures whose mean distance is the outlierness
_TOP = 20
_RATES = (0.001, 0.01, 0.05, 0.1)  # false-positive rates at which a member may count as recognised
_LEAST_FALSE_POSITIVES = 10  # that such a rate must allow


def outlierness(training: Pictures, accelerator: Any = None) -> np.ndarray:
    """Mean l2 of each distinct picture to its nearest 10 other distinct pictures, over all views, float64 [P].

    Carlini et al. 2023, section 5.2, take distances of CLIP features; pixels are what the extraction attack compares. Where
    there are fewer others, all of them; NaN for a single picture.
    """
    queries = Rows(training.images, training.first)
    k = min(NEIGHBOURS, len(training.ids) - 1)
    if k == 0:
        return np.full(1, np.nan)
    found = search_sharded(queries, training.images, training.picture, k + 1, accelerator=accelerator).distinct
    other = found.picture != training.ids[:, None]
    other &= np.cumsum(other, axis=1) <= k  # a picture may miss in its own list, if so many others are equal to it
    return found.distance[other].reshape(len(queries), k).mean(axis=1, dtype=np.float64)


def risk_table(
    training: Pictures,
    extraction: Extraction | None,
    membership: Sequence[dict[str, Any]] = (),
    inpainting: Sequence[dict[str, Any]] = (),
    copy_metrics: tuple[dict[str, Any], Sequence[dict[str, Any]]] | None = None,
    accelerator: Any = None,
) -> list[dict[str, Any]]:
    """Rows of risk.csv, one for each distinct training picture, riskiest first (`RANK_RULE`), on all ranks alike.

    Args:
        membership: rows of membership.csv; held-out ones are passed over.
        inpainting: rows of inpainting.csv, likewise.
        copy_metrics: report and rows of `eval.copymetrics.copy_metrics`.
    """
    distance = outlierness(training, accelerator)
    picture_of = dict(zip(training.record_id, training.picture.tolist(), strict=True))
    attack = membership_attack(membership)
    known = {picture_of[row["record_id"]]: row for row in membership if row["member"]}
    filled = {picture_of[row["record_id"]]: row["l2"] for row in inpainting if row["member"]}
    copied = _copied(picture_of, copy_metrics)
    rows = []
    for place, (picture, first) in enumerate(zip(training.ids.tolist(), training.first.tolist(), strict=True)):
        member = known.get(picture, {})
        rows.append(
            {
                "record_id": training.record_id[first],
                "group": training.group[first],
                "copies": int(training.copies[first]),
                "outlierness": _number(distance[place]),
                **_extracted(extraction, place),
                "membership": _number(member.get(attack)),
                "membership_fpr": _number(member.get(f"{attack}_fpr")),
                "inpainting_l2": filled.get(picture),
                "copy_metrics": " ".join(copied[picture])
                if picture in copied
                else None
                if copy_metrics is None
                else "",
            }
        )
    rows.sort(key=_risk)
    return [{"rank": rank} | row for rank, row in enumerate(rows, start=1)]


def membership_attack(rows: Sequence[dict[str, Any]]) -> str | None:
    """The attack of membership.csv whose score stands for a picture; None where none was run."""
    run = [name.removesuffix("_fpr") for name in (rows[0] if rows else ()) if name.endswith("_fpr")]
    return next((name for name in PRIMARY if name in run), run[0] if run else None)


def _extracted(extraction: Extraction | None, place: int) -> dict[str, Any]:
    if extraction is None:
        return dict.fromkeys(("l2", "generation", "adaptive_score", "verified"))
    found = extraction.pictures
    return {
        "l2": _number(found.l2[place]),
        "generation": found.generation[place],
        "adaptive_score": None if found.score is None else _number(found.score[place]),
        "verified": bool(found.verified[place]),
    }


def _copied(
    picture_of: dict[str, int], copy_metrics: tuple[dict[str, Any], Sequence[dict[str, Any]]] | None
) -> dict[int, list[str]]:
    """Picture -> metrics by which a generation whose nearest picture it is counts as its copy."""
    found: dict[int, list[str]] = {}
    report, rows = copy_metrics or ({"metrics": []}, [])
    for metric in report["metrics"]:
        if metric["threshold"] is None:
            continue
        rule = METRICS[metric["name"]]
        for row in rows:
            value, names = row[metric["name"]], found.setdefault(picture_of[row["record_id"]], [])
            if value is not None and metric["name"] not in names and rule.passed(np.array(value), metric["threshold"]):
                names.append(metric["name"])
    return found


def _number(value: float | None) -> float | None:
    """A finite float, or None: inf and NaN are no JSON."""
    return float(value) if value is not None and np.isfinite(value) else None


def _risk(row: dict[str, Any]) -> tuple:
    """Sorts the riskiest first; ties by record id, so that the order is the same everywhere."""
    keys = ("membership_fpr", "adaptive_score" if row["adaptive_score"] is not None else "l2", "inpainting_l2")
    values = [np.inf if row[key] is None else row[key] for key in keys]
    return (not row["verified"], *values, row["record_id"])


def risk_report(
    rows: Sequence[dict[str, Any]], training: Pictures, membership: Sequence[dict[str, Any]] = (), seed: int = 0
) -> dict[str, Any]:
    """report.json, ``privacy.risk``.

    Args:
        rows: as `risk_table` gives them.
        membership: rows of membership.csv, for the number of non-members.
    """
    place = {training.record_id[first]: index for index, first in enumerate(training.first)}
    block = training.block[training.first][[place[row["record_id"]] for row in rows]]
    nonmembers = sum(not row["member"] for row in membership)
    fpr = next((rate for rate in _RATES if rate * nonmembers >= _LEAST_FALSE_POSITIVES), None)
    table = _Table(rows, block, training.grouped, fpr, seed)
    return {
        "pictures": len(rows),
        "rank_rule": RANK_RULE,
        "outlierness": f"mean l2 to the nearest {min(NEIGHBOURS, len(rows) - 1)} other distinct training pictures, all views",
        "membership_attack": membership_attack(membership),
        "recognised_fpr": fpr,
        "by_outlierness": table.by_outlierness(),
        "by_copies": table.by_copies(),
        "correlation": table.correlations(),
        "top": [{key: value for key, value in row.items() if key != "group"} for row in rows[:_TOP]],
    }


class _Table:
    """Rates and correlations over the rows of risk.csv.

    Attributes:
        fpr: false-positive rate at which a member counts as recognised; None: there are too few non-members for any.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], block: np.ndarray, grouped: bool, fpr: float | None, seed: int):
        self.rows, self.block, self.grouped, self.fpr, self.seed = rows, block, grouped, fpr, seed
        self.verified = np.array([bool(row["verified"]) for row in rows])
        self.extracted = bool(rows) and rows[0]["verified"] is not None

    def column(self, name: str) -> np.ndarray:
        """float64 [P], NaN where it was not measured."""
        return np.array([np.nan if row[name] is None else row[name] for row in self.rows], dtype=np.float64)

    def by_outlierness(self) -> list[dict[str, Any]]:
        """Rates by tenths of outlierness, the least unusual first; fewer parts where there are fewer than 100 pictures."""
        values = self.column("outlierness")
        order = np.argsort(values, kind="stable")
        parts = np.array_split(order, max(1, min(10, len(order) // 10)))
        return [
            {"from": _number(values[part[0]]), "to": _number(values[part[-1]]), **self._rates(part)} for part in parts
        ]

    def by_copies(self) -> list[dict[str, Any]]:
        """Rates by the number of copies in the training split."""
        copies = self.column("copies").astype(np.int64)
        return [
            {"copies": count, **self._rates(np.flatnonzero(copies == count))} for count in np.unique(copies).tolist()
        ]

    def _rates(self, part: np.ndarray) -> dict[str, Any]:
        fpr = self.column("membership_fpr")[part]
        asked = part[~np.isnan(fpr)] if self.fpr is not None else part[:0]
        recognised = self.column("membership_fpr")[asked] <= (self.fpr or 0)
        return {
            "pictures": len(part),
            "verified": self._rate(self.verified[part], part) if self.extracted else None,
            "recognised": self._rate(recognised, asked) if len(asked) else None,
        }

    def _rate(self, flags: np.ndarray, part: np.ndarray) -> dict[str, Any]:
        low, high, method = rate_interval(flags, self.block[part], self.grouped, derive(self.seed, "attack/risk"))
        return {
            "n": len(part),
            "count": int(flags.sum()),
            "rate": float(flags.mean()),
            "ci95": [low, high],
            "method": method,
        }

    def correlations(self) -> list[dict[str, Any]]:
        """Spearman's rank correlation of what may explain risk with each sign of it, over the pictures with both."""
        found = []
        for cause in ("outlierness", "copies"):
            for sign in ("l2", "adaptive_score", "membership", "inpainting_l2"):
                x, y = self.column(cause), self.column(sign)
                both = ~np.isnan(x) & ~np.isnan(y)
                if both.any():
                    result = spearman(x[both], y[both], self.block[both], self.grouped, self.seed)
                    found.append({"x": cause, "y": sign, **result})
        return found


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="finished run, or evaluation below one")
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for risk_overlap.csv and risk_overlap.md"
    )
    arguments = parser.parse_args()
    try:
        compare_runs(arguments.runs, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((arguments.output / "risk_overlap.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
