"""All defenses, in the order in which they are applied: the one place that names them."""

from dataclasses import dataclass

import numpy as np

from defenses.antigradient import AntiGradient, AntiGradientConfig
from defenses.augment import Augment, AugmentConfig
from defenses.base import BatchPlan, Defense, GradientRule
from defenses.captions import Captions, CaptionsConfig
from defenses.dedup import Dedup, DedupConfig
from defenses.dpsgd import DPSGD, DPSGDConfig
from defenses.earlystop import EarlyStop, EarlyStopConfig
from defenses.errors import UserError
from defenses.outputfilter import OutputFilter, OutputFilterConfig
from defenses.promptperturbation import PromptPerturbation, PromptPerturbationConfig
from defenses.scrub import Scrub, ScrubConfig
from defenses.textfilter import TextFilter, TextFilterConfig


@dataclass(kw_only=True)
class DefensesConfig:
    """Section ``defenses``: null means off, ``{}`` on with its defaults."""

    dedup: DedupConfig | None = None
    scrub: ScrubConfig | None = None
    augment: AugmentConfig | None = None
    captions: CaptionsConfig | None = None
    anti_gradient: AntiGradientConfig | None = (
        None  # before text_filter: its averages need losses that nobody has set to zero
    )
    text_filter: TextFilterConfig | None = None
    dpsgd: DPSGDConfig | None = None
    early_stop: EarlyStopConfig | None = None
    prompt_perturbation: PromptPerturbationConfig | None = None  # inside the filter, which may draw an image anew
    output_filter: OutputFilterConfig | None = None


CLASSES = {
    "dedup": Dedup,
    "scrub": Scrub,
    "augment": Augment,
    "captions": Captions,
    "anti_gradient": AntiGradient,
    "text_filter": TextFilter,
    "dpsgd": DPSGD,
    "early_stop": EarlyStop,
    "prompt_perturbation": PromptPerturbation,
    "output_filter": OutputFilter,
}


def private(config: DefensesConfig) -> list[str]:
    """Names of the defenses that are on and keep what is measured on records to the holder of the records."""
    return [name for name, kind in CLASSES.items() if kind.private and getattr(config, name) is not None]


def build(config: DefensesConfig) -> list[Defense]:
    """The defenses that are switched on, in order of application."""
    settings = {name: getattr(config, name) for name in CLASSES}
    return [CLASSES[name](setting) for name, setting in settings.items() if setting is not None]


def batch_plan(defenses: list[Defense], rows: np.ndarray, batch_size: int, seed: int) -> BatchPlan | None:
    """The plan of the one defense that draws the batches, or None.

    Raises:
        UserError: two defenses want to.
    """
    plans = {d.name: plan for d in defenses if (plan := d.plan(rows, batch_size, seed)) is not None}
    if len(plans) > 1:
        raise UserError("defenses", f"{' and '.join(plans)} both draw the batches", "switch one of them off")
    return next(iter(plans.values()), None)


def gradient_rule(defenses: list[Defense], default: GradientRule) -> GradientRule:
    """The rule of the one defense that owns the gradient, or ``default``.

    Raises:
        UserError: two defenses claim it.
    """
    rules = {defense.name: rule for defense in defenses if (rule := defense.gradient_rule()) is not None}
    if len(rules) > 1:
        raise UserError("defenses", f"{' and '.join(rules)} both replace the gradient", "switch one of them off")
    return next(iter(rules.values()), default)
