"""Copies by correlation: a second opinion that shares neither distance nor threshold with attack and output filter.

Pearson correlation of pixels does not change with brightness and contrast (Akbar et al. 2023, arXiv 2305.07644). A filter
that is judged by its own score alone always looks good; this judges it by another.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses.exact import centred, reduced_differences, squares
from defenses.seeding import derive
from eval.pictures import Pictures, Rows

QUANTILE = 0.95
_BLOCK = 1024  # queries and references in one product; a matrix of it takes 8 MiB
RULE = (
    "a generation is a copy of the training picture with which it correlates most (pixels, or their mirror image), if it does "
    "so more than 95 % of the training pictures do with the calibration picture nearest to them (Dar et al. 2024)"
)


@dataclass
class Closest:
    """The best reference of each query, by the larger correlation over its identity and mirror view.

    Attributes:
        correlation: in [-1, 1], float64 [Q]; 0 where query or reference is flat (one grey level).
        picture: picture id of that reference, int64 [Q]; of equals the lowest.
    """

    correlation: np.ndarray
    picture: np.ndarray

    def copied(self, threshold: float) -> np.ndarray:
        """Queries that are copies, bool [Q]; flat ones never are."""
        return self.correlation > max(threshold, 0.0)

    def verified(self, threshold: float) -> np.ndarray:
        """Distinct picture ids of which some query is a copy, ascending."""
        return np.unique(self.picture[self.copied(threshold)])


def by_correlation(
    generations: Any,
    training: Pictures,
    heldout: Pictures | None,
    calibration: Pictures | None,
    accelerator: Any = None,
) -> dict[str, Any] | None:
    """Counts copies by correlation, on all ranks; each returns the same.

    The control is `eval.control`'s: the same rule once against m training and once against m held-out pictures, and the share
    of real held-out pictures that would count as copies (``background``). That share exceeds 5 % where there are fewer
    calibration than training pictures, since the best of more is better: read the count beside its control only.

    Args:
        generations: uint8 [G, C, H, W], array or memory map, of the shape of the pictures; G > 0.

    Returns:
        report.json, ``privacy.extraction.by_correlation``; None without calibration pictures, which set the threshold.
    """
    if calibration is None:
        return None
    threshold = copy_threshold(training, calibration, accelerator)
    found = closest(generations, training.images, training.picture, accelerator)
    return {
        "threshold": threshold,
        "quantile": QUANTILE,
        "verified": len(found.verified(threshold)),
        "candidates": int(found.copied(threshold).sum()),
        "control": _control(generations, training, heldout, threshold, accelerator),
        "rule": RULE,
    }


def copy_threshold(training: Pictures, calibration: Pictures, accelerator: Any = None) -> float:
    """Dar et al. (2024, arXiv 2402.01054, section 2): for each training picture the correlation with the calibration picture
    nearest to it; of these the 95th percentile, in [0, 1]. Copies of one training picture count once, by the nearest."""
    found = closest(training.images, calibration.images, calibration.picture, accelerator).correlation
    best = np.full(len(training.ids), -1.0)
    np.maximum.at(best, np.searchsorted(training.ids, training.picture), found)
    return float(max(np.quantile(best, QUANTILE), 0.0))


def closest(queries: Any, references: Any, picture: np.ndarray, accelerator: Any = None) -> Closest:
    """The reference with which each query correlates most, in blocks of bounded memory, shared among the ranks.

    Sums are whole numbers (`defenses.exact`), so the result is the brute-force one on any device and number of processes.

    Args:
        queries: uint8 [Q, C, H, W]; references: uint8 [R, C, H, W], R > 0; arrays or memory maps.
        picture: picture id of each reference, int64 [R].
    """
    rank, world, device = 0, 1, torch.device("cpu")
    if accelerator is not None:
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    order = np.argsort(picture, kind="stable")  # the first of equal correlations has the lowest picture id
    rows = np.arange(rank, len(queries), world)
    parts = [
        (some, *_best(queries[some], references, order, device))
        for some in (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    ]
    parts = gather_object(parts) if world > 1 else parts
    correlation, row = np.zeros(len(queries)), np.zeros(len(queries), dtype=np.int64)
    for some, value, place in parts:
        correlation[some], row[some] = value, order[place]
    return Closest(correlation, np.asarray(picture)[row])


def _best(
    queries: np.ndarray, references: Any, order: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Largest correlation of each query and the place of its reference in the order, float64 [q] and int64 [q]."""
    query = centred(queries, device)
    best = torch.full((len(query),), -2.0, dtype=torch.float64, device=device)
    place = torch.zeros(len(query), dtype=torch.int64, device=device)
    for start in range(0, len(order), _BLOCK):
        block = torch.from_numpy(np.ascontiguousarray(references[order[start : start + _BLOCK]])).to(device)
        views = (centred(view, device) for view in (block, block.flip(-1)))
        value, index = torch.stack([_correlation(query, view) for view in views]).amax(0).max(1)
        better = value > best
        best, place = torch.where(better, value, best), torch.where(better, index + start, place)
    return best.cpu().numpy(), place.cpu().numpy()


def _correlation(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of the rows of [q, D] and [r, D] of centred grey levels, float64 [q, r]; 0 for flat rows.

    r = (D sum(xy) - sum(x) sum(y)) / sqrt((D sum(x^2) - sum(x)^2) (D sum(y^2) - sum(y)^2)), with 2 sum(xy) = sum(y^2) -
    reduced differences; the numbers under the root and above the bar are integers below 2^53 for D < 2^19.
    """
    size = left.shape[1]
    product = (squares(right) - reduced_differences(left, right)).long() // 2
    total, other = left.double().sum(1).long(), right.double().sum(1).long()
    numerator = (size * product - total[:, None] * other).double()
    root, other_root = (
        (size * squares(rows).long() - s**2).double().sqrt() for rows, s in ((left, total), (right, other))
    )
    scale = root[:, None] * other_root
    return torch.where(scale > 0, (numerator / scale.clamp(min=1.0)).clamp(-1, 1), 0.0)


def _control(
    generations: Any, training: Pictures, heldout: Pictures | None, threshold: float, accelerator: Any
) -> dict[str, Any] | None:
    if heldout is None:
        return None
    m = min(len(training.ids), len(heldout.ids))
    counts = {}
    for side, pictures in (("training", training), ("heldout", heldout)):
        rows = np.flatnonzero(np.isin(pictures.picture, pictures.drawn(m, derive(0, "attack/correlation", side))))
        found = closest(generations, Rows(pictures.images, rows), pictures.picture[rows], accelerator)
        counts[side] = len(found.verified(threshold))
    strangers = closest(Rows(heldout.images, heldout.first), training.images, training.picture, accelerator)
    background = float(strangers.copied(threshold).mean())
    return {"verified": counts["heldout"], "verified_train_m": counts["training"], "n": m, "background": background}
