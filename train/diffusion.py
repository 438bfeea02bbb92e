"""The diffusion objective: schedule, noising, per-example loss."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from defenses.base import Batch
from defenses.errors import UserError
from train.objective import Objective


@dataclass(kw_only=True)
class DiffusionConfig:
    """Section ``train.diffusion``."""

    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"  # what the network predicts
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    timesteps: int = 1000
    snr_gamma: float | None = 5.0  # min-SNR weighting (Hang et al. 2023); null: unweighted loss
    # relative probability of equally long stretches of the schedule, from clean to noisy, e.g. [1, 3, 3, 1]; null: uniform
    timestep_weights: list[float] | None = None

    def __post_init__(self):
        if self.timesteps < 2:
            raise UserError("train.diffusion.timesteps", f"{self.timesteps} is too few", "at least 2; 1000 is usual")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise UserError(
                "train.diffusion.snr_gamma", f"{self.snr_gamma} is not positive", "null switches weighting off"
            )
        if self.timestep_weights is not None:
            _check_weights(self.timestep_weights, self.timesteps)


def _check_weights(weights: list[float], timesteps: int) -> None:
    key = "train.diffusion.timestep_weights"
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(key, f"{weights} are not relative probabilities", "none below 0, one above 0; null: uniform")
    if len(weights) > timesteps:
        raise UserError(key, f"{len(weights)} stretches for {timesteps} timesteps", "give fewer weights")


def noise_schedule(config: DiffusionConfig) -> DDPMScheduler:
    """The forward process, as it is saved with the model."""
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule=config.noise_schedule,
        prediction_type=config.prediction,
        clip_sample=True,
    )


def draw(batch: Batch, schedule: DDPMScheduler, timestep_weights: Sequence[float] | None = None) -> Batch:
    """Adds each record's timestep and noise, from its own random stream.

    Args:
        timestep_weights: see `biased_timesteps`; None: uniform timesteps.
    """
    device, shape, steps = batch.images.device, batch.images.shape[1:], schedule.config.num_train_timesteps
    if timestep_weights is None:
        timesteps = batch.random.integers("timestep", steps)
    else:
        timesteps = biased_timesteps(batch.random.uniform("timestep"), timestep_weights, steps)
    batch.timesteps = timesteps.to(device)
    batch.noise = batch.random.normal("noise", *shape).to(device, non_blocking=True)
    return batch


def biased_timesteps(uniform: torch.Tensor, weights: Sequence[float], steps: int) -> torch.Tensor:
    """Timesteps by the inverse of their distribution function, int64 [B] in [0, steps).

    The schedule is cut into ``len(weights)`` stretches, equally long within one timestep; a stretch is hit in proportion to its
    weight whatever its exact length, timesteps inside it alike. The objective is biased on purpose and not corrected by
    importance weights: private fine-tuning gains from more draws at the timesteps that matter for the picture (Ghalebikesabi
    et al. 2023). The weights are settings: they never follow losses seen on the data, which would leak.

    Args:
        uniform: one number in [0, 1) per record, float32 [B].
        weights: relative, not negative, one at least positive; not more than ``steps``.
    """
    stretch = torch.arange(steps) * len(weights) // steps  # int64 [steps]
    within = torch.tensor(weights, dtype=torch.float64) / torch.bincount(stretch)
    distribution = within[stretch].cumsum(0)
    # right=True skips timesteps of probability 0; u < 1 stays below the last entry
    return torch.searchsorted(distribution, uniform.double() * distribution[-1], right=True)


def loss_weight(schedule: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Weight of the squared error of the network's own output, float32 [B].

    Min-SNR weights the error of the predicted image by min(SNR, gamma) (Hang et al. 2023, section 3.4). An error in epsilon
    is 1/SNR of it, one in v is 1/(SNR + 1): hence the divisors.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = compute_snr(schedule, timesteps)
    divisor = snr if schedule.config.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor


def per_example_loss(model: nn.Module, batch: Batch, schedule: DDPMScheduler, gamma: float | None) -> torch.Tensor:
    """Weighted mean squared error of each record, float32 [B].

    Args:
        batch: with timesteps and noise (`draw`).
        gamma: bound of the min-SNR weight, or None.
    """
    noisy = schedule.add_noise(batch.images, batch.noise, batch.timesteps)  # [B, C, H, W]
    if schedule.config.prediction_type == "epsilon":
        target = batch.noise
    else:
        target = schedule.get_velocity(batch.images, batch.noise, batch.timesteps)
    prediction = model(noisy, batch.timesteps, class_labels=batch.labels, return_dict=False)[0]
    error = (prediction.float() - target).square().flatten(1).mean(1)
    return error * loss_weight(schedule, batch.timesteps, gamma)


def fix(batch: Batch, position: np.ndarray, schedule: DDPMScheduler) -> Batch:
    """Adds timesteps at the given places of the schedule, float64 [B] in (0, 1), and noise that depends on the record alone."""
    batch.timesteps = torch.from_numpy((position * schedule.config.num_train_timesteps).astype(np.int64))
    batch.noise = batch.random.normal("heldout", *batch.images.shape[1:])
    return batch


def objective(config: DiffusionConfig, schedule: DDPMScheduler) -> Objective:
    """Denoising at random timesteps; held-out losses at evenly spread ones."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return per_example_loss(model, batch, schedule, config.snr_gamma)

    return Objective(
        loss=loss,
        heldout_loss=loss,
        draw=lambda batch: draw(batch, schedule, config.timestep_weights),
        fix=lambda batch, position: fix(batch, position, schedule),
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bf16 arithmetic for ``precision="bf16"``, else plain float32. Weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def native_precision() -> str:
    """ "bf16" where this machine multiplies in it, else "fp32": emulated bf16 is ten times slower than fp32 (docs/performance.md)."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known = torch.cpu.get_capabilities()
    return "bf16" if any(known.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "fp32"
