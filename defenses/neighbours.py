"""Nearest pictures and the adaptive score: one engine for deduplication, attack, output filter and early stop.

l2(a, b) = sqrt(mean((a - b)^2)) with pixels in [0, 1] (Carlini et al. 2023, section 3.1). `search` works in whole numbers
(`defenses.exact`), so it returns the brute-force result, whatever the device, the blocks and the number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses.bounds import Products, rounded_up
from defenses.exact import centred, integer_type, l2_of, reduced_differences, squares
from defenses.knn import squared_distances
from defenses.nearestlists import BestQuery, KNearest

VIEWS = tuple(
    f"{flip}{shift}" for flip in ("", "mirror ") for shift in ("identity", "up", "down", "left", "right")
)  # fixed for all arms and for the control: see design.md

_BLOCK = 2048  # most queries and references in one matrix product
_MEMORY_BYTES = 2**28  # for the pictures of one block, as they enter a product


@dataclass
class Neighbours:
    """Nearest neighbours of each query, nearest first; ties go to the lower picture id, then to the lower row.

    Attributes:
        distance: l2, float32 [Q, k], ascending.
        picture: picture id, int64 [Q, k].
        row: row in the references, int64 [Q, k]; for pictures the member (copy) that is nearest.
    """

    distance: np.ndarray
    picture: np.ndarray
    row: np.ndarray


@dataclass
class SearchResult:
    """What `search` found. A picture is a set of references (copies); its distance is the smallest over its members.

    Attributes:
        query: rows of the queries that were searched, int64 [Q], ascending; the first axis of all neighbours.
        distinct: nearest distinct pictures, over all `VIEWS` of each reference.
        identity: the same over the identity view only.
        records: nearest single references (copies counted), over all views.
        pictures: every picture id, int64 [P], ascending.
        best_distance: l2 of each picture to its nearest query, all views, float64 [P]; inf without queries.
        best_query: that query (the lowest of equals), int64 [P]; -1 without queries.
    """

    query: np.ndarray
    distinct: Neighbours
    identity: Neighbours
    records: Neighbours
    pictures: np.ndarray
    best_distance: np.ndarray
    best_query: np.ndarray


def views(images: torch.Tensor) -> list[torch.Tensor]:
    """The fixed views of pictures [..., H, W], in the order of `VIEWS`, identity first.

    Each picture and its mirror image, as they are and shifted by side/32 (at least 1) pixels in four directions; the edge
    is repeated where a shift uncovers it. Views are taken of the references: at the edge, a shifted query would give
    another distance.
    """
    return [*_shifts(images), *_shifts(images.flip(-1))]


def _shifts(images: torch.Tensor) -> list[torch.Tensor]:
    height, width = images.shape[-2:]
    up, left = min(max(1, round(height / 32)), height - 1), min(max(1, round(width / 32)), width - 1)
    top, bottom = (edge.expand(*edge.shape[:-2], up, width) for edge in (images[..., :1, :], images[..., -1:, :]))
    near, far = (edge.expand(*edge.shape[:-1], left) for edge in (images[..., :1], images[..., -1:]))
    return [
        images,
        torch.cat([images[..., up:, :], bottom], dim=-2),
        torch.cat([top, images[..., : height - up, :]], dim=-2),
        torch.cat([images[..., left:], far], dim=-1),
        torch.cat([near, images[..., : width - left]], dim=-1),
    ]


def adaptive_score(distance: np.ndarray, alpha: float, n: int) -> np.ndarray:
    """Carlini et al. 2023, section 5.1: nearest distance over alpha times the mean of the n nearest, float64 [Q].

    ``distance`` [Q, k] is ascending and holds one entry per distinct picture, the nearest among the n. A score <= 1 counts
    as extracted. With fewer than n pictures all are used. Where that mean is 0 the nearest does not stand out from the
    others, as where all distances are equal: the score is 1/alpha, its largest value.
    """
    near = np.asarray(distance, dtype=np.float64)[:, :n]
    if near.shape[1] == 0:
        raise ValueError("the adaptive score needs at least one neighbour")
    mean = near.mean(axis=1)
    return np.divide(near[:, 0], alpha * mean, out=np.full(len(near), 1 / alpha), where=mean > 0)


def search(
    queries: Any,
    references: Any,
    picture: np.ndarray,
    k: int,
    *,
    device: torch.device | str = "cpu",
    rows: Sequence[int] | None = None,
) -> SearchResult:
    """Exact nearest neighbours of every query among all references, in blocks of bounded memory.

    Args:
        queries: uint8 [Q, C, H, W], array or memory map.
        references: uint8 [R, C, H, W], likewise, R > 0.
        picture: picture id of each reference, int64 [R]; copies share it.
        k: neighbours per query; where there are fewer, all of them.
        rows: ascending rows of the queries to search (null: all).

    Raises:
        ValueError: images of different shape or not uint8, no references, k < 1.
    """
    _check(queries, references, picture, k)
    rows = np.arange(len(queries)) if rows is None else np.asarray(rows, dtype=np.int64)
    count, size = len(references), int(np.prod(references.shape[1:]))
    order = np.argsort(picture, kind="stable")  # by picture id, then row: a lower place wins a tie
    pictures, first, segment = np.unique(np.asarray(picture)[order], return_index=True, return_inverse=True)
    best = BestQuery(count)
    found = []
    for some in _blocks(rows, max(1, min(_BLOCK, _MEMORY_BYTES // (4 * size)))):
        distinct, identity = (KNearest(len(some), k, segment) for _ in range(2))
        single = KNearest(len(some), k, np.arange(count)) if len(pictures) < count else distinct
        for start, near, same in _squared(centred(queries[some], device), references, order):
            groups = distinct.add(near, start)
            identity.add(same, start)
            if single is not distinct:
                single.add(near, start, groups)
            best.add(near, start, some)
        found.append([lists.table for lists in (distinct, identity, single)])
    squared, query = best.of_segments(first)
    widths = (min(k, len(pictures)), min(k, len(pictures)), min(k, count))
    tables = list(zip(*found, strict=True)) or [[np.zeros((0, width), dtype=np.int64)] for width in widths]
    neighbours = []
    for parts in tables:
        keys = np.concatenate(parts)
        row = order[keys % count]
        neighbours.append(Neighbours(l2_of(keys // count, size).astype(np.float32), np.asarray(picture)[row], row))
    distance = np.where(query >= 0, l2_of(squared, size), np.inf)
    return SearchResult(rows, *neighbours, pictures, distance, query)


def search_sharded(
    queries: Any, references: Any, picture: np.ndarray, k: int, *, accelerator: Any = None, device: Any = None
) -> SearchResult:
    """`search` shared among the ranks, each with every W-th query; all ranks return the same full result.

    ``accelerator`` null: this process alone. ``device`` null: the accelerator's, or the CPU.
    """
    if accelerator is None:
        return search(queries, references, picture, k, device=device or "cpu")
    rows = np.arange(accelerator.process_index, len(queries), accelerator.num_processes)
    part = search(queries, references, picture, k, device=device or accelerator.device, rows=rows)
    return part if accelerator.num_processes == 1 else _merge(gather_object([part]))


def pairs_within(vectors: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows whose l2 = sqrt(mean((a - b)^2)) is at most ``radius``.

    Args:
        vectors: finite float32 [N, D].

    Returns:
        i, j (int64, i < j, sorted by i, then j) and the distance (float64, from direct differences in float64).
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError("vectors must be finite, [N, D]")
    size = max(vectors.shape[1], 1)
    i, j = _close_rows(vectors, size * radius**2) if len(vectors) else np.zeros((2, 0), dtype=np.int64)
    squared = squared_distances(vectors, i, vectors, j)
    keep = squared <= size * radius**2
    i, j, distance = i[keep], j[keep], np.sqrt(squared[keep] / size)
    order = np.lexsort((j, i))
    return i[order], j[order], distance[order]


def _close_rows(vectors: np.ndarray, limit: float) -> np.ndarray:
    """All pairs i < j whose squared distance may be at most ``limit``, by lower bounds, int64 [2, P]."""
    products, found = Products(vectors, torch.device("cpu")), []
    for first in _blocks(np.arange(len(vectors)), products.step):
        left, length = products.left(vectors[first])
        own = length.square()
        reach = rounded_up((limit - own) / 2 + products.of_lengths * own + products.tiny)
        for start in range(int(first[0]), len(vectors), products.step):
            low = products.bounds(left, products.right(start)[0])
            i, j = np.nonzero((low <= reach[:, None]).numpy())
            i, j = i + first[0], j + start
            found.append(np.stack([i[i < j], j[i < j]]))
    return np.concatenate(found, axis=1)


def _check(queries: Any, references: Any, picture: np.ndarray, k: int) -> None:
    if queries.dtype != np.uint8 or references.dtype != np.uint8 or len(references.shape) != 4:
        raise ValueError("queries and references must be uint8 [N, C, H, W]")
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"queries are {queries.shape[1:]}, references {references.shape[1:]}")
    if len(references) == 0 or len(picture) != len(references) or k < 1:
        raise ValueError("need at least one reference, one picture id for each, and k >= 1")


def _blocks(rows: np.ndarray, length: int) -> Iterator[np.ndarray]:
    return (rows[start : start + length] for start in range(0, len(rows), length))


def _squared(
    queries: torch.Tensor, references: Any, order: np.ndarray
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Squared distances in grey levels to the references in the given order, block by block.

    Yields:
        Place of the block's first reference; integers [q, r] over all views, and of the identity view (buffers that the next
        block overwrites).
    """
    size = queries.shape[1]
    length = max(1, min(_BLOCK, _MEMORY_BYTES // (16 * size)))  # ten views of a byte, one in float32
    shape = (len(queries), min(length, len(order)))
    least, same, view_squared = (torch.empty(shape, dtype=integer_type(size), device=queries.device) for _ in range(3))
    product = torch.empty(shape, device=queries.device)
    own = squares(queries)[:, None]
    for start in range(0, len(order), length):
        block = torch.from_numpy(np.ascontiguousarray(references[order[start : start + length]])).to(queries.device)
        near, identity, squared, floats = (
            part.flatten()[: len(queries) * len(block)].view(len(queries), -1)
            for part in (least, same, view_squared, product)
        )
        for name, view in zip(VIEWS, views(block), strict=True):
            into = near if name == "identity" else squared
            reduced_differences(queries, centred(view, queries.device), out=into, product=floats)
            if name == "identity":
                torch.add(near, own, out=identity)
            else:
                torch.minimum(near, squared, out=near)
        near += own
        yield start, near, identity


def _merge(parts: list[SearchResult]) -> SearchResult:
    query = np.concatenate([part.query for part in parts])
    order = np.argsort(query, kind="stable")

    def together(name: str) -> Neighbours:
        lists = [getattr(part, name) for part in parts]
        fields = ("distance", "picture", "row")
        return Neighbours(*(np.concatenate([getattr(item, field) for item in lists])[order] for field in fields))

    distance = np.stack([part.best_distance for part in parts])
    index = np.stack([part.best_query for part in parts])
    first = np.lexsort((index, distance), axis=0)[0]
    column = np.arange(distance.shape[1])
    return SearchResult(
        query[order], together("distinct"), together("identity"), together("records"), parts[0].pictures,
        distance[first, column], index[first, column],
    )  # fmt: skip
