"""The same attack and the same quality figures for any set of generations: released model, guard off, earlier checkpoints."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator

from defenses.errors import UserError
from eval.captioncontrol import compare
from eval.correlation import by_correlation
from eval.downstream import Labelled, labels_of_generations, measure_downstream, not_measured
from eval.extraction import Extraction, check_tier, untargeted
from eval.generations import Generations
from eval.prompted import prompted
from eval.quality import measure
from eval.stream import conclude_stream
from eval.target import pictures_of
from train.data import Dataset


def attack(images: Generations, dataset: Dataset, config: SimpleNamespace, accelerator: Accelerator) -> Extraction:
    """The extraction attack in the protocol that fits: prompted where generations are grouped by prompt."""
    settings = config.attack.extraction
    training, heldout = pictures_of(dataset, "train"), pictures_of(dataset, "heldout")
    size, channels = config.data.image_size, config.data.channels
    options = {"exchangeable": config.data.exchangeable(), "seed": config.run.seed}
    protocol = settings.protocol if settings.protocol != "auto" else ("prompted" if images.prompted else "untargeted")
    if images.streamed is not None:
        found = conclude_stream(images, training, heldout, settings, accelerator, **options)
        return with_captions(found, images, dataset, config, accelerator)
    if protocol == "prompted":
        if not images.prompted:
            raise UserError("attack.extraction.protocol", "prompted needs a folder of images per prompt", "use auto")
        left, asked = dict(images.groups), images.asked
        check_tier(settings, sum(asked.values()), len(asked), min(asked.values()))
        groups = [
            (name, left.get(name, []), partial(images.read, left.get(name, []), size, channels)) for name in asked
        ]
        found = prompted(groups, training, heldout, settings, accelerator, asked=list(asked.values()), **options)
        return with_captions(found, images, dataset, config, accelerator)
    names = [name for _, files in images.groups for name in files]
    check_tier(settings, sum(images.asked.values()))
    generations = images.read(names, size, channels)
    found = untargeted(generations, training, heldout, settings, accelerator, names=names, **options)
    calibration = pictures_of(dataset, "calibration")
    found.report["by_correlation"] = by_correlation(generations, training, heldout, calibration, accelerator)
    return found


def with_captions(
    found: Extraction, images: Generations, dataset: Dataset, config: SimpleNamespace, accelerator: Accelerator
) -> Extraction:
    """Adds ``captions`` to the control of a prompted attack, or None and the reason."""
    control, beside = images.control, found.report["control"]
    if control is None or beside is None:
        return found
    beside |= {"captions": None, "captions_reason": control.reason}
    if control.images is not None:
        pictures = pictures_of(dataset, "train"), pictures_of(dataset, "heldout")
        captions = compare(control, found.candidates, *pictures, dataset, config, accelerator)
        captions["training"]["verified"] = beside["verified_train_m"]
        beside["captions"] = captions
    return found


def quality_of(
    images: Generations, dataset: Dataset, config: SimpleNamespace, accelerator: Accelerator
) -> dict[str, Any] | None:
    """Image quality against held-out pictures; None where there are none, or no generation to measure."""
    rows, generations = dataset.rows("heldout"), _read(images, config)
    if not len(rows) or not len(generations):
        return None
    return measure(
        generations,
        dataset.images[rows],
        config.utility,
        accelerator.device,
        config.run.seed,
        accelerator=accelerator,
    )


def downstream_of(
    images: Generations,
    dataset: Dataset,
    classes: list[str] | None,
    config: SimpleNamespace,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Use for a classifier, or why it was not measured.

    Args:
        classes: labels that the model was conditioned on; none for other models.
    """
    if config.utility.downstream is None:
        return not_measured("it is switched off (utility.downstream)")
    if not classes:
        return not_measured("the generations have no known classes")
    names = [name for _, files in images.groups for name in files]
    labelled = Labelled(_read(images, config), labels_of_generations(images.folder, names, len(classes)))
    return measure_downstream(labelled, dataset, classes, config.utility.downstream, accelerator)


def _read(images: Generations, config: SimpleNamespace) -> np.ndarray:
    every = [name for _, files in images.groups for name in files]
    names = every if images.measured is None else images.measured
    return images.read(names, config.data.image_size, config.data.channels)
