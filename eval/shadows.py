"""Shadow models: the run's own trainer on random halves of its pictures, for attacks that compare a model with others.

Carlini et al. 2022 ("Membership inference attacks from first principles"): every picture is trained on by half of the
shadows, so that one set of them tells of each picture how a model looks with it and without it.

Folder layout, below the run's directory: ``shadows/settings.json`` (what they depend on), ``shadows/00/``, ``shadows/01/`` ...
with ``model/`` and ``training.json`` as in a run; what is computed from a shadow lies beside its model.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator
from omegaconf import OmegaConf

from defenses import registry
from defenses.base import Defense
from defenses.errors import UserError
from defenses.ranks import on_main
from defenses.seeding import derive
from eval.denoiser import Denoiser, load
from eval.target import Target
from train.data import Dataset
from train.files import atomic, write_json
from train.loop import Interrupted
from train.planting import SPLIT as CANARY
from train.records import select_records
from train.release import RECORD, SIDECAR
from train.runlog import RunDirectory, leaves, lock
from train.stage import train_model

KEY = "attack.membership.lira"
POOL = (
    "train",
    "heldout",
)  # splits that the shadows are trained on; planted canaries and calibration are not among them


@dataclass
class Shadows:
    """Trained shadow models.

    Attributes:
        folders: of each; ``model/`` is the saved pipeline.
        trained: whether each was given the picture of each row of the data set, bool [S, rows]; a column outside of the pool is False
            throughout. What its defenses then leave out is part of how such models are trained.
        seconds: spent on training them.
    """

    folders: list[Path]
    trained: np.ndarray
    seconds: float

    def __len__(self) -> int:
        return len(self.folders)

    def values(
        self,
        name: str,
        key: dict[str, Any],
        compute: Callable[[Denoiser], np.ndarray],
        shape: tuple[int, int, int],
        accelerator: Accelerator,
    ) -> np.ndarray:
        """What ``compute`` gives for every shadow, [S, ...]; kept in its folder, so that a stop loses one shadow's at most.

        Args:
            name: of the file.
            key: JSON values; what else the result depends on. A file with another key is replaced.
            compute: called on all ranks, which give the same.
            shape: (C, H, W) of the data.
        """
        found = []
        for number, folder in enumerate(self.folders):
            file = folder / f"{name}.npz"
            known = on_main(accelerator, lambda file=file: _read(file, key))
            if known is None:
                accelerator.print(f"shadow {number + 1} of {len(self)}: {name}")
                known = compute(load(folder / "model", shape, accelerator.device))
                on_main(accelerator, lambda file=file, known=known: _write(file, key, known))
            found.append(known)
        return np.stack(found)


class ShadowsInterrupted(Interrupted):
    """SIGTERM or SIGINT while a shadow was trained; a checkpoint was saved."""

    def __init__(self, number: int, count: int, step: int):
        self.number, self.count = number, count
        super().__init__(step)

    def __str__(self) -> str:
        return f"stopped after the checkpoint of step {self.step} of shadow {self.number + 1} of {self.count}"


def train_shadows(count: int, target: Target, config: SimpleNamespace, accelerator: Accelerator) -> Shadows:
    """Trains (or resumes, or finds all done) the first ``count`` shadows of a run, on all ranks together.

    A shadow depends on the run and on its own number, not on ``count``: more of them can be asked for later.

    Args:
        config: of the evaluation; seed and precision are those with which the run was trained.

    Raises:
        UserError: the model was not trained here, or the folder holds shadows made under other settings, or the trainer refuses.
        ShadowsInterrupted: a signal; the same call goes on.
    """
    if target.run is None:
        raise UserError(
            KEY, "needs the trainer of a run of ours: nobody knows how this model was trained", "set it to null"
        )
    folder, seed = target.run.path / "shadows", run_seed(target.run)
    pool = np.array([row for row, record in enumerate(target.dataset.records) if record.split in POOL])
    trained = np.zeros((count, len(target.dataset.records)), dtype=bool)
    trained[:, pool] = halves(np.array([target.dataset.records[row].block for row in pool]), count, seed)
    settings = [shadow_config(config, target, folder, seed, number) for number in range(count)]
    on_main(accelerator, lambda: _open(folder, depends_on(settings[0], target.dataset, seed)))
    seconds = 0.0
    with _untracked(accelerator):
        for number, each in enumerate(settings):
            directory = RunDirectory(each.run)
            if not on_main(accelerator, lambda directory=directory: (directory.model / SIDECAR).exists()):
                accelerator.print(f"shadow {number + 1} of {count}: {int(trained[number].sum())} records")
                _train(number, count, each, shadow_dataset(target.dataset, trained[number]), directory, accelerator)
            seconds += on_main(accelerator, lambda directory=directory: _finish(directory))
    return Shadows([folder / f"{number:02d}" for number in range(count)], trained, seconds)


def halves(block: np.ndarray, shadows: int, seed: int) -> np.ndarray:
    """Which records each shadow is trained on, bool [shadows, N]: shadow 2k has a random half, shadow 2k + 1 the other.

    So every record is in exactly half of them, for any even number, and every shadow has as near to N / 2 records as whole
    blocks allow.

    Args:
        block: independent unit of each record, int64 [N]; it stays together.

    Raises:
        UserError: there are fewer than two units.
    """
    _, unit, size = np.unique(block, return_inverse=True, return_counts=True)
    if len(size) < 2:
        raise UserError(KEY, "all pictures belong to one unit (patient), which cannot be halved", "set it to null")
    result = np.zeros((shadows, len(block)), dtype=bool)
    for pair in range(shadows // 2):
        random = np.random.Generator(np.random.Philox(derive(seed, "shadows", pair)))
        order = random.permutation(len(size))
        filled = np.cumsum(size[order])[:-1]  # the last unit always stays for the other half
        first = np.isin(unit, order[: 1 + np.abs(2 * filled - len(block)).argmin()])
        result[2 * pair], result[2 * pair + 1] = first, ~first
    return result


def shadow_dataset(dataset: Dataset, inside: np.ndarray) -> Dataset:
    """The same pictures under another split: those ``inside`` (bool [rows]) are trained on, the rest of the pool is held out.

    Nothing of what the run's defenses took out is kept: they select again.
    """
    records = []
    for record, chosen in zip(dataset.records, inside.tolist(), strict=True):
        if record.split in POOL:
            split = "train" if chosen else "heldout"
            record = replace(record, split=split, kept=True, reason="", duplicate_of="", distance=None)
        elif record.split == CANARY:  # a copy, and no canary any more: nothing tosses its coin for the run's own record
            record = replace(record, kept=False, canary="", reason="canary: not in shadows")
        records.append(record)
    return replace(dataset, records=records)


def shadow_config(config: SimpleNamespace, target: Target, folder: Path, seed: int, number: int) -> SimpleNamespace:
    """The run's configuration with another seed and without what only watches.

    The audit of DP-SGD is off: it is about the run's own claim. So is the public number of units, which may be too small for a
    shadow. A shadow's budget is its own; it touches nothing of the run's.
    """
    own = derive(seed, "shadow", number)
    on_images = {  # they change no weight
        name: None
        for name, kind in registry.CLASSES.items()
        if kind.after_training and kind.after_checkpoint is Defense.after_checkpoint
    }
    defenses = replace(config.defenses, **on_images)
    if defenses.dpsgd is not None:
        known = defenses.dpsgd.test_seed
        known = None if known is None else derive(known, "shadow", number)
        defenses.dpsgd = replace(defenses.dpsgd, canaries=0, units=None, test_seed=known)
    train = replace(
        config.train,
        precision=target.facts["precision"],
        trackers=[],
        preview_every=0,
        heldout_every=0,
        keep_checkpoints=1,
    )
    run = replace(config.run, name=f"{number:02d}", output_dir=str(folder), seed=own)
    return SimpleNamespace(**{**vars(config), "run": run, "train": train, "defenses": defenses})


def run_seed(run: RunDirectory) -> int:
    """``run.seed`` with which a run was trained; an evaluation may have another one."""
    return OmegaConf.load(run.path / "config.yaml").run.seed


def depends_on(config: SimpleNamespace, dataset: Dataset, seed: int) -> dict[str, Any]:
    """All that decides a shadow's weights beside its number, flat, JSON values."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(json.dumps([record.record_id, record.pixel_hash, record.split, record.block]).encode())
    data = {key: getattr(config.data, key) for key in ("image_size", "channels", "label_key")}
    sections = {name: asdict(getattr(config, name)) for name in ("model", "train", "defenses")}
    return {"records": digest.hexdigest()[:16]} | leaves({"run": {"seed": seed}, "data": data, **sections})


