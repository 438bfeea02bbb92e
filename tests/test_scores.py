"""Membership scores: against a network that is a formula, and brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.seeding import generator
from eval import scores
from eval.clid import clid, mixed, reduced
from eval.denoiser import Denoiser
from eval.scores import Probe, loss_values, pia, secmi, sima, standardised

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


# --- attacks of one query or a few, on a network that scales its input: everything has a closed form

GAIN = 0.7


def probe(images, predict, conditions=None, batch=3):
    conditions = [0.0] * len(images) if conditions is None else conditions
    rows = np.arange(len(images)) + 10
    return Probe(formula(predict), images, conditions, rows, 5, Accelerator(cpu=True), batch)


def scaling(x, t, condition):
    return GAIN * x


def rates(timestep):
    alpha = float(ALPHAS[timestep].double())
    return np.sqrt(alpha), np.sqrt(1 - alpha)


def pixels(images):
    return images.astype(np.float64).reshape(len(images), -1) / 127.5 - 1


def growth(start, end):
    """What one DDIM step multiplies a picture by, when the predicted noise is GAIN times the picture."""
    (signal, spread), (later_signal, later_spread) = rates(start), rates(end)
    return later_signal * (1 - spread * GAIN) / signal + later_spread * GAIN


def test_secmi_is_the_error_of_a_step_forth_and_back():
    images = pictures()
    inverted = np.prod([growth(t, t + 5) for t in range(0, 20, 5)])
    error = (growth(20, 25) * growth(25, 20) - 1) ** 2 * (inverted**2 * (pixels(images) ** 2).mean(1))
    assert secmi(probe(images, scaling), 20, 5) == pytest.approx(-error, rel=1e-3)
    assert error.min() > 1e-7


def test_secmi_of_a_constant_prediction_is_zero():
    assert secmi(probe(pictures(), lambda x, t, c: torch.ones_like(x)), 20, 5) == pytest.approx(0, abs=1e-10)


def test_pia_compares_two_predictions():
    images, (signal, spread) = pictures(), rates(30)
    found = pia(probe(images, scaling), 30)
    x = pixels(images)
    plain = GAIN * abs(signal + spread * GAIN - 1) * np.linalg.norm(x, 4, axis=1)
    noise = x * np.sqrt(2 / np.pi) / abs(x).mean(1, keepdims=True)
    normalised = np.linalg.norm(GAIN * (signal * x + spread * noise) - noise, 4, axis=1)
    assert found == pytest.approx(-np.stack([plain, normalised], 1), rel=1e-4)


def test_sima_is_the_size_of_one_prediction():
    images = pictures()
    found = sima(probe(images, lambda x, t, c: GAIN * x + t[:, None, None, None]), 3)
    assert found == pytest.approx(-np.linalg.norm(GAIN * pixels(images) + 3, 4, axis=1), rel=1e-5)


def test_the_grid_weighs_every_timestep_alike():
    losses = np.array([[1.0, 100.0], [3.0, 300.0], [2.0, 200.0], [2.0, 200.0]])
    assert standardised(losses) == pytest.approx(np.array([2, -2, 0, 0]) / np.sqrt(2))
    assert standardised(np.ones((3, 2))).tolist() == [0, 0, 0]


# --- captions


def test_captions_are_clipped_from_the_end():
    assert [reduced("a b c d e f g h", share) for share in (0.75, 0.5, 0.25, 0)] == [
        "a b c d e f",
        "a b c d",
        "a b",
        "",
    ]
    assert reduced("", 0.5) == ""


def test_clid_is_what_the_caption_saves():
    """A network that predicts the constant number of words: losses by hand, under the same noise."""
    images, captions = pictures(6), ["", "a", "a b", "a b c d", "a b c d e f g h", "x y z u"]
    asking = probe(images, lambda x, t, c: c["value"][:, None, None, None].expand_as(x) / 4, captions)
    asking.denoiser.condition = lambda values: {"value": torch.tensor([float(len(value.split())) for value in values])}
    own, discrepancy = [], []
    for row, caption in enumerate(captions):
        noises = [
            torch.randn((1, 4, 4), generator=generator(5, "attack/noise", t, 0, 0, 10 + row)) for t in (44, 45, 46)
        ]
        words = len(caption.split())
        losses = {k: np.mean([float((k / 4 - noise).square().mean()) for noise in noises]) for k in range(9)}
        own.append(losses[words])
        fewer = [int(words * share) for share in (0.75, 0.5, 0.25, 0)]
        discrepancy.append(np.mean([losses[k] for k in fewer]) - losses[words])
    assert clid(asking) == pytest.approx(mixed(np.array(discrepancy), np.array(own)), rel=1e-4)


def test_the_mix_of_clid_is_robust_and_has_the_right_signs():
    discrepancy, loss = np.array([0.0, 1, 2, 3, 1000]), np.array([0.4, 0.3, 0.2, 0.1, -5])
    assert mixed(discrepancy, loss)[:4] == pytest.approx([-1.0, -0.5, 0.0, 0.5])
    assert mixed(np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]
