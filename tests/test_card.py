import re

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel

from eval.card import model_card
from eval.config import GenerateConfig
from eval.source import load
from tests.fabricate import fabricate_report
from tests.pipelines import stable_diffusion_3


def test_front_matter_and_numbers():
    report = fabricate_report()
    card = model_card(report)
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "diffusers" and {"deffuse", "defense:dedup", "defense:dpsgd"} <= set(front["tags"])
    for text in ("8 of 40", "0 of 31", "p = 0.0013", "epsilon 7.913 at delta 1e-05 per patient", "0.2345", "0.00678"):
        assert text in body
    assert "Removes copies" in body and "heuristic, no guarantee" in body and "Membership was not measured" in body
    assert not re.search(r"\b(anonymous|safe|compliant)\b", card, re.IGNORECASE)
    assert "Inception" not in card and not re.search(r"\bFID\b", card)


def test_parts_that_were_not_run():
    report = fabricate_report()
    report |= {"model": None, "utility": None, "defenses": []}
    report["privacy"]["extraction"] = None
    report["data"]["removed_by_dedup"] = None
    card = model_card(report)
    assert "no model here" in card and "Quality: not measured" in card and "was not run" in card


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.filterwarnings("ignore")  # of the libraries, in code that the user will run
def test_the_loading_example_runs(tmp_path, monkeypatch, classes):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=classes or None,
    )
    pipeline = DDIMPipeline(unet=unet, scheduler=DDPMScheduler(prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    report = fabricate_report()
    report["model"]["classes"] = classes
    code = re.search(r"```python\n(.*?)```", model_card(report), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "MODEL_CARD.md", "exec"), names)
    images = names["images"]
    if classes:
        assert images.shape == (4, 1, 8, 8) and 0 <= images.min() < images.max() <= 1
        assert not torch.equal(images[0], images[1])
    else:
        assert len(images) == 4 and images[0].size == (8, 8)


@pytest.mark.parametrize(("t5", "attacked"), [(True, True), (False, True), (False, False)])
@pytest.mark.filterwarnings("ignore")  # of the libraries, in code that the user will run
def test_the_loading_example_of_prompts_runs(tmp_path, monkeypatch, t5, attacked):
    """Also without T5, which diffusers wants to hear of, and where the attack by prompts was not run."""
    torch.manual_seed(0)
    stable_diffusion_3(tmp_path / "model", t5=t5)
    options = GenerateConfig(sampler="euler", steps=1)
    source = load(tmp_path / "model", options, 0, (3, 16, 16), torch.device("cpu"))
    report = fabricate_report()
    report["model"] |= source.facts | {"family": "latent"}
    report["privacy"]["extraction"] = report["privacy"]["extraction"] | {"protocol": "prompted"} if attacked else None
    code = re.search(r"```python\n(.*?)```", model_card(report), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code.replace("=50", "=1"), "MODEL_CARD.md", "exec"), names)
    assert names["images"][0].size == (16, 16)
