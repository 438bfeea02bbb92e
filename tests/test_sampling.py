"""Samplers against a model whose answer is known in closed form."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn

from train.diffusion import DiffusionConfig, noise_schedule
from train.models import ModelConfig, build, save_pipeline
from train.sampling import SamplerConfig, blocks, class_of_sample, sample, save_grid, to_uint8


class OneImage(nn.Module):
    """The exact denoiser of a data set of one image: epsilon = (x_t - sqrt(a) x_0) / sqrt(1 - a), or its v."""

    def __init__(self, image: torch.Tensor, schedule):
        super().__init__()
        self.image, self.schedule = nn.Parameter(image), schedule

    def forward(self, x, t, class_labels=None, return_dict=False):
        alpha = self.schedule.alphas_cumprod[t.long().cpu()][:, None, None, None]
        epsilon = (x - alpha.sqrt() * self.image) / (1 - alpha).sqrt()
        if self.schedule.config.prediction_type == "v_prediction":
            return (alpha.sqrt() * epsilon - (1 - alpha).sqrt() * self.image,)
        return (epsilon,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_samplers_find_the_only_image(sampler, prediction):
    schedule = noise_schedule(DiffusionConfig(prediction=prediction))
    image = torch.rand(1, 4, 4) * 1.6 - 0.8
    config = SamplerConfig(sampler=sampler, steps=20)
    drawn = sample(OneImage(image, schedule), schedule.config, config, range(3), (1, 4, 4), seed=0)
    torch.testing.assert_close(drawn, (image / 2 + 0.5).expand(3, 1, 4, 4), atol=0.02, rtol=0)


def test_an_image_depends_on_its_index_alone():
    schedule = noise_schedule(DiffusionConfig())
    model = build(ModelConfig(), 16, 1, 0).eval()
    config = SamplerConfig(steps=3)
    together = sample(model, schedule.config, config, [4, 9, 2], (1, 16, 16), seed=0)
    alone = sample(model, schedule.config, config, [9], (1, 16, 16), seed=0)
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)
    other_seed = sample(model, schedule.config, config, [9], (1, 16, 16), seed=1)
    assert (alone - other_seed).abs().mean() > 0.05


def test_saved_pipeline_samples_like_the_model(tmp_path):
    """What diffusers' own pipeline computes from the saved folder is what our sampler computes from the weights."""
    schedule = noise_schedule(DiffusionConfig())
    model = build(ModelConfig(), 16, 1, 0).eval()
    save_pipeline(tmp_path / "model", model, schedule)
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    start = torch.randn(1, 1, 16, 16)
    theirs = pipeline(
        batch_size=1, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np"
    ).images
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(schedule.config)
    scheduler.set_timesteps(5)
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in scheduler.timesteps:
            image = scheduler.step(model(image, t, return_dict=False)[0], t, image, return_dict=False)[0]
    np.testing.assert_allclose(theirs[0, ..., 0], (image / 2 + 0.5).clamp(0, 1)[0, 0].numpy(), atol=1e-4)
    assert start.shape == image.shape


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_blocks_cover_every_index_once_and_keep_their_shape(world):
    parts = [blocks(100, 16, rank, world) for rank in range(world)]
    assert sorted(i for part in parts for block in part for i in block) == list(range(100))
    assert {(b.start, b.stop) for part in parts for b in part} == {(b.start, b.stop) for b in blocks(100, 16, 0, 1)}
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_classes_follow_the_training_frequencies():
    frequency = np.array([1, 0, 3])
    drawn = np.bincount(class_of_sample(range(4000), frequency, seed=0), minlength=3)
    assert drawn[1] == 0 and abs(drawn[0] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    np.testing.assert_array_equal(class_of_sample([17], frequency, 0), class_of_sample(range(18), frequency, 0)[17:])


def test_grid_and_rounding(tmp_path):
    from PIL import Image

    images = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 1, 2, 2)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 128, 255]
    save_grid(tmp_path / "a" / "grid.png", images)
    pixels = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert pixels.shape == (4, 4) and pixels[0, 0] == 0 and pixels[0, 2] == 128 and pixels[2, 0] == 255
