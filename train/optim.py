"""Optimizer, learning-rate schedule and the ordinary gradient."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from defenses.base import Batch, LossFunction, Microbatches
from defenses.errors import UserError
from train.attention import plain_attention, training_attention
from train.diffusion import autocast


@dataclass(kw_only=True)
class OptimizerConfig:
    """Section ``train.optimizer``: AdamW."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 100
    # Clip the gradient of the batch to this l2 norm. auto: 1.0, or never where a defense owns the gradient; null: never.
    max_grad_norm: float | str | None = "auto"
    eight_bit: bool = False  # moments in 8 bits by blocks (Dettmers et al. 2022), through bitsandbytes

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise UserError("train.optimizer.warmup_steps", f"{self.warmup_steps} is negative", "0 means no warm-up")
        norm = self.max_grad_norm
        if norm is not None and norm != "auto" and (isinstance(norm, str) or norm <= 0):
            raise UserError("train.optimizer.max_grad_norm", f"{norm} is not positive", "null switches it off")


def build_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW over ``parameters``.

    Raises:
        UserError: its 8-bit form is not installed, or does not work on this device.
    """
    betas = (config.beta1, config.beta2)
    if config.eight_bit:
        return _eight_bit(parameters, lr=learning_rate, betas=betas, weight_decay=config.weight_decay)
    fused = parameters[0].device.type in ("cuda", "cpu")  # one pass over all numbers
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=config.weight_decay, fused=fused)


def _eight_bit(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Tried on a small tensor first: an unsupported device fails at the first step only."""
    key, remedy = "train.optimizer.eight_bit", "set it to false"
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # of the library's own loader too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(key, f"needs bitsandbytes: {reason}", f"pip install bitsandbytes, or {remedy}") from error
    try:
        trial = nn.Parameter(torch.ones(8192, device=parameters[0].device))
        optimizer = AdamW8bit([trial], **settings)
        trial.grad = torch.ones_like(trial)
        optimizer.step()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(key, f"does not work on {parameters[0].device.type}: {reason}", remedy) from error
    return AdamW8bit(parameters, **settings)


def build_schedule(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int):
    """Learning rate as a function of optimizer steps. Not passed to Accelerate, which would step it once per process."""
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


class MeanGradient:
    """The gradient of the mean loss over the global batch: what training without a defense at seam 4 uses.

    Args:
        batch_size: records of a global batch, a constant.
        max_grad_norm: clips that mean to this l2 norm; "auto": to 1; None: never.
        precision: "bf16" or "fp32" arithmetic of the forward pass.
        recomputes: whether activations are computed again on the way back (gradient checkpointing).
    """

    prepares_model = True

    def __init__(
        self,
        batch_size: int,
        max_grad_norm: float | str | None = None,
        precision: str = "fp32",
        recomputes: bool = False,
    ):
        self.batch_size, self.precision = batch_size, precision
        self.attention = plain_attention if recomputes else training_attention
        self.max_grad_norm = 1.0 if max_grad_norm == "auto" else max_grad_norm

    def check(self, model: nn.Module, loss: LossFunction, example: Batch) -> None:
        """Every model has a mean gradient."""
        return None

    def memory(self, trained: int) -> int:
        """Nothing."""
        return 0

    def backward(
        self, model: nn.Module, loss: LossFunction, microbatches: Microbatches, step: int, accelerator: Any
    ) -> torch.Tensor:
        """See `defenses.base.GradientRule`. DDP averages over ranks, hence the factor ``num_processes``."""
        scale = accelerator.num_processes / self.batch_size
        losses = []
        for position, microbatch in enumerate(microbatches):
            last = position == len(microbatches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                device = microbatch.images.device
                with autocast(device, self.precision), self.attention(device, self.precision):
                    examples = loss(model, microbatch)  # [b]
                (examples.sum() * scale).backward()
            losses.append(examples.detach())
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
        return torch.cat(losses)
