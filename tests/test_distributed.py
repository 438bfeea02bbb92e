"""One and two processes (gloo), under the launcher: the same training within rounding, the same images, the same counts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.small import OVERRIDES

pytestmark = [pytest.mark.multi, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
TEN_STEPS = [
    *OVERRIDES,
    "train.steps=10",
    "train.accumulation=2",
    "train.batch_size=7",
    "generate.batch_size=3",
    "defenses.augment={}",
]


def launch(processes: int, script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """One process by `accelerate launch`; several by torchrun, because Accelerate starts several on CPUs only with MPI."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        launch(processes, "train/run.py", *TEN_STEPS, f"run.output_dir={folder}", f"run.name=p{processes}")
    return folder


def test_there_really_were_two(runs):
    sizes = [json.loads((runs / f"p{p}" / "report.json").read_text())["run"]["world_size"] for p in (1, 2)]
    assert sizes == [1, 2]


def test_weights_agree_within_rounding(runs):
    """After ten steps with two micro-batches and an odd batch: on average within 1e-6, at most 1e-3.

    The gradients are the same sums in another order (float32, relative error about 1e-7), but Adam divides by their size:
    a weight whose gradient is zero but for rounding, such as the bias of the attention's keys, moves by up to the learning
    rate (1e-3) per step in a direction that rounding decides. All other weights agree to 1e-4.
    """
    one, two = (load_file(runs / f"p{p}" / "checkpoints" / "step-10" / "model.safetensors") for p in (1, 2))
    worst = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean() < 1e-6
    assert max(difference for name, difference in worst.items() if not name.endswith("to_k.bias")) < 1e-4, worst


def test_logged_losses_agree(runs):
    rows = [[json.loads(line) for line in (runs / f"p{p}" / "metrics.jsonl").read_text().splitlines()] for p in (1, 2)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for one, two in zip(*rows, strict=True):
        for key in one.keys() - {"images_per_second"}:
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_same_checkpoint_same_images_same_counts(runs):
    """From one saved model: images within one grey level, attack counts identical."""
    for processes in (1, 2):
        launch(processes, "eval/run.py", f"run_dir={runs / 'p1'}", f"run.name=again{processes}")
    folders = [runs / "p1" / "eval" / f"again{p}" for p in (1, 2)]
    files = [sorted(folder.glob("generations/*.png")) for folder in folders]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 16
    for one, two in zip(*files, strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two)).astype(int)
        assert np.abs(difference).max() <= 1
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    for report in reports:
        report["privacy"]["extraction"].pop("seconds")
    assert reports[0]["privacy"] == reports[1]["privacy"]
    assert (folders[0] / "attack" / "matches.csv").read_text() == (folders[1] / "attack" / "matches.csv").read_text()
    for key, value in reports[0]["utility"].items():
        expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
        assert reports[1]["utility"][key] == expected, key


def test_two_processes_prepare_the_same_data(runs):
    manifests = [(runs / f"p{p}" / "manifest.csv").read_text().splitlines() for p in (1, 2)]
    without_group = [[re.sub(r"^((?:[^,]*,){3})[^,]*,", r"\1", line) for line in manifest] for manifest in manifests]
    assert without_group[0] == without_group[1]  # groups are salted per run


def test_dry_run_with_two_processes(tmp_path):
    done = launch(2, "train/run.py", "--dry-run", *TEN_STEPS, f"run.output_dir={tmp_path}")
    assert done.stdout.count("parameters 1062497") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_mistakes_are_one_line_without_traceback(processes, tmp_path):
    done = launch(processes, "train/run.py", "train.step=5", f"run.output_dir={tmp_path}", check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(ours) == 1 and "train.step" in ours[0]
    assert "train/config.py" not in done.stderr  # nothing of ours in a traceback; the launcher may add its own
