"""A finished run given a defense afterwards: the same choice, images and figures as if it had been on from the start."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from defenses.errors import UserError
from eval import run as evaluation
from tests.small import OVERRIDES
from train import cli
from train import run as training
from train.release import FOR_THE_HOLDER

SMALL = [
    *(text for text in OVERRIDES if not text.startswith(("data.phantom", "train.checkpoint"))),
    "data.phantom={pictures: 24, copied: 2, copies: 3, outliers: 2, heldout: 12, calibration: 20}",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=null",
    "attack.extraction.permutations=99",
]
# a tolerance of 0 and one image of chance: the decision falls at some checkpoint, whichever it is
STOP = "defenses.early_stop={images: 12, tolerance: 0.0}"
FILTER = "defenses.output_filter={false_alarm_rate: 0.4, attempts: 1}"


def train(folder: Path, name: str, *overrides: str) -> Path:
    arguments = cli.Arguments(None, False, [*SMALL, f"run.output_dir={folder}", f"run.name={name}", *overrides])
    assert training.main(arguments) == 0
    return folder / name


def evaluate(run: Path, name: str, *overrides: str) -> Path:
    assert evaluation.main(cli.Arguments(None, False, [f"run_dir={run}", f"run.name={name}", *overrides])) == 0
    return run / "eval" / name


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def figures(found: dict) -> dict:
    """All figures but times."""
    found["privacy"]["extraction"].pop("seconds")
    return {key: found[key] for key in ("privacy", "utility")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("replay"), "plain", "report.along=[2,4]")


@pytest.mark.slow
def test_early_stop_afterwards_equals_early_stop_in_training(plain, tmp_path):
    during, after = train(tmp_path, "during", STOP), evaluate(plain, "stopped", STOP)
    first, second = report(during), report(after)
    assert second["defenses"][0]["findings"] == first["defenses"][0]["findings"]
    assert len(first["defenses"][0]["findings"]["curve"]) >= 1
    for key in ("steps", "released_step", "stopped_by", "images_seen"):
        assert second["model"][key] == first["model"][key], key
    weights = [
        load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors") for folder in (during, after)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert figures(second) == figures(first)


def test_a_checkpoint_that_a_kill_left_is_not_asked(plain, tmp_path):
    """Training would not have looked there: it asks at multiples of checkpoint_every, and at the end."""
    run = tmp_path / "plain"
    shutil.copytree(plain, run, ignore=shutil.ignore_patterns("eval", ".lock"))
    shutil.copytree(run / "checkpoints" / "step-2", run / "checkpoints" / "step-3")
    curve = report(evaluate(run, "stopped", STOP.replace("0.0", "0.9")))["defenses"][0]["findings"]["curve"]
    assert [point["step"] for point in curve] == [2, 4, 6, 7]


@pytest.mark.slow
def test_filter_afterwards_equals_filter_in_training(plain, tmp_path):
    during, after = train(tmp_path, "during", FILTER), evaluate(plain, "filtered", FILTER)
    first, second = report(during), report(after)
    assert figures(second) == figures(first)
    found = second["defenses"][0]["findings"]
    assert found["flagged"] > 0 and found["generations"] == 16
    assert found["flagged"] == first["defenses"][0]["findings"]["flagged"]
    # images that were not flagged are the bare model's own; the guard-off figures are those of the undefended run
    bare, guarded = (sorted((after / name).glob("*.png")) for name in ("generations_guard_off", "generations"))
    assert len(bare) == 16 and len(guarded) == 16 - found["withheld"]
    pixels = {path.name: np.asarray(Image.open(path)) for path in bare}
    same = sum(np.array_equal(np.asarray(Image.open(path)), pixels[path.name]) for path in guarded)
    assert same == 16 - found["flagged"]
    undefended = report(plain)["privacy"]["extraction"]
    for key in ("verified", "candidates", "control", "at_l2", "by_copies", "by_correlation"):
        assert second["privacy"]["extraction_guard_off"][key] == undefended[key], key
    assert not (plain / "model" / "output_filter").exists()  # the run's own model is left alone
    assert (after / "model" / "output_filter").is_dir()


def test_figures_along_training(plain, tmp_path):
    """Those of step 4 are the figures of a run that ends there."""
    found = report(plain)
    assert [point["step"] for point in found["along"]] == [2, 4]
    assert [point["images_seen"] for point in found["along"]] == [12, 24]
    short = report(train(tmp_path, "short", "train.steps=4"))
    point = found["along"][1]
    assert point["extraction"]["verified"] == short["privacy"]["extraction"]["verified"]
    assert point["extraction"]["at_l2"] == short["privacy"]["extraction"]["at_l2"]
    assert point["utility"]["kid"] == short["utility"]["kid"]
    assert found["utility"]["kid"] != point["utility"]["kid"]
    assert sorted(path.name for path in (plain / "along" / "step-4").iterdir()) == ["figures.json"]


def test_a_private_run_is_not_chosen_from_by_looking_at_its_records(tmp_path):
    run = train(tmp_path, "dp", "defenses.dpsgd={epsilon: 20.0, delta: 1e-2, test_seed: 1}")
    with pytest.raises(UserError, match="defenses.early_stop: stops or chooses by looking at private records"):
        evaluate(run, "chosen", STOP)
    with pytest.raises(UserError, match="report.nonprivate_metrics: cannot be changed after training"):
        evaluate(run, "told", STOP, "report.nonprivate_metrics=true")
    evaluate(run, "filtered", FILTER)
    sidecars = list(run.rglob("deffuse.json"))
    assert len(sidecars) == 2 and all(not set(json.loads(file.read_text())) & set(FOR_THE_HOLDER) for file in sidecars)


def test_a_defense_that_was_trained_with_stays_in_the_claim(tmp_path):
    run = train(tmp_path, "filtered", FILTER)
    with pytest.raises(UserError, match="defenses.output_filter: was on when the run was trained"):
        evaluate(run, "bare", "defenses.output_filter=null")


def test_what_training_depended_on_cannot_be_changed_afterwards(plain):
    with pytest.raises(UserError, match="defenses.dedup: cannot be changed after training"):
        evaluate(plain, "late", "defenses.dedup={}")


def test_removed_checkpoints_are_missed(tmp_path):
    run = train(tmp_path, "pruned", "train.keep_checkpoints=1")
    with pytest.raises(UserError, match="kept only the checkpoints of steps"):
        evaluate(run, "stopped", STOP)
