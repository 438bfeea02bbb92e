"""Generations that agree with each other, as disjoint cliques, one for each picture that is looked for (Wu et al. 2025)."""

import time
from dataclasses import dataclass

import numpy as np

from eval.cliques import largest_clique

STEP = 0.01  # between thresholds, in l2; the paper: 0.01 in cosine similarity


@dataclass(frozen=True)
class Clusters:
    """Disjoint cliques of the graph at one threshold.

    Attributes:
        threshold: largest distance that joins two generations.
        cliques: nodes of each, ascending, in the order in which they were taken, largest first.
        exact: whether each was proved to be the largest of what was left; False where the time ran out first.
        reached: whether there are as many as were looked for.
    """

    threshold: float
    cliques: list[list[int]]
    exact: bool
    reached: bool


def find_clusters(distance: np.ndarray, wanted: int, least: int, loosest: float, seconds: float) -> Clusters:
    """Disjoint cliques at the largest threshold that leaves at least ``wanted`` of them.

    As in the paper the search goes from loose to tight, in steps of `STEP`: loose thresholds join everything, and at tight ones
    the generations of a single picture fall apart into many cliques. A first pass takes greedy cliques, which are quick and depend
    on nothing but the graph; from where it ends, cliques are exact while the time lasts. Where no threshold leaves enough, it is
    the one that leaves most, the loosest of equals.

    Args:
        distance: [N, N], symmetric, >= 0.
        wanted: cliques looked for, >= 1.
        least: nodes of a clique that counts.
        loosest: threshold at which the search begins.
        seconds: wall-clock bound on the exact searches together; 0: greedy cliques alone.
    """
    levels = thresholds(loosest)
    counts = []
    for level in levels:
        counts.append(len(disjoint_cliques(distance <= level, least, 0.0)[0]))
        if counts[-1] >= wanted:
            break
    reached = counts[-1] >= wanted
    place = len(counts) - 1 if reached else int(np.argmax(counts))
    deadline, best = time.monotonic() + seconds, None
    for level in levels[place:]:
        cliques, exact = disjoint_cliques(distance <= level, least, max(0.0, deadline - time.monotonic()))
        found = Clusters(level, cliques, exact, len(cliques) >= wanted)
        if found.reached or not reached:
            return found
        if best is None or len(cliques) > len(best.cliques):  # exact cliques are larger, and may leave fewer: go on
            best = found
    return best


def thresholds(loosest: float) -> list[float]:
    """Thresholds that are tried, descending from ``loosest`` in steps of `STEP`, none below 0."""
    return [round(loosest - number * STEP, 10) for number in range(int(loosest / STEP + 1e-6) + 1)]


def disjoint_cliques(adjacency: np.ndarray, least: int, seconds: float) -> tuple[list[list[int]], bool]:
    """The largest clique, the largest of what is left without it, and so on, until one has fewer than ``least`` nodes.

    Args:
        adjacency: bool [N, N], symmetric.
        seconds: wall-clock bound over all of them; what is left to do then is done greedily.

    Returns:
        Nodes of each clique, ascending; whether every search came to its end in time.
    """
    deadline = time.monotonic() + seconds
    left, cliques, exact = np.arange(len(adjacency)), [], True
    while len(left) >= least:
        clique = largest_clique(adjacency[np.ix_(left, left)], seconds=max(0.0, deadline - time.monotonic()))
        exact &= clique.exact
        if len(clique.nodes) < least:
            break
        cliques.append(left[clique.nodes].tolist())
        left = np.delete(left, clique.nodes)
    return cliques, exact


def medoid(distance: np.ndarray, nodes: list[int]) -> int:
    """The node with the smallest sum of distances to the others, the lowest of equals."""
    return nodes[int(distance[np.ix_(nodes, nodes)].sum(axis=1).argmin())]
