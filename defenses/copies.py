"""Which pictures are copies of each other: the fixed rule behind `copies` and `cluster`, shared with `defenses.dedup`.

Exact copies have equal decoded pixels. A near copy is a picture that a clipped change of brightness and contrast turns
into the other one, up to what re-encoding or resizing costs:

1. Candidates are pairs whose 16 x 16 box thumbnails, each less its mean and over its standard deviation (all channels
   jointly, so that hues keep their relation), differ by at most ``2.5 * threshold`` RMS.
2. For each candidate, at up to 64 px, y ~ clip(gain * x + offset, 0, 1) is fitted on the pixels where y is not
   saturated, in both directions. The residual, blurred 3 x 3 and divided by the standard deviation of y, must have an
   RMS of at most ``threshold``, and of at most 2.5 times that in each of 4 x 4 tiles: a local difference (another hand,
   another nodule) is no copy.
3. Groups form around the lowest row: a member counts only if it is a copy of that representative itself, never through
   a chain of others.

Measured (the threshold was chosen on these pictures): share of about 330 pictures per set found again after an edit at
their stored size, and records called near copies in the whole set, none of which is an exact copy:

| pictures, px        | JPEG q50 | half | x 1.2 | x 0.8 | + 20 % | - 20 % | c 1.2, c 0.8 | (a)   | (b)   | called near |
|---------------------|----------|------|-------|-------|--------|--------|--------------|-------|-------|-------------|
| NIH films, 64 -> 32 | 1.00     | 1.00 | 1.00  | 1.00  | 1.00   | 1.00   | 1.00, 1.00   | 1.00  | 1.00  | 0 of 1000   |
| NIH films, 64       | 1.00     | .997 | 1.00  | 1.00  | 1.00   | 1.00   | 1.00, 1.00   | .991  | .997  | 0 of 1000   |
| Hannover films, 128 | 1.00     | 1.00 | 1.00  | 1.00  | 1.00   | 1.00   | 1.00, 1.00   | 1.00  | 1.00  | 0 of 243    |
| Fashion-MNIST, 28   | .997     | .216 | 1.00  | 1.00  | 1.00   | .928   | 1.00, 1.00   | .266  | .186  | 7 of 2000   |
| emoji RGB, 64 -> 32 | .997     | 1.00 | .761  | 1.00  | .690   | 1.00   | 1.00, 1.00   | .251  | .958  | 134 of 2008 |
| emoji RGB, 64       | .722     | .985 | .824  | 1.00  | .752   | 1.00   | 1.00, 1.00   | .018  | .343  | 134 of 2008 |

half: to half size and back; c: contrast; (a) half, x 1.2, JPEG q50; (b) half, x 0.8, c 0.8, JPEG q50. The films'
nearest pair that is no copy (one patient, two visits, 32 px) has a residual of 0.141. Of the 134 emoji 116 to 117 are
skin tones of one drawing: small differences of hue pass for re-encoding. Half of 28 px, and colours clipped to white,
lose more than the rule forgives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, pad

from defenses.neighbours import pairs_within

CANDIDATE_SIDE, CONFIRM_SIDE, TILES = 16, 64, 4
CANDIDATE_FACTOR, TILE_FACTOR = 2.5, 2.5  # limits of steps 1 and 2, in thresholds
FLAT = 0.02  # standard deviation (pixels in [0, 1]) below which only exact copies are found: nothing is left to compare
GAIN_RANGE = (0.5, 2.0)
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class CopyRule:
    """What counts as a copy; the defaults are the fixed rule of every report."""

    near: bool = True  # false: exact copies only
    flips: bool = False  # true: a mirrored picture is a near copy, too
    threshold: float = 0.12  # largest residual of a near copy, in standard deviations of the picture


@dataclass(frozen=True)
class Copy:
    """One picture that repeats another.

    Attributes:
        kept: row of the representative, the lowest of its group.
        row: row of the copy.
        kind: ``exact`` or ``near``.
        distance: 0 for exact copies, else the residual of step 2.
    """

    kept: int
    row: int
    kind: Literal["exact", "near"]
    distance: float


def find_copies(images: Any, pixel_hash: Sequence[str], rule: CopyRule | None = None) -> np.ndarray:
    """Cluster id of every picture, int64 [N]: 0..K-1 in the order of first occurrence; copies share an id.

    Args:
        images: uint8 [N, C, H, W], array or memory map.
        pixel_hash: digest of the decoded pixels of each row.
    """
    representative = np.arange(len(images))
    for copy in copy_groups(images, pixel_hash, rule):
        representative[copy.row] = copy.kept
    return np.unique(representative, return_inverse=True)[1].astype(np.int64)


def relatives(images: Any, pixel_hash: Sequence[str], rule: CopyRule) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of rows that are copies of each other by ``rule``, int64 i < j: what must not lie on two sides of a split.

    Clusters are stars around a representative; a pair of copies may lie in two of them.
    """
    first: dict[str, int] = {}
    twin = [(first.setdefault(digest, row), row) for row, digest in enumerate(pixel_hash)]
    pairs = [pair for pair in twin if pair[0] != pair[1]]
    rows, i, j = _candidate_rows(images, np.array(list(first.values()), dtype=np.int64), rule)
    for place in np.unique(i):
        kept, others = int(rows[place]), [int(rows[k]) for k in j[i == place]]
        distances = _residuals(images, kept, others, rule)
        pairs += [(kept, row) for row, distance in zip(others, distances, strict=True) if distance <= rule.threshold]
    joined = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return joined[:, 0], joined[:, 1]


