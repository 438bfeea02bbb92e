"""Rectified flow (Liu et al. 2023; Esser et al. 2024): pictures and noise joined by straight lines, the network predicts the velocity.

x_t = (1 - s) x_0 + s e and v = dx_t / ds = e - x_0, with the noise level s in (0, 1]. Levels are kept in a table as the noise schedules
of diffusion are: timestep t of T, from clean to noise.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from defenses.base import Batch
from defenses.errors import UserError


@dataclass(kw_only=True)
class FlowConfig:
    """Section ``train.diffusion.flow``, for ``prediction=flow`` alone."""

    shift: float = (
        3.0  # of the noise levels towards noise (Esser et al. 2024, equation 23); must be the pipeline's, 1: none
    )
    # how timesteps are drawn and errors weighted, as diffusers' examples name it. logit_normal: timesteps by the two numbers below,
    # equal weights; the others: timesteps uniform, weights 1 / s^2 (sigma_sqrt), 2 / (pi (1 - 2 s + 2 s^2)) (cosmap), 1 (none)
    weighting: Literal["logit_normal", "sigma_sqrt", "cosmap", "none"] = "logit_normal"
    logit_mean: float = (
        0.0  # of log(u / (1 - u)), u the place in the schedule; above 0: more noise (diffusers' examples: less)
    )
    logit_std: float = 1.0

    def __post_init__(self):
        for key in ("shift", "logit_std"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"train.diffusion.flow.{key}", f"{getattr(self, key)} is not positive", "leave it out")
        if not math.isfinite(self.logit_mean):
            raise UserError("train.diffusion.flow.logit_mean", f"{self.logit_mean} is no number", "0 is usual")


def levels(timesteps: int, shift: float) -> torch.Tensor:
    """Noise level s of every timestep, float32 [T], ascending, 1 at the last (Esser et al. 2024, equation 23; the table of diffusers'
    `FlowMatchEulerDiscreteScheduler` is this one from the end)."""
    place = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return (shift * place / (1 + (shift - 1) * place)).float()


class RectifiedFlow:
    """`train.objective.Process` of a rectified flow.

    Args:
        schedule: its length and shift.
        config: section ``train.diffusion.flow``.
    """

    def __init__(self, schedule: FlowMatchEulerDiscreteScheduler, config: FlowConfig):
        self.config, self.timesteps = config, schedule.config.num_train_timesteps
        self.levels = levels(self.timesteps, schedule.config.shift)

    def at(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """s of each record, [B, 1, ...] to multiply with ``like``."""
        return self.levels.to(like.device)[timesteps].reshape(-1, *[1] * (like.ndim - 1))

    def draw(self, batch: Batch) -> Batch:
        """Timestep and noise of each record's latents from its own random stream."""
        if self.config.weighting == "logit_normal":  # Esser et al. 2024, equation 19
            normal = batch.random.normal("timestep").double()
            place = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
            timesteps = (place * self.timesteps).long().clamp(max=self.timesteps - 1)
        else:
            timesteps = batch.random.integers("timestep", self.timesteps)
        noise = batch.random.normal("noise", *batch.latents.shape[1:])
        batch.timesteps = timesteps.to(batch.latents.device)
        batch.noise = noise.to(batch.latents.device, non_blocking=True)
        return batch

    def fix(self, batch: Batch, position: np.ndarray) -> Batch:
        """Timesteps at the given places of the schedule, float64 [B] in (0, 1), and noise that depends on the record alone."""
        batch.timesteps = torch.from_numpy((position * self.timesteps).astype(np.int64))
        batch.noise = batch.random.normal("heldout", *batch.latents.shape[1:])
        return batch

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - s) x_0 + s e."""
        level = self.at(timesteps, clean)
        return (1 - level) * clean + level * noise

    def error(self, prediction: torch.Tensor, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weighted mean squared error of the velocity e - x_0, float32 [B]."""
        error = (prediction.float() - (batch.noise - clean)).square().flatten(1).mean(1)
        level = self.levels.to(error.device)[batch.timesteps]
        return error * compute_loss_weighting_for_sd3(self.config.weighting, level)

    def noise_share(self, timesteps: torch.Tensor) -> torch.Tensor:
        """1 - s, float32 [B]: the predicted noise is x_t + (1 - s) v."""
        return 1 - self.levels.to(timesteps.device)[timesteps]
