"""A run stopped at any step and resumed ends with the same weights, averages and metrics as one never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from defenses.errors import UserError
from tests.small import opened
from train import checkpoint, files, release, runlog
from train.loop import Interrupted, Trainer
from train.stage import train_model

STEPS = 7
TIMES = ("images_per_second",)


class Killed(Exception):
    pass


def finish(path, *overrides):
    arguments = opened(path, *overrides)
    train_model(*arguments)
    return arguments[2]


def outcome(directory):
    final = directory.checkpoints / f"step-{STEPS}"
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    tensors = {part: load_file(final / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    return tensors, metrics, json.loads((final / "state.json").read_text())["images_seen"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return outcome(finish(tmp_path_factory.mktemp("straight"), "defenses.augment={}"))


def same(one, two):
    for part in one[0]:
        assert one[0][part].keys() == two[0][part].keys()
        for name, tensor in one[0][part].items():
            assert torch.equal(tensor, two[0][part][name]), (part, name)
    assert one[1:] == two[1:]


@pytest.mark.parametrize("step", range(STEPS))
def test_killed_at_every_step(step, tmp_path, monkeypatch, straight):
    """A kill leaves no trace but the last checkpoint; metrics after it are written again, not twice."""
    original = Trainer.step

    def dying(self):
        if self.state.step == step:
            raise Killed
        return original(self)

    monkeypatch.setattr(Trainer, "step", dying)
    with pytest.raises(Killed):
        finish(tmp_path, "defenses.augment={}")
    monkeypatch.undo()
    same(outcome(finish(tmp_path, "defenses.augment={}")), straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_in_progress(number, tmp_path, monkeypatch, straight):
    original = Trainer.step

    def interrupting(self):
        if self.state.step == 4:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupting)
    with pytest.raises(Interrupted) as stop:
        finish(tmp_path, "defenses.augment={}")
    monkeypatch.undo()
    assert stop.value.step == 5 and (tmp_path / "quickstart" / "checkpoints" / "step-5").is_dir()
    same(outcome(finish(tmp_path, "defenses.augment={}")), straight)


def test_half_written_checkpoint_is_ignored(tmp_path, monkeypatch):
    """A kill inside the writing of a checkpoint leaves only a temporary folder, and the one before it."""
    directory = finish(tmp_path)
    steps = checkpoint.all_steps(directory.checkpoints)
    original = checkpoint.save_file
    written = []

    def dying(tensors, path):
        if len(written) == 2:
            raise Killed
        written.append(path)
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", dying)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Killed):
        checkpoint.save(
            directory.checkpoints / "step-99",
            model,
            torch.optim.AdamW(model.parameters()),
            list(model.parameters()),
            {},
        )
    assert checkpoint.all_steps(directory.checkpoints) == steps


def test_damaged_checkpoint_is_named(tmp_path):
    directory = finish(tmp_path, "train.steps=3")
    (directory.checkpoints / "step-3" / "model.safetensors").write_bytes(b"damaged")
    for path in directory.model.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(UserError, match="step-3"):
        finish(tmp_path, "train.steps=3")


def test_pickle_never_runs(tmp_path):
    """A planted pickle in place of a checkpoint file is refused, not executed."""
    import pickle

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    directory = finish(tmp_path, "train.steps=3")
    for part in ("model", "ema", "optimizer"):
        (directory.checkpoints / "step-3" / f"{part}.safetensors").write_bytes(pickle.dumps(Payload()))
    (directory.model / "deffuse.json").unlink()
    with pytest.raises(UserError):
        finish(tmp_path, "train.steps=3")
    assert not (tmp_path / "pwned").exists()


def test_other_settings_are_refused(tmp_path):
    finish(tmp_path)
    with pytest.raises(UserError, match=r"train\.learning_rate.*run\.name"):
        finish(tmp_path, "train.learning_rate=1e-4")


def test_finished_training_is_not_repeated(tmp_path, monkeypatch):
    directory = finish(tmp_path)
    before = (directory.model / "deffuse.json").read_bytes()
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("trained again"))
    finish(tmp_path)
    assert (directory.model / "deffuse.json").read_bytes() == before


def test_old_checkpoints_are_pruned(tmp_path):
    assert checkpoint.all_steps(finish(tmp_path, "train.keep_checkpoints=2").checkpoints) == [6, 7]
    assert checkpoint.all_steps(finish(tmp_path, "train.keep_checkpoints=null", "run.name=all").checkpoints) == [
        3,
        6,
        7,
    ]


def test_divergence_is_told_and_saves_nothing(tmp_path):
    """Infinite weights end the run in words; the checkpoint before them stays the last one."""
    with pytest.raises(UserError, match=r"train\.learning_rate: training diverged.*run\.name"):
        finish(tmp_path, "train.learning_rate=1e30", "train.optimizer.warmup_steps=0", "train.checkpoint_every=1")
    assert not list((tmp_path / "quickstart").glob("checkpoints/step-[2-9]"))


@pytest.mark.slow
def test_a_second_process_is_kept_out(tmp_path):
    """While one process works in a directory another is refused; afterwards the lock is gone with its process."""
    opened(tmp_path)
    script = "import sys; from tests.small import opened; from pathlib import Path; opened(Path(sys.argv[1]))"
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert "run.name: another process is working in" in done.stderr
    os.close(runlog._LOCKED.pop((tmp_path / "quickstart").resolve()))  # as the end of this process would
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["unet", "sidecar"])
def test_a_kill_while_the_model_is_written_leaves_none(tmp_path, monkeypatch, part):
    """Neither a folder that looks complete, nor anything of the killed attempt in the one that is written later."""

    def killed(folder, *arguments):
        folder.mkdir(exist_ok=True)
        (folder / "junk").touch()
        raise Killed

    def write():
        if part == "unet":
            patch.setattr("train.models.adapters.save", killed)
        else:
            patch.setattr(release, "write_sidecar", killed)
        with pytest.raises(Killed):
            finish(tmp_path, "train.steps=1", "train.heldout_every=0")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *arguments, **options: None)  # SIGKILL: nobody tidies up
        write()
    directory = tmp_path / "quickstart"
    assert (directory / ".model.tmp").exists() and not (directory / "model").exists()
    (directory / "model").mkdir()  # of an earlier version, which wrote in place
    (directory / "model" / "junk").touch()
    finish(tmp_path, "train.steps=1", "train.heldout_every=0")
    assert (directory / "model" / "deffuse.json").exists() and not (directory / ".model.tmp").exists()
    assert not list((directory / "model").rglob("junk"))


def test_a_folder_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, renamed = [], []
    monkeypatch.setattr(files, "sync_directory", lambda path: synced.append(path.name))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda old, new: (renamed.append(list(synced)), rename(old, new))[1])
    with files.whole_folder(tmp_path / "x" / "model") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("w")
        assert not (tmp_path / "x" / "model").exists()
    assert sorted(renamed[0]) == [".model.tmp", "unet", "weights"] and synced[-1] == "x"
    assert (tmp_path / "x" / "model" / "unet" / "weights").read_text() == "w"


@pytest.mark.parametrize(
    ("changed", "refused"),
    [({}, set()), ({"compile": True}, {"generate.compile"}), ({"steps": 6}, {"generate.steps"})],
)
def test_a_run_that_knew_of_no_switch_goes_on_without_it(tmp_path, changed, refused):
    """Also with images half drawn: those of a compiled network are never among those of a plain one."""
    earlier = {"generate": {"steps": 5}, "train": {"diffusion": {"prediction": "epsilon"}}}
    now = {"generate": {"steps": 5, "compile": False} | changed, "train": {"diffusion": {"prediction": "epsilon"}}}
    now["train"]["diffusion"]["flow"] = {"shift": 3.0, "weighting": "logit_normal"}
    directory = runlog.RunDirectory(runlog.RunConfig(name="run", output_dir=str(tmp_path)))
    directory.open(OmegaConf.create(earlier), "")
    directory.generations.mkdir()
    if not refused:
        directory.open(OmegaConf.create(now), "")
        return
    with pytest.raises(UserError) as caught:
        directory.open(OmegaConf.create(now), "")
    assert {caught.value.key} == refused
