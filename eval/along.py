"""Privacy and quality along training: the attack on earlier checkpoints, with the samples, the sampler and the rules of the end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator

from defenses.ranks import on_main
from eval import samples
from eval.generations import find
from eval.measure import attack, quality_of
from eval.source import load
from eval.target import Target, timed
from train.checkpoint import all_steps
from train.files import write_json
from train.release import checkpoint_pipeline

# What is kept of ``privacy.extraction``: the settings and the sampler are those of the report itself.
KEPT = ("generations", "candidates", "verified", "verified_units", "rate", "rate_ci95", "at_l2", "control", "by_copies")


def along_training(
    target: Target, config: SimpleNamespace, accelerator: Accelerator, prompts: list[str]
) -> list[dict[str, Any]]:
    """Figures of the checkpoints in ``report.along`` other than the released one, ascending by step.

    Args:
        prompts: those of the released model, of text-to-image models.


    A step that training did not reach, because a defense ended it, is left out. What is finished stays in
    ``along/step-N/figures.json``; generated images and weights of a step are removed when it is.
    """
    if not config.report.along:
        return []
    steps = on_main(accelerator, lambda: all_steps(target.run.checkpoints))
    wanted = [step for step in sorted(config.report.along) if step in steps and step != target.facts["released_step"]]
    return [_figures(target, config, step, accelerator, prompts) for step in wanted]


def _figures(
    target: Target, config: SimpleNamespace, step: int, accelerator: Accelerator, prompts: list[str]
) -> dict[str, Any]:
    folder = target.output.path / "along" / f"step-{step}"
    done = folder / "figures.json"
    model, generations = folder / "model", folder / "generations"
    if on_main(accelerator, done.exists):
        on_main(accelerator, lambda: remove(model, generations))
        return json.loads(done.read_text())
    with timed(target.output, "along_seconds", accelerator):
        facts = on_main(accelerator, lambda: checkpoint_pipeline(config, target.run, step, model))
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        source = load(model, config.generate, config.run.seed, shape, accelerator.device)
        samples.generate(source, generations, config.generate, prompts, config.run.seed, accelerator)
        images = find(generations, config.data.image_size, config.data.channels)
        extraction = None
        if config.attack.extraction is not None:
            report = attack(images, target.dataset, config, accelerator).report
            extraction = {key: report[key] for key in KEPT}
        utility = quality_of(images, target.dataset, config, accelerator)
    result = {"step": step, "images_seen": facts["images_seen"], "extraction": extraction, "utility": utility}
    if accelerator.is_main_process:
        write_json(done, result)
        remove(model, generations)
    accelerator.wait_for_everyone()
    return result


def remove(*folders: Path) -> None:
    """Removes what the figures were made from, also where a kill came in between."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
