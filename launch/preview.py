"""``--dry-run`` of a comparison: the whole plan, and what it will cost, measured by a few steps of every training on this machine."""

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from defenses import registry
from defenses.base import Defense
from eval.wording import duration
from launch.plan import Job, Plan, shown
from train import cli, families, textstage
from train.data import prepare
from train.diffusion import noise_schedule
from train.dryrun import disk_bytes, gib, prompt_counts
from train.loop import Trainer
from train.records import class_names, select_records
from train.runlog import RunDirectory
from train.stage import build_trainer

TIMED_STEPS = 2  # optimizer steps that are timed, after one that warms up
SAMPLED = 8, 2  # images and steps of the sampling that is timed


@dataclass
class Cost:
    """Of one training with its evaluation, on one process of this machine."""

    step_seconds: float
    forward_seconds: float  # of the network, per image
    disk_bytes: int
    captions: tuple[int, int] = (0, 0)  # `train.dryrun.prompt_counts` of a text-to-image model


def show(whole: Plan) -> int:
    """Prints arms, trainings that are shared, what is done already, commands, expected time and disk; returns 0."""
    print(OmegaConf.to_yaml(whole.tree))  # unresolved: an ${oc.env:TOKEN} stays a name
    first = whole.jobs[0].config
    accelerator = cli.start(first)
    costs = {
        job.arm: measure(job, accelerator)
        for job in whole.jobs
        if job.parent is None and job.seed == whole.config.seeds[0]
    }
    for note in not_comparable(whole):
        print(f"note: {note}")
    total, disk = 0.0, 0
    for job in whole.jobs:
        cost = costs[job.parent.arm if job.parent else job.arm]
        seconds = expected_seconds(job, cost)
        state = "done" if job.done else "to do"
        use = f"uses the training of {job.parent.label}" if job.parent else "trains"
        print(f"{job.label}: {use}, {state}, about {duration(seconds)}\n  {shown(whole.config.launcher, job)}")
        if not job.done:
            total, disk = total + seconds, disk + (cost.disk_bytes if job.parent is None else 0)
    trainings = sum(job.parent is None for job in whole.jobs)
    print(
        f"{len(whole.overrides)} arms x {len(whole.config.seeds)} seeds: {len(whole.jobs)} results from {trainings} trainings"
    )
    print(
        f"still to do: about {duration(total / whole.config.launcher.parallel / (whole.config.launcher.processes or 1))}, "
        f"{gib(disk)} in {whole.folder} ({gib(shutil.disk_usage(existing(whole.folder)).free)} free)"
    )
    print(
        "(timed by a few steps of one process here; copy search, attack and what defenses draw for themselves come on top)"
    )
    return 0


def not_comparable(whole: Plan) -> list[str]:
    """Arms that may run, but whose counts will not be compared (`eval.alike.asked_otherwise`): their prompts follow the arm."""
    found, reference = [], whole.of(whole.reference)[0]
    for job in (whole.of(arm)[0] for arm in whole.overrides if arm != whole.reference):
        generate, attack = job.config.generate, job.config.attack
        if not families.of(job.config.model).captioned or generate.prompts is not None:
            continue
        if attack.captions == "trained" and rewriting(job) != rewriting(reference):
            why = "attack.captions=trained asks it with captions of its own; original asks all arms alike"
        elif generate.order == "prefilter" and (job.parent or job) is not (reference.parent or reference):
            why = (
                "generate.order=prefilter asks it the prompts that it scores highest itself; copies asks all arms alike"
            )
        else:
            continue
        found.append(f"{job.arm} will not be comparable: {why}")
    return found


def rewriting(job: Job) -> dict[str, Any]:
    """Settings of the defenses that rewrite captions before training."""
    kinds = {name for name, kind in registry.CLASSES.items() if kind.rewrite is not Defense.rewrite}
    return {name: setting for name in kinds if (setting := getattr(job.config.defenses, name)) is not None}


def existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    return next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())


def expected_seconds(job: Job, cost: Cost) -> float:
    """Training, and the images of every checkpoint that is attacked."""
    generate, later = job.config.generate, len(job.config.report.along) if job.parent is None else 0
    count = generate.count
    if families.of(job.config.model).captioned:
        count = sum(generate.planned(*cost.captions)) * generate.per_prompt
    images = count * generate.steps * (1 + later) * cost.forward_seconds
    return images + (cost.step_seconds * job.config.train.steps if job.parent is None else 0.0)


def measure(job: Job, accelerator: Accelerator) -> Cost:
    """Builds the arm in a folder that is removed again, and times a few steps."""
    config = job.config
    folder = tempfile.mkdtemp(prefix="deffuse-compare-")
    try:
        directory = RunDirectory(replace(config.run, output_dir=folder))
        directory.path.mkdir(parents=True)
        dataset = prepare(config.data, directory.prepared, accelerator)
        defenses = registry.build(config.defenses)
        select_records(config, dataset, defenses, accelerator)
        trainer = build_trainer(
            config,
            dataset,
            directory,
            accelerator,
            defenses,
            class_names(dataset, config.data.label_key),
            rehearsal=True,
        )
        disk = disk_bytes(config, dataset, defenses, trainer.state.model)
        disk += textstage.cache_bytes(config, dataset, defenses, trainer.state.model)
        captions = prompt_counts(config, dataset) if families.of(config.model).captioned else (0, 0)
        return Cost(step_seconds(trainer), forward_seconds(trainer, config), disk, captions)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def step_seconds(trainer: Trainer) -> float:
    trainer.step()  # encodes what a cache would hold; the batch stays the same
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.step()
    return (time.perf_counter() - started) / TIMED_STEPS


def forward_seconds(trainer: Trainer, config: SimpleNamespace) -> float:
    """Seconds per image and step of the sampler."""
    count, steps = SAMPLED
    family, schedule = families.of(config.model), noise_schedule(config.train.diffusion)
    model = family.released(trainer.state.model)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    labels = torch.zeros(count, dtype=torch.int64) if config.data.label_key else None
    prompts = [""] * count if family.captioned else None
    options = replace(config.generate, steps=steps)

    def draw() -> None:
        conditions = {"labels": labels, "prompts": prompts}
        family.sample(
            model, schedule, options, range(count), shape, seed=0, precision=config.generate.precision, **conditions
        )

    draw()
    started = time.perf_counter()
    draw()
    return (time.perf_counter() - started) / (count * steps)
