"""Text-to-image on one and on two processes: the same weights within rounding, the same images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.pipelines import stable_diffusion_3, stable_diffusion_xl
from tests.test_distributed import TEN_STEPS, launch
from tests.test_latent import SD
from tests.test_sd3 import FLOW

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Stable Diffusion XL layout with both text encoders in training; augmentation is off, so that latents are cached."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    stable_diffusion_xl(folder / "base")
    options = [each for each in TEN_STEPS if not each.startswith("defenses")]
    for processes in (1, 2):
        launch(
            processes, "train/run.py", *options, *SD, f"model.pretrained={folder / 'base'}", f"run.output_dir={folder}",
            f"run.name=p{processes}", "model.train_text_encoder=true", "train.caption_dropout=0.5",
        )  # fmt: skip
    return folder


def test_weights_agree_within_rounding(runs):
    """As for pictures (tests/test_distributed.py); keys of attention have biases whose gradient is zero but for rounding."""
    one, two = (load_file(runs / f"p{p}" / "checkpoints" / "step-10" / "model.safetensors") for p in (1, 2))
    assert any(name.startswith("text_encoders") for name in one)
    worst = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean() < 1e-5
    assert max(value for name, value in worst.items() if "k_proj.bias" not in name) < 1e-3, worst


def test_caches_are_equal(runs):
    one, two = (next((runs / f"p{p}" / "cache").glob("latents-*.npy")) for p in (1, 2))
    assert one.name == two.name
    assert np.abs(np.load(one) - np.load(two)).max() < 1e-5


def test_one_model_gives_the_same_images(runs):
    for processes in (1, 2):
        launch(processes, "eval/run.py", f"run_dir={runs / 'p1'}", f"run.name=again{processes}")
    folders = [runs / "p1" / "eval" / f"again{p}" for p in (1, 2)]
    files = [sorted(folder.glob("generations/*/*.png")) for folder in folders]
    assert len(files[0]) == 8 == len(files[1])
    for one, two in zip(*files, strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two)).astype(int)
        assert np.abs(difference).max() <= 1
    reports = [json.loads((folder / "report.json").read_text())["privacy"]["extraction"] for folder in folders]
    assert reports[0]["protocol"] == "prompted" and reports[0]["candidates"] == reports[1]["candidates"]


def test_a_flow_trains_alike(tmp_path):
    """Stable Diffusion 3 with its CLIP text encoders in training."""
    torch.manual_seed(0)
    stable_diffusion_3(tmp_path / "base")
    options = [each for each in TEN_STEPS if not each.startswith("defenses")]
    for processes in (1, 2):
        launch(
            processes, "train/run.py", *options, *FLOW, f"model.pretrained={tmp_path / 'base'}", f"run.name=p{processes}",
            f"run.output_dir={tmp_path}", "model.train_text_encoder=true", "train.caption_dropout=0.5",
        )  # fmt: skip
    one, two = (load_file(tmp_path / f"p{p}" / "checkpoints" / "step-10" / "model.safetensors") for p in (1, 2))
    assert any(name.startswith("transformer.") for name in one) and any(name.startswith("text_enc") for name in one)
    differences = torch.cat([(one[name] - two[name]).abs().flatten() for name in one if "k_proj.bias" not in name])
    assert differences.mean() < 1e-5 and differences.max() < 1e-3