def copy_groups(
    images: Any, pixel_hash: Sequence[str], rule: CopyRule | None = None, rows: np.ndarray | None = None
) -> list[Copy]:
    """All pictures that are copies, with the representative that stays, by ascending row.

    Args:
        images, pixel_hash: as for `find_copies`.
        rows: ascending rows to look at; None: all.
    """
    rule = rule or CopyRule()
    if len(images) != len(pixel_hash):
        raise ValueError(f"{len(images)} images, {len(pixel_hash)} hashes")
    rows = np.arange(len(images)) if rows is None else rows
    first: dict[str, int] = {}
    twin = {int(row): first.setdefault(pixel_hash[row], int(row)) for row in rows}
    near = _near_groups(images, np.array(list(first.values()), dtype=np.int64), rule) if rule.near else {}
    copies = []
    for row, exact in twin.items():
        kept, distance = near.get(exact, (exact, 0.0))
        if kept != row:
            copies.append(Copy(kept, row, "exact" if kept == exact else "near", distance))
    return copies


def _near_groups(images: Any, rows: np.ndarray, rule: CopyRule) -> dict[int, tuple[int, float]]:
    """Near copies among ascending rows of different pixels: row -> (representative, distance)."""
    rows, i, j = _candidate_rows(images, rows, rule)
    stop = np.searchsorted(i, np.arange(len(rows) + 1))
    found: dict[int, tuple[int, float]] = {}
    for place in np.unique(i):
        kept = int(rows[place])
        others = [int(rows[k]) for k in j[stop[place] : stop[place + 1]] if int(rows[k]) not in found]
        if kept in found or not others:
            continue
        for row, distance in zip(others, _residuals(images, kept, others, rule), strict=True):
            if distance <= rule.threshold:
                found[row] = kept, float(distance)
    return found


