"""The attacks beyond extraction that a configuration switches on, one after the other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from defenses.errors import UserError
from defenses.ranks import on_main
from eval import captions, copymetrics, denoiser, exposure, finetuning, inpainting, membership, prefilter, risk
from eval.denoiser import Denoiser
from eval.suite import Finding, Scene
from eval.target import pictures_of, timed


def run_parts(scene: Scene) -> dict[str, Finding]:
    """Runs what ``attack`` asks for, on all ranks; part of ``privacy`` in report.json -> what was found.

    A part that does not apply (no weights, no canaries, no extraction to judge) is left out. Risk comes last: it joins the others.
    """
    settings, found = scene.config.attack, {}
    for name, run in PARTS.items():
        if getattr(settings, name) is None:
            continue
        with timed(scene.target.output, f"{name}_seconds", scene.accelerator):
            finding = run(scene)
        if finding is not None:
            found[name] = finding
            if name in ("inpainting", "finetuning"):
                progress = on_main(scene.accelerator, scene.target.output.progress)
                finding.report["seconds"] = progress[f"{name}_seconds"]
    if settings.risk and (scene.extraction is not None or found):
        with timed(scene.target.output, "risk_seconds", scene.accelerator):
            found["risk"] = _risk(scene, found)
    return found


def white_box(target_pipeline: Path | None, settings, shape: tuple[int, int, int], device) -> Denoiser | None:
    """The model for the attacks that look at its weights; None where none of them is on, or there are only generations.

    Raises:
        UserError: it cannot be loaded, or one of the attacks cannot be run on it.
    """
    wanted = (settings.membership, settings.inpainting, settings.finetuning, settings.prefilter)
    if target_pipeline is None or all(part is None for part in wanted):
        return None
    model = denoiser.load(target_pipeline, shape, device)
    if settings.prefilter is not None and model.kind != "caption":
        raise UserError("attack.prefilter", "scores prompts, and this model takes none", "set it to null")
    return model


def _canaries(scene: Scene) -> Finding | None:
    """Exposure of the canaries that the trainer planted (`eval.exposure`); None where it planted none."""
    target = scene.target
    if target.run is None:
        return None
    planted = exposure.measure(
        target.run.path,
        scene.config,
        captions.for_losses(target, scene.config),
        scene.accelerator,
        model=target.pipeline,
        facts=target.facts,
    )
    return planted and Finding(planted.report, {"canaries.csv": (exposure.COLUMNS, planted.table)})


def _copy_metrics(scene: Scene) -> Finding | None:
    """Other metrics of copying on the attack's matches (`eval.copymetrics`)."""
    if scene.extraction is None:
        return None
    config, dataset = scene.config, scene.target.dataset
    matched = {match["generation"] for match in scene.extraction.matches}
    names = [name for _, files in scene.images.groups for name in files if name in matched]
    if not names:  # a prompted attack that flagged nothing, or kept no image
        return None
    generations: np.ndarray = scene.images.read(names, config.data.image_size, config.data.channels)
    splits = [pictures_of(dataset, split) for split in ("train", "heldout", "calibration")]
    report, rows = copymetrics.copy_metrics(
        generations, names, scene.extraction.matches, *splits, config.attack.copy_metrics, scene.accelerator
    )
    return Finding(report, {"copy_metrics.csv": (copymetrics.COLUMNS, rows)})


def _risk(scene: Scene, found: dict[str, Finding]) -> Finding:
    """What all the others found, picture by picture (`eval.risk`)."""
    training = pictures_of(scene.target.dataset, "train")
    rows = {
        name: found[name].tables[f"{name}.csv"][1] if f"{name}.csv" in found[name].tables else []
        for name in ("membership", "inpainting", "copy_metrics")
        if name in found
    }
    copied = (found["copy_metrics"].report, rows["copy_metrics"]) if "copy_metrics" in found else None
    members = rows.get("membership", [])
    table = risk.risk_table(
        training, scene.extraction, members, rows.get("inpainting", []), copied, accelerator=scene.accelerator
    )
    report = risk.risk_report(table, training, members, seed=scene.config.run.seed)
    return Finding(report, {"risk.csv": (risk.COLUMNS, table)})


PARTS: dict[str, Callable[[Scene], Finding | None]] = {
    "membership": membership.run,
    "inpainting": inpainting.run,
    "finetuning": finetuning.run,
    "canaries": _canaries,
    "copy_metrics": _copy_metrics,
    "prefilter": prefilter.run,
}
