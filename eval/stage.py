"""The last stage of a run: generate, attack, measure, report. `run_evaluation` is all that the trainer calls."""

import hashlib
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
from accelerate import Accelerator

from defenses.errors import UserError
from defenses.outputfilter import FOLDER as INDEX_FOLDER
from defenses.ranks import on_main
from eval import captions
from eval.along import along_training
from eval.audit import COLUMNS as CANARIES
from eval.audit import RunAudit, audit_run
from eval.drawing import generate
from eval.extraction import Extraction
from eval.generations import Generations
from eval.measure import attack, downstream_of, quality_of
from eval.parts import PARTS, run_parts, white_box
from eval.report import render
from eval.source import Source
from eval.suite import Finding, Scene
from eval.target import Target, target_of, timed
from train.files import write_csv, write_json
from train.manifest import summary
from train.release import describe, peak_memory
from train.runlog import RunDirectory, hardware, timestamp, versions

MATCHES = ["generation", "record_id", "l2", "adaptive_score", "clique", "verified"]
CLIQUES = [
    "prompt", "generations", "edges", "clique_size", "flagged", "exact", "mean_distance", "medoid", "record_id", "l2", "verified",
    "withheld",
]  # fmt: skip


def run_evaluation(directory: RunDirectory, config: SimpleNamespace, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluates the run in ``directory`` from its files, on all ranks, and writes its reports."""
    return evaluate(target_of(directory, directory, config), config, accelerator)


def evaluate(target: Target, config: SimpleNamespace, accelerator: Accelerator) -> dict[str, Any]:
    """Generates (where there is a pipeline), attacks, measures, writes ``attack/``, ``report.json`` and ``report.html``.

    Returns:
        The contents of report.json.
    """
    output = target.output
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    model = white_box(target.pipeline, config.attack, shape, accelerator.device)  # first: it may be refused
    source, images, bare = generate(target, config, accelerator, model)
    found = Findings(images)
    if config.attack.extraction is not None:
        with timed(output, "attack_seconds", accelerator):
            found.extraction = attack(images, target.dataset, config, accelerator)
        found.extraction.report["sampler"] = sampler_of(source, config) if source else None
        found.extraction.report["seconds"] = on_main(accelerator, lambda: output.progress()["attack_seconds"])
    if target.facts:
        with timed(output, "audit_seconds", accelerator):
            found.audit = audit_run(
                target.run.path,
                config,
                captions.for_losses(target, config),
                accelerator,
                model=target.pipeline,
                facts=target.facts,
            )
    found.parts = run_parts(Scene(target, config, accelerator, model, images, found.extraction))
    with timed(output, "utility_seconds", accelerator):
        found.utility = quality_of(images, target.dataset, config, accelerator)
        if found.utility is not None:
            classes = source.facts["classes"] if source else None
            found.utility |= downstream_of(images, target.dataset, classes, config, accelerator)
    if target.guarded:
        measure_unguarded(found, bare, source, target, config, accelerator)
    if target.facts:
        found.along = along_training(target, config, accelerator, source.prompts if source else [])
    report = on_main(accelerator, lambda: assemble(target, config, source, found, accelerator))
    if accelerator.is_main_process:
        write(target, config, report, found)
    accelerator.wait_for_everyone()
    return report


@dataclass
class Findings:
    """What the evaluation found; a part that was not run is None (``along``: empty)."""

    images: Generations
    extraction: Extraction | None = None
    unguarded: dict[str, Any] | None = None  # privacy.extraction of the same model without the defenses of seam 6
    audit: RunAudit | None = None
    utility: dict[str, Any] | None = None
    parts: dict[str, Finding] = field(default_factory=dict)  # of ``privacy`` in the report, by name
    along: list[dict[str, Any]] = field(default_factory=list)


def measure_unguarded(
    found: Findings,
    images: Generations,
    source: Source,
    target: Target,
    config: SimpleNamespace,
    accelerator: Accelerator,
) -> None:
    """The same attack and quality figures with the guard off, on the bare model's images: what the weights give away."""
    with timed(target.output, "guard_off_seconds", accelerator):
        if config.attack.extraction is not None:
            found.unguarded = attack(images, target.dataset, config, accelerator).report
            found.unguarded["sampler"] = sampler_of(source, config)
        if found.utility is not None:
            found.utility["guard_off"] = quality_of(images, target.dataset, config, accelerator)


def sampler_of(source: Source, config: SimpleNamespace) -> dict[str, Any]:
    """How the images were drawn, as in the report."""
    settings = config.generate
    return source.sampler or {"name": settings.sampler, "steps": settings.steps, "precision": settings.precision}


def assemble(
    target: Target,
    config: SimpleNamespace,
    source: Source | None,
    found: Findings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """report.json, schema 1 (docs: the contract). A part that was not run is None."""
    facts, progress = target.facts, target.output.progress()
    environment = json.loads((target.output.path / "environment.json").read_text())
    stored = (target.output.path / "config.yaml").read_bytes()
    train_seconds = facts.get("train_seconds")
    return {
        "schema": 1,
        "run": {
            "name": config.run.name,
            "started": progress.get("started"),
            "finished": timestamp(),
            "seed": config.run.seed,
            "command": environment["command"],
            "config_sha256": hashlib.sha256(stored).hexdigest(),
            "versions": versions(),
            "hardware": hardware(),
            "world_size": facts.get("world_size", accelerator.num_processes),
        },
        "data": {
            "source": config.data.source,
            **summary(target.dataset),
            "removed_by_dedup": target.removed.get("dedup", 0) if target.facts else None,
            "restricted": config.data.restricted,
            "generations_rejected": found.images.rejected,
        },
        "defenses": with_findings(target, config),
        "model": {**source.facts, "released_step": facts.get("released_step"), "stopped_by": facts.get("stopped_by")}
        if source
        else None,
        "privacy": {
            "extraction": found.extraction.report if found.extraction else None,
            "extraction_guard_off": found.unguarded,
            "captions": captions.report(target, config, source.prompts)
            if source and source.protocol == "prompted"
            else None,
            **dict.fromkeys((*PARTS, "risk")),
            **{name: finding.report for name, finding in found.parts.items()},
            **{name: part for finding in found.parts.values() for name, part in finding.beside.items()},
            "audit": found.audit.report if found.audit else None,
        },
        "utility": found.utility,
        "along": found.along,
        "cost": {
            "train_seconds": train_seconds,
            "images_per_second": facts["images_seen"] / train_seconds if train_seconds else None,
            "generate_seconds": progress.get("generate_seconds"),
            "attack_seconds": progress.get("attack_seconds"),
            **{f"{name}_seconds": progress.get(f"{name}_seconds") for name in found.parts},
            "along_seconds": progress.get("along_seconds"),
            "peak_memory_bytes": max(facts.get("peak_memory_bytes", 0), peak_memory(accelerator)),
        },
    }


def with_findings(target: Target, config: SimpleNamespace) -> list[dict[str, Any]]:
    """The defenses as they were recorded after training, with what those at seam 6 have measured since; of a model of others these
    alone."""
    if target.run is None:
        return [describe(defense, config) for defense in target.defenses]
    later = {defense.name: defense.findings() for defense in target.defenses}
    entries = target.facts.get("defenses", [])
    return [entry | {"findings": entry.get("findings") or later.get(entry["name"])} for entry in entries]


def write(target: Target, config: SimpleNamespace, report: dict[str, Any], found: Findings) -> None:
    """Tables of the attack, then the page, and report.json last: its presence says that the run is complete."""
    output, extraction, audit = target.output, found.extraction, found.audit
    if extraction is not None:
        output.attack.mkdir(exist_ok=True)
        write_csv(output.attack / "matches.csv", MATCHES, extraction.matches)
        if extraction.cliques:
            write_csv(output.attack / "cliques.csv", CLIQUES, extraction.cliques)
    if audit is not None:
        output.attack.mkdir(exist_ok=True)
        write_csv(output.attack / "audit.csv", CANARIES, audit.table)
    for finding in found.parts.values():
        output.attack.mkdir(exist_ok=True)
        for name, (columns, rows) in finding.tables.items():
            write_csv(output.attack / name, columns, rows)
    row_of = {record.record_id: row for row, record in enumerate(target.dataset.records)}
    render(
        output.path,
        report,
        images=lambda record_id: np.asarray(target.dataset.images[row_of[record_id]]),
        restricted=config.data.restricted,
        config=config.report,
        generations=target.generations,
        trained_in=target.run.path if target.run else None,
    )
    if config.report.push_to_hub is not None:
        push(target, config.report.push_to_hub)
    write_json(output.report, report)


def push(target: Target, repository: str) -> None:
    """Uploads the saved model with its card. Nothing else of the run leaves the machine.

    Raises:
        UserError: the hub refuses.
    """
    if target.pipeline is None:
        raise UserError("report.push_to_hub", "there is no model to upload", "set it to null")
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        # an output filter's index holds training pictures
        hub.upload_folder(repo_id=repository, folder_path=target.pipeline, ignore_patterns=[f"{INDEX_FOLDER}/*"])
        hub.upload_file(
            repo_id=repository, path_or_fileobj=target.output.path / "MODEL_CARD.md", path_in_repo="README.md"
        )
    except Exception as error:  # network, rights, names: the hub has many
        raise UserError(
            "report.push_to_hub",
            str(error).splitlines()[0][:300],
            "log in, or set it to null; the same command tries again",
        ) from error
