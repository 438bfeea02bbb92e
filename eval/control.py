"""The control: what the rule finds in pictures that the model never saw. Without it a count is not evidence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from defenses.neighbours import Neighbours, search_sharded
from defenses.references import Rows, shuffled
from defenses.seeding import derive
from eval.pictures import Pictures

_LIST = 4  # length of the neighbour lists of the permutation test, times n
_LEAST = 64  # and at least this: lists of a few pictures often lie on one side whole
_FEW = 50  # pictures on each side below which the control says so
_CELLS = 2**22  # of the largest array of the permutation test


@dataclass(frozen=True)
class Rule:
    """When a candidate is taken to be its nearest picture.

    Attributes:
        n: distinct neighbours that the rule looks at.
        score: ascending distances [Q, <= n] -> scores [Q]; <= 1 passes. Farther neighbours beyond the first never raise a
            score, a farther first one never lowers it.
    """

    n: int
    score: Callable[[np.ndarray], np.ndarray]

    def verified(self, found: Neighbours) -> np.ndarray:
        """Distinct picture ids that some candidate is taken to be, ascending."""
        return np.unique(found.picture[self.passed(found), 0])

    def passed(self, found: Neighbours) -> np.ndarray:
        """Candidates that pass, bool [Q]."""
        return self.score(found.distance[:, : self.n]) <= 1


def control(
    candidates: np.ndarray,
    training: Pictures,
    heldout: Pictures | None,
    rule: Rule,
    accelerator: Any = None,
    *,
    exchangeable: bool,
    permutations: int,
    seed: int,
) -> dict[str, Any] | None:
    """Runs the rule against m training and m held-out pictures, m the smaller number of distinct ones.

    Args:
        candidates: uint8 [Q, C, H, W], what the attack would call extracted (all generations, or the medoids).
        exchangeable: whether held-out pictures are drawn like training pictures; otherwise there is no p-value.

    Returns:
        report.json, ``privacy.extraction.control``; None without held-out pictures.
    """
    if heldout is None:
        return None
    sides = drawn_sides(training, heldout, seed)
    m = len(sides[0][1])
    found = [_nearest(candidates, pictures, ids, max(_LEAST, _LIST * rule.n), accelerator) for pictures, ids in sides]
    blocks = [pictures.block[pictures.first[np.searchsorted(pictures.ids, ids)]] for pictures, ids in sides]
    unit = "group" if training.grouped or heldout.grouped else "picture"
    p_value = None
    if exchangeable:
        lists = _pooled(found, [ids for _, ids in sides], rule)
        apart = [np.unique(block, return_inverse=True)[1] * 2 + side for side, block in enumerate(blocks)]
        p_value = permutation_p_value(lists, np.concatenate(apart), rule, permutations, seed, accelerator)
    result = {
        "verified": len(rule.verified(found[1])),
        "verified_train_m": len(rule.verified(found[0])),
        "n": m,
        "p_value": p_value,
        "background": _background(training, heldout, rule, accelerator),
        "neighbours": min(rule.n, m),
        "unit": unit,
        "units": {"training": len(np.unique(blocks[0])), "heldout": len(np.unique(blocks[1]))},
        "permutations": permutations if exchangeable else None,
    }
    if m < _FEW:
        result["note"] = f"only {m} pictures on either side: the control resolves little"
    return result


def drawn_sides(training: Pictures, heldout: Pictures, seed: int) -> list[tuple[Pictures, np.ndarray]]:
    """Both sides, each with the ids of m of its pictures, ascending; m is the smaller number of distinct pictures."""
    m = min(len(training.ids), len(heldout.ids))
    return [
        (pictures, np.sort(pictures.drawn(m, derive(seed, "attack/control", side))))
        for side, pictures in (("training", training), ("heldout", heldout))
    ]


@dataclass
class PooledLists:
    """Nearest pictures of each candidate among both sides together.

    Attributes:
        place: number of the picture, 0..m-1 training and m..2m-1 held-out, int64 [Q, L], nearest first.
        distance: l2, float64 [Q, L].
        m: pictures on either side.
    """

    place: np.ndarray
    distance: np.ndarray
    m: int


def permutation_p_value(
    lists: PooledLists, block: np.ndarray, rule: Rule, permutations: int, seed: int, accelerator: Any = None
) -> float:
    """One-sided p-value of verified(training) - verified(held-out) when whole blocks change sides at random.

    p = (1 + number of permutations that reach the observed difference) / (1 + permutations) (Davison and Hinkley 1997,
    equation 4.11). The rule is run again for every permutation, on the permuted reference sets. Where a list ends before
    n pictures of one side, its last distance stands in for the missing ones, which can only keep a candidate from passing.

    Args:
        block: unit of each picture of the pool, int64 [2m]; no block has pictures on both sides.
    """
    rerun = _Rerun(lists, rule)
    observed = int(rerun.difference(np.arange(2 * lists.m)[None] < lists.m)[0])
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine, reached = range(rank, permutations, world), 0
    for start in range(0, len(mine), rerun.batch):
        indices = mine[start : start + rerun.batch]
        labels = np.zeros((len(indices), 2 * lists.m), dtype=bool)
        for row, index in enumerate(indices):
            random = np.random.default_rng(derive(seed, "attack/permutation", index))
            labels[row, shuffled(block, random)[: lists.m]] = True
        reached += int((rerun.difference(labels) >= observed).sum())
    total = reached if world == 1 else sum(gather_object([reached]))
    return (1 + total) / (1 + permutations)


class _Rerun:
    """The rule on permuted reference sets, for many permutations at once.

    The rest is arithmetic saved: a place in a list is dropped if no permutation lets its candidate pass there, and nothing
    is computed again where even the closest possible neighbours let it pass.

    Attributes:
        always: pictures that are verified on whichever side they stand, int64 [A].
        possible, certain: whether a candidate can pass, or passes in any case, when the picture at this place of its list
            is the first of its side, bool [Q, depth]; candidates without such a place and pictures in ``always`` left out.
    """

    def __init__(self, lists: PooledLists, rule: Rule):
        self.rule, self.m, self.n = rule, lists.m, min(rule.n, lists.m)
        last = np.repeat(lists.distance[:, -1:], self.n, axis=1)
        padded = np.concatenate([lists.distance, last], axis=1)
        possible, certain = [], []
        for place in range(
            lists.distance.shape[1]
        ):  # a score rises with the distance of the nearest: stop at the first
            farthest = np.concatenate([lists.distance[:, place : place + 1], last[:, 1:]], axis=1)
            possible.append(rule.score(farthest) <= 1)
            if not possible[-1].any():
                break
            certain.append(rule.score(padded[:, place : place + self.n]) <= 1)
        depth = len(certain)
        self.possible = np.stack(possible[:depth] or [np.zeros(0, bool)], axis=1)
        self.certain = np.stack(certain or [np.zeros(0, bool)], axis=1)
        self.always = np.unique(lists.place[self.certain[:, 0], 0] if depth else lists.place[:0])
        if depth:
            self.possible &= ~np.isin(lists.place[:, :depth], self.always)
        keep = np.flatnonzero(self.possible.any(axis=1))
        self.possible, self.certain = self.possible[keep], self.certain[keep]
        self.place, self.padded = lists.place[keep], padded[keep]
        self.batch = max(1, _CELLS // max(2 * self.m, self.possible.size))

    def difference(self, labels: np.ndarray) -> np.ndarray:
        """verified(first side) - verified(second side) for labels bool [B, 2m] (True: first side), int64 [B]."""
        always = 2 * labels[:, self.always].sum(axis=1) - len(self.always)
        if not len(self.place):
            return always
        mine = labels[:, self.place[:, : self.possible.shape[1]]]  # [B, Q, depth]
        return always + self._verified(labels, mine, True) - self._verified(labels, ~mine, False)

    def _verified(self, labels: np.ndarray, mine: np.ndarray, side: bool) -> np.ndarray:
        nearest = mine.argmax(axis=2)
        candidate = np.arange(len(self.place))[None]
        passed = mine.any(axis=2) & self.possible[candidate, nearest]
        unsure = np.nonzero(passed & ~self.certain[candidate, nearest])
        step = max(1, _CELLS // self.padded.shape[1])
        for start in range(0, len(unsure[0]), step):
            permutation, row = (index[start : start + step] for index in unsure)
            passed[permutation, row] = self._passes(labels, permutation, row, side)
        hit = np.zeros((len(labels), 2 * self.m), dtype=bool)
        permutation, row = np.nonzero(passed)
        hit[permutation, self.place[row, nearest[permutation, row]]] = True
        return hit.sum(axis=1)

    def _passes(self, labels: np.ndarray, permutation: np.ndarray, row: np.ndarray, side: bool) -> np.ndarray:
        """The rule itself: the n nearest of one side."""
        own = np.ones((len(row), self.padded.shape[1]), dtype=bool)  # the repeated last distances are everyone's
        own[:, : self.place.shape[1]] = labels[permutation[:, None], self.place[row]] == side
        own &= np.cumsum(own, axis=1, dtype=np.int32) <= self.n
        return self.rule.score(self.padded[row][own].reshape(len(row), self.n)) <= 1


def _nearest(candidates: np.ndarray, pictures: Pictures, ids: np.ndarray, k: int, accelerator: Any) -> Neighbours:
    rows: Rows = pictures.subset(ids)
    return search_sharded(candidates, rows, pictures.picture[rows.rows], k, accelerator=accelerator).distinct


def _pooled(found: list[Neighbours], ids: list[np.ndarray], rule: Rule) -> PooledLists:
    """Both sides' lists as one, cut to the length of either: up to there it is complete."""
    m, length = len(ids[0]), min(2 * len(ids[0]), max(_LEAST, _LIST * rule.n))
    place = np.concatenate([np.searchsorted(ids[i], found[i].picture) + i * m for i in range(2)], axis=1)
    distance = np.concatenate([each.distance for each in found], axis=1).astype(np.float64)
    order = np.argsort(distance, axis=1, kind="stable")[:, :length]
    return PooledLists(np.take_along_axis(place, order, 1), np.take_along_axis(distance, order, 1), m)


def _background(training: Pictures, heldout: Pictures, rule: Rule, accelerator: Any) -> float:
    """Share of real held-out pictures that would pass against all training pictures if they were generations."""
    queries = Rows(heldout.images, heldout.first)
    found = search_sharded(queries, training.images, training.picture, rule.n, accelerator=accelerator).distinct
    return float(rule.passed(found).mean())
