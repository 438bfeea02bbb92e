"""The diffusion objective: schedule, noising, per-example loss."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import nn

from defenses.base import Batch
from defenses.errors import UserError
from train.flow import FlowConfig, RectifiedFlow
from train.objective import Objective, Process

Schedule = DDPMScheduler | FlowMatchEulerDiscreteScheduler


@dataclass(kw_only=True)
class DiffusionConfig:
    """Section ``train.diffusion``."""

    # what the network predicts; flow: the velocity of a rectified flow (Stable Diffusion 3), which has no betas and none of what
    # belongs to them: noise_schedule=null snr_gamma=null
    prediction: Literal["epsilon", "v_prediction", "flow"] = "v_prediction"
    noise_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = "squaredcos_cap_v2"
    timesteps: int = 1000
    # first and last variance of the linear schedules; null: 1e-4 and 0.02 (Ho et al. 2020), for scaled_linear 0.00085 and 0.012
    # (Stable Diffusion)
    beta_start: float | None = None
    beta_end: float | None = None
    offset_noise: float = (
        0.0  # standard deviation of a constant added to the noise of each channel (Guttenberg 2023); 0: none
    )
    snr_gamma: float | None = 5.0  # min-SNR weighting (Hang et al. 2023); null: unweighted loss
    # relative probability of equally long stretches of the schedule, from clean to noisy, e.g. [1, 3, 3, 1]; null: uniform
    timestep_weights: list[float] | None = None
    flow: FlowConfig = field(default_factory=FlowConfig)  # for prediction=flow alone

    def __post_init__(self):
        self._refuse_misfits()
        if self.timesteps < 2:
            raise UserError("train.diffusion.timesteps", f"{self.timesteps} is too few", "at least 2; 1000 is usual")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise UserError(
                "train.diffusion.snr_gamma", f"{self.snr_gamma} is not positive", "null switches weighting off"
            )
        for key in ("beta_start", "beta_end"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < 1:
                raise UserError(
                    f"train.diffusion.{key}", f"{getattr(self, key)} is not in (0, 1)", "null: the usual one"
                )
        if not 0 <= self.offset_noise < math.inf:
            raise UserError("train.diffusion.offset_noise", f"{self.offset_noise} is negative", "0.1 is usual; 0: none")
        if self.timestep_weights is not None:
            _check_weights(self.timestep_weights, self.timesteps)

    def _refuse_misfits(self) -> None:
        """Settings of diffusion in a flow, and of a flow in diffusion."""
        if self.prediction != "flow":
            if self.noise_schedule is None:
                problem = "is null, which only prediction=flow takes"
                raise UserError("train.diffusion.noise_schedule", problem, "squaredcos_cap_v2 is the default")
            if self.flow != FlowConfig():
                raise UserError("train.diffusion.flow", "is for prediction=flow", "leave it out")
            return
        none = ("noise_schedule", "snr_gamma", "beta_start", "beta_end", "timestep_weights")
        for key, off in {**dict.fromkeys(none, None), "offset_noise": 0.0}.items():
            if getattr(self, key) != off:
                raise UserError(
                    f"train.diffusion.{key}",
                    f"is {getattr(self, key)}, which has no meaning for prediction=flow",
                    f"set it to {'null' if off is None else off}; train.diffusion.flow has what a flow has",
                )


def _check_weights(weights: list[float], timesteps: int) -> None:
    key = "train.diffusion.timestep_weights"
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(key, f"{weights} are not relative probabilities", "none below 0, one above 0; null: uniform")
    if len(weights) > timesteps:
        raise UserError(key, f"{len(weights)} stretches for {timesteps} timesteps", "give fewer weights")


BETAS = {"scaled_linear": (0.00085, 0.012)}  # others: those of Ho et al. (2020)


def noise_schedule(config: DiffusionConfig) -> Schedule:
    """The forward process, as it is saved with the model."""
    if config.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.timesteps, shift=config.flow.shift)
    first, last = BETAS.get(config.noise_schedule, (1e-4, 0.02))
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule=config.noise_schedule,
        beta_start=config.beta_start or first,
        beta_end=config.beta_end or last,
        prediction_type=config.prediction,
        clip_sample=True,
    )


def schedule_of(scheduler: Any) -> Schedule:
    """The forward process that a pipeline's own sampler belongs to."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    return DDPMScheduler.from_config(scheduler.config)


