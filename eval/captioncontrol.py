"""The control of the prompted attack: the same attack with captions of held-out pictures, on held-out pictures.

A model that draws what a caption says, and has seen neither side, comes nearer to the pictures whose captions it is asked with. So
held-out pictures are no fair control for candidates of training captions (`eval.control`); held-out captions are.

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
that are copied more often than any held-out one, such as planted copies: for these Fisher's test alone speaks, and it is exact only if being
copied came after the sides were drawn and fell on any picture alike.

The picture must be the caption's own: the nearest of many training pictures would be nearer than the nearest of few held-out
ones. And the caption must be of one unit: one that several units share says nothing about any of them, and is trained
on if one of them is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom

from defenses.exact import l2_of
from defenses.neighbours import search_sharded, views
from eval.control import Rule, drawn_sides
from eval.generations import Generations
from eval.pictures import Pictures
from eval.prompted import candidates_of, examine, nearest_rule
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


@dataclass
class CaptionControl:
    """A planned control, and its images once they are drawn.

    Attributes:
        attacked: the prompts of the attack itself, in their order.
        prompts: the held-out captions.
        reason: why there are none of these.
        known: which unit each caption belongs to, as the captions are told.
    """

    attacked: list[str]
    prompts: list[str] = field(default_factory=list)
    reason: str | None = None
    images: Generations | None = None
    known: dict[str, "Owner"] = field(default_factory=dict)


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


def plan(config: SimpleNamespace, dataset: Dataset, attacked: list[str]) -> CaptionControl:
    """Chooses held-out captions as the training captions were: of the most copied pictures first, then by name.

    Only captions that describe pictures of one unit; each once.

    Args:
        attacked: prompts of the attack, in their order.
    """
    settings, extraction = config.generate, config.attack.extraction
    records = [dataset.records[row] for row in dataset.rows("heldout")]
    captioned = [record for record in sorted(records, key=lambda r: (-r.copies, r.source)) if record.caption]
    known = owners(dataset) if captioned else {}
    texts = list(dict.fromkeys(record.caption for record in captioned if record.caption in known))
    reason = None
    if extraction is None or extraction.protocol == "untargeted":
        reason = "the prompted attack is off"
    elif settings.control_prompts == 0:
        reason = "it is switched off (generate.control_prompts=0)"
    elif settings.prompts is not None:
        reason = "the prompts are from a file, and nobody knows which pictures they describe"
    elif settings.order == "prefilter":
        reason = "the prompts were chosen by a score (generate.order=prefilter), which held-out captions were not"
    elif not captioned:
        reason = "no held-out picture has a caption"
    elif not texts:
        reason = "every held-out caption is shared by several pictures or people"
    count = len(attacked) if settings.control_prompts is None else settings.control_prompts
    return CaptionControl(attacked, [] if reason else texts[:count], reason, known=known)


def settings_of(config: SimpleNamespace) -> SimpleNamespace:
    """The configuration for the images of the control: none is compared unless its prompt is flagged, no size is required."""
    extraction = replace(config.attack.extraction, nearest="flagged", tier=None)
    return SimpleNamespace(**vars(config) | {"attack": replace(config.attack, extraction=extraction)})


def compare(
    control: CaptionControl,
    candidates: dict[str, np.ndarray],
    training: Pictures,
    heldout: Pictures,
    dataset: Dataset,
    config: SimpleNamespace,
    accelerator: Any = None,
) -> dict[str, Any]:
    """Attacks the images of the held-out captions and counts beside the training captions, on all ranks alike.

    Args:
        candidates: of the attack itself, by the names of the folders of their prompts, which are numbers.

    Returns:
        report.json, ``privacy.extraction.control.captions``, but for ``training.verified``. ``tested``: units with a caption of their
        own, ``own``: those of them whose candidate shows the caption's picture.
    """
    found = heldout_candidates(control, heldout, settings_of(config), accelerator)
    rule, device = nearest_rule(config.attack.extraction), accelerator.device if accelerator else "cpu"
    sides: dict[str, Outcomes] = {}
    for split, texts, flagged in (("train", control.attacked, candidates), ("heldout", control.prompts, found)):
        image = {int(name): candidate for name, candidate in flagged.items()}
        sides[split] = outcomes(split, texts, image, control.known, dataset, rule, device)
    _, ids = drawn_sides(training, heldout, config.run.seed)[1]
    images = np.stack(list(found.values())) if found else np.zeros((0, *heldout.images.shape[1:]), np.uint8)
    rows = heldout.subset(ids)
    near = search_sharded(images, rows, heldout.picture[rows.rows], 1, accelerator=accelerator).distinct
    fisher, reason = None, None
    if not config.data.exchangeable():
        reason = "the held-out pictures are not drawn like the training pictures"
    elif not len(sides["train"].own) or not len(sides["heldout"].own):
        reason = "no attacked caption belongs to one training picture or person alone"
    else:
        fisher = exact_p_value(sides["train"].own, sides["heldout"].own)
    counts = {split: {"tested": len(side.own), "own": int(side.own.sum())} for split, side in sides.items()}
    return {
        "prompts": len(control.prompts),
        "pictures": len(ids),
        "candidates": len(found),
        "verified": len(rule.verified(near)),
        **counts["heldout"],
        "training": {"prompts": len(control.attacked), "candidates": len(candidates), **counts["train"]},
        "p_value": fisher,
        "reason": reason,
        "unit": "group" if training.grouped or heldout.grouped else "picture",
        "test": TEST,
        "stratified": stratified(strata(sides["train"], sides["heldout"]), reason),
    }


def stratified(parts: list[Stratum], reason: str | None) -> dict[str, Any]:
    """report.json, ``privacy.extraction.control.captions.stratified``.

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


def heldout_candidates(
    control: CaptionControl, heldout: Pictures, config: SimpleNamespace, accelerator: Any = None
) -> dict[str, np.ndarray]:
    """Candidates of the held-out captions, by the clique rule of the attack; their images may be streamed already."""
    images = control.images
    if images.streamed is not None:
        return candidates_of(images.streamed.findings)
    read = partial(images.read, image_size=config.data.image_size, channels=config.data.channels)
    groups = [(name, files, partial(read, files)) for name, files in images.groups]
    return candidates_of(examine(groups, heldout, config.attack.extraction, accelerator)[0])


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
