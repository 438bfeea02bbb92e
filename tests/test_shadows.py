"""Shadow models: who is trained on what, what survives a stop, what is refused."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from defenses.errors import UserError
from defenses.outputfilter import OutputFilterConfig
from eval import shadows
from eval.shadows import ShadowsInterrupted, depends_on, halves, shadow_config, shadow_dataset, train_shadows
from eval.target import target_of
from tests.small import opened
from train.loop import Trainer
from train.manifest import write_manifest
from train.records import toss
from train.stage import train_model

NANO = ["model.size=nano", "train.steps=3", "train.checkpoint_every=1", "train.heldout_every=0"]
SHAPE = (1, 16, 16)


def run(path, *overrides):
    """A finished run as a target, with what `train_shadows` is called with."""
    config, dataset, directory, defenses, accelerator = opened(path, *NANO, *overrides)
    write_manifest(dataset, directory.manifest)
    train_model(config, dataset, directory, defenses, accelerator)
    return target_of(directory, directory, config), config, accelerator


def weights(found):
    return [load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors") for folder in found.folders]


def same(one, two):
    assert all((a[name] == b[name]).all() for a, b in zip(one, two, strict=True) for name in a)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """The run and its first two shadows, for copies of it."""
    path = tmp_path_factory.mktemp("shadows")
    return path, train_shadows(2, *run(path))


@pytest.fixture
def finished(trained_run):
    """The run with two shadows; what a test adds stays for the next ones."""
    path, found = trained_run
    return run(path), found


@pytest.fixture
def copied(trained_run, tmp_path):
    """Folder with a copy of the run without shadows."""
    shutil.copytree(trained_run[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "quickstart" / "shadows")
    return tmp_path


@pytest.fixture
def fresh(copied):
    """The copy of the run, as `run` gives it."""
    return run(copied)


def test_every_record_is_in_exactly_half_of_any_even_number():
    random = np.random.default_rng(0)
    block = np.repeat(np.arange(60), random.integers(1, 5, 60))
    trained = halves(block, 16, 3)
    for count in (4, 8, 16):
        assert (halves(block, count, 3) == trained[:count]).all()  # more shadows later: the first stay
        assert (trained[:count].sum(0) == count // 2).all()
    for unit in range(60):
        assert (trained[:, block == unit] == trained[:, block == unit][:, :1]).all()
    assert np.abs(trained.sum(1) - len(block) / 2).max() <= 2  # half of the largest block
    assert (halves(block, 16, 4) != trained).any()


def test_halves_are_random():
    """Two records share a side of a pair with probability 1/2: the mean agreement of many pairs."""
    trained = halves(np.arange(40), 2000, 1)[::2]
    agree = np.corrcoef(trained.T)
    assert np.abs(agree[~np.eye(40, dtype=bool)].mean() + 1 / 39) < 0.005  # sides of equal size: -1 / (n - 1)
    assert np.abs(trained.mean(0) - 0.5).max() < 4 * 0.5 / 1000**0.5


def test_one_unit_cannot_be_halved():
    with pytest.raises(UserError, match=r"attack\.membership\.lira: all pictures belong to one unit"):
        halves(np.zeros(5, dtype=int), 4, 0)


def test_shadow_dataset_keeps_copies_together_and_other_splits_away(tmp_path):
    config, dataset, directory, defenses, accelerator = opened(tmp_path, "defenses.dedup={}")
    assert any(not record.kept for record in dataset.records)
    dataset.records[0] = coin = replace(dataset.records[0], split="canary", canary="coin", kept=True)
    before = [replace(record) for record in dataset.records]
    pool = [row for row, record in enumerate(dataset.records) if record.split in ("train", "heldout")]
    trained = np.zeros(len(dataset.records), dtype=bool)
    trained[pool] = halves(np.array([dataset.records[row].block for row in pool]), 4, 0)[0]
    found = shadow_dataset(dataset, trained)
    assert found.images is dataset.images
    assert set(found.rows("train").tolist()) == set(np.flatnonzero(trained).tolist())
    assert (found.rows("calibration") == dataset.rows("calibration")).all()
    assert not found.records[0].kept and not found.records[0].canary  # shadows are not trained on canaries
    toss(found, seed=1)
    assert dataset.records == before and dataset.records[0] is coin  # the coins of the run are its own
    assert all(found.records[row].kept and not found.records[row].reason for row in pool)
    sides = {}
    for row in pool:
        sides.setdefault(found.records[row].block, set()).add(found.records[row].split)
    assert all(len(side) == 1 for side in sides.values())


def test_shadows_differ_only_in_their_half_and_their_seed(finished):
    (target, config, accelerator), found = finished
    folder = target.run.path / "shadows"
    one, two = (shadow_config(config, target, folder, 0, number) for number in (0, 1))
    assert one.run.seed != two.run.seed != config.run.seed
    assert one.train == two.train and one.model == config.model
    assert one.train == replace(config.train, preview_every=0, heldout_every=0, keep_checkpoints=1)


def test_what_is_left_behind(finished):
    """Models and records of training, readable by their owner alone; no checkpoint, no preview, no held-out loss."""
    (target, config, accelerator), found = finished
    assert stat.S_IMODE((target.run.path / "shadows").stat().st_mode) == 0o700
    assert len(found) == 2 and found.seconds > 0
    for number, folder in enumerate(found.folders):
        assert {path.name for path in folder.iterdir()} == {"model", "training.json", "metrics.jsonl"}
        facts = json.loads((folder / "training.json").read_text())
        assert facts["steps"] == 3 and facts["images_seen"] == 18
        assert "heldout_loss" not in (folder / "metrics.jsonl").read_text()
        rows = np.flatnonzero(found.trained[number])
        assert {target.dataset.records[row].split for row in rows} == {"train", "heldout"}
    pool = [record.split in ("train", "heldout") for record in target.dataset.records]
    assert (found.trained.sum(0) == pool).all()
    assert not (weights(found)[0]["conv_in.weight"] == weights(found)[1]["conv_in.weight"]).all()


def test_values_are_computed_once_for_each_key(finished):
    (target, config, accelerator), found = finished
    asked = []

    def compute(denoiser):
        asked.append(denoiser)
        return np.full(3, float(len(asked)))

    first = found.values("losses", {"draws": 1}, compute, SHAPE, accelerator)
    assert first.shape == (2, 3) and first[:, 0].tolist() == [1, 2]
    assert (found.values("losses", {"draws": 1}, compute, SHAPE, accelerator) == first).all() and len(asked) == 2
    assert found.values("losses", {"draws": 2}, compute, SHAPE, accelerator)[:, 0].tolist() == [3, 4]


def test_an_evaluation_with_another_seed_uses_the_same_shadows(finished, monkeypatch):
    (target, config, accelerator), found = finished
    monkeypatch.setattr(shadows, "_train", lambda *rest: pytest.fail("trained again"))
    other = SimpleNamespace(**{**vars(config), "run": replace(config.run, seed=7)})
    assert (train_shadows(2, target, other, accelerator).trained == found.trained).all()


def test_shadows_of_other_settings_are_refused(finished):
    (target, config, accelerator), _ = finished
    other = SimpleNamespace(**{**vars(config), "train": replace(config.train, steps=4)})
    with pytest.raises(UserError, match=r"attack\.membership\.lira: .*shadows made with train\.steps=3, now 4"):
        train_shadows(2, target, other, accelerator)
    target.dataset.records[3] = replace(target.dataset.records[3], pixel_hash="another picture")
    with pytest.raises(UserError, match=r"made with records="):
        train_shadows(2, target, config, accelerator)


def test_a_foreign_model_has_no_trainer(finished):
    (target, config, accelerator), _ = finished
    with pytest.raises(UserError, match=r"attack\.membership\.lira: needs the trainer of a run of ours"):
        train_shadows(2, replace(target, run=None), config, accelerator)


def test_a_filter_at_sampling_changes_no_shadow(finished):
    (target, config, accelerator), _ = finished
    defenses = replace(config.defenses, output_filter=OutputFilterConfig())
    filtered = SimpleNamespace(**{**vars(config), "defenses": defenses})
    folder = target.run.path / "shadows"
    told = [depends_on(shadow_config(c, target, folder, 0, 0), target.dataset, 0) for c in (config, filtered)]
    assert told[0] == told[1]


def test_a_shadow_that_cannot_be_trained_names_itself(fresh):
    target, config, accelerator = fresh
    config.train = replace(config.train, learning_rate=1e30, optimizer=replace(config.train.optimizer, warmup_steps=0))
    with pytest.raises(
        UserError, match=r"lira: shadow 1 of 2 cannot be trained: .*diverged.*finished shadows are kept"
    ):
        train_shadows(2, target, config, accelerator)


def test_trackers_of_the_run_see_nothing(fresh):
    target, config, accelerator = fresh
    logged = []
    tracker = type("Tracker", (), {"log": lambda self, *values, **more: logged.append(values), "finish": logged.append})
    accelerator.trackers = [tracker()]
    train_shadows(2, target, config, accelerator)
    assert logged == [] and len(accelerator.trackers) == 1


@pytest.mark.slow
def test_finished_shadows_are_kept_and_more_are_added(finished, monkeypatch):
    arguments, found = finished
    trained, original = [], shadows._train
    monkeypatch.setattr(shadows, "_train", lambda number, *rest: (trained.append(number), original(number, *rest)))
    before = weights(found)
    again = train_shadows(2, *arguments)
    assert trained == [] and (again.trained == found.trained).all()
    more = train_shadows(4, *arguments)
    assert trained == [2, 3] and len(more) == 4
    same(weights(more)[:2], before)
    assert (more.trained[:2] == found.trained).all()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_shadows_end_with_the_same_weights(fresh, monkeypatch, trained_run):
    """Whatever shadow is hit; finished ones are not trained again."""
    done, original = [], Trainer.step

    def dying(self):
        if len(done) == 4:  # of 6: three steps each
            raise Killed
        done.append(self.directory.path.name)
        return original(self)

    monkeypatch.setattr(Trainer, "step", dying)
    with pytest.raises(Killed):
        train_shadows(2, *fresh)
    monkeypatch.setattr(Trainer, "step", lambda self: (done.append(self.directory.path.name), original(self))[1])
    found = train_shadows(2, *fresh)
    assert [done.count("00"), done.count("01")] == [3, 3]
    same(weights(found), weights(trained_run[1]))


KILLED = """
import os, signal, sys
from pathlib import Path
from eval.shadows import train_shadows
from tests.test_shadows import run
from train.loop import Trainer
original = Trainer.step
def step(self):
    if self.directory.path.name == "00" and self.state.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)
