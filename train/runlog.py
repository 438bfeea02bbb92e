"""The run directory: its layout, its log of metrics, its record of what is done."""

import fcntl
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from defenses.errors import UserError
from train.files import atomic, write_json


@dataclass(kw_only=True)
class RunConfig:
    """Section ``run``."""

    name: str = "quickstart"  # folder inside output_dir
    output_dir: str = "runs"
    seed: int = 0  # of initial weights, batches, noise and generated images; the split has data.split_seed
    cpu_threads: int | None = (
        None  # per process, without a GPU; null: OMP_NUM_THREADS, or the cores shared among the processes (`train.cli.start`)
    )

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise UserError("run.name", f"{self.name!r} is not a plain folder name", "use letters, digits, - and _")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise UserError("run.cpu_threads", f"{self.cpu_threads} is less than 1", "null takes all cores")


# Keys that may differ when a run is resumed: they change no number. (Where the data lie is checked by their content.)
# These may change while training is not finished: the ledger books every step with the settings it was made with.
WHILE_TRAINING = tuple(
    f"defenses.dpsgd.{name}"
    for name in "epsilon noise_multiplier delta clip_norm sample_rate batch_size multiplicity backend physical_batch test_seed".split()
)
# Attacks on the finished model: they may be switched and changed until the report is written. What they keep carries its settings.
BEFORE_THE_REPORT = tuple(
    f"attack.{name}"
    for name in ("membership", "inpainting", "finetuning", "canaries", "copy_metrics", "prefilter", "risk")
)
# What there is before training has left anything: while it is all, any setting may change. What was prepared is checked by its own
# digest (`train/data.py`); the table of canaries (`defenses/canaries.py`) goes with the settings that it was drawn for.
PREPARATION = ("config.yaml", "environment.json", "progress.json", "manifest.csv", "prepared", "audit", ".lock")
NO_RESULT = (
    "run.output_dir", "run.cpu_threads", "data.source", "data.heldout_source", "model.scratch.autoencoders", "train.trackers",
    "run_dir",
)  # fmt: skip
LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "opacus",
    "dp-accounting",
    "peft",
    "datasets",
    "omegaconf",
    "torch-fidelity",
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide the numbers; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, memory and accelerators of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": memory, "accelerators": accelerators}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


_LOCKED: dict[Path, int] = {}  # directories that this process holds, with the open files that hold them


def lock(folder: Path, key: str) -> None:
    """Keeps a second process out of a directory until this one ends.

    Raises:
        UserError: for ``key``, another process is working there.
    """
    if folder.resolve() in _LOCKED:
        return
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _LOCKED[folder.resolve()] = handle
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(key, f"another process is working in {folder}", "wait, or choose another name") from error
    except OSError:  # a file system without locks
        os.close(handle)


class RunDirectory:
    """Paths and small records of one run. Only the main process writes; every process may read."""

    def __init__(self, config: RunConfig):
        path = Path(config.output_dir) / config.name
        self.path, self.main = path, int(os.environ.get("RANK", "0")) == 0
        self.checkpoints, self.model, self.prepared = path / "checkpoints", path / "model", path / "prepared"
        self.samples, self.generations, self.attack = path / "samples", path / "generations", path / "attack"
        self.manifest, self.metrics, self.report = path / "manifest.csv", path / "metrics.jsonl", path / "report.json"

    def open(self, config: DictConfig, command: str) -> None:
        """Creates the directory (mode 0700: it holds training pictures), or checks that it has the same configuration. Where nothing
        but the preparation is there, because the first command was refused or stopped, the new configuration takes its place.

        Raises:
            UserError: it holds a run with another configuration, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(
                "run.output_dir", f"{self.path}: {error.strerror}", "choose a folder that can be written"
            ) from error
        if self.main:
            lock(self.path, "run.name")
        stored, changed, begun = self.path / "config.yaml", {}, self._has_begun()
        if stored.exists():
            changed = _changes(OmegaConf.load(stored), config)
        if begun:
            free = () if self.model.exists() else WHILE_TRAINING
            late = () if self.report.exists() else BEFORE_THE_REPORT
            refused = {key: pair for key, pair in changed.items() if key not in free and not key.startswith(late)}
            _refuse_changes(refused, self.path)
        if (
            self.main and changed and not begun
        ):  # coins that were tossed for other settings: no record was left out by them
            shutil.rmtree(self.path / "audit", ignore_errors=True)
        if self.main and (not stored.exists() or changed):
            with atomic(stored) as file:
                file.write(OmegaConf.to_yaml(config))  # unresolved: an ${oc.env:TOKEN} stays a name
        if self.main and ((changed and not begun) or not (self.path / "environment.json").exists()):
            write_json(
                self.path / "environment.json", {"versions": versions(), "hardware": hardware(), "command": command}
            )
            self.record(started=timestamp())

    def _has_begun(self) -> bool:
        """Whether anything is there that settings other than those of the data have decided."""
        unfinished = tuple(f".{name}." for name in PREPARATION)  # temporary files of `atomic` that a kill left
        names = [path.name for path in self.path.iterdir()]
        return any(name not in PREPARATION and not name.startswith(unfinished) for name in names)

    def progress(self) -> dict[str, Any]:
        """What was recorded so far: start time, seconds per stage."""
        file = self.path / "progress.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def record(self, **values: Any) -> None:
        """Adds values to `progress`."""
        if self.main:
            write_json(self.path / "progress.json", {**self.progress(), **values})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to the time spent on a stage, over all stops and resumes."""
        self.record(**{stage: self.progress().get(stage, 0.0) + seconds})

    def truncate_metrics(self, step: int) -> None:
        """Drops lines later than ``step``: they will be written again by the resumed run."""
        if self.main and self.metrics.exists():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if (row := _parse(line)) is not None and row["step"] <= step]
            with atomic(self.metrics) as file:
                file.writelines(line + "\n" for line in kept)

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        if self.main:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")


def timestamp() -> str:
    """Now, as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return None


def _changes(stored: DictConfig, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every setting that differs and changes a number."""
    old, new = leaves(OmegaConf.to_container(stored)), leaves(OmegaConf.to_container(config))
    differing = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    # a run of an earlier version, which had no such attack
    differing = [key for key in differing if not (key.startswith(BEFORE_THE_REPORT) and _unheard(key, old))]
    # or no such switch, which is off, or knew of no flow
    differing = [
        key
        for key in differing
        if not (_unheard(key, old) and (new.get(key) is False or key.startswith("train.diffusion.flow.")))
    ]
    return {key: (old.get(key), new.get(key)) for key in differing if not key.startswith(NO_RESULT)}


def _unheard(key: str, old: dict[str, Any]) -> bool:
    """Whether neither the setting nor a section that holds it was known."""
    return key not in old and not any(key.startswith(f"{known}.") for known in old)


def _refuse_changes(changed: dict[str, tuple[Any, Any]], path: Path) -> None:
    if changed:
        key, (old, new) = min(changed.items(), key=lambda item: item[0])
        raise UserError(
            key,
            f"{path} was made with {old!r}, now {new!r}"
            + (f" and {len(changed) - 1} more changes" if len(changed) > 1 else ""),
            "choose another run.name, or give the same settings to resume",
        )


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a nested configuration by its dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in leaves(child, f"{prefix}.{name}".lstrip(".")).items()
    }
