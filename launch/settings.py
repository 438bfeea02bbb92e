"""The settings of a comparison, and how its processes are started."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from defenses.errors import UserError
from eval.comparison import UtilityFloor
from eval.config import SECTIONS as EVAL_SECTIONS
from train import cli
from train import config as configuration

SECTIONS = {**configuration.SECTIONS, **EVAL_SECTIONS}  # of a run
OWN_KEYS = ("run.name", "run.seed", "run.output_dir")  # set by the comparison


@dataclass(kw_only=True)
class FactorConfig:
    """One setting that is varied; every value is an arm, named after it."""

    key: str = "???"  # dotted, e.g. data.phantom.copies
    values: list[Any] = field(default_factory=list)


@dataclass(kw_only=True)
class LauncherConfig:
    """How the processes of an arm are started."""

    config_file: str | None = (
        "launch/accelerate/cpu.yaml"  # of Accelerate, relative to the repository; null: Accelerate's own
    )
    processes: int | None = None  # per arm; null: as the file says
    parallel: int = 1  # arms that run side by side
    gpus: list[int] = field(default_factory=list)  # shared out among arms that run side by side; []: all for every arm

    def __post_init__(self):
        for key, value in (("processes", self.processes), ("parallel", self.parallel)):
            if value is not None and value < 1:
                raise UserError(f"launcher.{key}", f"{value} is less than 1", "take a positive number")
        if self.gpus and len(self.gpus) % self.parallel:
            raise UserError(
                "launcher.gpus",
                f"{len(self.gpus)} GPUs cannot be shared out among {self.parallel} arms",
                "change either",
            )
        share = len(self.gpus) // self.parallel
        if self.gpus and self.processes is not None and self.processes != share:
            raise UserError(
                "launcher.processes", f"{self.processes} for {share} GPUs per arm", "null: a process for each GPU"
            )
        if self.config_file is not None and not (cli.ROOT / self.config_file).is_file():
            raise UserError("launcher.config_file", f"{self.config_file} does not exist", "see launch/accelerate/")


@dataclass(kw_only=True)
class CompareConfig:
    """A comparison: a base configuration, arms as overrides of it, seeds."""

    name: str = "???"  # folder inside output_dir
    output_dir: str = "runs"
    base: str = "???"  # a run's YAML, relative to the comparison's own file
    overrides: list[str] = field(default_factory=list)  # key=value for every arm
    arms: dict[str, list[str]] = field(default_factory=dict)  # name -> key=value
    factor: FactorConfig | None = None  # vary one setting instead of naming arms
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # run.seed of every arm, one training each
    reference: str | None = None  # arm that the others are held against; null: the first
    floor: UtilityFloor = field(default_factory=UtilityFloor)  # arms below this utility are "not comparable"
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    select: str | None = None  # arm to export, ready to use, from a finished comparison

    def __post_init__(self):
        for name in (self.name, *self.arms):
            # letters first, and nothing that YAML takes for something else (off, no): it is passed as run.name=NAME
            plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name) and isinstance(yaml.safe_load(name), str)
            if not plain and name != "???":
                raise UserError(
                    "arms" if name in self.arms else "name",
                    f"{name!r} is not a plain folder name",
                    "a letter, then letters, digits, - and _",
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds", f"{self.seeds} are not distinct seeds", "e.g. [0, 1, 2]")
        if (self.factor is None) == (not self.arms):
            raise UserError("arms", "and factor exclude each other, and one is needed", "give either")
        if self.factor is not None and len({str(value) for value in self.factor.values}) < 2:
            raise UserError("factor.values", f"{self.factor.values} has no two different values", "e.g. [1, 4, 16]")


def read(file: Path, given: Sequence[str]) -> tuple[DictConfig, CompareConfig, list[str]]:
    """The comparison's own settings, and the overrides that are for every arm.

    A key of a run's section (``data.source=…``) goes to every arm, any other to the comparison.
    """
    for_runs = [text for text in given if text.partition("=")[0].split(".")[0] in SECTIONS]
    for key in (text.partition("=")[0] for text in for_runs):
        if key in OWN_KEYS:
            raise UserError(key, "is set by the comparison", "use name, seeds or output_dir")
    tree = configuration.merge(
        OmegaConf.structured(CompareConfig), file, [text for text in given if text not in for_runs]
    )
    config = configuration.objects(OmegaConf.create({"comparison": tree})).comparison
    return tree, config, for_runs


def launcher(config: LauncherConfig, slot: int = 0) -> tuple[list[str], dict[str, str]]:
    """What comes before an arm's command, and what is set in its environment."""
    environment, processes = {}, config.processes
    if config.gpus:
        share = processes = len(config.gpus) // config.parallel
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.gpus[slot * share : (slot + 1) * share]))
    if (
        _on_cpu(config) and (config.processes or 1) > 1
    ):  # accelerate starts several processes without GPUs only through MPI
        environment["ACCELERATE_USE_CPU"] = "true"
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(config.processes),
        ], environment
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    words += ["--config_file", str(cli.ROOT / config.config_file)] if config.config_file else []
    words += ["--gpu_ids", "all"] if config.gpus else []  # a launch file's gpu_ids would win over the environment
    words += ["--num_processes", str(processes)] if processes else []
    words += ["--main_process_port", "0"] if config.parallel > 1 and not _on_cpu(config) else []  # a free one
    return words, environment


def _on_cpu(config: LauncherConfig) -> bool:
    return config.config_file is not None and bool(OmegaConf.load(cli.ROOT / config.config_file).get("use_cpu"))
