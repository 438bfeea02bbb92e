"""Blocks and splits against brute force and counts that are known beforehand."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import UserError
from train.data import Record
from train.dataconfig import DataConfig
from train.splits import blocks, random_split, renumber, sides


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(0, 9)), max_size=20))
@settings(derandomize=True, deadline=None)
def test_blocks_are_the_components_over_group_and_cluster(cells):
    graph = nx.Graph()
    for row, (group, cluster) in enumerate(cells):
        graph.add_edge(row, ("cluster", cluster))
        if group is not None:
            graph.add_edge(row, ("group", group))
    expected = {frozenset(n for n in part if isinstance(n, int)) for part in nx.connected_components(graph)}
    found = blocks([group for group, _ in cells], np.array([cluster for _, cluster in cells], dtype=np.int64))
    assert {frozenset(np.flatnonzero(found == number).tolist()) for number in set(found.tolist())} == expected
    assert found.tolist() == renumber(found).tolist()


def test_renumber_counts_first_occurrences():
    assert renumber(np.array([7, 7, 3, 9, 3])).tolist() == [0, 0, 1, 2, 1]


def ids(count: int) -> list[str]:
    return [f"{row:012x}" for row in range(count)]


def test_shares_of_a_random_split():
    split = random_split(np.arange(1000), ids(1000), 0.2, 0.1, 0)
    assert [split.count(name) for name in ("heldout", "calibration", "train")] == [200, 100, 700]
    assert split == random_split(np.arange(1000), ids(1000), 0.2, 0.1, 0)
    other = random_split(np.arange(1000), ids(1000), 0.2, 0.1, 1)
    both = sum(a == b == "heldout" for a, b in zip(split, other, strict=True))
    assert 20 < both < 60  # 40 expected by chance, standard deviation 5
    assert random_split(np.arange(10), ids(10), 0, 0, 0) == ["train"] * 10


def test_blocks_stay_whole_and_shares_are_met_within_half_a_block():
    block = np.repeat(np.arange(60), np.arange(60) % 7 + 1)
    split = np.array(random_split(block, ids(len(block)), 0.3, 0.2, 3))
    assert all(len(set(split[block == number])) == 1 for number in range(60))
    assert abs(np.sum(split == "heldout") - 0.3 * len(block)) <= 3.5
    assert abs(np.sum(split == "calibration") - 0.2 * len(block)) <= 3.5


def test_one_block_that_is_everything_stays_in_training():
    assert random_split(np.zeros(9, dtype=np.int64), ids(9), 0.2, 0.1, 0) == ["train"] * 9


def test_a_given_split_is_kept_or_refused():
    records = [Record(name, name, group=group) for name, group in zip("abcd", "ppqq", strict=True)]
    clusters = np.arange(4)
    given_split = ["train", "train", "heldout", "heldout"]
    assert sides(given_split, records, clusters, np.array([0, 0, 1, 1]), DataConfig()) == given_split
    with pytest.raises(UserError, match="2 groups and 0 copied pictures"):
        sides(["train", "heldout"] * 2, records, clusters, np.array([0, 0, 1, 1]), DataConfig())
    with pytest.raises(UserError, match="0 groups and 1 copied pictures"):
        sides(given_split, records, np.array([0, 1, 1, 2]), np.zeros(4, dtype=np.int64), DataConfig())


def test_related_pictures_stay_together():
    """Copies that fell into two clusters, and mirrored twins, are one block."""
    related = np.array([0, 2]), np.array([2, 3])
    found = blocks([None] * 5, np.arange(5), related)
    np.testing.assert_array_equal(found, [0, 1, 0, 0, 2])


def test_no_side_is_empty_because_of_one_large_block():
    """A patient with 60 of 175 records fits into neither small side; both get others, in every seed."""
    block = np.concatenate([np.zeros(60, int), 1 + np.arange(115)])
    ids = [f"r{row}" for row in range(175)]
    for seed in range(50):
        split = random_split(block, ids, 0.1, 0.05, seed)
        assert min(split.count("heldout"), split.count("calibration")) > 0
