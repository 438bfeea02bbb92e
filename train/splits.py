"""Which records belong together, and which side of the split they go to.

A block is a connected component over shared group and shared cluster (copies of one picture). Blocks are what is
shuffled, permuted and resampled; no block lies on two sides.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from defenses.errors import UserError
from defenses.seeding import derive
from train.dataconfig import DataConfig


class HasGroup(Protocol):
    """What is needed of a record."""

    record_id: str
    group: str | None


def renumber(ids: np.ndarray) -> np.ndarray:
    """The same partition with numbers 0, 1, ... in order of first occurrence, int64 [N]."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def blocks(
    groups: Sequence[str | None], clusters: np.ndarray, related: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Block of each record, int64 [N], numbered in order of first occurrence; None is a group of its own.

    ``related``: further pairs of records that must stay together, two int64 arrays.
    """
    count = len(clusters)
    with_group = np.flatnonzero([group is not None for group in groups])
    group_ids = (
        np.unique([groups[row] for row in with_group], return_inverse=True)[1] if len(with_group) else with_group
    )
    cluster_ids = renumber(clusters) if count else clusters
    rows = np.concatenate([np.arange(count), with_group])
    first_group_node = count + count  # nodes: records, clusters, groups
    nodes = np.concatenate([count + cluster_ids, first_group_node + group_ids])
    if related is not None:
        rows, nodes = np.concatenate([rows, related[0]]), np.concatenate([nodes, related[1]])
    size = 3 * count
    graph = coo_array((np.ones(len(rows), dtype=np.int8), (rows, nodes)), shape=(size, size))
    return renumber(connected_components(graph, directed=False)[1][:count]) if count else np.zeros(0, dtype=np.int64)


def random_split(
    block: np.ndarray, record_ids: Sequence[str], heldout_fraction: float, calibration_fraction: float, seed: int
) -> list[str]:
    """Side of each record: whole blocks in random order go to ``heldout``, then ``calibration``, the rest to ``train``.

    Each side is filled until the next block would take it further from its share of the records than stopping does; a
    block that is too large for an empty side is passed over, so that no side stays empty for its sake. The
    order comes from (seed, id of the block's first record) alone, so it is the same on every machine.
    """
    _, first, sizes = np.unique(block, return_index=True, return_counts=True)
    order = sorted(range(len(first)), key=lambda number: derive(seed, "split", record_ids[first[number]]))
    side = ["train"] * len(first)
    for name, fraction in (("heldout", heldout_fraction), ("calibration", calibration_fraction)):
        target, filled = fraction * len(block), 0
        for number in [number for number in order if side[number] == "train"]:
            if abs(filled + sizes[number] - target) < abs(filled - target):
                side[number] = name
                filled += sizes[number]
            elif filled:
                break
    return [side[number] for number in np.unique(block, return_inverse=True)[1]]


def sides(
    given: Sequence[str | None],
    records: Sequence[HasGroup],
    clusters: np.ndarray,
    block: np.ndarray,
    config: DataConfig,
) -> list[str]:
    """The split of each usable record: as ``given``, and drawn at random for those without.

    Raises:
        UserError: a group or a copied picture lies on two sides of the given split.
    """
    splits = list(given)
    own = np.array([row for row, split in enumerate(given) if split is None], dtype=np.int64)
    if len(own):
        heldout_fraction = config.heldout_fraction if config.heldout_source is None else 0.0
        ids = [records[row].record_id for row in own]
        drawn = random_split(block[own], ids, heldout_fraction, config.calibration_fraction, config.split_seed)
        for row, split in zip(own, drawn, strict=True):
            splits[row] = split
    refuse_straddling([record.group for record in records], splits, clusters.tolist())
    return splits


def refuse_straddling(groups: Sequence[str | None], splits: Sequence[str], clusters: Sequence[int] = ()) -> None:
    """Raises UserError if a group, or a picture where ``clusters`` are known, lies in more than one split."""
    patients = _straddling(groups, splits)
    pictures = _straddling(clusters, splits) if clusters else 0
    if patients or pictures:
        raise UserError(
            "data.split_key",
            f"{patients} groups and {pictures} copied pictures lie on more than one side of this split",
            "set data.split_key=null, so that the split follows data.group_key, or mend the column",
        )


def _straddling(keys: Sequence, splits: Sequence[str]) -> int:
    """How many distinct keys (None apart) occur in more than one split."""
    seen: dict = {}
    for key, split in zip(keys, splits, strict=True):
        if key is not None:
            seen.setdefault(key, set()).add(split)
    return sum(len(sides) > 1 for sides in seen.values())
