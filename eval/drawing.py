"""The images that are attacked: of the model, of the model without its guard, and of captions that it never saw."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from defenses.errors import UserError
from eval import captioncontrol, captions, samples
from eval.captioncontrol import CaptionControl
from eval.denoiser import Denoiser
from eval.generations import Generations, find
from eval.prefilter import prompt_scores
from eval.stream import stream
from eval.target import Target, sampling_context, timed

CONTROL = "control"  # suffix of the folders of images and records of held-out captions
BARE = "guard_off"  # and of those without the defenses of seam 6


def generate(
    target: Target, config: SimpleNamespace, accelerator: Accelerator, model: Denoiser | None = None
) -> tuple[samples.Source | None, Generations, Generations | None]:
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
        source = samples.load(
            target.pipeline, config.generate, config.run.seed, (channels, size, size), accelerator.device
        )
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
        asked = source  # the control first: a defense reports of the last source that it guards
        if target.guarded and control is not None and control.prompts:
            asked = guard(source, target, config, accelerator, CONTROL)
        control = draw_control(asked, control, "", target, config, accelerator)
        if target.guarded:
            source = guard(source, target, config, accelerator)
        images = draw(source, "", target, config, accelerator)
        images.control = control
    return source, images, bare


def guard(
    source: samples.Source, target: Target, config: SimpleNamespace, accelerator: Accelerator, apart: str | None = None
) -> samples.Source:
    """The source behind the defenses of seam 6.

    Args:
        apart: folder in ``attack/`` for the records that they keep; None: where they keep those of the attack.
    """
    guarded, context = replace(source), sampling_context(target, config, accelerator)
    if apart is not None:
        context = replace(context, records=target.output.attack / apart)
    samples.wrap(guarded, target.defenses, replace(context, text_model=source.text_model))
    return guarded


def draw(
    source: samples.Source, suffix: str, target: Target, config: SimpleNamespace, accelerator: Accelerator
) -> Generations:
    """Images of one source; with ``generate.keep=flagged`` attacked at once, records in ``attack/``."""
    folder, records = folders(target, suffix)
    if config.generate.keep == "flagged":
        return stream(source, folder, records, source.prompts, target.dataset, config, accelerator)
    samples.generate(source, folder, config.generate, source.prompts, config.run.seed, accelerator)
    return find(folder, config.data.image_size, config.data.channels)


def draw_control(
    source: samples.Source,
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
    try:
        if config.generate.keep == "flagged":
            images = stream(source, folder, records, prompts, target.dataset, held, accelerator, split="heldout")
        else:
            samples.generate(source, folder, held.generate, prompts, config.run.seed, accelerator)
            images = find(folder, config.data.image_size, config.data.channels)
    except UserError as error:
        if error.key != "generations":
            raise
        images = Generations(folder, [], {})  # a defense withheld every one: nothing to attack
    return replace(control, images=images)


def folders(target: Target, suffix: str) -> tuple[Path, Path]:
    """Of images, and of the records of a streamed attack; those of the attack itself have no suffix."""
    if not suffix:
        return target.generations, target.output.attack / "prompts"
    return target.output.path / f"generations_{suffix}", target.output.attack / f"prompts_{suffix}"
