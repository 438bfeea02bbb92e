"""The largest clique of a graph of generations (Carlini et al. 2023, section 4.2): exact, with a bound on time.

A prompt is flagged by its largest *clique*, not by a connected component: a chain of neighbours proves nothing.
"""

import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clique:
    """The best clique found.

    Attributes:
        nodes: its nodes, ascending; empty only for a graph without nodes.
        exact: whether it is proved that no clique is larger; False where the time ran out first.
    """

    nodes: list[int]
    exact: bool


def largest_clique(adjacency: np.ndarray, *, seconds: float) -> Clique:
    """Maximum clique by branch and bound in degeneracy order, bounded by greedy colouring (Tomita and Seki 2003).

    Deterministic: of several largest cliques the same graph always gives the same one, unless the time runs out.

    Args:
        adjacency: bool [n, n], symmetric; the diagonal is ignored.
        seconds: wall-clock bound from the call on. Ordering the nodes, which takes time in n^2 alone, and one greedy clique
            are done whatever the bound.
    """
    deadline = time.monotonic() + seconds
    adjacency = np.array(adjacency, dtype=bool)
    if adjacency.ndim != 2 or not np.array_equal(adjacency, adjacency.T):
        raise ValueError("adjacency must be a symmetric square matrix")
    np.fill_diagonal(adjacency, False)
    order = _degeneracy_order(adjacency)
    search = _Search(_bitsets(adjacency[np.ix_(order, order)]), deadline)
    exact = search.greedy() and search.prove()
    return Clique(sorted(int(order[place]) for place in search.best), exact)


class _Search:
    """Branch and bound over sets of nodes held as bits of Python integers; ``best`` is the largest clique so far."""

    def __init__(self, neighbours: list[int], deadline: float):
        self.neighbours, self.deadline = neighbours, deadline
        self.best: list[int] = []

    def later(self, node: int) -> int:
        """Neighbours of a node that come after it: every clique is found once, from its first node."""
        return self.neighbours[node] >> (node + 1) << (node + 1)

    def greedy(self) -> bool:
        """A lower bound, from all nodes together, then from each: always take on the last candidate, which lies in the densest
        core. True if the time sufficed; the first is done whatever the time."""
        count = len(self.neighbours)
        self._take([], (1 << count) - 1)
        for node in reversed(range(count)):
            if time.monotonic() > self.deadline:
                return False
            self._take([node], self.later(node))
        return True

    def _take(self, clique: list[int], candidates: int) -> None:
        while candidates and len(clique) + candidates.bit_count() > len(self.best):
            clique.append(candidates.bit_length() - 1)
            candidates &= self.neighbours[clique[-1]]
        if not candidates and len(clique) > len(self.best):
            self.best = clique

    def prove(self) -> bool:
        """Searches for anything larger than ``best``; True if that came to its end within the time."""
        places = reversed(range(len(self.neighbours)))
        return all(self._branch(node) for node in places if self.later(node).bit_count() >= len(self.best))

    def _branch(self, node: int) -> bool:
        """All cliques whose first node is this one, depth first (an explicit stack: cliques may be deep)."""
        if time.monotonic() > self.deadline:
            return False
        clique, stack = [node], [self._coloured(self.later(node), 1)]
        while stack:
            branches = stack[-1]
            if not branches or len(clique) + branches[-1][1] <= len(self.best):
                stack.pop()
                clique.pop()
                continue
            if time.monotonic() > self.deadline:
                return False
            place, _, candidates = branches.pop()
            clique.append(place)
            if len(clique) > len(self.best):
                self.best = list(clique)
            stack.append(self._coloured(candidates & self.neighbours[place], len(clique)))
        return True

    def _coloured(self, candidates: int, size: int) -> list[tuple[int, int, int]]:
        """Branches (node, colours used so far, candidates up to and with it), to be tried from the end.

        Nodes of one colour are no neighbours, so a clique holds at most one of each. Nodes whose colour number cannot
        lift a clique of ``size`` above the best one are never branched on, only kept as candidates.
        """
        branches: list[tuple[int, int, int]] = []
        colour, uncoloured, seen = 0, candidates, 0
        while uncoloured:
            colour += 1
            free = uncoloured
            while free:
                bit = free & -free
                place = bit.bit_length() - 1
                uncoloured ^= bit
                seen |= bit
                free &= ~(self.neighbours[place] | bit)
                if size + colour > len(self.best):
                    branches.append((place, colour, seen))
        return branches


def _degeneracy_order(adjacency: np.ndarray) -> np.ndarray:
    """Nodes in the order in which the one of least degree (the lowest of equals) is taken away, int64 [n]."""
    count = len(adjacency)
    rows = adjacency.astype(np.int32)
    degree = rows.sum(axis=1, dtype=np.int32)
    order = np.empty(count, dtype=np.int64)
    for step in range(count):
        order[step] = node = degree.argmin()
        degree -= rows[node]
        degree[node] = 2 * count  # stays above all others, which lose less than ``count`` more
    return order


def _bitsets(adjacency: np.ndarray) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(adjacency, axis=1, bitorder="little")]
