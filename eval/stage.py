"""The last stage of a run: generate, attack, measure, report. `run_evaluation` is all that the trainer calls."""

import csv
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
from accelerate import Accelerator

from defenses import registry
from defenses.base import Defense, SamplingContext
from defenses.errors import UserError
from defenses.ranks import on_main
from eval import samples
from eval.audit import COLUMNS as CANARIES
from eval.audit import RunAudit, audit_run
from eval.downstream import Labelled, labels_of_generations, measure_downstream, not_measured
from eval.extraction import Extraction, Pictures, check_tier, untargeted
from eval.prompted import prompted
from eval.quality import measure
from eval.report import render
from train.data import Dataset
from train.files import write_csv, write_json
from train.manifest import summary
from train.records import pool_of
from train.runlog import RunDirectory, hardware, timestamp, versions
from train.stage import RECORD, peak_memory

MATCHES = ["generation", "record_id", "l2", "adaptive_score", "clique", "verified"]
CLIQUES = [
    "prompt", "generations", "edges", "clique_size", "flagged", "exact", "mean_distance", "medoid", "record_id", "l2", "verified",
]  # fmt: skip


@dataclass
class Target:
    """What is evaluated, and where the results go.

    Attributes:
        output: run directory, or a folder of its own for a second evaluation.
        pipeline: saved pipeline to sample; None where ``generations`` were made by somebody else.
        generations: folder of the images.
        facts: contents of the pipeline's sidecar (see `train.stage.release`); empty for foreign models.
        removed: records that each defense took out of training.
    """

    output: RunDirectory
    dataset: Dataset
    pipeline: Path | None
    generations: Path
    facts: dict[str, Any] = field(default_factory=dict)
    defenses: list[Defense] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)


