"""Which training pictures several seeds or runs memorise, and how often chance alone would make them agree.

Carlini et al. 2023, section 6, found 244 of the pictures extracted from a GAN among those extracted from a diffusion model, 10 by
chance: what is memorised depends on the picture. Chance: every run memorises as many pictures as it did, any of them alike.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from defenses.errors import UserError
from train.files import atomic, write_csv

COLUMNS = ["picture", "record_id", "copies", "outlierness", "runs", "memorised_by", "best_l2", "best_adaptive_score"]


@dataclass
class RiskOfRun:
    """The table of one run.

    Attributes:
        name: of its directory.
        rows: picture -> row of risk.csv, all text. A picture is known by the SHA-256 of its file, or where that is unknown by its
            record id, so that runs on the same data are matched whatever else differs.
    """

    name: str
    rows: dict[str, dict[str, str]]

    @property
    def memorised(self) -> set[str]:
        """Verified pictures."""
        return {picture for picture, row in self.rows.items() if row["verified"] == "true"}


def read_run(folder: Path) -> RiskOfRun:
    """Reads ``attack/risk.csv`` of a run or of an evaluation below it, and the run's manifest.

    Raises:
        UserError: there is none, or it tells nothing of extraction.
    """
    table = folder / "attack" / "risk.csv"
    manifest = next(
        (each / "manifest.csv" for each in (folder, folder.parent.parent) if (each / "manifest.csv").exists()), None
    )
    if not table.is_file():
        raise UserError(
            str(folder), "holds no attack/risk.csv", "give finished runs with attack.extraction and attack.risk on"
        )
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not all(row["verified"] for row in rows):
        raise UserError(str(table), "knows of no extraction", "give runs with attack.extraction on")
    digest: dict[str, str] = {}
    if manifest is not None:
        with manifest.open(newline="", encoding="utf-8") as file:
            digest = {row["record_id"]: row["sha256"] for row in csv.DictReader(file)}
    return RiskOfRun(folder.name, {digest.get(row["record_id"]) or row["record_id"]: row for row in rows})


def across_runs(runs: Sequence[RiskOfRun]) -> dict[str, Any]:
    """How far the runs memorise the same pictures, of those that all of them have.

    Returns:
        ``{"runs": {name: pictures memorised}, "pictures": in all runs, "pairs": [{"first", "second", "shared", "expected",
        "p_value"}], "all": the same for all runs together, "at_least": [{"runs", "pictures", "expected"}], "single_copies": the same
        five for pictures that occur once in the training split, None where there are none}``. p-values are one-sided and exact.

    Raises:
        UserError: fewer than two runs, or no picture in common.
    """
    if len(runs) < 2 or len({run.name for run in runs}) < len(runs):
        raise UserError("RUN_DIR", "two or more runs of different names are needed", "give their directories")
    common = set.intersection(*(set(run.rows) for run in runs))
    if not common:
        raise UserError("RUN_DIR", "the runs have no training picture in common", "give runs on the same data")
    single = {picture for picture in common if runs[0].rows[picture]["copies"] == "1"}
    return _agreement(runs, common) | {"single_copies": _agreement(runs, single) if single else None}


def _agreement(runs: Sequence[RiskOfRun], pictures: set[str]) -> dict[str, Any]:
    sets, total = [run.memorised & pictures for run in runs], len(pictures)
    sizes = [len(each) for each in sets]
    pairs = [
        {"first": runs[i].name, "second": runs[j].name, **_shared([sets[i], sets[j]], total)}
        for i, j in combinations(range(len(runs)), 2)
    ]
    seen = Counter(picture for each in sets for picture in each)
    expected = total * _at_least(np.array(sizes) / total)
    return {
        "runs": {run.name: size for run, size in zip(runs, sizes, strict=True)},
        "pictures": total,
        "pairs": pairs,
        "all": _shared(sets, total),
        "at_least": [
            {
                "runs": least,
                "pictures": sum(count >= least for count in seen.values()),
                "expected": float(expected[least]),
            }
            for least in range(1, len(runs) + 1)
        ],
    }


def _shared(sets: Sequence[set[str]], total: int) -> dict[str, Any]:
    shared = len(set.intersection(*sets))
    chance = intersection(sorted(len(each) for each in sets), total)
    return {
        "shared": shared,
        "expected": float(chance @ np.arange(len(chance))),
        "p_value": float(min(1.0, chance[shared:].sum())),
    }


def intersection(sizes: Sequence[int], total: int) -> np.ndarray:
    """Probability that independent random sets of these sizes have 0, 1, ... elements in common, float64 [sizes[0] + 1].

    For two sets it is hypergeometric; every further set keeps a hypergeometric number of what the others share.

    Args:
        sizes: each at most ``total``.
    """
    chance = np.zeros(sizes[0] + 1)
    chance[sizes[0]] = 1.0
    counts = np.arange(len(chance))
    for size in sizes[1:]:
        chance = chance @ hypergeom.pmf(counts[None], total, counts[:, None], size)
    return chance


def _at_least(shares: np.ndarray) -> np.ndarray:
    """Probability that a picture is in at least 0, 1, ... of independent random sets, which hold these shares of all."""
    exactly = np.ones(1)
    for share in shares:
        exactly = np.convolve(exactly, [1 - share, share])
    return exactly[::-1].cumsum()[::-1]


def memorised_rows(runs: Sequence[RiskOfRun]) -> list[dict[str, Any]]:
    """Pictures that some run memorised, those of most runs first."""
    rows = []
    for picture in sorted(set.union(*(run.memorised for run in runs))):
        by = [run.name for run in runs if picture in run.memorised]
        known = [run.rows[picture] for run in runs if picture in run.rows]
        rows.append(
            {name: known[0][name] for name in ("record_id", "copies", "outlierness")}
            | {"picture": picture, "runs": len(by), "memorised_by": " ".join(by)}
            | {f"best_{name}": _least(known, name) for name in ("l2", "adaptive_score")}
        )
    return sorted(
        rows, key=lambda row: (-row["runs"], np.inf if row["best_l2"] is None else row["best_l2"], row["picture"])
    )


def _least(rows: Sequence[Mapping[str, str]], name: str) -> float | None:
    return min((float(row[name]) for row in rows if row[name]), default=None)


def markdown(found: dict[str, Any], rows: Sequence[Mapping[str, Any]], most: int = 20) -> str:
    """The comparison as a page of Markdown: agreement, then the pictures that most runs memorise."""
    lines = ["# Pictures memorised by several runs", ""]
    for title, part in (("All pictures", found), ("Pictures with a single copy", found["single_copies"])):
        if part is not None:
            lines += [f"## {title}", "", *_agreement_lines(part), ""]
    lines += ["## The pictures", "", "| record | copies | runs | memorised by | best l2 |", "|---|---|---|---|---|"]
    for row in rows[:most]:
        nearest = "" if row["best_l2"] is None else f"{row['best_l2']:.3f}"
        lines.append(f"| `{row['record_id']}` | {row['copies']} | {row['runs']} | {row['memorised_by']} | {nearest} |")
    if len(rows) > most:
        lines.append(f"\n{len(rows) - most} more in risk_overlap.csv.")
    return "\n".join(lines) + "\n"


def _agreement_lines(part: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{name} {count}" for name, count in part["runs"].items())
    lines = [
        f"Memorised of {part['pictures']}: {counts}.",
        "",
        "| runs | in common | expected by chance | p |",
        "|---|---|---|---|",
    ]
    for pair in part["pairs"]:
        lines.append(
            f"| {pair['first']}, {pair['second']} | {pair['shared']} | {pair['expected']:.2f} | {pair['p_value']:.2g} |"
        )
    if len(part["runs"]) > 2:
        every = part["all"]
        lines.append(
            f"| all {len(part['runs'])} | {every['shared']} | {every['expected']:.2f} | {every['p_value']:.2g} |"
        )
    for least in part["at_least"][1:-1]:
        lines.append(f"| at least {least['runs']} | {least['pictures']} | {least['expected']:.2f} | |")
    return lines


def compare_runs(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Writes ``risk_overlap.csv`` and ``risk_overlap.md`` for finished runs.

    Returns:
        As `across_runs`.
    """
    runs = [read_run(folder) for folder in folders]
    found, rows = across_runs(runs), memorised_rows(runs)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "risk_overlap.csv", COLUMNS, rows)
    with atomic(output / "risk_overlap.md") as file:
        file.write(markdown(found, rows))
    return found