def _candidate_rows(images: Any, rows: np.ndarray, rule: CopyRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows with enough contrast, and the pairs of places among them that step 1 lets through."""
    vectors, clear = _thumbnails(images, rows)
    rows, vectors = rows[clear], vectors[clear]
    none = np.zeros(0, dtype=np.int64)
    return rows, *(_candidates(vectors, rule) if len(rows) > 1 else (none, none))


def _thumbnails(images: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised thumbnails, float32 [N, C, s, s], and which pictures have enough contrast for them, bool [N]."""
    parts, clear = [], []
    for start in range(0, max(len(rows), 1), _BLOCK):
        small = _reduced(images[rows[start : start + _BLOCK]], CANDIDATE_SIDE)
        small -= small.mean(dim=(1, 2, 3), keepdim=True)
        spread = small.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        parts.append((small / spread.clamp(min=FLAT)).numpy())
        clear.append((spread >= FLAT).flatten().numpy())
    return np.concatenate(parts), np.concatenate(clear)


def _candidates(vectors: np.ndarray, rule: CopyRule) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j that step 1 lets through, sorted by i, then j, each once."""
    count, radius = len(vectors), CANDIDATE_FACTOR * rule.threshold
    flat = vectors.reshape(count, -1)
    if not rule.flips:
        return pairs_within(flat, radius)[:2]
    both = np.concatenate([flat, vectors[..., ::-1].reshape(count, -1)])
    i, j, _ = pairs_within(both, radius)
    i, j = i % count, j % count
    pairs = np.unique(np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1)[i != j], axis=0)
    return pairs[:, 0], pairs[:, 1]


def _residuals(images: Any, kept: int, others: list[int], rule: CopyRule) -> np.ndarray:
    """Step 2 for one picture against others, float32 [k]; infinite where a tile differs too much."""
    x = _reduced(images[kept : kept + 1], CONFIRM_SIDE)
    parts = []
    for start in range(0, len(others), _BLOCK):
        y = _reduced(images[np.asarray(others[start : start + _BLOCK])], CONFIRM_SIDE)
        views = [x, x.flip(-1)] if rule.flips else [x]
        ways = [residual(a.expand_as(y), b.expand_as(y), rule) for v in views for a, b in ((v, y), (y, v))]
        parts.append(torch.stack(ways).amin(dim=0).numpy())
    return np.concatenate(parts)


def residual(x: torch.Tensor, y: torch.Tensor, rule: CopyRule) -> torch.Tensor:
    """How far y is from the best clipped brightness and contrast change of x, in standard deviations of y.

    Args:
        x, y: float32 [k, C, H, W] in [0, 1].

    Returns:
        float32 [k]; infinite where one of 4 x 4 tiles differs by more than 2.5 thresholds.
    """
    dims = (1, 2, 3)
    open_ = ((y > 1.5 / 255) & (y < 253.5 / 255)).float()  # not saturated
    weight = torch.where(open_.mean(dim=dims, keepdim=True) > 0.05, open_, 1.0)
    weight = weight / weight.sum(dim=dims, keepdim=True)
    x_mean, y_mean = ((weight * t).sum(dim=dims, keepdim=True) for t in (x, y))
    variance = (weight * (x - x_mean).square()).sum(dim=dims, keepdim=True)
    covariance = (weight * (x - x_mean) * (y - y_mean)).sum(dim=dims, keepdim=True)
    gain = (covariance / variance.clamp(min=1e-8)).clamp(*GAIN_RANGE)
    error = y - (gain * (x - x_mean) + y_mean).clamp(0, 1)
    error = avg_pool2d(pad(error, (1, 1, 1, 1), mode="replicate"), 3, 1).square().mean(dim=1, keepdim=True)
    spread = y.var(dim=dims, unbiased=False).clamp(min=FLAT**2)
    whole = (error.mean(dim=dims) / spread).sqrt()
    tile = (adaptive_avg_pool2d(error, TILES).amax(dim=dims) / spread).sqrt()
    return torch.where(tile <= TILE_FACTOR * rule.threshold, whole, torch.inf)


def _reduced(images: np.ndarray, side: int) -> torch.Tensor:
    """Pictures in [0, 1], box-filtered down to at most ``side`` px, float32 [N, C, h, w]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return adaptive_avg_pool2d(pixels, side) if max(pixels.shape[-2:]) > side else pixels
