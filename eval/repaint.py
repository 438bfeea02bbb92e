"""Inpainting with a diffusion model that was not trained for it: RePaint (Lugmayr et al. 2022)."""

from collections.abc import Sequence

import numpy as np
import torch

from eval.denoiser import Condition, Denoiser


def walk(steps: int, jump_length: int, resamples: int) -> list[int]:
    """Noise levels in the order of the visits, from ``steps`` (noise) down to 0 (clean).

    Every ``jump_length`` levels, from level 1 on, the walk goes back up by ``jump_length`` and comes down again, until it
    has come down ``resamples`` times: only so do the filled and the known part come to agree (Lugmayr et al. 2022, section
    4.2 and figure 9). ``jump_length`` 1 is their Algorithm 1; 10 levels and 10 times are their choice for 250 steps.
    """
    left = {level: resamples - 1 for level in range(1, steps - jump_length + 1, jump_length)}
    levels = [steps]
    while levels[-1] > 0:
        level = levels[-1] - 1
        levels.append(level)
        if left.get(level, 0) > 0:
            left[level] -= 1
            levels.extend(range(level + 1, level + jump_length + 1))
    return levels


def evaluations(levels: Sequence[int]) -> int:
    """Evaluations of the network for one image: steps of the walk that lead down."""
    return int((np.diff(levels) < 0).sum())


def timesteps_of(timesteps: int, steps: int) -> np.ndarray:
    """Timestep of each noise level 1..steps, int64 [steps], evenly spread up to the last, where the walk starts from noise."""
    return np.rint(np.arange(1, steps + 1) * timesteps / steps).astype(np.int64) - 1


@torch.no_grad()
def repaint(
    denoiser: Denoiser,
    known: torch.Tensor,
    hidden: torch.Tensor,
    condition: Condition,
    levels: Sequence[int],
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Fills the hidden part of one picture several times (Lugmayr et al. 2022, Algorithm 1).

    A step down takes the hidden part from the model and the known part from the forward process (equation 8; Algorithm 1
    scales its noise by 1 - a_t where that equation has the square root). The model's step is the posterior of Ho et al.
    2020, equation 7, between the levels that are visited.

    In a latent model the mask is applied to latents, so that a latent cell is known or filled as a whole.

    Args:
        known: x_0 in the model's space, [C, h, w]; its hidden part is never read.
        hidden: bool [h, w], what is to be filled.
        condition: for as many images as there are generators.
        levels: as `walk` gives them; the first is the number of steps.
        generators: one for each fill, on the CPU, so that a fill does not depend on the batch it is drawn in.

    Returns:
        x_0, float32 [len(generators), C, h, w]; the known part is ``known`` itself.
    """
    assert denoiser.levels is None  # the posterior below is of betas (eval.config.check_flow)
    device, count = denoiser.device, len(generators)
    timestep = timesteps_of(denoiser.timesteps, levels[0])
    signal = np.concatenate([[1.0], denoiser.alphas_cumprod.cpu().double().numpy()[timestep]])  # of each level
    known = torch.where(hidden, 0.0, known)

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(known.shape, generator=each) for each in generators]).to(device)

    x = noise()
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        kept = signal[max(level, following)] / signal[min(level, following)]  # alpha of this one step
        if following > level:
            x = kept**0.5 * x + (1 - kept) ** 0.5 * noise()
            continue
        t = torch.full((count,), int(timestep[level - 1]), dtype=torch.int64, device=device)
        clean = denoiser.predict_clean(x, t, condition)
        if not denoiser.latent:
            clean = clean.clamp(-1, 1)
        before, now = signal[following], signal[level]
        mean = (before**0.5 * (1 - kept) * clean + kept**0.5 * (1 - before) * x) / (1 - now)
        spread = ((1 - before) / (1 - now) * (1 - kept)) ** 0.5
        if following == 0:
            return torch.where(hidden, mean, known)
        drawn = noise()  # either part takes its own places of it
        x = torch.where(hidden, mean + spread * drawn, before**0.5 * known + (1 - before) ** 0.5 * drawn)
    return x
