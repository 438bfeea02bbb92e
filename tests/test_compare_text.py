"""A comparison of text-to-image arms as a user runs it: real launches, one autoencoder, a guard without training, other prompts."""

import csv
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.comparison_checks import check_paths, check_prose, check_rounding
from tests.test_compare import ROOT, run

SMALL = [
    "data={source: phantom, image_size: 16, channels: 1, caption_key: caption}",
    "data.phantom={pictures: 24, copied: 2, copies: 3, outliers: 2, heldout: 12, calibration: 20}",
    "model={family: latent, size: nano, scratch: {autoencoder_steps: 3, autoencoder_batch_size: 6}}",
    "train.steps=2",
    "train.batch_size=6",
    "train.checkpoint_every=2",
    "train.preview_every=0",
    "train.heldout_every=0",
    "train.precision=fp32",
    "train.trackers=[]",
    "generate={max_prompts: 3, per_prompt: 4, steps: 2, batch_size: 16}",
    "attack.extraction.permutations=99",
    "attack.captions=trained",
    "attack.membership={attacks: [loss], records: 20, set_test: false}",
    "attack.prefilter={draws: 1}",
    "run.cpu_threads=1",
]
ARMS = {
    "none": [],
    "random-captions": ["defenses.captions={replace_probability: 0.4}"],
    "scrub": ["defenses.scrub={patterns: [chest]}"],
    "prompt-perturbation": ["defenses.prompt_perturbation={target: 1.0e-6, steps: 1}"],
}


@pytest.mark.slow
@pytest.mark.multi
def test_a_comparison_of_text_to_image_arms(tmp_path):
    content = {
        "name": "c", "base": str(ROOT / "configs" / "smoke.yaml"), "overrides": SMALL, "arms": ARMS, "seeds": [0],
    }  # fmt: skip
    file = tmp_path / "compare.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    status, text = run(file, tmp_path)
    assert status == 0, text
    assert "note: scrub will not be comparable: attack.captions=trained" in text
    folder = tmp_path / "c"
    found = json.loads((folder / "comparison.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    (kept,) = (folder / "autoencoders").iterdir()  # one for all: scrub changes words, not pictures
    trained = [folder / f"{name}-s0" / "base" / "vae" for name in ("none", "random-captions", "scrub")]
    weights = {(part / "diffusion_pytorch_model.safetensors").read_bytes() for part in trained}
    assert len(weights) == 1 and kept.name.startswith("autoencoder-")
    assert {name: arm["asked_otherwise"] is None for name, arm in arms.items()} == {
        "none": True, "random-captions": True, "scrub": False, "prompt-perturbation": True,
    }  # fmt: skip
    assert arms["scrub"]["comparable"] is False and "asked other prompts" in arms["scrub"]["why"]
    guard = arms["prompt-perturbation"]
    assert guard["shares"] == "none" and guard["protects"] == "outputs" and guard["by_construction"] is False
    assert guard["versus_reference"]["verified"]["p_value"] is not None
    assert np.isclose(
        guard["other_attacks"]["membership"]["auc"]["mean"], arms["none"]["other_attacks"]["membership"]["auc"]["mean"]
    )  # the same weights
    for name in ("captions", "membership", "prefilter"):
        assert all(arm["other_attacks"][name] is not None for arm in found["arms"]), name
    page = (folder / "comparison.html").read_text()
    assert check_paths(found, page) > 100
    check_prose(found, page)
    check_rounding(found, page)
    with (folder / "comparison.csv").open(newline="") as table:
        assert {row["arm"] for row in csv.DictReader(table)} == set(ARMS)
