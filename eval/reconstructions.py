"""Reconstructed halves against their originals: distances, fills that know of no model, members against held-out pictures."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.blocktest import lower_mean_p_value
from eval.members import Candidates, distinct
from eval.roc import auc
from train.data import Dataset

COLUMNS = [
    "record_id", "member", "group", "reference", "l2", "l2_hidden", "l2_first", "score_first", "l2_mirror", "l2_mean", "fill",
]  # fmt: skip
_EXAMPLES = 4  # pictures of either side that the report shows


def mirrored(picture: np.ndarray) -> np.ndarray:
    """The picture with the mirror image of its right half in place of the left one, of which nothing is read.

    Args:
        picture: [C, H, W]. Where W is odd the middle column counts as known.
    """
    half = picture.shape[-1] // 2
    blind = picture[..., ::-1].copy()
    blind[..., half:] = picture[..., half:]
    return blind


def left_half(height: int, width: int) -> torch.Tensor:
    """What is hidden, bool [height, width]."""
    return (torch.arange(width) < width // 2).expand(height, width)


@dataclass
class Fills:
    """What was kept of one picture.

    Attributes:
        images: uint8 [K, C, H, W], lowest score first; the known half is the picture's own.
        score: float64 [K], ascending.
    """

    images: np.ndarray
    score: np.ndarray

    def best(self, other: "Fills", keep: int) -> "Fills":
        """The ``keep`` lowest of both; equals in the order of their drawing."""
        images, score = np.concatenate([self.images, other.images]), np.concatenate([self.score, other.score])
        order = np.argsort(score, kind="stable")[:keep]
        return Fills(images[order], score[order])


@dataclass
class MeanPicture:
    """Mean of the distinct training pictures, as a fill that knows of no model.

    Attributes:
        total: sum of the pictures, float64 [C, H, W] in [0, 1] each.
        count: how many they are.
    """

    total: np.ndarray
    count: int

    @classmethod
    def of(cls, dataset: Dataset) -> "MeanPicture":
        rows = distinct(dataset, dataset.rows("train", kept=True))
        total = np.zeros(dataset.images.shape[1:])
        for start in range(0, len(rows), 256):
            total += (dataset.images[rows[start : start + 256]] / 255.0).sum(axis=0)
        return cls(total, len(rows))

    def without(self, picture: np.ndarray, member: bool) -> np.ndarray:
        """The mean of the other pictures, float64 [C, H, W]: a member, uint8 [C, H, W], has no part in its own fill."""
        return (self.total - picture / 255.0) / max(self.count - 1, 1) if member else self.total / self.count


def distances(kept: Fills, original: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """Mean l2 of the kept fills to the original, pixels in [0, 1], over the whole picture as in the paper and over the hidden
    half; that of the first of them; and that of fills without a model.

    Args:
        original: uint8 [C, H, W].
        mean: what the mean picture shows, float64 [C, H, W] in [0, 1].
    """
    truth, half = original / 255.0, original.shape[-1] // 2
    errors = kept.images / 255.0 - truth
    whole = _l2(errors)
    return {
        "l2": float(whole.mean()),
        "l2_hidden": float(_l2(errors[..., :half]).mean()),
        "l2_first": float(whole[0]),
        "score_first": float(kept.score[0]),
        "l2_mirror": float(_l2((mirrored(original) / 255.0 - truth)[None])[0]),
        "l2_mean": float(_l2(np.where(np.arange(truth.shape[-1]) < half, mean - truth, 0)[None])[0]),
    }


def _l2(errors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(errors).mean(axis=(1, 2, 3)))


def summary(
    asked: Candidates, rows: list[dict[str, Any]], permutations: int, seed: int, *, exchangeable: bool
) -> dict[str, Any]:
    """Members against held-out pictures: the part of ``privacy.inpainting`` that rests on distances.

    Args:
        rows: of inpainting.csv, in the order of ``asked``.
        exchangeable: whether held-out pictures are drawn like training pictures; otherwise there is no p-value.
    """

    def figures(name: str) -> dict[str, Any]:
        return compared(np.array([row[name] for row in rows]), asked, permutations if exchangeable else None, seed)

    unit = "group" if asked.grouped else "picture"
    sides = {"members": asked.member, "nonmembers": ~asked.member}
    units = {name: len(np.unique(asked.block[side])) for name, side in sides.items()}
    return {
        **{name: int(side.sum()) for name, side in sides.items()},
        "unit": unit,
        "units": units,
        "test": f"permutation of whole {unit}s, one-sided, difference of means" if exchangeable else None,
        **figures("l2"),
        "hidden_half": figures("l2_hidden"),
        "baseline": {"mirror": figures("l2_mirror"), "mean": figures("l2_mean")},
        "pairs": [[row["member"], row["l2_mirror"], row["l2"]] for row in rows],
        "examples": _examples(rows),
        "note": _note(units, unit),
    }


def compared(values: np.ndarray, asked: Candidates, permutations: int | None, seed: int) -> dict[str, Any]:
    """Whether a distance is smaller for members than for held-out pictures.

    Args:
        values: float64, of each picture of ``asked``.
        permutations: of the test; None: there is no p-value.

    Returns:
        ``{"member_l2_mean", "nonmember_l2_mean", "difference": held-out minus members, "p_value", "auc": of the negative
        distance, "auc_ci95", "auc_method"}``; None what needs a side that is empty.
    """
    sides = values[asked.member], values[~asked.member]
    means = [float(side.mean()) if len(side) else None for side in sides]
    found = {"member_l2_mean": means[0], "nonmember_l2_mean": means[1]}
    if None in means:
        return found | dict.fromkeys(("difference", "p_value", "auc", "auc_ci95", "auc_method"))
    groups = (asked.block[asked.member], asked.block[~asked.member]) if asked.grouped else None
    area, p_value = auc(-sides[0], -sides[1], groups), None
    if permutations is not None:
        p_value = lower_mean_p_value(values, asked.member, asked.block, permutations, seed)
    return found | {
        "difference": means[1] - means[0],
        "p_value": p_value,
        "auc": area.auc,
        "auc_ci95": [area.low, area.high],
        "auc_method": area.method,
    }


def _examples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nearest reconstructions of either side, members first."""
    chosen = []
    for member in (True, False):
        side = sorted((row for row in rows if row["member"] == member), key=lambda row: row["l2"])
        chosen += [{key: row[key] for key in ("record_id", "member", "l2", "fill")} for row in side[:_EXAMPLES]]
    return chosen


def _note(units: dict[str, int], unit: str) -> str | None:
    """A warning where so few units could not give a p-value of 0.01 whatever the distances."""
    sides = list(units.values())
    least = 1 / math.comb(sum(sides), sides[0])
    return f"{sides[0]} and {sides[1]} {unit}s: no p-value below {least:.2g} is possible" if least > 0.01 else None