def run_evaluation(directory: RunDirectory, config: SimpleNamespace, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluates the run in ``directory`` from its files, on all ranks, and writes its reports."""
    return evaluate(target_of(directory, directory, config), config, accelerator)


def target_of(directory: RunDirectory, output: RunDirectory, config: SimpleNamespace) -> Target:
    """A finished run as something to evaluate; ``output`` is where the results go."""
    with directory.manifest.open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file) if row["kept"] == "false" and row["split"] == "train"]
    removed: dict[str, int] = {}
    for reason in reasons:
        name = reason.partition(":")[0]
        removed[name] = removed.get(name, 0) + 1
    facts = json.loads((directory.path / RECORD).read_text())
    defenses = registry.build(config.defenses)
    for defense in defenses:
        if defense.name in facts["defense_states"]:
            defense.load_state_dict(facts["defense_states"][defense.name])
    dataset = Dataset.load(directory.prepared)
    return Target(output, dataset, directory.model, output.generations, facts, defenses, removed)


def evaluate(target: Target, config: SimpleNamespace, accelerator: Accelerator) -> dict[str, Any]:
    """Generates (where there is a pipeline), attacks, measures, writes ``attack/``, ``report.json`` and ``report.html``.

    Returns:
        The contents of report.json.
    """
    output, shape = target.output, (config.data.channels, config.data.image_size, config.data.image_size)
    source, sampler = None, None
    if target.pipeline is not None:
        with timed(output, "generate_seconds", accelerator):
            source = samples.load(target.pipeline, config.generate, config.run.seed, shape, accelerator.device)
            samples.wrap(source, target.defenses, sampling_context(target, config, accelerator))
            prompts = samples.prompts_of(config.generate, target.dataset) if source.protocol == "prompted" else []
            samples.generate(source, target.generations, config.generate, prompts, config.run.seed, accelerator)
        sampler = {
            "name": config.generate.sampler,
            "steps": config.generate.steps,
            "precision": config.generate.precision,
        }
    images = samples.find(target.generations, config.data.image_size, config.data.channels)
    extraction = None
    if config.attack.extraction is not None:
        with timed(output, "attack_seconds", accelerator):
            extraction = attack(images, target.dataset, config, accelerator)
            extraction.report |= {"sampler": sampler}
        extraction.report["seconds"] = on_main(accelerator, lambda: output.progress()["attack_seconds"])
    audit = None
    if target.facts:
        with timed(output, "audit_seconds", accelerator):
            audit = audit_run(target.pipeline.parent, config, target.dataset, accelerator)
    with timed(output, "utility_seconds", accelerator):
        classes = source.facts["classes"] if source else None
        utility = measure_utility(images, target.dataset, classes, config, accelerator)
    report = on_main(
        accelerator, lambda: assemble(target, config, source, images, extraction, audit, utility, accelerator)
    )
    if accelerator.is_main_process:
        write(target, config, report, extraction, audit)
    accelerator.wait_for_everyone()
    return report


def sampling_context(target: Target, config: SimpleNamespace, accelerator: Accelerator) -> SamplingContext:
    """What defenses at seam 6 may use: all training records, those that a defense removed among them."""
    pool = replace(pool_of(target.dataset, config.run.seed), rows=target.dataset.rows("train"))
    return SamplingContext(pool, target.dataset.rows("calibration"), target.pipeline, accelerator)


@contextmanager
def timed(output: RunDirectory, stage: str, accelerator: Accelerator) -> Iterator[None]:
    """Adds the block's wall-clock seconds to the stage's record."""
    started = time.perf_counter()
    yield
    accelerator.wait_for_everyone()
    output.add_seconds(stage, time.perf_counter() - started)


def pictures_of(dataset: Dataset, split: str) -> Pictures | None:
    """All usable records of one split, those that a defense removed among them; None where it is empty."""
    rows = dataset.rows(split)
    if not len(rows):
        return None
    records = [dataset.records[row] for row in rows]
    return Pictures(
        images=dataset.images[rows[0] : rows[-1] + 1] if len(rows) == rows[-1] - rows[0] + 1 else dataset.images[rows],
        record_id=[record.record_id for record in records],
        picture=np.array([record.cluster for record in records], dtype=np.int64),
        block=np.array([record.block for record in records], dtype=np.int64),
        group=[record.group for record in records],
        copies=np.array([record.copies for record in records], dtype=np.int64),
    )


def attack(
    images: samples.Generations, dataset: Dataset, config: SimpleNamespace, accelerator: Accelerator
) -> Extraction:
    """The extraction attack in the protocol that fits: prompted where generations are grouped by prompt."""
    settings = config.attack.extraction
    training, heldout = pictures_of(dataset, "train"), pictures_of(dataset, "heldout")
    size, channels = config.data.image_size, config.data.channels
    options = {"exchangeable": config.data.exchangeable(), "seed": config.run.seed}
    protocol = settings.protocol if settings.protocol != "auto" else ("prompted" if images.prompted else "untargeted")
    if protocol == "prompted":
        if not images.prompted:
            raise UserError("attack.extraction.protocol", "prompted needs a folder of images per prompt", "use auto")
        sizes = [len(files) for _, files in images.groups]
        check_tier(settings, sum(sizes), len(sizes), min(sizes))
        groups = ((name, files, partial(images.read, files, size, channels)) for name, files in images.groups)
        return prompted(groups, training, heldout, settings, accelerator, **options)
    names = [name for _, files in images.groups for name in files]
    check_tier(settings, len(names))
    return untargeted(
        images.read(names, size, channels), training, heldout, settings, accelerator, names=names, **options
    )


def measure_utility(
    images: samples.Generations,
    dataset: Dataset,
    classes: list[str] | None,
    config: SimpleNamespace,
    accelerator: Accelerator,
) -> dict[str, Any] | None:
    """Image quality against held-out pictures, and use for a classifier; None without held-out pictures.

    Args:
        classes: labels that the model was conditioned on; none for other models.
    """
    rows = dataset.rows("heldout")
    if not len(rows):
        return None
    names = [name for _, files in images.groups for name in files]
    generated = images.read(names, config.data.image_size, config.data.channels)
    quality = measure(
        generated, dataset.images[rows], config.utility, accelerator.device, config.run.seed, accelerator=accelerator
    )
    if config.utility.downstream is None:
        return quality | not_measured("it is switched off (utility.downstream)")
    if not classes:
        return quality | not_measured("the generations have no known classes")
    labelled = Labelled(generated, labels_of_generations(images.folder, names, len(classes)))
    return quality | measure_downstream(labelled, dataset, classes, config.utility.downstream, accelerator)


def assemble(
    target: Target,
    config: SimpleNamespace,
    source: samples.Source | None,
    images: samples.Generations,
    extraction: Extraction | None,
    audit: RunAudit | None,
    utility: dict[str, Any] | None,
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
            "generations_rejected": images.rejected,
        },
        "defenses": target.facts.get("defenses", []),
        "model": {**source.facts, "released_step": facts.get("released_step"), "stopped_by": facts.get("stopped_by")}
        if source
        else None,
        "privacy": {
            "extraction": extraction.report if extraction else None,
            "membership": None,
            "inpainting": None,
            "canaries": None,
            "audit": audit.report if audit else None,
        },
        "utility": utility,
        "cost": {
            "train_seconds": train_seconds,
            "images_per_second": facts["images_seen"] / train_seconds if train_seconds else None,
            "generate_seconds": progress.get("generate_seconds"),
            "attack_seconds": progress.get("attack_seconds"),
            "peak_memory_bytes": max(facts.get("peak_memory_bytes", 0), peak_memory(accelerator)),
        },
    }


def write(
    target: Target,
    config: SimpleNamespace,
    report: dict[str, Any],
    extraction: Extraction | None,
    audit: RunAudit | None,
) -> None:
    """Tables of the attack, then the page, and report.json last: its presence says that the run is complete."""
    output = target.output
    if extraction is not None:
        output.attack.mkdir(exist_ok=True)
        write_csv(output.attack / "matches.csv", MATCHES, extraction.matches)
        if extraction.cliques:
            write_csv(output.attack / "cliques.csv", CLIQUES, extraction.cliques)
    if audit is not None:
        output.attack.mkdir(exist_ok=True)
        write_csv(output.attack / "audit.csv", CANARIES, audit.table)
    row_of = {record.record_id: row for row, record in enumerate(target.dataset.records)}
    render(
        output.path,
        report,
        images=lambda record_id: np.asarray(target.dataset.images[row_of[record_id]]),
        restricted=config.data.restricted,
        config=config.report,
        generations=target.generations,
        trained_in=target.pipeline.parent if target.facts else None,
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
        hub.upload_folder(repo_id=repository, folder_path=target.pipeline)
        hub.upload_file(
            repo_id=repository, path_or_fileobj=target.output.path / "MODEL_CARD.md", path_in_repo="README.md"
        )
    except Exception as error:  # network, rights, names: the hub has many
        raise UserError(
            "report.push_to_hub",
            str(error).splitlines()[0][:300],
            "log in, or set it to null; the same command tries again",
        ) from error
