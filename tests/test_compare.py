"""The comparison as a user runs it: real launches, a failed arm, kills at random moments, the export."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "data.image_size=16",
    "data.label_key=label",  # class-conditional, as in the shipped comparison: the stock pipeline cannot draw it
    "data.phantom={pictures: 24, copied: 2, copies: 3, outliers: 2, heldout: 12, calibration: 20}",
    "train.steps=6",
    "train.batch_size=6",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=null",
    "train.preview_every=0",
    "train.heldout_every=0",
    "train.precision=fp32",
    "train.trackers=[]",
    "generate.count=16",
    "generate.steps=2",
    "attack.extraction.permutations=99",
    "report.along=[4]",
    "run.cpu_threads=1",
]
ARMS = {
    "none": [],
    "dp": ["defenses.dpsgd={epsilon: 20.0, delta: 1e-2, test_seed: 1}"],
    "early": ["defenses.early_stop={images: 8}"],
    "filter": ["defenses.output_filter={false_alarm_rate: 0.3}"],
}
TIMES = re.compile(r"(^|\.)cost\.|seconds|memory|images_per_second|started|finished|^comparison\.")


def write(folder: Path, arms: dict, seeds: list[int]) -> Path:
    content = {
        "name": "c",
        "base": str(ROOT / "configs" / "smoke.yaml"),
        "overrides": SMALL,
        "arms": arms,
        "seeds": seeds,
    }
    file = folder / "compare.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(content | {"launcher": {"parallel": 2}})))
    return file


def start(file: Path, out: Path, *given: str) -> subprocess.Popen:
    """From a folder that is not the repository's, with a relative output folder."""
    command = [sys.executable, str(ROOT / "launch" / "compare.py"), "--config", str(file), "output_dir=.", *given]
    out.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(file: Path, out: Path, *given: str) -> tuple[int, str]:
    process = start(file, out, *given)
    text = process.communicate(timeout=900)[0]
    return process.returncode, text


def table(folder: Path) -> dict[str, object]:
    """Every figure of comparison.json but times, by its path; paths of this folder as ``OUT``."""
    flat: dict[str, object] = {}

    def walk(value, path):
        if isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                walk(child, f"{path}.{key}".lstrip("."))
        elif not TIMES.search(path):
            flat[path] = value.replace(str(folder.parent), "OUT") if isinstance(value, str) else value

    walk(json.loads((folder / "comparison.json").read_text()), "")
    return flat


@pytest.mark.slow
@pytest.mark.multi
def test_a_failed_arm_is_told_and_the_rest_kept_and_exported(tmp_path):
    arms = {"none": [], "hopeless": ["defenses.dpsgd={epsilon: 1e-6, delta: 1e-9}"], "filter": ARMS["filter"]}
    file = write(tmp_path, arms, [0])
    status, text = run(file, tmp_path)
    assert status == 1 and "hopeless, seed 0: failed: error: defenses.dpsgd" in text, text
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [arm["runs"][0]["status"] for arm in found["arms"]] == ["done", "failed", "done"]
    assert found["arms"][2]["protects"] == "outputs" and found["arms"][2]["runs"][0]["guard_off"] is not None
    assert [point["step"] for point in found["arms"][0]["runs"][0]["along"]] == [4]

    before = (tmp_path / "c" / "none-s0" / "report.json").stat().st_mtime_ns
    status, text = run(file, tmp_path)
    assert status == 1 and "none, seed 0: started" not in text
    assert (tmp_path / "c" / "none-s0" / "report.json").stat().st_mtime_ns == before

    status, text = run(file, tmp_path, "select=hopeless")
    assert status == 2 and text.startswith("error: select: hopeless, seed 0 is not finished")
    status, text = run(file, tmp_path, "train.learning_rate=0.5")
    assert status == 2 and "error: arms.none: train.learning_rate: " in text and "now 0.5" in text
    status, text = run(file, tmp_path, "select=filter")
    selected = tmp_path / "c" / "selected" / "filter"
    assert status == 0 and text.startswith(f"selected: {selected}")
    assert json.loads((selected / "claim.json").read_text())["protects"] == "outputs"
    assert "protects the outputs, not the weights" in (selected / "README.md").read_text()
    assert sorted(path.name for path in selected.iterdir()) == [
        "MODEL_CARD.md", "README.md", "claim.json", "for-the-holder", "model",
    ]  # fmt: skip
    lines = (selected / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = (
        lines.replace("(50)", "(2)") + "\nassert withhold.shape == (4,) and len(images) == 4\nprint('four images')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=selected,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("four images\n"), done.stderr


@pytest.mark.slow
@pytest.mark.multi
def test_ten_kills_change_nothing(tmp_path):
    """SIGKILL at random moments: the same final table as a comparison that was left alone (DP under its test seed)."""
    file = write(tmp_path, ARMS, [0])
    started = time.monotonic()
    status, text = run(file, tmp_path / "calm")
    assert status == 0, text
    length, chance, kills = time.monotonic() - started, random.Random(0), 0
    while kills < 10:
        process = start(file, tmp_path / "killed")
        try:
            process.communicate(timeout=chance.uniform(0.1, 0.5) * length)
            break  # done before it could be killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    status, text = run(file, tmp_path / "killed")
    assert status == 0 and kills >= 5, text
    calm, killed = table(tmp_path / "calm" / "c"), table(tmp_path / "killed" / "c")
    assert calm.keys() == killed.keys() and len(calm) > 200
    different = {key: (calm[key], killed[key]) for key in calm if calm[key] != killed[key]}
    assert not different
    assert np.isfinite([value for value in calm.values() if isinstance(value, float)]).all()
