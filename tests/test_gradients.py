"""Gradient features: against closed forms and one ordinary backward pass."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from defenses.seeding import generator
from eval.denoiser import of_network
from eval.gradients import differentiable, equally_spaced, gradient_features
from tests.test_denoiser import CPU, denoiser_config, pictures, unet
from tests.test_scores import ALPHAS, formula

OPTIONS = {"timesteps": [10, 60], "seed": 5, "batch": 2}


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.unused = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.ones(3))


def test_gradient_of_one_weight_in_closed_form():
    images, network = pictures(3), Scale().requires_grad_(False)
    denoiser = formula(lambda x, t, c: network.gain * x)
    denoiser.network = network
    rows = np.array([4, 9, 2])
    found = gradient_features(denoiser, images, [0.0] * 3, rows, accelerator=Accelerator(cpu=True), **OPTIONS)
    assert found.shape == (3, 2) and (found[:, 1] == 0).all()
    for record, row in enumerate(rows):
        x, slopes = images[record].astype(np.float64) / 127.5 - 1, []
        for timestep in (10, 60):
            alpha = float(ALPHAS[timestep])
            noise = torch.randn((1, 8, 8), generator=generator(5, "attack/noise", timestep, 0, 0, int(row))).numpy()
            noisy = np.sqrt(alpha) * x + np.sqrt(1 - alpha) * noise
            slopes.append((2 * (0.7 * noisy - noise) * noisy).mean())
        assert found[record, 0] == pytest.approx(abs(np.mean(slopes)), rel=1e-4)
    assert not any(weight.requires_grad for weight in network.parameters())


def test_gradients_of_a_network_are_those_of_one_backward_pass():
    network, images = unet(classes=3), pictures(2)
    denoiser = of_network(network, denoiser_config("epsilon"), (1, 8, 8), CPU)
    found = gradient_features(denoiser, images, [2, 0], np.array([4, 9]), accelerator=Accelerator(cpu=True), **OPTIONS)
    timesteps = torch.tensor([10, 60])
    noise = torch.stack(
        [torch.randn((1, 8, 8), generator=generator(5, "attack/noise", int(t), 0, 0, 9)) for t in timesteps]
    )
    clean = (torch.from_numpy(images[1:]) / 127.5 - 1).expand(2, -1, -1, -1)
    noisy = DDPMScheduler().add_noise(clean, noise, timesteps)
    network.requires_grad_(True)
    predicted = network(noisy, timesteps, class_labels=torch.tensor([0, 0])).sample
    torch.nn.functional.mse_loss(predicted, noise).backward()
    expected = [float(weight.grad.norm()) for weight in network.parameters()]
    assert found[1] == pytest.approx(expected, rel=1e-3, abs=1e-6) and max(expected) > 1e-3
    assert not np.allclose(found[0], found[1], rtol=0.05)


def test_timesteps_lie_in_the_middle_of_equal_stretches():
    assert equally_spaced(1000, 4) == [125, 375, 625, 875] and equally_spaced(10, 1) == [5]


def test_a_network_is_frozen_again_whatever_happens():
    network = Scale().requires_grad_(False)
    with pytest.raises(RuntimeError), differentiable(network):
        assert network.gain.requires_grad
        raise RuntimeError
    assert not network.gain.requires_grad
