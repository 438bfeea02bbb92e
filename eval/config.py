"""The evaluation's sections of the configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from defenses import registry
from defenses.errors import UserError
from eval.captions import Captions
from eval.captions import check as check_captions
from eval.copymetrics import CopyMetricsConfig
from eval.detectors import PrefilterConfig
from eval.exposure import ExposureConfig
from eval.extraction import ExtractionConfig, check_tier
from eval.features import verified_bytes
from eval.finetuning import FinetuningConfig
from eval.finetuning import check as check_finetuning
from eval.inpainting import InpaintingConfig
from eval.membership import MembershipConfig
from eval.membership import check as check_membership
from eval.quality import UtilityConfig
from eval.report import ReportConfig
from eval.sscd import load_sscd
from eval.textsource import kind_of
from train import families
from train.diffusion import native_precision
from train.sampling import SamplerConfig


@dataclass(kw_only=True)
class GenerateConfig(SamplerConfig):
    """Section ``generate``: the images that are attacked and measured."""

    count: int = 1024  # images of an unconditional or class-conditional model
    prompts: str | None = None  # text file, a prompt a line, for text-to-image models; null: the training captions
    max_prompts: int = 8  # prompts, the first in the order below
    # copies: a file's prompts as they stand, captions by how often their picture occurs; prefilter: the highest scores of
    # attack.prefilter first
    order: Literal["copies", "prefilter"] = "copies"
    candidates: int | None = None  # prompts that order=prefilter scores, the first by copies; null: all
    # captions of held-out pictures that are attacked beside those of training pictures, which tells memory from what a caption
    # says; null: as many, or all there are; 0: none
    control_prompts: int | None = None
    per_prompt: int = 16  # images per prompt; a divisor or a multiple of batch_size fills the forward passes
    # of a text-to-image model. all: every image is written, then attacked; flagged: attacked while they are drawn, and only
    # those of flagged prompts are written, with the first images of the others (about `count` in all) for image quality
    keep: Literal["all", "flagged"] = "all"
    precision: Literal["auto", "bf16", "fp32"] = (
        "fp32"  # of the network; auto: bf16 where the machine has it in hardware
    )
    # torch.compile of the network, for one size of passes: half a minute or more once per process, then faster ones; images differ
    # by what rounding makes of them
    compile: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.precision == "auto":
            self.precision = native_precision()
        for key in ("count", "max_prompts", "per_prompt"):
            if getattr(self, key) < 1:
                raise UserError(f"generate.{key}", f"{getattr(self, key)} is less than 1", "take a positive number")
        if self.control_prompts is not None and self.control_prompts < 0:
            raise UserError("generate.control_prompts", f"{self.control_prompts} is negative", "take 0 for none")
        if self.candidates is not None and self.candidates < self.max_prompts:
            raise UserError(
                "generate.candidates",
                f"{self.candidates} is less than max_prompts={self.max_prompts}",
                "null takes all",
            )

    def planned(self, captions: int, heldout: int = 0) -> tuple[int, int]:
        """Prompts that will be attacked, of so many distinct ones, and the most held-out captions that will be their control: none for
        prompts of a file or chosen by their scores."""
        prompts = min(captions, self.max_prompts)
        control = min(heldout, prompts if self.control_prompts is None else self.control_prompts)
        return prompts, 0 if self.prompts is not None or self.order == "prefilter" else control


@dataclass(kw_only=True)
class AttackConfig:
    """Section ``attack``: null switches an attack off; its part of the report is then null."""

    # of a text-to-image run whose defenses rewrite captions. trained: as they were trained on; original: as the data have them. null:
    # trained where losses are measured (membership, inpainting, canaries, the audit of DP-SGD), original as prompts (generate,
    # finetuning, prefilter). Prompts from a file stay as they are
    captions: Captions | None = None
    extraction: ExtractionConfig | None = field(default_factory=ExtractionConfig)
    membership: MembershipConfig | None = None  # who can be recognised as trained on
    inpainting: InpaintingConfig | None = None  # what half of a picture brings back of the other
    finetuning: FinetuningConfig | None = None  # what the step from a base model to this one gives away
    # what is remembered of the pictures that data.canaries plants; without such pictures nothing
    canaries: ExposureConfig | None = field(default_factory=ExposureConfig)
    copy_metrics: CopyMetricsConfig | None = None  # other metrics of copying on the matches of the extraction attack
    prefilter: PrefilterConfig | None = None  # which prompts look memorised before anything is generated
    risk: bool = True  # joins what was found, picture by picture


SECTIONS: dict[str, type] = {
    "generate": GenerateConfig,
    "attack": AttackConfig,
    "utility": UtilityConfig,
    "report": ReportConfig,
}

LOCAL_TRACKERS = {"tensorboard"}


def check(config: SimpleNamespace) -> None:
    """Rules across sections.

    Raises:
        UserError: a combination that must not run.
    """
    foreign = getattr(config, "pipeline", None) or getattr(config, "generations", None)
    if foreign is None and families.of(config.model).captioned and config.data.label_key is not None:
        raise UserError("data.label_key", "a text-to-image model takes captions, not classes", "set it to null")
    extraction = config.attack.extraction
    if extraction is not None and foreign is None:
        captioned = families.of(config.model).captioned
        if captioned and config.generate.prompts is None:
            check_tier(extraction, 0, config.generate.max_prompts, config.generate.per_prompt)
        elif not captioned:
            check_tier(extraction, config.generate.count)
        if extraction.protocol == "prompted" and not captioned:
            raise UserError(
                "attack.extraction.protocol", "prompted needs a text-to-image model", "use auto or untargeted"
            )
    if foreign is None and config.generate.steps > config.train.diffusion.timesteps:
        raise UserError(
            "generate.steps", f"is more than train.diffusion.timesteps={config.train.diffusion.timesteps}", "lower it"
        )
    check_captions(config, foreign)
    check_flow(config, foreign)
    check_keep(config)
    check_along(config, foreign)
    check_white_box(config, foreign)
    check_copy_metrics(config, foreign)
    if config.generate.order == "prefilter" and config.attack.prefilter is None:
        raise UserError("generate.order", "prefilter needs attack.prefilter, which is off", "set attack.prefilter={}")
    if config.utility.downstream is not None and foreign is None and config.data.label_key is None:
        raise UserError(
            "utility.downstream",
            "needs classes, and data.label_key is null",
            "set data.label_key, or downstream to null",
        )
    if config.utility.features != "random-conv":
        verified_bytes(config.utility.weights, config.utility.weights_sha256)
    private = registry.private(config.defenses) if foreign is None else []
    if private and config.report.push_to_hub is not None:
        raise UserError(
            "report.push_to_hub",
            f"would publish a model card with figures computed from the records, which the claim of {private[0]} does not cover",
            "set it to null, and publish the folder model/ yourself",
        )
    if config.generate.prompts is not None and not Path(config.generate.prompts).is_file():
        raise UserError(
            "generate.prompts", f"{config.generate.prompts} is no file", "give a text file, a prompt a line"
        )
    if not config.data.restricted:
        return
    remote = sorted(set(config.train.trackers) - LOCAL_TRACKERS)
    if remote:
        raise UserError(
            "train.trackers",
            f"{', '.join(remote)} may send data away, and data.restricted is true",
            "use [tensorboard] or []",
        )
    if config.report.push_to_hub is not None:
        raise UserError("report.push_to_hub", "is refused where data.restricted is true", "set it to null")


def check_flow(config: SimpleNamespace, foreign: str | None) -> None:
    """Refuses for a flow what draws or attacks diffusion on a schedule of betas alone, and the other way round.

    Raises:
        UserError: generate.sampler or attack.inpainting.
    """
    pipeline = getattr(config, "pipeline", None)
    if foreign is not None and pipeline is None:  # images alone
        return
    flow = config.train.diffusion.prediction == "flow" if pipeline is None else kind_of(Path(pipeline)) == "sd3"
    if flow != (config.generate.sampler == "euler"):
        problem = f"{config.generate.sampler} does not draw {'a flow' if flow else 'what is no flow'}"
        raise UserError("generate.sampler", problem, f"set it to {'euler' if flow else 'ddim'}")
    if flow and config.attack.inpainting is not None:
        raise UserError("attack.inpainting", "(RePaint) is not defined for a flow", "set it to null")


def check_keep(config: SimpleNamespace) -> None:
    """Refuses to keep flagged prompts alone where nothing can be flagged, or where all images are needed.

    Raises:
        UserError: generate.keep.
    """
    if config.generate.keep == "all" or getattr(config, "generations", None) is not None:
        return
    problem = None
    if config.attack.extraction is None:
        problem = "the extraction attack, which flags prompts, is off"
    elif config.attack.extraction.protocol == "untargeted":
        problem = "the untargeted protocol flags no prompt"
    elif config.report.along:
        problem = "report.along attacks the images of each checkpoint from their files"
    elif getattr(config, "pipeline", None) is None and config.model.family in ("pixel", "gan"):
        problem = f"a model of family {config.model.family} has no prompts"
    if problem:
        raise UserError("generate.keep", f"is flagged, and {problem}", "set generate.keep=all")


def check_white_box(config: SimpleNamespace, foreign: str | None) -> None:
    """Refuses attacks on weights where there are none, or none that predict noise.

    Raises:
        UserError: attack.membership, attack.inpainting, attack.finetuning, attack.prefilter or attack.canaries.
    """
    white = ("membership", "inpainting", "finetuning", "prefilter")
    attacks = [name for name in white if getattr(config.attack, name) is not None]
    attacks += ["canaries"] if config.data.canaries is not None and config.attack.canaries is not None else []
    if not attacks:
        return
    if getattr(config, "generations", None) is not None:
        raise UserError(f"attack.{attacks[0]}", "needs the model, and only images are given", "set it to null")
    if getattr(config, "pipeline", None) is None and config.model.family == "gan":
        raise UserError(
            f"attack.{attacks[0]}", "needs a model that predicts noise, which a GAN does not", "set it to null"
        )
    if config.attack.prefilter is not None and foreign is None and not families.of(config.model).captioned:
        raise UserError("attack.prefilter", "scores prompts, and this model takes none", "set it to null")
    check_finetuning(config, foreign)
    inpainting = config.attack.inpainting
    if inpainting is not None and foreign is None and inpainting.steps > config.train.diffusion.timesteps:
        raise UserError(
            "attack.inpainting.steps",
            f"is more than train.diffusion.timesteps={config.train.diffusion.timesteps}",
            "lower it",
        )
    if config.attack.membership is None:
        return
    check_membership(config)
    if config.attack.membership.lira is not None and getattr(config, "pipeline", None) is not None:
        raise UserError(
            "attack.membership.lira",
            "needs the trainer of a run of ours: nobody knows how this model was trained",
            "set it to null",
        )


def check_copy_metrics(config: SimpleNamespace, foreign: str | None) -> None:
    """Loads the weights of SSCD once, and refuses thresholds that nothing can set.

    Raises:
        UserError: attack.copy_metrics.
    """
    settings = config.attack.copy_metrics
    if settings is None:
        return
    if config.attack.extraction is None:
        raise UserError(
            "attack.copy_metrics", "judges the matches of the extraction attack, which is off", "set it to null"
        )
    if settings.sscd_weights is not None:
        load_sscd(settings.sscd_weights, settings.sscd_weights_sha256, "cpu")
    phantom = config.data.source == "phantom"
    calibrated = config.data.phantom.calibration if phantom else config.data.calibration_fraction
    if settings.threshold == "dar" and (foreign or not (calibrated or config.data.split_key)):
        remedy = "hold some out for it (data.calibration_fraction), or take threshold=published"
        raise UserError("attack.copy_metrics.threshold", "dar needs calibration pictures", remedy)


def check_along(config: SimpleNamespace, foreign: str | None) -> None:
    """Refuses steps in ``report.along`` at which there will be no checkpoint.

    Raises:
        UserError: report.along.
    """
    if not config.report.along:
        return
    if foreign is not None:
        raise UserError("report.along", "needs the checkpoints of a run of ours", "set it to []")
    every, last = config.train.checkpoint_every, config.train.steps
    missing = [step for step in config.report.along if step >= last or not every or step % every]
    if missing:
        raise UserError(
            "report.along", f"no checkpoint is made at step {missing[0]}", f"multiples of {every or last} below {last}"
        )
    if config.train.keep_checkpoints is not None:
        raise UserError("report.along", "needs the checkpoints that are removed", "set train.keep_checkpoints=null")