def draw(batch: Batch, schedule: DDPMScheduler, config: DiffusionConfig) -> Batch:
    """Adds each record's timestep and noise, from its own random stream; the noise has the shape of what is noised: latents where
    there are some, else images."""
    clean = batch.images if batch.latents is None else batch.latents
    steps = schedule.config.num_train_timesteps
    if config.timestep_weights is None:
        timesteps = batch.random.integers("timestep", steps)
    else:
        timesteps = biased_timesteps(batch.random.uniform("timestep"), config.timestep_weights, steps)
    noise = batch.random.normal("noise", *clean.shape[1:])
    if config.offset_noise:
        noise = noise + config.offset_noise * batch.random.normal("offset noise", clean.shape[1], 1, 1)
    batch.timesteps = timesteps.to(clean.device)
    batch.noise = noise.to(clean.device, non_blocking=True)
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
    prediction = model(noisy, batch.timesteps, class_labels=batch.labels, return_dict=False)[0]
    return weighted_error(prediction, batch.images, batch, schedule, gamma)


def weighted_error(
    prediction: torch.Tensor, clean: torch.Tensor, batch: Batch, schedule: DDPMScheduler, gamma: float | None
) -> torch.Tensor:
    """Weighted mean squared error of what a network predicted for ``clean`` with the noise of ``batch``, float32 [B]."""
    if schedule.config.prediction_type == "epsilon":
        target = batch.noise
    else:
        target = schedule.get_velocity(clean, batch.noise, batch.timesteps)
    error = (prediction.float() - target).square().flatten(1).mean(1)
    return error * loss_weight(schedule, batch.timesteps, gamma)


def fix(batch: Batch, position: np.ndarray, schedule: DDPMScheduler) -> Batch:
    """Adds timesteps at the given places of the schedule, float64 [B] in (0, 1), and noise that depends on the record alone."""
    clean = batch.images if batch.latents is None else batch.latents
    batch.timesteps = torch.from_numpy((position * schedule.config.num_train_timesteps).astype(np.int64))
    batch.noise = batch.random.normal("heldout", *clean.shape[1:])
    return batch


class Diffusion:
    """`train.objective.Process` of diffusion on a schedule of betas: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e."""

    def __init__(self, schedule: DDPMScheduler, config: DiffusionConfig):
        self.schedule, self.config = schedule, config

    def draw(self, batch: Batch) -> Batch:
        return draw(batch, self.schedule, self.config)

    def fix(self, batch: Batch, position: np.ndarray) -> Batch:
        return fix(batch, position, self.schedule)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.schedule.add_noise(clean, noise, timesteps)

    def error(self, prediction: torch.Tensor, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_error(prediction, clean, batch, self.schedule, self.config.snr_gamma)

    def noise_share(self, timesteps: torch.Tensor) -> torch.Tensor:
        """1, or sqrt(a_t) where v is predicted: the noise is sqrt(a_t) v + sqrt(1 - a_t) x_t (Salimans and Ho 2022)."""
        if self.schedule.config.prediction_type == "epsilon":
            return torch.ones(len(timesteps), device=timesteps.device)
        return self.schedule.alphas_cumprod.to(timesteps.device)[timesteps].sqrt()


def process(config: DiffusionConfig, schedule: Schedule) -> Process:
    """How pictures become noise in training."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(schedule, config.flow)
    return Diffusion(schedule, config)


def objective(config: DiffusionConfig, schedule: DDPMScheduler) -> Objective:
    """Denoising at random timesteps; held-out losses at evenly spread ones."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return per_example_loss(model, batch, schedule, config.snr_gamma)

    return Objective(
        loss=loss,
        heldout_loss=loss,
        draw=lambda batch: draw(batch, schedule, config),
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
