"""Flagged prompts on the page: the figures of each, its candidate beside the training picture that is nearest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval import evidence

MOST = 50  # rows
BUDGET_BYTES = 250_000  # of their encoded pictures


def flagged_prompts(
    cliques: Path,
    index: Path,
    manifest: list[dict[str, str]],
    files: dict[str, Path],
    images: Callable[[str], np.ndarray] | None,
    pairs: int,
) -> list[dict[str, Any]]:
    """Rows of cliques.csv that are flagged, tightest first, for display.

    Each has further ``text`` (of the prompt; None where nobody knows it), ``copies`` of the nearest picture, and the pictures
    ``generation`` and ``training`` (data URIs or None).

    Args:
        cliques: attack/cliques.csv.
        index: index.csv of the generations, which tells the text of a prompt.
        manifest, files: as `evidence.pair_rows` takes them.
        images: record_id -> uint8 [C, H, W]; None where the data are restricted: prompts are captions and record ids are
            made from names of files, so neither is given.
        pairs: prompts with pictures, at most.
    """
    rows = [row for row in evidence.read_table(cliques) if row["flagged"] == "true"]
    rows = sorted(rows, key=lambda row: float(row["mean_distance"] or "inf"))[:MOST]
    copies = {row["record_id"]: int(row["copies"]) for row in manifest if row.get("copies", "").isdigit()}
    rows = [row | {"copies": copies.get(row["record_id"]), "generation": None, "training": None} for row in rows]
    if images is None:
        hidden = {"text": None, "record_id": "", "medoid": ""}
        return [row | hidden | {"prompt": f"prompt {rank}"} for rank, row in enumerate(rows, 1)]
    texts = {row["file"]: row.get("condition") for row in evidence.read_table(index)} if rows else {}
    rows = [row | {"text": texts.get(row["medoid"])} for row in rows]
    shown = []
    for row in rows[:pairs]:
        candidate = evidence.read_image(files[row["medoid"]]) if row["medoid"] in files else None
        if candidate is not None:
            shown.append((row, candidate, images(row["record_id"])))
    uris = iter(evidence.encode([each for _, *pair in shown for each in pair], BUDGET_BYTES))
    for row, *_ in shown:
        row |= {"generation": next(uris), "training": next(uris)}
    return rows
