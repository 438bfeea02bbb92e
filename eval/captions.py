"""Under which captions the attacks ask: those of the data, or those that the model was trained on.

A defense that rewrites captions before training (`defenses.base.Defense.rewrite`) changes the key to every picture. Whoever knows that
defense knows the new key, so the attacks on weights take it unless told otherwise: else a defense would look good by the attacker's ignorance.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

from defenses.base import Defense
from defenses.errors import UserError
from eval.target import Target
from train import families
from train.data import Dataset
from train.textstage import captions_of

Captions = Literal["original", "trained"]
KEY = "attack.captions"


def check(config: SimpleNamespace, foreign: str | None) -> None:
    """Refuses captions as they were trained on where nobody knows them.

    Args:
        foreign: what of others is evaluated; None: a run of ours.

    Raises:
        UserError: attack.captions.
    """
    if config.attack.captions != "trained":
        return
    if foreign is not None:
        problem = "is trained, and nobody knows under which captions the model of others was trained"
        raise UserError(KEY, problem, "leave it null: the captions of data.source are told as they stand there")
    if not families.of(config.model).captioned:
        raise UserError(
            KEY, f"is trained, and a model of family {config.model.family} has no captions", "set it to null"
        )


def for_losses(target: Target, config: SimpleNamespace) -> Dataset:
    """The records with the captions that attacks on weights tell the model: trained ones, or with ``attack.captions=original`` the data's."""
    return _told(target, config, "trained")


def for_prompts(target: Target, config: SimpleNamespace) -> Dataset:
    """The records with the captions that images are generated from: the data's, or with ``attack.captions=trained`` those."""
    return _told(target, config, "original")


def _told(target: Target, config: SimpleNamespace, usual: Captions) -> Dataset:
    """The data set, pictures and rows unchanged. Of a model of others nobody knows more than the data's captions."""
    dataset = target.dataset
    if target.run is None or not families.of(config.model).captioned:
        return dataset
    if (config.attack.captions or usual) == "original":
        return dataset
    told = zip(dataset.records, *captions_of(config, dataset, target.defenses), strict=True)
    return replace(
        dataset,
        records=[
            record
            if (record.caption or "") == text and record.more_captions == more
            else replace(record, caption=text, more_captions=list(more))
            for record, text, more in told
        ],
    )


def report(target: Target, config: SimpleNamespace, asked: Sequence[str]) -> dict[str, Any]:
    """``privacy.captions`` of report.json, for a model with text.

    Args:
        asked: prompts that images were generated from.

    Returns:
        ``losses`` and ``prompts``: "original" or "trained", prompts also "file"; ``rewritten_by``: the defenses that make the
        two differ, None for a model of others; ``asked_sha256``: of the prompts, in any order, without telling them.
    """
    ours = target.run is not None
    chosen = config.attack.captions
    prompts = "file" if config.generate.prompts is not None else chosen or "original"
    names = [each.name for each in target.defenses if type(each).rewrite is not Defense.rewrite]
    return {
        "losses": (chosen or "trained") if ours else "original",
        "prompts": prompts,
        "rewritten_by": names if ours else None,
        "asked_sha256": hashlib.sha256(json.dumps(sorted(asked)).encode()).hexdigest(),
    }