Trainer.step = step
train_shadows(2, *run(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing(copied, trained_run):
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, str(copied)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = copied / "quickstart" / "shadows" / "00" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-2"]
    same(weights(train_shadows(2, *run(copied))), weights(trained_run[1]))


@pytest.mark.slow
def test_a_signal_is_told_in_one_line(fresh, monkeypatch, trained_run):
    original = Trainer.step

    def interrupting(self):
        if self.directory.path.name == "01" and self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupting)
    with pytest.raises(ShadowsInterrupted, match="^stopped after the checkpoint of step 2 of shadow 2 of 2$"):
        train_shadows(2, *fresh)
    monkeypatch.undo()
    same(weights(train_shadows(2, *fresh)), weights(trained_run[1]))


@pytest.mark.slow
def test_early_stopping_ends_each_shadow_by_itself(tmp_path):
    found = train_shadows(2, *run(tmp_path, "defenses.early_stop={images: 2}"))
    told = [json.loads((folder / "training.json").read_text())["defenses"][0] for folder in found.folders]
    assert [len(each["findings"]["curve"]) for each in told] == [3, 3]


@pytest.mark.slow
def test_dpsgd_books_into_the_shadows_own_ledger(tmp_path):
    settings = "defenses.dpsgd={noise_multiplier: 1.0, canaries: 4, test_seed: 5}"
    target, config, accelerator = run(tmp_path, settings, "train.optimizer.max_grad_norm=null")
    ledger = target.run.path / "ledger.jsonl"
    before = ledger.read_bytes()
    found = train_shadows(2, target, config, accelerator)
    assert ledger.read_bytes() == before and len(before.splitlines()) == 3
    for folder in found.folders:
        assert len((folder / "ledger.jsonl").read_text().splitlines()) == 3
        assert not (folder / "audit").exists()
    folder = target.run.path / "shadows"
    seeds = {shadow_config(config, target, folder, 0, number).defenses.dpsgd.test_seed for number in range(4)}
    assert len(seeds) == 4 and 5 not in seeds
