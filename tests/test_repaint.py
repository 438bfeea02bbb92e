"""RePaint against linear algebra: with a Gaussian prior every step is linear, so the law of a fill is known."""

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler

from defenses.seeding import generator
from eval.repaint import evaluations, repaint, timesteps_of, walk
from tests import ideal

MEAN = np.array([0.2, -0.3, 0.1, 0.4])
ROOT = np.array([[0.9, 0, 0, 0], [-0.4, 0.5, 0, 0], [0.7, 0.2, 0.3, 0], [0.1, -0.5, 0.4, 0.3]])
COVARIANCE = ROOT @ ROOT.T
HIDDEN = np.array([True, True, False, False])  # a picture of 1 x 4 pixels, its left half
KNOWN = np.array([0.8, -0.6])  # the right half


def fills(levels: list[int], count: int, known=(9.0, 9.0, *KNOWN), timesteps: int = 1000) -> np.ndarray:
    """Fills of the hidden half, float64 [count, 4]."""
    # a latent model: no clipping, which would not be linear
    model = ideal.denoiser(ideal.gaussian(MEAN, COVARIANCE), latent=True, timesteps=timesteps)
    picture = torch.tensor(known, dtype=torch.float32).reshape(1, 1, 4)
    generators = [generator(1, "test", index) for index in range(count)]
    return (
        repaint(model, picture, torch.from_numpy(HIDDEN)[None], {}, levels, generators)
        .reshape(count, 4)
        .double()
        .numpy()
    )


def law(levels: list[int], timesteps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Mean [4] and covariance [4, 4] of x_0 after RePaint's walk, by Lugmayr et al. 2022, equations 8a to 8c and 1."""
    alphas = [1.0, *ideal.alphas_cumprod(timesteps).double().numpy()[timesteps_of(timesteps, levels[0])]]
    mean, covariance = np.zeros(4), np.eye(4)
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        if following == level + 1:
            kept = alphas[following] / alphas[level]
            mean, covariance = kept**0.5 * mean, kept * covariance + (1 - kept) * np.eye(4)
            continue
        now, before = alphas[level], alphas[following]
        beta = 1 - now / before
        gain = now**0.5 * COVARIANCE @ np.linalg.inv(now * COVARIANCE + (1 - now) * np.eye(4))
        offset = MEAN - now**0.5 * gain @ MEAN  # E[x_0 | x_t] = gain x_t + offset
        # posterior mean in DDPM's own form: (x_t - beta / sqrt(1 - a_t) eps) / sqrt(alpha), eps from E[x_0 | x_t]
        slope = (np.eye(4) - beta / (1 - now) * (np.eye(4) - now**0.5 * gain)) / (1 - beta) ** 0.5
        shift = beta / (1 - now) * now**0.5 * offset / (1 - beta) ** 0.5
        mean, covariance = slope @ mean + shift, slope @ covariance @ slope.T
        covariance = covariance + beta * (1 - before) / (1 - now) * np.eye(4)
        # the known half anew, independent of all that was
        mean = np.where(HIDDEN, mean, before**0.5 * np.array([0, 0, *KNOWN]))
        covariance = np.where(np.outer(HIDDEN, HIDDEN), covariance, 0) + (1 - before) * np.diag(1.0 - HIDDEN)
    return mean, covariance


def conditional() -> tuple[np.ndarray, np.ndarray]:
    """Mean [2] and covariance [2, 2] of the hidden half given the known one."""
    cross = COVARIANCE[:2, 2:] @ np.linalg.inv(COVARIANCE[2:, 2:])
    return MEAN[:2] + cross @ (KNOWN - MEAN[2:]), COVARIANCE[:2, :2] - cross @ COVARIANCE[2:, :2]


def assert_moments(found: np.ndarray, mean: np.ndarray, covariance: np.ndarray, slack: float = 0.0) -> None:
    """Sample moments within 4.5 standard errors (normal data) and ``slack``."""
    n, variance = len(found), np.diag(covariance)
    assert (np.abs(found.mean(0) - mean) <= 4.5 * np.sqrt(variance / n) + slack).all()
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert (np.abs(np.cov(found.T) - covariance) <= 4.5 * error + slack).all()


@pytest.mark.parametrize(("steps", "jump", "resamples"), [(10, 1, 1), (10, 1, 3), (12, 3, 4), (250, 10, 10), (7, 7, 2)])
def test_the_walk_is_that_of_the_authors(steps, jump, resamples):
    theirs = RePaintScheduler(num_train_timesteps=steps)
    theirs.set_timesteps(steps, jump, resamples)
    levels = walk(steps, jump, resamples)
    assert levels == [t + 1 for t in theirs.timesteps.tolist()] + [0]
    assert evaluations(levels) == steps + (resamples - 1) * jump * len(range(1, steps - jump + 1, jump))


def test_levels_spread_over_the_whole_schedule():
    assert timesteps_of(1000, 4).tolist() == [249, 499, 749, 999] and timesteps_of(10, 10).tolist() == list(range(10))


@pytest.mark.parametrize(("steps", "jump", "resamples"), [(12, 1, 1), (12, 1, 4), (20, 5, 3)])
def test_fills_have_the_mean_and_covariance_of_the_algorithm(steps, jump, resamples):
    levels = walk(steps, jump, resamples)
    found, (mean, covariance) = fills(levels, 1000), law(levels)
    assert_moments(found[:, :2], mean[:2], covariance[:2, :2])


def test_resampling_brings_fills_to_the_conditional_distribution():
    mean, covariance = conditional()
    far, near = (law(walk(20, 1, resamples)) for resamples in (1, 10))
    assert np.abs(far[0][:2] - mean).max() > 0.1 > 0.05 > np.abs(near[0][:2] - mean).max()
    assert_moments(fills(walk(20, 1, 10), 200)[:, :2], mean, covariance, slack=0.05)


def test_the_known_half_is_untouched_and_the_hidden_half_never_read():
    levels = walk(8, 2, 2)
    found = fills(levels, 5)
    assert (found[:, 2:] == np.float32(KNOWN)).all()
    assert np.array_equal(found, fills(levels, 5, known=(np.nan, -3.0, *KNOWN)))


def test_a_fill_does_not_depend_on_the_others():
    levels = walk(8, 2, 2)
    assert np.allclose(fills(levels, 3), fills(levels, 7)[:3], atol=1e-6)


def test_predictions_in_pixels_are_clipped_to_the_range_of_pixels():
    bright = ideal.denoiser(lambda x, signal: torch.full_like(x, 3.0))
    found = repaint(bright, torch.zeros(1, 2, 4), torch.ones(2, 4).bool(), {}, walk(5, 1, 1), [generator(0, "test")])
    assert torch.equal(found, torch.ones(1, 1, 2, 4))
