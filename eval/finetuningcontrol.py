"""The control of the attack on the fine-tuning by captions: the same images of each weight from captions of held-out pictures.

The step from base to fine-tuned model follows a caption, the more closely the larger w, also where the fine-tuned model knows nothing but
captions. Its clusters join images of all captions of a side, so what one caption gives there depends on the others. Here each
caption is judged by its own images: its candidate is the medoid of the largest clique among them, at the threshold at which the search for
clusters begins. That is a function of the caption and the models alone, as the exact tests of `eval.captionunits` need it.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from defenses.ranks import on_main
from eval.captioncontrol import CaptionControl, chosen
from eval.captionunits import figures, outcomes
from eval.cliques import largest_clique
from eval.clusters import medoid
from eval.control import Rule
from eval.generations import Generations
from eval.pairedtests import holm
from eval.prompted import tiled_l2
from eval.suite import Scene
from eval.wording import beyond_caption
from train.data import Dataset

FOLDER = "finetuning_control"  # below the output: images of each weight


def plan(config: SimpleNamespace, dataset: Dataset, attacked: list[str]) -> CaptionControl:
    """Held-out captions as many as attacked, or ``generate.control_prompts``; or none and the reason."""
    settings, most = config.attack.finetuning, config.generate.control_prompts
    reason = None
    if most == 0:
        reason = "it is switched off (generate.control_prompts=0)"
    elif settings.prompts is not None:
        reason = "the prompts are from a file, and nobody knows which pictures they describe"
    elif attacked == [""]:
        reason = "the training pictures have no captions"
    elif settings.per_prompt < settings.clique_size:
        reason = "a caption has fewer images (per_prompt) than a cluster needs (clique_size)"
    return CaptionControl(attacked, reason=reason) if reason else chosen(dataset, attacked, most)


def add(
    report: dict[str, Any],
    control: CaptionControl,
    drawn: list[Generations],
    others: list[Generations],
    dataset: Dataset,
    scene: Scene,
) -> None:
    """Adds ``captions`` to every weight of the report, on all ranks alike, and ``captions_reason``, why there are none.

    Args:
        drawn: images of the attacked captions at every weight.
        others: images of the held-out captions; none without these.
    """
    report["captions_reason"] = control.reason
    for entry in report["weights"]:
        entry["captions"] = None
    for entry, *images in zip(report["weights"], drawn, others, strict=True) if others else []:
        entry["captions"] = on_main(scene.accelerator, lambda images=images: compared(control, *images, dataset, scene))
    adjusted = holm([beyond_caption(entry["captions"]) for entry in report["weights"]])
    for entry, p_value in zip(report["weights"], adjusted, strict=True):
        if entry["captions"] is not None:
            entry["captions"]["p_value_holm"] = p_value


def compared(
    control: CaptionControl, attacked: Generations, unseen: Generations, dataset: Dataset, scene: Scene
) -> dict[str, Any]:
    """``captions`` of one weight: how many captions bring their own picture back, on either side."""
    config, limit = scene.config, scene.config.attack.finetuning.verify_l2
    rule, device = Rule(1, lambda distance: distance[:, 0].astype(np.float64) / limit), scene.accelerator.device
    seconds = config.attack.finetuning.clique_seconds / max(len(control.attacked), len(control.prompts))
    sides, found = {}, {}
    for split, texts, images in (("train", control.attacked, attacked), ("heldout", control.prompts, unseen)):
        found[split] = candidates(images, len(texts), seconds, config, device)
        sides[split] = outcomes(split, texts, found[split], control.known, dataset, rule, device)
    part = figures(sides, config.data.exchangeable())
    training = {"prompts": len(control.attacked), "candidates": len(found["train"]), **part["training"]}
    grouped = any(dataset.records[row].group is not None for split in sides for row in dataset.rows(split))
    unit = "group" if grouped else "picture"
    return {
        "prompts": len(control.prompts),
        "candidates": len(found["heldout"]),
        **part,
        "training": training,
        "unit": unit,
    }


def candidates(
    images: Generations, prompts: int, seconds: float, config: SimpleNamespace, device: Any
) -> dict[int, np.ndarray]:
    """The candidate of each caption that has one, by the caption's place, uint8 [C, H, W].

    Args:
        seconds: of search for each caption; the same for both sides, which the test takes to be treated alike.
    """
    settings, names, found = config.attack.finetuning, images.groups[0][1], {}
    for place in range(prompts):
        own = names[place * settings.per_prompt : (place + 1) * settings.per_prompt]
        pixels = images.read(own, config.data.image_size, config.data.channels)
        distance = tiled_l2(pixels, device)
        clique = largest_clique(distance <= settings.edge_threshold, seconds=seconds)
        if len(clique.nodes) >= settings.clique_size:
            found[place] = pixels[medoid(distance, clique.nodes)]
    return found
