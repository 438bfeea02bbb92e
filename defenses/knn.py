"""Exact nearest neighbours of float32 vectors (embeddings, flattened images): a shortlist with a proof, then direct distances.

A reference is dropped only if the lower bound of its distance (`defenses.bounds`) exceeds the k-th smallest upper bound so far, so every
true neighbour survives. What survives, k and a few in float32, is compared by sum((q - r)^2) in float64. Nothing depends on
blocks, ranks, device or the format of the products; where the bounds exclude nothing, as among equal references, all are compared directly.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses.bounds import Products, rounded_up

_QUERIES = 2048  # most queries in one block
_GROUP = 16  # entries of a product whose least one is looked at first
_CANDIDATES = 2**22  # of one block of queries, beyond which their distances are computed at once
_PAIR_CELLS = 2**16  # numbers in one batch of direct differences: as many as a core's cache holds


@dataclass
class Nearest:
    """Nearest references of each query, nearest first; ties go to the lower row.

    Attributes:
        query: rows of the queries that were searched, int64 [Q], ascending.
        squared: sum((q - r)^2), float64 [Q, k], from direct differences in float64.
        row: row in the references, int64 [Q, k].
    """

    query: np.ndarray
    squared: np.ndarray
    row: np.ndarray


def nearest(
    queries: Any,
    references: Any,
    k: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
) -> Nearest:
    """The k nearest references of every query by squared Euclidean distance, streamed in blocks of bounded memory.

    Args:
        queries: float32 [Q, D], array or memory map.
        references: float32 [R, D], likewise, R > 0. Both sides are read in blocks.
        k: neighbours per query; where there are fewer references, all of them.
        dtype: float32 or bfloat16, of the shortlist alone; null: bfloat16 where the processor multiplies in it. The result is the same.
        rows: ascending rows of the queries to search (null: all).

    Raises:
        ValueError: wrong shapes or types, no references, k < 1, a vector that is not finite or longer than 1e17.
    """
    for side in (queries, references):
        if len(side.shape) != 2 or side.dtype != np.float32:
            raise ValueError("queries and references must be float32 [N, D]")
    if queries.shape[1] != references.shape[1] or len(references) == 0 or k < 1:
        raise ValueError("need vectors of one length, at least one reference, and k >= 1")
    rows = np.arange(len(queries)) if rows is None else np.asarray(rows, dtype=np.int64)
    k = min(k, len(references))
    products = Products(references, torch.device(device), dtype)
    length = max(1, min(_QUERIES, 8 * _CANDIDATES // (8 * k + products.step), products.row_limit))
    found = [
        _Search(queries[rows[start : start + length]], products, k).result() for start in range(0, len(rows), length)
    ]
    squared, row = (np.concatenate(part) for part in zip(*found, strict=True)) if found else (np.zeros((0, k)),) * 2
    return Nearest(rows, squared, row.astype(np.int64))


def nearest_sharded(queries: Any, references: Any, k: int, *, accelerator: Any = None) -> Nearest:
    """`nearest` shared among the ranks, each with every W-th query; all ranks return the same full result."""
    if accelerator is None:
        return nearest(queries, references, k)
    rank, world = accelerator.process_index, accelerator.num_processes
    part = nearest(queries, references, k, device=accelerator.device, rows=np.arange(rank, len(queries), world))
    if world == 1:
        return part
    parts = gather_object([part])
    query, squared, row = (np.concatenate([getattr(p, name) for p in parts]) for name in ("query", "squared", "row"))
    order = np.argsort(query)
    return Nearest(query[order], squared[order], row[order])


def squared_distances(left: Any, i: np.ndarray, right: Any, j: np.ndarray) -> np.ndarray:
    """sum((left[i] - right[j])^2) of pairs of rows, direct differences in float64 on all threads, float64 [N]."""
    size = left.shape[1]
    step, threads = max(1, _PAIR_CELLS // max(size, 1)), torch.get_num_threads()
    result = np.empty(len(i))

    def part(pairs: np.ndarray) -> None:
        ours, theirs = (
            np.empty((step, size), left.dtype),
            np.empty((step, size), right.dtype),
        )  # reused: new memory costs half
        differences = np.empty((step, size))
        for start in range(0, len(pairs), step):
            some = pairs[start : start + step]
            own, other, difference = ours[: len(some)], theirs[: len(some)], differences[: len(some)]
            np.take(left, i[some], axis=0, out=own, mode="clip")
            np.take(right, j[some], axis=0, out=other, mode="clip")
            difference[:] = other
            difference -= own
            result[some] = np.einsum("nd,nd->n", difference, difference)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(np.arange(len(i)), threads)))
    return result


class _Search:
    """The k nearest references of one block of queries."""

    def __init__(self, queries: np.ndarray, products: Products, k: int):
        self.queries, self.products, self.k = queries.astype(np.float64), products, k
        self.left, self.length = products.left(queries)
        device = products.device
        self.limit = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=device)
        whole, real = torch.zeros(0, dtype=torch.int64, device=device), self.limit[:0]
        self.kept = [whole, whole, real, real]  # query, row, lower and upper bound of each candidate
        self.new: list[list[torch.Tensor]] = []  # the same of those that came since the limit was lowered

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        products, seen, tightened = self.products, 0, 0
        for start in range(0, len(products.references), products.step):
            right, length = products.right(start)
            self._collect(products.bounds(self.left, right), length, start)
            seen += len(right)
            crowded = len(self.kept[0]) + sum(len(part[0]) for part in self.new) > _CANDIDATES
            if seen >= 2 * tightened or crowded:  # by then a limit lets through twice as many as it should
                self._tighten()
                tightened = seen
            if crowded and len(self.kept[0]) > _CANDIDATES // 2:
                self._settle(*self._exact())
        self._tighten()
        return self._exact()[:2]

    def _collect(self, low: torch.Tensor, length: torch.Tensor, start: int) -> None:
        """Keeps the references of a block whose lower bound reaches the limit; groups of columns are looked at first."""
        count = low.shape[1] // _GROUP
        whole, rest = low[:, : count * _GROUP].unflatten(1, (_GROUP, count)), low[:, count * _GROUP :]
        least = whole.amin(dim=1)
        if count >= self.k and not start:  # the k-th smallest of the groups bounds that of all
            first = _smallest(least, self.k).double()
            self.limit = torch.minimum(self.limit, first + self.products.gap(self.length, length.max()))
        limit = rounded_up(self.limit)
        query, group = (least <= limit[:, None]).nonzero(as_tuple=True)
        values = whole[query, :, group]
        hit, place = (values <= limit[query, None]).nonzero(as_tuple=True)
        self._keep(query[hit], place * count + group[hit], values[hit, place], length, start)
        if not rest.shape[1]:
            return
        query, column = (rest <= limit[:, None]).nonzero(as_tuple=True)
        self._keep(query, column + count * _GROUP, rest[query, column], length, start)

    def _keep(self, query, column, low, length, start) -> None:
        upper = low.double() + self.products.gap(self.length[query], length[column])
        self.new.append([query, column + start, low.double(), upper])

    def _tighten(self) -> None:
        """Lowers the limit to the k-th smallest upper bound of each query and drops what lies above it."""
        self.kept = [torch.cat(parts) for parts in zip(self.kept, *self.new, strict=True)]
        self.new = []
        query, _, low, upper = self.kept
        order = torch.argsort(upper)
        order = order[torch.argsort(query[order].short(), stable=True)]
        counts = torch.bincount(query, minlength=len(self.queries))
        full = counts >= self.k
        last = (counts.cumsum(0) - counts)[full] + self.k - 1
        self.limit[full] = torch.minimum(self.limit[full], upper[order[last]])
        near = low <= self.limit[query]
        self.kept = [part[near] for part in self.kept]

    def _exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k nearest candidates of each query by direct distances [q, k], their rows, and how many there are [q]."""
        order = torch.argsort(self.kept[0].short(), stable=True)  # one query after the other: it stays in the cache
        query, row = (part[order].cpu().numpy() for part in self.kept[:2])
        squared = squared_distances(self.queries, query, self.products.references, row)
        order = np.lexsort((row, squared, query))
        counts = np.bincount(query, minlength=len(self.queries))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query[order]]
        order, place = order[place < self.k], place[place < self.k]
        table = np.full((len(self.queries), self.k), np.inf)
        rows = np.full(table.shape, -1)
        table[query[order], place], rows[query[order], place] = squared[order], row[order]
        return table, rows, np.minimum(counts, self.k)

    def _settle(self, squared: np.ndarray, row: np.ndarray, counts: np.ndarray) -> None:
        """Keeps these k candidates alone; their bounds are their distances."""
        there = np.arange(self.k) < counts[:, None]
        query = torch.from_numpy(np.nonzero(there)[0]).to(self.limit.device)
        row, squared = (torch.from_numpy(part[there]).to(self.limit.device) for part in (row, squared))
        own = self.length[query].square()
        value = (squared - own) / 2 + self.products.of_lengths * own  # as `bounds` has it
        slack = (self.products.size + 8) * 2.0**-50 * (squared + own)
        self.kept = [query, row, value - slack, value + slack]
        self._tighten()


def _smallest(table: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest number of each row, rounded up; numpy's partition takes an eighth of the time of torch's on the CPU."""
    if table.device.type == "cpu":
        value = torch.from_numpy(np.partition(table.float().numpy(), k - 1, axis=1)[:, k - 1])
    else:
        value = torch.kthvalue(table.float(), k, dim=1).values
    return rounded_up(value)
