"""The objective against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from train.diffusion import DiffusionConfig, biased_timesteps, draw, loss_weight, noise_schedule, per_example_loss

TIMESTEPS = torch.tensor([0, 10, 250, 500, 900])


class Fixed(nn.Module):
    """A network that always answers the same."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x, t, class_labels=None, return_dict=False):
        self.seen = x
        return (self.answer,)


def batch_of(images: torch.Tensor, timesteps: torch.Tensor) -> Batch:
    random = RecordRandom(0, 0, range(len(images)), [0] * len(images))
    return Batch(images, np.arange(len(images)), None, random, timesteps, random.normal("noise", *images.shape[1:]))


def snr_by_hand(schedule, t: int) -> float:
    alpha = math.prod(1 - float(beta) for beta in schedule.betas[: t + 1])
    return alpha / (1 - alpha)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_of_a_fixed_answer(prediction, gamma):
    """Noising, target and weight recomputed from the betas: x_t = a x + s e, v = a e - s x."""
    schedule = noise_schedule(DiffusionConfig(prediction=prediction, snr_gamma=gamma))
    images = torch.rand(5, 1, 4, 4) * 2 - 1
    answer = torch.randn(5, 1, 4, 4)
    batch, model = batch_of(images, TIMESTEPS), Fixed(answer)
    losses = per_example_loss(model, batch, schedule, gamma)
    for i, t in enumerate(TIMESTEPS.tolist()):
        alpha = math.prod(1 - float(beta) for beta in schedule.betas[: t + 1])
        a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
        torch.testing.assert_close(model.seen[i], a * images[i] + s * batch.noise[i], atol=1e-4, rtol=1e-3)
        target = batch.noise[i] if prediction == "epsilon" else a * batch.noise[i] - s * images[i]
        snr = alpha / (1 - alpha)
        weight = 1 if gamma is None else min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
        assert losses[i].item() == pytest.approx(weight * ((answer[i] - target) ** 2).mean().item(), rel=2e-3)


