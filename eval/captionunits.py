"""Which training captions bring their own picture back, beside captions that were never trained on: units, outcomes and tests.

The test. The unit is a picture with its captions; with groups (patients) it is a block of them, and copies of a picture are in one
block. S = 1 if one caption of the unit flags, and its candidate lies within ``verify_l2`` of a picture of that very caption. S is a
function of the unit and of the model. If the model treats the units of both sides alike, as one does that has seen none of them or
all of them, and the units were put on the sides at random, then, given both numbers of units, every way to put the observed
S on the sides is equally likely. The number of S = 1 on the training side is then hypergeometric, whatever the captions tell,
however the distances are distributed, and for unequal sides: p = P(X >= observed), Fisher's exact test (Fisher 1935), which is the
permutation test of whole units with all permutations.

Captions are not asked at random: on either side those of the most copied pictures come first, and a training split has more of them. If
often copied pictures are also easier to draw from their captions, Fisher's test calls that memory. So the test is made once more among
pictures with equally many copies (`eval.stratified`), which holds whatever copies do to S. It says nothing of training pictures
with a number of copies that no tested held-out one has, such as planted copies: of these Fisher's test alone speaks, and it is exact only if
being copied came after the sides were drawn and fell on any picture alike.

The picture must be the caption's own: the nearest of many training pictures would be nearer than the nearest of few held-out
ones. And the caption must be of one unit: one that several units share says nothing about any of them, and is trained
on if one of them is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom

from defenses.exact import l2_of
from defenses.neighbours import views
from eval.control import Rule
from eval.stratified import Outcomes, Stratum, p_value, strata
from train.data import Dataset

TEST = "Fisher's exact test of whole units, one-sided"
STRATIFIED = "exact conditional test of whole units, stratified by the number of copies, one-sided"
_APART = "no held-out picture whose caption was asked has as many copies as a training picture"
_PIXELS = 2**22  # of the candidates that are compared at once


@dataclass(frozen=True)
class Owner:
    """The one unit that a caption describes pictures of.

    Attributes:
        rows: of these pictures in the data, int64 [R].
    """

    split: str
    block: int
    rows: np.ndarray


def owners(dataset: Dataset) -> dict[str, Owner]:
    """Captions, further ones of a picture included, whose training and held-out pictures all belong to one unit."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for split in ("train", "heldout"):
        for row in dataset.rows(split).tolist():
            record = dataset.records[row]
            for text in {record.caption, *record.more_captions} - {None, ""}:
                found.setdefault(text, []).append((split, record.block, row))
    return {
        text: Owner(*places[0][:2], np.array([row for _, _, row in places], dtype=np.int64))
        for text, places in found.items()
        if len({place[:2] for place in places}) == 1
    }


def figures(sides: dict[str, Outcomes], exchangeable: bool) -> dict[str, Any]:
    """Part of the report: what came back by its own caption on either side, and the p-values.

    Args:
        sides: of "train" and "heldout".
        exchangeable: whether held-out pictures are drawn like training pictures; otherwise there is no p-value.

    Returns:
        ``tested``: units with a caption of their own, ``own``: those of them whose candidate shows the caption's picture; the same of
        ``training``.
    """
    fisher, reason = None, None
    if not exchangeable:
        reason = "the held-out pictures are not drawn like the training pictures"
    elif not len(sides["train"].own) or not len(sides["heldout"].own):
        reason = "no attacked caption belongs to one training picture or person alone"
    else:
        fisher = exact_p_value(sides["train"].own, sides["heldout"].own)
    counts = {split: {"tested": len(side.own), "own": int(side.own.sum())} for split, side in sides.items()}
    return {
        **counts["heldout"],
        "training": counts["train"],
        "p_value": fisher,
        "reason": reason,
        "test": TEST,
        "stratified": stratified(strata(sides["train"], sides["heldout"]), reason),
    }


def stratified(parts: list[Stratum], reason: str | None) -> dict[str, Any]:
    """report.json, ``stratified`` beside a Fisher's test by captions.

    Args:
        reason: why there is no p-value at all; None: there may be one.

    Returns:
        ``without_counterpart``: training units with another number of copies than any held-out unit, of which the test says nothing.
    """
    value = None if reason else p_value(parts)
    alone = [part for part in parts if not part.heldout]
    return {
        "p_value": value,
        "reason": reason or (_APART if value is None else None),
        "test": STRATIFIED,
        "strata": [
            {"copies": part.kind, "tested": part.heldout, "own": part.heldout_own}
            | {"training": {"tested": part.training, "own": part.training_own}}
            for part in parts
        ],
        "without_counterpart": {
            "tested": sum(part.training for part in alone),
            "own": sum(part.training_own for part in alone),
        },
    }


def outcomes(
    split: str,
    texts: Sequence[str],
    image: dict[int, np.ndarray],
    known: dict[str, Owner],
    dataset: Dataset,
    rule: Rule,
    device: Any,
) -> Outcomes:
    """S of every unit of one side that a prompt describes alone, and how often its picture occurs; of several prompts of a unit the first
    counts, which is that of its most copied picture.

    Args:
        image: candidate of each flagged prompt, by its place in ``texts``, uint8 [C, H, W].
    """
    chosen: dict[int, tuple[int, Owner]] = {}
    for place, text in enumerate(texts):
        owner = known.get(text)
        if owner is not None and owner.split == split:
            chosen.setdefault(owner.block, (place, owner))
    pairs = [
        (unit, place, row)
        for unit, (place, owner) in enumerate(chosen.values())
        if place in image
        for row in owner.rows
    ]
    own = np.zeros(len(chosen), dtype=bool)
    step = max(1, _PIXELS // int(np.prod(dataset.images.shape[1:])))
    for start in range(0, len(pairs), step):
        unit, place, row = (list(column) for column in zip(*pairs[start : start + step], strict=True))
        distance = distances(np.stack([image[each] for each in place]), dataset.images[row], device)
        own[np.array(unit)[rule.score(distance[:, None]) <= 1]] = True
    copies = [max(dataset.records[row].copies for row in owner.rows) for _, owner in chosen.values()]
    return Outcomes(own, np.array(copies, dtype=np.int64))


def distances(candidates: np.ndarray, pictures: np.ndarray, device: Any = "cpu") -> np.ndarray:
    """l2 of each candidate to the nearest view of one picture, uint8 [Q, C, H, W] both, float32 [Q]; as `search` has it."""
    left = torch.from_numpy(candidates).to(device).int()
    size, squared = left[0].numel(), []
    for view in views(torch.from_numpy(np.ascontiguousarray(pictures)).to(device)):
        squared.append((view.int() - left).square().flatten(1).sum(1))  # sums of int32 are int64
    return l2_of(torch.stack(squared).amin(0).cpu().numpy(), size).astype(np.float32)


def exact_p_value(training: np.ndarray, heldout: np.ndarray) -> float:
    """P(X >= number of S = 1 on the training side) if units had been put on the sides at random.

    Args:
        training, heldout: S of the units of either side, bool [U] and [V].
    """
    units, hits = len(training) + len(heldout), int(training.sum() + heldout.sum())
    return float(hypergeom.sf(int(training.sum()) - 1, units, hits, len(training)))
