"""Saved text-to-image pipelines as evaluation samples them."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from defenses.textmodel import TextCondition
from eval.config import GenerateConfig
from eval.source import load
from eval.textsource import TextSampler, load_model
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from train.sampling import SamplerConfig
from train.textsampling import start_noise

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd-epsilon", "sd-v_prediction", "sdxl"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    if request.param == "sdxl":
        stable_diffusion_xl(place)
    else:
        stable_diffusion(place, request.param.removeprefix("sd-"))
    return place


def sampler_of(folder, **options) -> TextSampler:
    return TextSampler(load_model(folder, CPU), SamplerConfig(steps=3, **options), "fp32", 5, 16, 3)


def test_an_image_does_not_depend_on_its_batch(folder):
    sampler = sampler_of(folder)
    together = sampler([0, 1, 0], ["a chest", "a chest", "left lung"])
    alone = torch.cat([sampler([i], [p]) for i, p in ((0, "a chest"), (1, "a chest"), (0, "left lung"))])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3 < (together[0] - together[2]).abs().max()


def test_a_changed_embedding_takes_the_place_of_the_prompt(folder):
    sampler = sampler_of(folder)
    text, pooled = sampler.encode(["left lung"])
    told = TextCondition("a chest", text[0], None if pooled is None else pooled[0])
    mixed = sampler([0, 0], [told, "a chest"])
    assert torch.allclose(mixed[1:], sampler([0], ["a chest"]), atol=1e-5)
    # the start noise stays that of the prompt
    text, pooled = sampler.encode(["a chest"])
    same = TextCondition("a chest", text[0], None if pooled is None else pooled[0])
    assert torch.allclose(sampler([0], [same]), mixed[1:], atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-4


def test_predicted_noise_against_the_parts_of_the_pipeline(folder):
    sampler = sampler_of(folder)
    assert sampler.first_timestep == 999
    pipeline = DiffusionPipeline.from_pretrained(folder)
    start = sampler.start(["a chest"], [4])
    assert torch.equal(start[0], start_noise(5, "a chest", 4, (4, 8, 8)))
    text, pooled = sampler.encode(["a chest"])
    more = {}
    if pooled is not None:
        expected, _, expected_pooled, _ = pipeline.encode_prompt("a chest", device=CPU, num_images_per_prompt=1)
        assert torch.allclose(text, expected, atol=1e-5) and torch.allclose(pooled, expected_pooled, atol=1e-5)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}}
    times = torch.tensor([400])
    with torch.no_grad():
        found = sampler.predict(start, times, text, pooled)
        output = pipeline.unet(start, times, encoder_hidden_states=text, **more).sample
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        signal = pipeline.scheduler.alphas_cumprod[400]
        output = signal.sqrt() * output + (1 - signal).sqrt() * start
    assert torch.allclose(found, output, atol=1e-5)


def test_images_have_the_shape_of_the_data(folder):
    config = GenerateConfig(steps=2)
    source = load(folder, config, 0, (1, 24, 24), CPU)
    images = source.draw([0, 1], ["a chest", "left lung"])
    assert images.shape == (2, 1, 24, 24) and source.protocol == "prompted"
    assert source.facts["parameters"] > 10_000 and source.sampler["guidance_scale"] == 7.5
    assert 0 <= images.min() and images.max() <= 1 and np.isfinite(images.numpy()).all()


def test_weights_kept_in_bf16_give_the_same_images(folder):
    settings, images = SamplerConfig(steps=3), []
    for kept in ("bf16", "fp32"):
        sampler = TextSampler(load_model(folder, CPU, kept), settings, "bf16", 5, 16, 3)
        images.append(sampler([0, 1], ["a chest", "left lung"]))
    assert torch.equal(images[0], images[1])
