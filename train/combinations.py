"""What defenses may do together, and what follows from them for the run: batches, gradient, what is kept quiet."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd as Dropout

from defenses import registry
from defenses.base import BatchPlan, Defense, GradientRule
from defenses.errors import UserError
from train import families
from train.data import Dataset
from train.loop import Trainer
from train.plan import EpochPlan
from train.records import class_frequency

# Batches of random images on which a private run tries whether a defense mixes records. One that lets every record take a random
# record's picture with probability 0.1 goes unnoticed in 1 of 700 runs
TRIES = 64
EXAMPLE, KEPT = 4, 2  # records of such a batch; the first ones are the same in both versions, the others differ
FIELDS = (
    "images", "labels", "captions", "more_captions", "text_noise", "timesteps", "noise", "latents", "text", "pooled", "tokens",
)  # fmt: skip


def refuse_mixing(trainer: Trainer) -> None:
    """Tries on random images whether a defense lets one example of a batch change another: a private rule could not bound it.

    What the objective draws is compared once, what defenses make of a batch under the randomness of several steps.

    Raises:
        UserError: it does.
    """
    for step in range(TRIES):
        drawn = step == 0  # encoding pictures is what costs
        one = trainer.example(EXAMPLE, step=step, drawn=drawn)
        other = trainer.example(EXAMPLE, negated=slice(KEPT, None), step=step, drawn=drawn)
        for name in FIELDS:
            first, second = getattr(one, name), getattr(other, name)
            if (first is None) != (second is None) or first is not None and not _alike(first[:KEPT], second[:KEPT]):
                problem = f"one of them mixes the {name} of a batch, which a private run cannot have"
                raise UserError("defenses", problem, "switch it off")


def refuse_dropout(model: nn.Module, defenses: list[Defense]) -> None:
    """Refuses to compare two passes of a network that drops something else in each.

    Args:
        model: as it is trained, adapters in place.

    Raises:
        UserError: a defense wants to be told such a comparison, and the network has dropout.
    """
    comparing = [defense.name for defense in defenses if defense.wants]
    # some layers drop by a function, with their rate in an attribute; not by getattr, which diffusers answers from the configuration
    rates = (module.p if isinstance(module, Dropout) else vars(module).get("dropout") for module in model.modules())
    if comparing and any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise UserError(
            f"defenses.{comparing[0]}",
            "compares passes with and without the caption, and dropout makes any two passes differ",
            "set model.adapter.dropout=0, take a network without dropout, or switch it off",
        )


def _alike(first: torch.Tensor | list, second: torch.Tensor | list) -> bool:
    if isinstance(first, list):
        return first == second
    # what comes from an encoder differs by rounding with its batch
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-3)


def refuse_combinations(config: SimpleNamespace, defenses: list[Defense]) -> None:
    """Defenses that contradict each other or the kind of model.

    Raises:
        UserError: one that remembers records beside a private one, or one that needs text in a model without.
    """
    private = [defense.name for defense in defenses if defense.private]
    for defense in defenses:
        if private and defense.remembers:
            raise UserError(
                f"defenses.{defense.name}",
                f"what it does to one record depends on others, which the guarantee of {private[0]} cannot cover",
                "switch one of the two off",
            )
        if not families.of(config.model).captioned and (defense.needs_captions or defense.wants):
            raise UserError(
                f"defenses.{defense.name}",
                f"is for text-to-image models, not family {config.model.family}",
                "switch it off",
            )


def plan_and_rule(config: SimpleNamespace, rows: np.ndarray, defenses: list[Defense]) -> tuple[BatchPlan, GradientRule]:
    """How batches are drawn and how their losses become a gradient: the defenses' way, or the ordinary one.

    Raises:
        UserError: two defenses want the same, or settings that contradict the defense that does.
    """
    settings = config.train
    default = families.of(config.model).rule(settings)
    rule = registry.gradient_rule(defenses, default)
    plan = registry.batch_plan(defenses, rows, settings.batch_size, config.run.seed)
    if rule is default:
        if plan is not None:
            raise UserError(
                "defenses", "batches are drawn by a defense, but none of them owns the gradient", "switch it off"
            )
    elif settings.optimizer.max_grad_norm not in (None, "auto"):
        raise UserError(
            "train.optimizer.max_grad_norm",
            "a defense owns the gradient; clipping it once more would only rescale what it released",
            "set it to null",
        )
    return plan or EpochPlan(rows, settings.batch_size, config.run.seed, settings.accumulation), rule


def is_quiet(config: SimpleNamespace, defenses: list[Defense]) -> bool:
    """Whether what is measured on the records stays out of logs, checkpoints and decisions.

    Raises:
        UserError: a defense wants to decide on such measurements.
    """
    quiet = any(defense.private for defense in defenses) and not config.report.nonprivate_metrics
    watchers = [d.name for d in defenses if type(d).after_checkpoint is not Defense.after_checkpoint]
    if quiet and watchers:
        raise UserError(
            f"defenses.{watchers[0]}",
            "stops or chooses by looking at private records, which a DP guarantee does not cover",
            "switch it off, or accept it with report.nonprivate_metrics=true",
        )
    return quiet


def sampling_frequency(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense], names: list[str]
) -> np.ndarray:
    """Weight of every class in what is generated, int64 [classes]: as in training, or equal where that is private."""
    frequency = class_frequency(dataset, names)
    return np.ones_like(frequency) if is_quiet(config, defenses) else frequency
