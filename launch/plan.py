"""A comparison as a plan: which arms there are, what each runs, and which of them share a training."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from defenses.base import Defense
from defenses.errors import UserError
from defenses.registry import CLASSES
from eval.config import check
from launch.settings import SECTIONS, CompareConfig, LauncherConfig, launcher, read
from train import cli
from train import config as configuration

MEASURED_ALIKE = ("generate", "attack", "utility")  # sections in which no arm may differ from the others
NO_TRAINING = (
    "run.name",
    "run.output_dir",
    "run.cpu_threads",
    "train.trackers",
    "generate",
    "attack",
    "utility",
    "report",
)
LATER = [name for name, kind in CLASSES.items() if kind.after_training]  # defenses that need no training of their own


@dataclass(kw_only=True)
class Job:
    """One training, or one evaluation of a training under a defense that needs none of its own.

    Attributes:
        config: typed sections of the arm's run.
        parent: job whose training this one uses, or None.
        command: what starts it, without the launcher.
    """

    arm: str
    seed: int
    config: SimpleNamespace
    directory: Path
    manifest: Path
    command: list[str]
    parent: "Job | None" = None

    @property
    def done(self) -> bool:
        return (self.directory / "report.json").exists()

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclass(kw_only=True)
class Plan:
    """All that a comparison runs. ``jobs`` are in an order in which parents come first."""

    config: CompareConfig
    tree: DictConfig
    folder: Path
    overrides: dict[str, list[str]]  # arm -> its own overrides
    levels: dict[str, Any]  # arm -> value of the varied factor; empty without one
    jobs: list[Job]

    @property
    def reference(self) -> str:
        return self.config.reference or next(iter(self.overrides))

    def of(self, arm: str) -> list[Job]:
        return [job for seed in self.config.seeds for job in self.jobs if (job.arm, job.seed) == (arm, seed)]


def plan(file: Path, given: Sequence[str]) -> Plan:
    """Reads and checks the whole comparison before any work.

    Raises:
        UserError: any arm's configuration is wrong, two arms would be measured differently, a file is missing.
    """
    tree, config, for_runs = read(file, given)
    base = (file.parent / config.base).resolve()
    if not base.is_file():
        raise UserError(
            "base", f"{config.base} does not exist beside {file}", "give a run's YAML, relative to this file"
        )
    levels = (
        {f"{config.factor.key.rsplit('.', 1)[-1]}-{value}": value for value in config.factor.values}
        if config.factor
        else {}
    )
    arms = {name: [f"{config.factor.key}={value}"] for name, value in levels.items()} if config.factor else config.arms
    if config.reference is not None and config.reference not in arms:
        raise UserError("reference", f"{config.reference} is not an arm", f"one of {', '.join(arms)}")
    folder = Path(config.output_dir) / config.name
    jobs = []
    for name, own in arms.items():
        for seed in config.seeds:
            jobs.append(_job(name, seed, base, [*config.overrides, *for_runs, *own], folder))
    _share(jobs)
    _check_alike(jobs, config)
    jobs.sort(key=lambda job: job.parent is not None)  # stable: trainings first, in the order of the arms
    return Plan(config=config, tree=tree, folder=folder, overrides=arms, levels=levels, jobs=jobs)


def _job(arm: str, seed: int, base: Path, overrides: list[str], folder: Path) -> Job:
    name = f"{arm}-s{seed}"
    given = [*overrides, f"run.name={name}", f"run.seed={seed}", f"run.output_dir={folder}"]
    try:
        config = configuration.objects(configuration.load(SECTIONS, base, given))
        check(config)
    except UserError as error:
        raise UserError(f"arms.{arm}: {error.key}", error.problem, error.remedy) from error
    command = ["train/run.py", "--config", _short(base), *given]
    return Job(
        arm=arm,
        seed=seed,
        config=config,
        directory=folder / name,
        manifest=folder / name / "manifest.csv",
        command=command,
    )


def _short(path: Path) -> str:
    """Relative to the repository where it lies inside, so that a command can be given on another machine."""
    return str(path.relative_to(cli.ROOT)) if path.is_relative_to(cli.ROOT) else str(path)


def _share(jobs: list[Job]) -> None:
    """Arms that differ only in defenses that work after training use the training of the arm without them."""
    pure = {_training_key(job): job for job in reversed(jobs) if not _later(job)}
    for job in jobs:
        parent = pure.get(_training_key(job))
        if parent is None or parent is job or not _later(job):
            continue
        _check_checkpoints(job)
        job.parent, job.manifest = parent, parent.manifest
        job.directory = parent.directory / "eval" / job.arm
        own = [text for text in job.command if text.startswith(tuple(f"defenses.{name}" for name in LATER))]
        job.command = ["eval/run.py", f"run_dir={parent.directory}", f"run.name={job.arm}", *own]


def _check_checkpoints(job: Job) -> None:
    """A defense that looks at checkpoints after training finds only those that were kept."""
    watching = [name for name in _later(job) if CLASSES[name].after_checkpoint is not Defense.after_checkpoint]
    if watching and job.config.train.keep_checkpoints is not None:
        raise UserError(
            f"arms.{job.arm}: train.keep_checkpoints",
            f"is {job.config.train.keep_checkpoints}, and {watching[0]} looks at all checkpoints of the training it shares",
            "set it to null in overrides",
        )


def _later(job: Job) -> list[str]:
    return [name for name in LATER if getattr(job.config.defenses, name) is not None]


def _training_key(job: Job) -> str:
    """Equal for two jobs whose trainings give the same weights."""
    leaves = {key: value for key, value in _leaves(job.config).items() if not key.startswith(NO_TRAINING)}
    leaves["report.nonprivate_metrics"] = job.config.report.nonprivate_metrics
    return json.dumps(
        {k: v for k, v in leaves.items() if k.split(".")[:2] not in [["defenses", n] for n in LATER]}, sort_keys=True
    )


def _leaves(config: SimpleNamespace) -> dict[str, Any]:
    """Every setting by its dotted key."""
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for name, child in value.items():
                walk(child, f"{prefix}.{name}".lstrip("."))
        else:
            found[prefix] = value

    walk(
        OmegaConf.to_container(
            OmegaConf.create({name: OmegaConf.structured(part) for name, part in vars(config).items()})
        ),
        "",
    )
    return found


def _check_alike(jobs: list[Job], config: CompareConfig) -> None:
    """Refuses arms that would be measured differently: their difference would not be the defense's."""
    factor = config.factor.key if config.factor else None
    first = _leaves(jobs[0].config)
    sections = MEASURED_ALIKE if factor else (*MEASURED_ALIKE, "data", "model")
    budget = _images_seen(jobs[0])
    for job in jobs[1:]:
        leaves = _leaves(job.config)
        if not factor and _images_seen(job) != budget:
            raise UserError(
                f"arms.{job.arm}: train.steps",
                f"x train.batch_size gives {_images_seen(job)} images seen, {budget} in {jobs[0].arm}: not the same budget",
                "set both for all arms in overrides, or change them together",
            )
        for key in sorted(first.keys() | leaves.keys()):
            free = key == factor or (config.arms and key.startswith("model.family"))
            if not free and key.startswith(sections) and first.get(key) != leaves.get(key):
                raise UserError(
                    f"arms.{job.arm}: {key}",
                    f"is {leaves.get(key)}, {first.get(key)} in {jobs[0].arm}: the arms could not be compared",
                    "set it for all arms in overrides",
                )


def _images_seen(job: Job) -> int:
    return job.config.train.steps * job.config.train.batch_size


def shown(config: LauncherConfig, job: Job) -> str:
    """The command that reproduces a job, as a person would give it."""
    words, environment = launcher(config)
    program = {"accelerate.commands.launch": ["accelerate", "launch"], "torch.distributed.run": ["torchrun"]}[words[2]]
    before = [f"{key}={value}" for key, value in environment.items() if key != "CUDA_VISIBLE_DEVICES"]
    return " ".join([*before, shlex.join([*program, *words[3:], *job.command])])
