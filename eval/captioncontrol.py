"""The control of the prompted attack: the same attack with captions of held-out pictures, on held-out pictures.

A model that draws what a caption says, and has seen neither side, comes nearer to the pictures whose captions it is asked with. So
held-out pictures are no fair control for candidates of training captions (`eval.control`); held-out captions are.
`eval.captionunits` has the test.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from defenses.neighbours import search_sharded
from eval.captionunits import Owner, figures, outcomes, owners
from eval.control import drawn_sides
from eval.generations import Generations
from eval.pictures import Pictures
from eval.prompted import candidates_of, examine, nearest_rule
from eval.stratified import Outcomes
from train.data import Dataset


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
    known: dict[str, Owner] = field(default_factory=dict)


def plan(config: SimpleNamespace, dataset: Dataset, attacked: list[str]) -> CaptionControl:
    """Chooses held-out captions as the training captions were: of the most copied pictures first, then by name.

    Only captions that describe pictures of one unit; each once.

    Args:
        attacked: prompts of the attack, in their order.
    """
    settings, extraction = config.generate, config.attack.extraction
    control = chosen(dataset, attacked, settings.control_prompts)
    reason = None
    if extraction is None or extraction.protocol == "untargeted":
        reason = "the prompted attack is off"
    elif settings.control_prompts == 0:
        reason = "it is switched off (generate.control_prompts=0)"
    elif settings.prompts is not None:
        reason = "the prompts are from a file, and nobody knows which pictures they describe"
    elif settings.order == "prefilter":
        reason = "the prompts were chosen by a score (generate.order=prefilter), which held-out captions were not"
    return replace(control, prompts=[], reason=reason) if reason else control


def chosen(dataset: Dataset, attacked: list[str], most: int | None) -> CaptionControl:
    """At most ``most`` held-out captions, or none and the reason; None: as many as are attacked."""
    records = [dataset.records[row] for row in dataset.rows("heldout")]
    captioned = [record for record in sorted(records, key=lambda r: (-r.copies, r.source)) if record.caption]
    known = owners(dataset) if captioned else {}
    texts = list(dict.fromkeys(record.caption for record in captioned if record.caption in known))
    reason = None
    if not captioned:
        reason = "no held-out picture has a caption"
    elif not texts:
        reason = "every held-out caption is shared by several pictures or people"
    return CaptionControl(attacked, texts[: len(attacked) if most is None else most], reason, known=known)


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
    found_own = figures(sides, config.data.exchangeable())
    return {
        "prompts": len(control.prompts),
        "pictures": len(ids),
        "candidates": len(found),
        "verified": len(rule.verified(near)),
        **found_own,
        "training": {"prompts": len(control.attacked), "candidates": len(candidates), **found_own["training"]},
        "unit": "group" if training.grouped or heldout.grouped else "picture",
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
    asked = [images.asked[name] for name, _ in images.groups]
    return candidates_of(examine(groups, heldout, config.attack.extraction, accelerator, asked)[0])