def _open(folder: Path, settings: dict[str, Any]) -> None:
    """Creates the folder (mode 0700: weights tell of records), or checks that its shadows were made under these settings."""
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(KEY, f"{folder}: {error.strerror}", "make the run's folder writable") from error
    lock(folder, KEY)
    file = folder / "settings.json"
    if not file.exists():
        return write_json(file, settings)
    old, new = json.loads(file.read_text()), json.loads(json.dumps(settings))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            KEY,
            f"{folder} holds shadows made with {key}={old.get(key)!r}, now {new.get(key)!r}",
            "give the same settings, or move that folder away to train new ones",
        )


def _train(
    number: int,
    count: int,
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    accelerator: Accelerator,
) -> None:
    on_main(accelerator, lambda: directory.path.mkdir(exist_ok=True, mode=0o700))
    defenses = registry.build(config.defenses)
    try:
        select_records(config, dataset, defenses, accelerator)
        train_model(config, dataset, directory, defenses, accelerator)
    except Interrupted as stop:
        raise ShadowsInterrupted(number, count, stop.step) from stop
    except UserError as error:
        problem = f"shadow {number + 1} of {count} cannot be trained: {error}"
        raise UserError(KEY, problem, "null gives the report without it; finished shadows are kept") from error
    finally:
        accelerator.free_memory()


def _finish(directory: RunDirectory) -> float:
    """Removes what only a resume needs; the seconds of training."""
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    return json.loads((directory.path / RECORD).read_text())["train_seconds"]


@contextmanager
def _untracked(accelerator: Accelerator) -> Iterator[None]:
    """Keeps the shadows' losses out of the trackers of the run."""
    trackers, accelerator.trackers = accelerator.trackers, []
    try:
        yield
    finally:
        accelerator.trackers = trackers


def _read(file: Path, key: dict[str, Any]) -> np.ndarray | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return stored["values"] if stored["key"].item() == json.dumps(key, sort_keys=True) else None


def _write(file: Path, key: dict[str, Any], values: np.ndarray) -> None:
    with atomic(file, "wb") as handle:
        np.savez(handle, key=np.array(json.dumps(key, sort_keys=True)), values=values)
