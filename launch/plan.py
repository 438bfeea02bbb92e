"""A comparison as a plan: which arms there are, what each runs, and which of them share a training."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from defenses.base import Defense
from defenses.errors import UserError
from defenses.registry import CLASSES
from eval.config import check
from launch.settings import OWN_KEYS, SECTIONS, CompareConfig, FactorConfig, LauncherConfig, launcher, read
from train import cli
from train import config as configuration
from train.runlog import NO_RESULT, leaves

MEASURED_ALIKE = ("generate", "attack", "utility", "report.along")  # in which no arm may differ from the others
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
    tree: DictConfig  # the same, interpolations unresolved
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
    written = OmegaConf.to_container(tree, resolve=False)  # ${oc.env:TOKEN} stays a name: the arm resolves it
    base = (file.parent / config.base).resolve()
    if not base.is_file():
        raise UserError(
            "base", f"{config.base} does not exist beside {file}", "give a run's YAML, relative to this file"
        )
    levels = levels_of(config.factor) if config.factor else {}
    arms = {name: [f"{config.factor.key}={value}"] for name, value in levels.items()} if levels else written["arms"]
    for key in ("reference", "select"):
        if getattr(config, key) is not None and getattr(config, key) not in arms:
            raise UserError(key, f"{getattr(config, key)} is not an arm", f"one of {', '.join(arms)}")
    folder = Path(config.output_dir).absolute() / config.name
    jobs = []
    for name, own in arms.items():
        for seed in config.seeds:
            jobs.append(_job(name, seed, base, [*written["overrides"], *for_runs, *own], folder))
    _share(jobs)
    _check_alike(jobs, config)
    for job in jobs:
        _refuse_stale(job)
    jobs.sort(key=lambda job: job.parent is not None)  # stable: trainings first, in the order of the arms
    return Plan(config=config, tree=tree, folder=folder, overrides=arms, levels=levels, jobs=jobs)


def levels_of(factor: FactorConfig) -> dict[str, Any]:
    """Name of an arm for every value of the factor."""
    if factor.key.split(".")[0] not in SECTIONS:
        raise UserError("factor.key", f"{factor.key} is no setting of a run", "e.g. data.phantom.copies")
    if any(value is None for value in factor.values):
        raise UserError("factor.values", "null is no level", "name the arms instead")
    return {f"{factor.key.rsplit('.', 1)[-1]}-{value}": value for value in factor.values}


def _job(arm: str, seed: int, base: Path, overrides: list[str], folder: Path) -> Job:
    name = f"{arm}-s{seed}"
    for key in (text.partition("=")[0] for text in overrides):
        if key in OWN_KEYS:
            raise UserError(f"arms.{arm}: {key}", "is set by the comparison", "use name, seeds or output_dir")
    given = [*overrides, f"run.name={name}", f"run.seed={seed}", f"run.output_dir={folder}"]
    try:
        tree = configuration.load(SECTIONS, base, given)
        config = configuration.objects(tree)
        model = config.model
        if model.family == "latent" and model.pretrained is None and model.scratch.autoencoders is None:
            given.append(f"model.scratch.autoencoders={folder / 'autoencoders'}")  # one for all arms of a seed
            tree = configuration.load(SECTIONS, base, given)
            config = configuration.objects(tree)
        check(config)
    except UserError as error:
        raise UserError(f"arms.{arm}: {error.key}", error.problem, error.remedy) from error
    if (config.run.name, config.run.output_dir) != (name, str(folder)):
        raise UserError(
            "output_dir", f"{folder}/{name} is read as something else in YAML", "take plain letters and digits"
        )
    if config.report.push_to_hub is not None:
        raise UserError(
            f"arms.{arm}: report.push_to_hub",
            "would upload every arm and seed to one place",
            "set it to null; export one with select=ARM and publish that",
        )
    command = [str(cli.ROOT / "train" / "run.py"), "--config", str(base), *given]
    directory = folder / name
    manifest = directory / "manifest.csv"
    return Job(arm=arm, seed=seed, config=config, tree=tree, directory=directory, manifest=manifest, command=command)


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
        names = [f"run_dir={parent.directory}", f"run.name={job.arm}"]
        job.command = [str(cli.ROOT / "eval" / "run.py"), *names, *_own(job, parent)]


def _own(job: Job, parent: Job) -> list[str]:
    """What a shared arm sets differently from its parent: its defenses, and what its report shows.

    From the typed settings, not from how they were written: they may stand in the base, or as one mapping.
    """
    own = [f"defenses.{name}={_flow(getattr(job.config.defenses, name))}" for name in _later(job)]
    mine, theirs = vars(job.config.report), vars(parent.config.report)
    return own + [f"report.{key}={_flow(value)}" for key, value in mine.items() if value != theirs[key]]


def _flow(value: Any) -> str:
    """A setting in YAML on one line; of a section only what differs from its defaults."""
    if is_dataclass(value):
        default = asdict(type(value)())
        value = {key: item for key, item in asdict(value).items() if item != default[key]}
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _refuse_stale(job: Job) -> None:
    """A finished arm is kept only if it was made with the settings that are given now.

    Settings that an older version did not have, or that this one has no longer, are not compared.
    """
    stored = job.directory / "config.yaml"
    if not job.done or not stored.exists():
        return
    then, now = (leaves(OmegaConf.to_container(tree)) for tree in (OmegaConf.load(stored), job.tree))
    here = ("data", "model", "train", "defenses", "generate", "attack", "utility", "report", "run.seed")
    if job.parent:  # an evaluation's own file repeats what the training had
        here = tuple(f"defenses.{name}" for name in LATER) + ("generate", "attack", "utility")
    for key in sorted(then.keys() | now.keys()):
        if not key.startswith(here) or key.startswith(NO_RESULT) or not _told_by_both(key, then, now):
            continue
        if then.get(key) != now.get(key):
            raise UserError(
                f"arms.{job.arm}: {key}",
                f"{job.directory} was made with {then.get(key)!r}, now {now.get(key)!r}",
                "give the same settings, or choose another name",
            )


def _told_by_both(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a setting stands in both, or is a section that is switched off in one and on in the other."""
    parts = key.split(".")
    above = {".".join(parts[:length]) for length in range(1, len(parts))}
    missing = other if key in one else one
    return (
        (key in one and key in other)
        or bool(above & missing.keys())
        or any(name.startswith(f"{key}.") for name in missing)
    )


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
    return leaves(
        OmegaConf.to_container(
            OmegaConf.create({name: OmegaConf.structured(part) for name, part in vars(config).items()})
        )
    )


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
    """The command that reproduces a job, as a person in the repository's folder would give it."""
    words, environment = launcher(config)
    program = {"accelerate.commands.launch": ["accelerate", "launch"], "torch.distributed.run": ["torchrun"]}[words[2]]
    before = [f"{key}={value}" for key, value in environment.items() if key != "CUDA_VISIBLE_DEVICES"]
    return " ".join([*before, shlex.join(_near(word) for word in [*program, *words[3:], *job.command])])


def _near(word: str) -> str:
    """Without the path of the repository, or of this folder."""
    key, equals, value = word.rpartition("=")
    for folder in (cli.ROOT, Path.cwd()):
        if Path(value).is_absolute() and Path(value).is_relative_to(folder):
            return f"{key}{equals}{Path(value).relative_to(folder)}"
    return word
