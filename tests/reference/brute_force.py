"""Slow, obvious versions of what `defenses.neighbours` and `eval` compute fast: Python loops, float64, no blocks."""

import itertools
import math

import numpy as np


def l2(a: np.ndarray, b: np.ndarray) -> float:
    """sqrt(mean((a - b)^2)) of two uint8 images, pixels in [0, 1]."""
    difference = a.astype(np.float64) / 255 - b.astype(np.float64) / 255
    return math.sqrt(float(np.mean(difference**2)))


def shifted(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """out[y, x] = image[y + dy, x + dx], the nearest pixel of the edge where that is outside."""
    out = np.empty_like(image)
    height, width = image.shape[-2:]
    for y, x in itertools.product(range(height), range(width)):
        out[..., y, x] = image[..., min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
    return out


def views(image: np.ndarray) -> list[np.ndarray]:
    """Image and mirror image, each plain and shifted in four directions by side/32, at least 1."""
    dy, dx = max(1, round(image.shape[-2] / 32)), max(1, round(image.shape[-1] / 32))
    shifts = [(0, 0), (dy, 0), (-dy, 0), (0, dx), (0, -dx)]
    return [shifted(base, *shift) for base in (image, image[..., ::-1]) for shift in shifts]


def records(query: np.ndarray, references: np.ndarray, all_views: bool) -> list[tuple[float, int]]:
    """(distance, row) of every reference, nearest first."""
    rows = []
    for row, reference in enumerate(references):
        shown = views(reference) if all_views else [reference]
        rows.append((min(l2(query, view) for view in shown), row))
    return sorted(rows)


def distinct(query: np.ndarray, references: np.ndarray, picture: np.ndarray, all_views: bool = True):
    """(distance, picture, row) of every picture, nearest first, then by picture id."""
    best: dict[int, tuple[float, int, int]] = {}
    for distance, row in records(query, references, all_views):
        entry = (distance, int(picture[row]), row)
        best[entry[1]] = min(best.get(entry[1], entry), entry)
    return sorted(best.values())


def score(distances: list[float], alpha: float, n: int) -> float:
    """Carlini et al. 2023, section 5.1, over the n nearest."""
    near = distances[:n]
    return near[0] / (alpha * (sum(near) / len(near)))
