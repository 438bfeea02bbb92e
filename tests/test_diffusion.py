"""The objective against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from train.diffusion import DiffusionConfig, draw, loss_weight, noise_schedule, per_example_loss

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
    batch = draw(Batch(images, np.arange(64), None, RecordRandom(0, 0, range(64), [0] * 64)), schedule)
    single = draw(Batch(images[:1], np.array([9]), None, RecordRandom(0, 0, [9], [0])), schedule)
    assert batch.timesteps[9] == single.timesteps[0]
    torch.testing.assert_close(batch.noise[9], single.noise[0], rtol=0, atol=0)
    assert len(batch.timesteps.unique()) > 50 and batch.timesteps.max() < 1000


@pytest.mark.parametrize(("key", "value"), [("timesteps", 1), ("snr_gamma", 0.0)])
def test_bad_values_name_their_key(key, value):
    with pytest.raises(UserError, match=f"train.diffusion.{key}"):
        DiffusionConfig(**{key: value})
