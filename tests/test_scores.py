"""Membership scores: against a network that is a formula, and brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.seeding import generator
from eval import scores
from eval.denoiser import Denoiser
from eval.scores import loss_values

TIMESTEPS = 100
ALPHAS = torch.linspace(0.999, 0.01, TIMESTEPS)


def formula(predict, shape=(1, 4, 4), prediction="epsilon"):
    """A denoiser whose network is ``predict(x, t, condition)``; conditions are numbers."""
    return Denoiser(
        network=torch.nn.Identity(),
        alphas_cumprod=ALPHAS,
        prediction=prediction,
        predict=predict,
        encode=lambda images: torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1,
        decode=lambda x: x / 2 + 0.5,
        condition=lambda values: {"value": torch.tensor(values, dtype=torch.float32)},
        kind="class",
        latent=False,
        device=torch.device("cpu"),
    )


def pictures(count=7, shape=(1, 4, 4)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def asked(denoiser, images, batch=3, accelerator=None, rows=None, **options):
    rows = np.arange(len(images)) + 10 if rows is None else rows
    settings = {"timesteps": [10, 40], "draws": 2, "flips": True, "seed": 5} | options
    conditions = [float(row % 3) for row in rows]
    accelerator = accelerator or Accelerator(cpu=True)
    return loss_values(denoiser, images, conditions, rows, batch=batch, accelerator=accelerator, **settings)


def test_loss_is_the_error_of_the_noise_by_hand():
    images = pictures()
    found = asked(formula(lambda x, t, c: 0.5 * x + c["value"][:, None, None, None]), images)
    assert found.shape == (7, 2, 2, 2) and found.dtype == np.float64
    for record, column, draw, view in np.ndindex(found.shape):
        timestep, row = (10, 40)[column], 10 + record
        x = images[record, :, :, ::-1] if view else images[record]
        x = torch.tensor(x.astype(np.float32) / 127.5 - 1)
        noise = torch.randn((1, 4, 4), generator=generator(5, "attack/noise", timestep, draw, view, row))
        noisy = ALPHAS[timestep].sqrt() * x + (1 - ALPHAS[timestep]).sqrt() * noise
        expected = float((0.5 * noisy + row % 3 - noise).square().mean())
        assert found[record, column, draw, view] == pytest.approx(expected, rel=1e-5)


def test_the_error_of_a_network_that_predicts_nothing_is_the_noise_itself():
    """Mean of a chi-square with 16 degrees of freedom over 16: 1, with a variance of 2 / 16."""
    found = asked(formula(lambda x, t, c: torch.zeros_like(x)), pictures(400), batch=400, draws=4)
    assert found.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 16 / found.size))
    assert found.var() == pytest.approx(2 / 16, rel=0.1)
    columns = found.reshape(400, -1)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert abs(correlation).max() < 5 / np.sqrt(400)  # every timestep, draw and view has noise of its own


def test_losses_do_not_depend_on_batches_neighbours_or_what_else_is_asked():
    images, denoiser = pictures(), formula(lambda x, t, c: torch.tanh(x) * t[:, None, None, None] / 50)
    whole = asked(denoiser, images)
    assert np.allclose(asked(denoiser, images, batch=7), whole, rtol=1e-6)
    some = np.array([5, 2])
    assert np.allclose(asked(denoiser, images[some], rows=10 + some), whole[some], rtol=1e-6)
    assert np.allclose(asked(denoiser, images, timesteps=[40], draws=1, flips=False), whole[:, 1:, :1, :1], rtol=1e-6)
    assert not np.allclose(asked(denoiser, images, seed=6), whole)


def test_ranks_share_the_records_and_agree(monkeypatch):
    images, seen, parts = pictures(), [], []
    denoiser = formula(lambda x, t, c: seen.append(len(x)) or 0.3 * x)
    alone = asked(denoiser, images)
    passes, seen[:] = sum(seen), []
    monkeypatch.setattr(scores, "together", lambda accelerator, work: work())
    monkeypatch.setattr(scores, "gather_object", lambda mine: parts.extend(mine) or parts)
    for rank in range(2):
        found = asked(denoiser, images, accelerator=SimpleNamespace(process_index=rank, num_processes=2))
    assert np.array_equal(found, alone)
    assert sum(seen) == passes == 7 * 2 * 2 * 2  # nothing is computed twice
