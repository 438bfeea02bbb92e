"""Disjoint cliques: planted groups, and networkx."""

import itertools

import networkx as nx
import numpy as np
import pytest

from eval.clusters import disjoint_cliques, find_clusters, medoid, thresholds


def planted(groups=(6, 5, 4), scattered=7, seed=0) -> np.ndarray:
    """Distances of points in 8 dimensions: tight groups (about 0.003 apart) in a cloud about 0.6 apart."""
    random = np.random.default_rng(seed)
    centres = random.normal(scale=0.15, size=(len(groups), 8))
    points = [centre + random.normal(scale=0.0008, size=(n, 8)) for centre, n in zip(centres, groups, strict=True)]
    points.append(random.normal(scale=0.15, size=(scattered, 8)))
    points = np.concatenate(points)
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_planted_groups_are_the_clusters():
    """From a threshold that joins everything, and from one of tiled l2, where scattered points are alone."""
    groups = [list(range(6)), list(range(6, 11)), list(range(11, 15))]
    found = find_clusters(planted(scattered=0), 3, 2, 1.0, 10)
    assert found.reached and found.exact and found.cliques == groups
    mixed = find_clusters(planted(), 3, 2, 0.15, 10)
    assert mixed.reached and mixed.threshold == 0.15 and mixed.cliques == groups
    shuffle = np.random.default_rng(3).permutation(15)
    moved = find_clusters(planted(scattered=0)[np.ix_(shuffle, shuffle)], 3, 2, 1.0, 10)
    assert sorted(sorted(shuffle[nodes].tolist()) for nodes in moved.cliques) == groups
    greedy = find_clusters(planted(scattered=0), 3, 2, 1.0, 0)
    assert greedy.cliques == groups and not greedy.exact


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_the_loosest_threshold_that_leaves_enough(seed):
    """Taken from networkx: each clique is a largest one of what the earlier ones left, no looser threshold leaves as many."""
    distance, wanted = planted((4, 3, 3, 2), 12, seed), 5
    found = find_clusters(distance, wanted, 2, 0.8, 20)
    assert found.reached and found.exact and len(found.cliques) >= wanted
    graph = nx.from_numpy_array((distance <= found.threshold) & ~np.eye(len(distance), dtype=bool))
    for nodes in found.cliques:
        assert all(graph.has_edge(i, j) for i, j in itertools.combinations(nodes, 2))
        assert len(nodes) == max(len(clique) for clique in nx.find_cliques(graph)) >= 2
        graph.remove_nodes_from(nodes)
    assert graph.number_of_edges() == 0  # nothing of two nodes is left
    levels = thresholds(0.8)
    looser = levels[: levels.index(found.threshold)]
    assert all(len(disjoint_cliques(distance <= level, 2, 10)[0]) < wanted for level in looser)
    assert levels == pytest.approx(np.linspace(0.8, 0, 81)) and thresholds(0.155)[-1] == pytest.approx(0.005)


def test_where_no_threshold_leaves_enough_it_is_the_one_that_leaves_most():
    distance = planted(scattered=0)
    found = find_clusters(distance, 8, 2, 1.0, 10)
    most = max(len(disjoint_cliques(distance <= level, 2, 10)[0]) for level in thresholds(1.0))
    assert not found.reached and len(found.cliques) == most < 8
    equal = find_clusters(np.zeros((4, 4)), 3, 2, 0.15, 10)
    assert equal.cliques == [[0, 1, 2, 3]] and equal.threshold == 0.15 and not equal.reached
    assert find_clusters(np.zeros((1, 1)), 1, 2, 0.15, 10).cliques == []


def test_a_medoid_is_nearest_to_the_others():
    points = np.array([0.0, 9.0, 1.0, 1.2, 3.0])
    distance = np.abs(points[:, None] - points[None])
    assert medoid(distance, [0, 2, 3, 4]) == 2 and medoid(distance, [1, 4]) == 1
