"""The images that are attacked: of the model, of the model without its guard, and of captions that it never saw."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from defenses.base import Defense, SamplingContext
from eval import captioncontrol, captions, samples
from eval.captioncontrol import CaptionControl
from eval.denoiser import Denoiser
from eval.extraction import check_tier
from eval.generations import Generations, find
from eval.prefilter import prompt_scores
from eval.prompted import refuse_hopeless
from eval.source import Source, load
from eval.stream import stream
from eval.target import Target, sampling_context, timed

CONTROL = "control"  # suffix of the folders of images and records of held-out captions
BARE = "guard_off"  # and of those without the defenses of seam 6


def generate(
    target: Target, config: SimpleNamespace, accelerator: Accelerator, model: Denoiser | None = None
) -> tuple[Source | None, Generations, Generations | None]:
    """Draws the images that are attacked; with a guard at seam 6 first those that the bare model gives.

    Args:
        model: scores the prompts where ``generate.order`` is "prefilter".

    Returns:
        What drew them (None where somebody else did), the images, and those of the bare model (None without a guard). Images of
        prompts have the control of their captions with them (``Generations.control``).
    """
    size, channels = config.data.image_size, config.data.channels
    if target.pipeline is None:
        images = find(target.generations, size, channels)
        images.control = CaptionControl([], reason="somebody else made the images, and nobody knows their prompts")
        return None, images, None
    bare, control = None, None
    with timed(target.output, "generate_seconds", accelerator):
        source = load(target.pipeline, config.generate, config.run.seed, (channels, size, size), accelerator.device)
        score = partial(prompt_scores, target, model, config, accelerator)
        if source.protocol == "prompted":
            known = captions.for_prompts(target, config)
            source.prompts = samples.prompts_of(config.generate, known, score)
            control = captioncontrol.plan(config, known, source.prompts)
        if target.guarded:
            bare = draw(source, BARE, target, config, accelerator)
            bare.control = draw_control(source, control, BARE, target, config, accelerator)
            if bare.streamed is None:
                samples.reuse(source, bare.folder, source.prompts)
                if bare.control and bare.control.images:
                    samples.reuse(source, bare.control.images.folder, bare.control.prompts)
        asked = source
        if target.guarded:  # the control first: a defense reports of the last source that it guards
            context = sampling_context(target, config, accelerator)
            if control is not None and control.prompts:
                asked = guard(source, target.defenses, replace(context, records=target.output.attack / CONTROL))
        control = draw_control(asked, control, "", target, config, accelerator)
        if target.guarded:
            source = guard(source, target.defenses, context)
        images = draw(source, "", target, config, accelerator)
        images.control = control
    return source, images, bare


def guard(source: Source, defenses: list[Defense], context: SamplingContext) -> Source:
    """The source behind the defenses of seam 6."""
    guarded = replace(source)
    samples.wrap(guarded, defenses, replace(context, text_model=source.text_model))
    return guarded


def draw(source: Source, suffix: str, target: Target, config: SimpleNamespace, accelerator: Accelerator) -> Generations:
    """Images of one source; with ``generate.keep=flagged`` attacked at once, records in ``attack/``."""
    folder, records = folders(target, suffix)
    if config.generate.keep == "flagged":
        return stream(source, folder, records, source.prompts, target.dataset, config, accelerator)
    extraction, each = config.attack.extraction, config.generate.per_prompt
    if source.prompts and extraction is not None and extraction.protocol != "untargeted":  # before hours of drawing
        check_tier(extraction, each * len(source.prompts), len(source.prompts), each)
        refuse_hopeless(extraction, [each] * len(source.prompts))
    samples.generate(source, folder, config.generate, source.prompts, config.run.seed, accelerator)
    return find(folder, config.data.image_size, config.data.channels)


def draw_control(
    source: Source,
    control: CaptionControl | None,
    suffix: str,
    target: Target,
    config: SimpleNamespace,
    accelerator: Accelerator,
) -> CaptionControl | None:
    """The control with its images, drawn as those of the attack; without held-out captions as it is."""
    if control is None or not control.prompts:
        return control
    folder, records = folders(target, "_".join(part for part in (CONTROL, suffix) if part))
    held, prompts = captioncontrol.settings_of(config), control.prompts
    if config.generate.keep == "flagged":
        images = stream(source, folder, records, prompts, target.dataset, held, accelerator, split="heldout")
    else:
        samples.generate(source, folder, held.generate, prompts, config.run.seed, accelerator)
        images = find(folder, config.data.image_size, config.data.channels)
    return replace(control, images=images)


def folders(target: Target, suffix: str) -> tuple[Path, Path]:
    """Of images, and of the records of a streamed attack; those of the attack itself have no suffix."""
    if not suffix:
        return target.generations, target.output.attack / "prompts"
    return target.output.path / f"generations_{suffix}", target.output.attack / f"prompts_{suffix}"
