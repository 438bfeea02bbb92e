"""The pictures that a report shows, and those that it must not show."""

import base64
import csv
import io
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MOST_PIXELS, MOST_SIDE = 64_000_000, 256  # of a generation that is read; of what is shown
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Match:
    """A row of attack/matches.csv: a generation and its nearest training picture."""

    generation: str
    record_id: str
    l2: float | None
    score: float | None  # adaptive score; None in the prompted protocol
    clique: str
    verified: bool


@dataclass(frozen=True)
class Pair:
    """A generation beside the training picture it resembles, for display."""

    match: Match
    copies: int | None


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_matches(path: Path) -> list[Match]:
    """attack/matches.csv."""
    return [
        Match(
            generation=row["generation"],
            record_id=row["record_id"],
            l2=_float(row["l2"]),
            score=_float(row["adaptive_score"]),
            clique=row.get("clique") or "",
            verified=row["verified"] == "true",
        )
        for row in read_table(path)
    ]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def choose_pairs(
    matches: Iterable[Match], picture: dict[str, str], copies: dict[str, int], most: int
) -> tuple[list[Pair], list[Pair]]:
    """The best generation of every verified picture, and the closest pairs that did not pass, closest first.

    At most ``most`` verified ones; the others fill up to a quarter of ``most``, for comparison.

    Args:
        picture: cluster of a record, so that copies are shown once; a record that is not in it stands for itself.
        copies: size of a record's cluster.
    """
    best: dict[tuple[bool, str], Match] = {}
    for match in sorted(matches, key=_closeness):
        best.setdefault((match.verified, picture.get(match.record_id, match.record_id)), match)
    shown = {name for verified, name in best if verified}
    verified = [match for (flag, _), match in best.items() if flag]
    others = [match for (flag, name), match in best.items() if not flag and name not in shown]
    pair = [[Pair(m, copies.get(m.record_id)) for m in group] for group in (verified, others)]
    return pair[0][:most], pair[1][: max(1, most // 4) if most else 0]


def pair_rows(
    matches: list[Match],
    manifest: list[dict[str, str]],
    files: dict[str, Path],
    images: Callable[[str], np.ndarray] | None,
    most: int,
    budget_bytes: int,
) -> dict[str, list[dict[str, Any]]]:
    """Pairs for a page: ``verified`` and ``closest``, rows {pair, generation, training}, the last two data URIs or None.

    Args:
        matches, manifest: rows of attack/matches.csv and manifest.csv.
        files: image files of the generations by name.
        images: record_id -> uint8 [C, H, W]; None where the data are restricted: neither pictures nor names are given.
        most: see `choose_pairs`.
        budget_bytes: of the encoded pictures.
    """
    copies = {row["record_id"]: int(row["copies"]) for row in manifest if row.get("copies", "").isdigit()}
    picture = {row["record_id"]: row["cluster"] for row in manifest if row.get("cluster")}
    groups = choose_pairs(matches, picture, copies, most)
    if images is None:
        numbered = [
            replace(pair, match=replace(pair.match, record_id=f"picture {i}", generation=""))
            for i, pair in enumerate(groups[0], 1)
        ]  # a record's id is a hash of its file name: whoever has a list of names could look it up
        return {"verified": [{"pair": pair} for pair in numbered], "closest": []}
    shown = [pair for group in groups for pair in group]
    paths = [files.get(pair.match.generation) for pair in shown]
    generated = [read_image(path) if path else None for path in paths]
    training = [images(pair.match.record_id) for pair in shown]
    uris = iter(encode([image for image in generated + training if image is not None], budget_bytes))
    columns = [[None if image is None else next(uris) for image in column] for column in (generated, training)]
    rows = [{"pair": pair, "generation": g, "training": t} for pair, g, t in zip(shown, *columns, strict=True)]
    return {"verified": rows[: len(groups[0])], "closest": rows[len(groups[0]) :]}


def generation_files(folder: Path) -> dict[str, Path]:
    """Image files below ``folder`` by the name that matches.csv gives them, sorted: "000012.png", "00003/000012.png"."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): path for path in files}


def read_image(path: Path) -> np.ndarray | None:
    """Picture for display, uint8 [C, H, W], grey or RGB, at most `MOST_SIDE` pixels wide; None if unreadable or huge.

    Generations may come from somebody else, so the size is taken from the header before anything is decoded.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # Pillow's remarks on odd files
            if image.width * image.height > MOST_PIXELS:
                return None
            image = image if image.mode == "L" else image.convert("RGB")
            image.thumbnail((MOST_SIDE, MOST_SIDE))
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def encode(images: Sequence[np.ndarray], budget_bytes: int) -> list[str]:
    """PNG data URIs of uint8 [C, H, W] pictures, shrunk together until they fit into ``budget_bytes``."""
    side = min(MOST_SIDE, max((max(image.shape[1:]) for image in images), default=1))
    while True:
        uris = [_data_uri(image, side) for image in images]
        if sum(map(len, uris)) <= budget_bytes or side <= 8:
            return uris
        side = int(side * min(0.9, 0.97 * (budget_bytes / sum(map(len, uris))) ** 0.5))


def _data_uri(image: np.ndarray, side: int) -> str:
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _closeness(match: Match) -> tuple[float, float, str]:
    infinity = float("inf")
    score = infinity if match.score is None else match.score
    return score, infinity if match.l2 is None else match.l2, match.generation


def _float(text: str | None) -> float | None:
    return float(text) if text else None
