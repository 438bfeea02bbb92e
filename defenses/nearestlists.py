"""What a search keeps while references stream by: the k nearest of each query, and the nearest query of each reference.

Distances come as whole numbers, block by block. Most lie beyond the k-th smallest so far: the least of every 16 is compared with it, and only
what is below is looked at.
"""

import numpy as np
import torch

_GROUP = 16
_NONE = np.iinfo(np.int64).max


class KNearest:
    """The k nearest distinct pictures of each query. A picture is a run of references (copies); its nearest one counts.

    Attributes:
        table: distance * references + place, int64 [q, min(k, pictures)], ascending: of equal distances the lower place is nearer.
    """

    def __init__(self, queries: int, k: int, segment: np.ndarray):
        """``segment``: picture 0..P-1 of each reference, ascending, int64 [R]."""
        self.segment, self.count = segment, len(segment)
        self.copies = self.count > segment[-1] + 1
        self.table = np.full((queries, min(k, int(segment[-1]) + 1)), _NONE)

    def add(self, squared: torch.Tensor, start: int, groups: torch.Tensor | None = None) -> torch.Tensor:
        """Takes a block of distances, integers [q, r], of the references from place ``start`` on.

        Returns:
            Least distance of each group of columns, to be given as ``groups`` to other lists of the same distances.
        """
        width = squared.shape[1] // _GROUP
        whole, rest = squared[:, : width * _GROUP].unflatten(1, (_GROUP, width)), squared[:, width * _GROUP :]
        groups = whole.amin(dim=1) if groups is None else groups
        limit = torch.from_numpy(self._limit(squared, start)).to(squared.device)
        query, group = (groups <= limit).nonzero(as_tuple=True)
        values = whole[query, :, group]
        hit, place = (values <= limit[query]).nonzero(as_tuple=True)
        end, column = (rest <= limit).nonzero(as_tuple=True)
        self._merge(
            torch.cat([query[hit], end]).cpu().numpy(),
            torch.cat([values[hit, place], rest[end, column]]).long().cpu().numpy() * self.count
            + torch.cat([place * width + group[hit], column + width * _GROUP]).cpu().numpy()
            + start,
        )
        return groups

    def _limit(self, squared: torch.Tensor, start: int) -> np.ndarray:
        """A distance that none of the k nearest exceeds, of each query, [q, 1]."""
        k, large = self.table.shape[1], torch.iinfo(squared.dtype).max
        if (self.table[:, -1] < _NONE).all():
            return (self.table[:, -1:] // self.count).astype(_numpy(squared.dtype))
        segment = self.segment[start : start + squared.shape[1]] - self.segment[start]
        if segment[-1] + 1 < k:
            return np.full((len(squared), 1), large, dtype=_numpy(squared.dtype))
        if self.copies:
            index = torch.from_numpy(segment).to(squared.device).expand(len(squared), -1)
            least = squared.new_full((len(squared), int(segment[-1]) + 1), large)
            squared = least.scatter_reduce(1, index, squared, "amin")
        if squared.device.type != "cpu":
            return torch.kthvalue(squared, k, dim=1, keepdim=True).values.cpu().numpy()
        return np.partition(squared.numpy(), k - 1, axis=1)[:, k - 1 : k]

    def _merge(self, query: np.ndarray, keys: np.ndarray) -> None:
        if not len(query):
            return
        order = np.argsort(query.astype(np.int32), kind="stable")
        counts = np.bincount(query, minlength=len(self.table))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query[order]]
        k = self.table.shape[1]
        table = np.full((len(self.table), k + counts.max()), _NONE)
        table[:, :k] = self.table
        table[query[order], k + place] = keys[order]
        table.sort(axis=1)
        if self.copies:
            table[self._repeated(table)] = _NONE
            table.sort(axis=1)
        self.table = table[:, :k].copy()

    def _repeated(self, table: np.ndarray) -> np.ndarray:
        """Entries of ascending rows whose picture stands before them in the row, bool."""
        picture = np.where(table < _NONE, self.segment[table % self.count], -1)
        order = np.argsort(picture, axis=1, kind="stable")
        ranked = np.take_along_axis(picture, order, axis=1)
        again = np.zeros(table.shape, dtype=bool)
        np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        return again


class BestQuery:
    """The nearest query of each reference, of equals the first that was seen.

    Attributes:
        squared: its distance, int64 [R]; the largest number without queries.
        query: its row, int64 [R]; -1 without queries.
    """

    def __init__(self, references: int):
        self.squared, self.query = np.full(references, _NONE), np.full(references, -1)

    def add(self, squared: torch.Tensor, start: int, rows: np.ndarray) -> None:
        """Takes a block of distances, integers [q, r], of these ascending rows of queries to the references from ``start`` on."""
        least = squared.amin(dim=0).long().cpu().numpy()
        here = slice(start, start + len(least))
        column = np.flatnonzero(least < self.squared[here])
        if not len(column):
            return
        at = torch.from_numpy(column).to(squared.device)
        first = (squared[:, at].cpu().numpy() == least[column]).argmax(axis=0)
        self.squared[here][column], self.query[here][column] = least[column], rows[first]

    def of_segments(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance and row of the nearest query of each run of references that starts at a place of ``first``, int64 [P]."""
        squared = np.minimum.reduceat(self.squared, first)
        run = np.repeat(np.arange(len(first)), np.diff(first, append=len(self.squared)))
        query = np.where(self.squared == squared[run], self.query, _NONE)
        return squared, np.minimum.reduceat(query, first)


def _numpy(dtype: torch.dtype) -> type:
    return np.int32 if dtype == torch.int32 else np.int64
