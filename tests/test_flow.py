"""The objective of a rectified flow against closed forms and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy.stats import kstest, norm

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from train.diffusion import DiffusionConfig, noise_schedule, process
from train.flow import FlowConfig, levels

NONE = {"noise_schedule": None, "snr_gamma": None}


def flow_of(timesteps: int = 1000, **options):
    config = DiffusionConfig(prediction="flow", timesteps=timesteps, flow=FlowConfig(**options), **NONE)
    return process(config, noise_schedule(config))


def batch_of(count: int, shape=(2, 2, 2)) -> Batch:
    latents = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    random = RecordRandom(0, 0, range(count), [0] * count)
    return Batch(torch.zeros(count, 3, 4, 4), np.arange(count), None, random, latents=latents)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_levels_are_those_of_diffusers_from_the_end(shift):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    ours = levels(1000, shift)
    assert torch.allclose(ours.flip(0), theirs.sigmas, atol=1e-6)
    assert torch.allclose(ours.flip(0) * 1000, theirs.timesteps, atol=1e-3)
    assert ours[-1] == 1 and (ours.diff() > 0).all()
    assert ours[499] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)


def test_noising_and_target_by_hand():
    flow, batch = flow_of(shift=3.0), batch_of(4)
    batch.timesteps, batch.noise = torch.tensor([0, 249, 499, 999]), torch.randn(4, 2, 2, 2)
    s = [3 * u / (1 + 2 * u) for u in (0.001, 0.25, 0.5, 1.0)]
    noisy = flow.noised(batch.latents, batch.noise, batch.timesteps)
    velocity = batch.noise - batch.latents
    for row in range(4):
        expected = (1 - s[row]) * batch.latents[row] + s[row] * batch.noise[row]
        assert torch.allclose(noisy[row], expected, atol=1e-6)
        # the noise that a velocity predicts, and how much of a difference in velocity is one in noise
        assert torch.allclose(noisy[row] + (1 - s[row]) * velocity[row], batch.noise[row], atol=1e-6)
    assert flow.noise_share(batch.timesteps).tolist() == pytest.approx([1 - each for each in s], abs=1e-6)
    assert flow.error(velocity, batch.latents, batch).tolist() == [0.0] * 4
    off = flow.error(velocity + 2, batch.latents, batch)
    assert off.tolist() == pytest.approx([4.0] * 4)


@pytest.mark.parametrize("weighting", ["logit_normal", "none", "sigma_sqrt", "cosmap"])
def test_weights_by_hand(weighting):
    flow, batch = flow_of(weighting=weighting, shift=1.0), batch_of(3)
    batch.timesteps, batch.noise = torch.tensor([99, 499, 899]), torch.zeros(3, 2, 2, 2)
    s = np.array([0.1, 0.5, 0.9])
    expected = {"sigma_sqrt": s**-2, "cosmap": 2 / (math.pi * (1 - 2 * s + 2 * s**2))}.get(weighting, np.ones(3))
    assert flow.error(1 - batch.latents, batch.latents, batch).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.4)])
def test_timesteps_are_logit_normal(mean, std):
    """Against the distribution function, and diffusers' own draws; a mean or spread 1.5 times as large fails."""
    flow, count = flow_of(logit_mean=mean, logit_std=std, timesteps=100_000), 4000
    place = (flow.draw(batch_of(count, (1, 1, 1))).timesteps.double().numpy() + 0.5) / 100_000
    assert kstest(np.log(place / (1 - place)), norm(mean, std).cdf).pvalue > 0.01
    torch.manual_seed(1)
    theirs = compute_density_for_timestep_sampling("logit_normal", count, mean, std).numpy()
    assert np.abs(np.quantile(place, [0.1, 0.5, 0.9]) - np.quantile(theirs, [0.1, 0.5, 0.9])).max() < 0.04


def test_other_weightings_draw_uniformly():
    for weighting in ("none", "sigma_sqrt", "cosmap"):
        timesteps = flow_of(weighting=weighting).draw(batch_of(3000, (1, 1, 1))).timesteps.numpy()
        assert kstest((timesteps + 0.5) / 1000, "uniform").pvalue > 0.01
        assert timesteps.min() >= 0 and timesteps.max() <= 999


def test_what_is_drawn_belongs_to_the_record():
    flow, whole = flow_of(), batch_of(6)
    part = Batch(torch.zeros(2, 3, 4, 4), np.arange(2), None, whole.random[4:], latents=whole.latents[4:])
    first, second = flow.draw(whole), flow.draw(part)
    assert torch.equal(first.timesteps[4:], second.timesteps) and torch.equal(first.noise[4:], second.noise)
    assert len(set(first.timesteps.tolist())) > 3 and abs(float(first.noise.std()) - 1) < 0.3


def test_heldout_timesteps_are_the_places_asked_for():
    fixed = flow_of().fix(batch_of(4), (np.arange(4) + 0.5) / 4)
    assert fixed.timesteps.tolist() == [125, 375, 625, 875]
    assert torch.equal(fixed.noise, flow_of().fix(batch_of(4), np.full(4, 0.3)).noise)


@pytest.mark.parametrize(
    ("key", "value", "off"),
    [
        ("noise_schedule", "linear", "null"), ("snr_gamma", 5.0, "null"), ("beta_start", 0.001, "null"),
        ("beta_end", 0.02, "null"), ("offset_noise", 0.1, "0.0"), ("timestep_weights", [1.0, 2.0], "null"),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused_by_name(key, value, off):
    with pytest.raises(UserError, match=f"no meaning for prediction=flow .set it to {off}") as caught:
        DiffusionConfig(**{"prediction": "flow"} | NONE | {key: value})
    assert caught.value.key == f"train.diffusion.{key}"


def test_settings_of_a_flow_are_refused_elsewhere():
    with pytest.raises(UserError, match="is for prediction=flow") as caught:
        DiffusionConfig(flow=FlowConfig(shift=2.0))
    assert caught.value.key == "train.diffusion.flow"
    with pytest.raises(UserError, match="which only prediction=flow takes"):
        DiffusionConfig(noise_schedule=None)
    for key, value in (("shift", 0.0), ("logit_std", -1.0), ("logit_mean", math.inf)):
        with pytest.raises(UserError) as caught:
            FlowConfig(**{key: value})
        assert caught.value.key == f"train.diffusion.flow.{key}"