def test_the_two_predictions_weight_the_error_of_the_image_alike():
    """Min-SNR bounds the weight of the squared error of the predicted image by gamma in either parametrisation."""
    for prediction, factor in (("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)):
        schedule = noise_schedule(DiffusionConfig(prediction=prediction))
        weights = loss_weight(schedule, TIMESTEPS, 5.0)
        for i, t in enumerate(TIMESTEPS.tolist()):
            snr = snr_by_hand(schedule, t)
            assert weights[i].item() * factor(snr) == pytest.approx(min(snr, 5.0), rel=2e-3)


def test_draw_is_per_record():
    schedule = noise_schedule(DiffusionConfig())
    images = torch.zeros(64, 1, 4, 4)
    batch = draw(
        Batch(images, np.arange(64), None, RecordRandom(0, 0, range(64), [0] * 64)), schedule, DiffusionConfig()
    )
    single = draw(Batch(images[:1], np.array([9]), None, RecordRandom(0, 0, [9], [0])), schedule, DiffusionConfig())
    assert batch.timesteps[9] == single.timesteps[0]
    torch.testing.assert_close(batch.noise[9], single.noise[0], rtol=0, atol=0)
    assert len(batch.timesteps.unique()) > 50 and batch.timesteps.max() < 1000


def test_uniform_timesteps_are_drawn_as_ever():
    """Runs without weights must not change: these are the first integers of each record's stream."""
    random = RecordRandom(3, 7, range(8), [0] * 8)
    batch = draw(
        Batch(torch.zeros(8, 1, 2, 2), np.arange(8), None, random), noise_schedule(DiffusionConfig()), DiffusionConfig()
    )
    assert torch.equal(batch.timesteps, random.integers("timestep", 1000))


@pytest.mark.parametrize("weights", [[1, 3, 3, 1], [0, 1, 0, 5, 0], [2.0, 1.0, 7.0], [1]])
@pytest.mark.parametrize("steps", [1000, 20])
def test_timesteps_follow_their_weights(weights, steps):
    """Chi-square over all timesteps; weights 1.5 times off must fail it."""
    draws = biased_timesteps(torch.rand(40_000), weights, steps)
    counts = np.bincount(draws.numpy(), minlength=steps)
    assert draws.dtype == torch.int64 and len(counts) == steps

    def p_value(assumed):
        expected = np.zeros(steps)
        for k, part in enumerate(np.array_split(np.arange(steps), len(assumed))):  # longer parts first
            expected[part] = assumed[k] / sum(assumed) * 40_000 / len(part)
        assert not counts[expected == 0].any()
        return stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue

    assert p_value(weights) > 1e-3
    if len(weights) > 1:
        k = int(np.argmax(weights))
        assert p_value([w * 1.5 if i == k else w for i, w in enumerate(weights)]) < 1e-6


def test_timesteps_at_the_ends_of_the_uniform_number():
    ends = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert biased_timesteps(ends, [1, 1], 1000).tolist() == [0, 500, 999]
    assert biased_timesteps(ends, [0, 2, 2, 0], 1000).tolist() == [250, 500, 749]
    assert biased_timesteps(ends[:0], [1, 2], 1000).shape == (0,)


def test_weighted_timesteps_are_per_record_and_leave_the_noise_alone():
    schedule = noise_schedule(DiffusionConfig())

    def drawn(rows, weights):
        random = RecordRandom(0, 0, rows, [0] * len(rows))
        return draw(
            Batch(torch.zeros(len(rows), 1, 4, 4), np.array(rows), None, random),
            schedule,
            DiffusionConfig(timestep_weights=weights),
        )

    batch, single, plain = drawn(range(64), [0, 1, 1, 0]), drawn([9], [0, 1, 1, 0]), drawn(range(64), None)
    assert batch.timesteps[9] == single.timesteps[0] and torch.equal(batch.noise, plain.noise)
    assert 250 <= batch.timesteps.min() and batch.timesteps.max() < 750 and len(batch.timesteps.unique()) > 45


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.nan], [1, math.inf], [1e308, 1e308]])
def test_weights_that_are_none(weights):
    with pytest.raises(UserError, match="train.diffusion.timestep_weights"):
        DiffusionConfig(timestep_weights=weights)


def test_more_weights_than_timesteps():
    DiffusionConfig(timestep_weights=[1.0] * 10, timesteps=10)
    with pytest.raises(UserError, match="train.diffusion.timestep_weights: 11 stretches for 10"):
        DiffusionConfig(timestep_weights=[1.0] * 11, timesteps=10)


@pytest.mark.parametrize(("key", "value"), [("timesteps", 1), ("snr_gamma", 0.0)])
def test_bad_values_name_their_key(key, value):
    with pytest.raises(UserError, match=f"train.diffusion.{key}"):
        DiffusionConfig(**{key: value})


def test_offset_noise_adds_one_constant_per_channel():
    schedule, count = noise_schedule(DiffusionConfig()), 400
    random = RecordRandom(0, 0, range(count), [0] * count)
    images = torch.zeros(count, 3, 4, 4)
    plain, moved = (
        draw(Batch(images, np.arange(count), None, random), schedule, DiffusionConfig(offset_noise=size)).noise
        for size in (0.0, 0.3)
    )
    offset = moved - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert 0.27 < offset[..., 0, 0].std() < 0.33  # 1,200 numbers: 2 % standard error


def test_betas_are_those_of_stable_diffusion_or_as_given():
    schedule = noise_schedule(DiffusionConfig(noise_schedule="scaled_linear"))
    assert [schedule.betas[0].item(), schedule.betas[-1].item()] == pytest.approx([0.00085, 0.012], rel=1e-5)
    given = noise_schedule(DiffusionConfig(noise_schedule="linear", beta_start=0.001, beta_end=0.01))
    assert given.betas[499].item() == pytest.approx(0.001 + 0.009 * 499 / 999, rel=1e-5)
