"""Largest cliques against brute force, networkx and planted ones."""

import itertools
import time

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.cliques import _degeneracy_order, largest_clique


def random_graph(seed: int, nodes: int, density: float) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((nodes, nodes)) < density, 1)
    return upper | upper.T


def is_clique(adjacency: np.ndarray, nodes: list[int]) -> bool:
    return all(adjacency[i, j] for i, j in itertools.combinations(nodes, 2))


def brute_force_size(adjacency: np.ndarray) -> int:
    nodes = range(len(adjacency))
    return max(
        size
        for size in range(len(adjacency) + 1)
        if any(is_clique(adjacency, chosen) for chosen in itertools.combinations(nodes, size))
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 9), st.integers(0, 10**6), st.sampled_from([0.1, 0.4, 0.7, 0.95]))
def test_small_graphs_equal_brute_force(nodes, seed, density):
    adjacency = random_graph(seed, nodes, density)
    clique = largest_clique(adjacency, seconds=10)
    assert clique.exact and is_clique(adjacency, clique.nodes)
    assert len(clique.nodes) == len(set(clique.nodes)) == brute_force_size(adjacency)
    assert clique.nodes == sorted(clique.nodes)


@pytest.mark.parametrize(("nodes", "density"), [(120, 0.1), (100, 0.3), (60, 0.5), (40, 0.8)])
def test_random_graphs_equal_networkx(nodes, density):
    for seed in range(3):
        adjacency = random_graph(seed, nodes, density)
        clique = largest_clique(adjacency, seconds=20)
        expected = max(len(found) for found in nx.find_cliques(nx.from_numpy_array(adjacency)))
        assert clique.exact and is_clique(adjacency, clique.nodes) and len(clique.nodes) == expected


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from([0.02, 0.2, 0.6]))
def test_overlapping_groups_equal_networkx(sizes, seed, density):
    """Cliques of several sizes joined at random, as near copies of several pictures are; the largest may lie outside the core."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    adjacency = random_graph(seed, len(group), density) | (group[:, None] == group)
    clique = largest_clique(adjacency, seconds=20)
    graph = nx.from_numpy_array(adjacency & ~np.eye(len(group), dtype=bool))
    expected = nx.max_weight_clique(graph, weight=None)[1]
    assert clique.exact and is_clique(adjacency, clique.nodes) and len(clique.nodes) == expected


def test_the_order_is_of_degeneracy():
    """Each node has at most its core number of neighbours after it, and some node exactly the largest core number."""
    for seed, density in ((0, 0.02), (1, 0.2), (2, 0.8)):
        adjacency = random_graph(seed, 90, density)
        order = _degeneracy_order(adjacency)
        core = nx.core_number(nx.from_numpy_array(adjacency))
        later = [int(adjacency[node, order[place + 1 :]].sum()) for place, node in enumerate(order)]
        assert sorted(order.tolist()) == list(range(90)) and max(later) == max(core.values())
        assert all(count <= core[int(node)] for count, node in zip(later, order, strict=True))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
def test_a_planted_clique_is_found_among_500(density):
    adjacency = random_graph(7, 500, density)
    planted = sorted(np.random.default_rng(8).choice(500, 20, replace=False).tolist())
    adjacency[np.ix_(planted, planted)] = True
    clique = largest_clique(adjacency, seconds=20)
    assert clique.exact and clique.nodes == planted


def test_a_hidden_clique_that_greedy_misses_is_found():
    """Two disjoint complete bipartite-like halves of high degree hide a triangle-free trap; the clique has low degree."""
    trap = np.zeros((86, 86), dtype=bool)
    trap[:40, 40:80] = trap[40:80, :40] = True
    trap[80:, 80:] = True
    clique = largest_clique(trap, seconds=5)
    assert clique.exact and clique.nodes == list(range(80, 86))


def test_complete_empty_and_chain_graphs():
    start = time.monotonic()
    full = largest_clique(np.ones((500, 500), dtype=bool), seconds=5)
    assert full.exact and full.nodes == list(range(500)) and time.monotonic() - start < 5
    assert largest_clique(np.zeros((0, 0), dtype=bool), seconds=1) == largest_clique(np.zeros((0, 0)), seconds=1)
    assert len(largest_clique(np.zeros((5, 5), dtype=bool), seconds=1).nodes) == 1
    chain = np.eye(20, k=1, dtype=bool)
    assert len(largest_clique(chain | chain.T, seconds=1).nodes) == 2


def test_complement_of_a_matching_is_solved_at_depth():
    """500 nodes, each adjacent to all but one: the largest clique takes one of every pair, 250."""
    adjacency = np.ones((500, 500), dtype=bool)
    for node in range(0, 500, 2):
        adjacency[node, node + 1] = adjacency[node + 1, node] = False
    clique = largest_clique(adjacency, seconds=5)
    assert clique.exact and len(clique.nodes) == 250 and is_clique(adjacency, clique.nodes)


def test_500_nodes_of_a_sparse_graph_take_20_ms():
    adjacency, seconds = random_graph(6, 500, 0.02), []
    for _ in range(5):
        start = time.thread_time()  # not that of other processes
        assert largest_clique(adjacency, seconds=20).exact
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.02


@pytest.mark.parametrize("density", [0.5, 0.9, 0.98])
def test_the_bound_on_time_holds_at_any_density(density):
    adjacency = random_graph(5, 500, density)
    for bound in (0.0, 0.2):
        start = time.monotonic()
        clique = largest_clique(adjacency, seconds=bound)
        assert time.monotonic() - start < bound + 1.0  # far less alone on a core (docs/performance.md)
        assert not clique.exact and is_clique(adjacency, clique.nodes)


def test_when_time_runs_out_the_best_found_is_returned():
    adjacency = random_graph(1, 400, 0.9)
    start = time.monotonic()
    clique = largest_clique(adjacency, seconds=0.3)
    assert time.monotonic() - start < 1.3
    assert not clique.exact and is_clique(adjacency, clique.nodes)
    assert len(clique.nodes) > 20  # random graphs of this kind hold cliques of about 50
    greedy = largest_clique(adjacency, seconds=0)
    assert 20 < len(greedy.nodes) <= len(clique.nodes)


def test_the_same_graph_gives_the_same_clique():
    adjacency = random_graph(3, 80, 0.3)
    assert largest_clique(adjacency, seconds=10) == largest_clique(adjacency.copy(), seconds=60)


def test_a_directed_graph_is_refused():
    with pytest.raises(ValueError, match="symmetric"):
        largest_clique(np.triu(np.ones((3, 3), dtype=bool)), seconds=1)
