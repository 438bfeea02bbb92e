"""Optimizer, learning-rate schedule and the ordinary gradient."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from defenses.base import Batch, LossFunction
from defenses.errors import UserError


@dataclass(kw_only=True)
class OptimizerConfig:
    """Section ``train.optimizer``: AdamW."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 100
    max_grad_norm: float | None = 1.0  # clip the gradient of the batch to this l2 norm; null: never

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise UserError("train.optimizer.warmup_steps", f"{self.warmup_steps} is negative", "0 means no warm-up")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise UserError(
                "train.optimizer.max_grad_norm", f"{self.max_grad_norm} is not positive", "null switches it off"
            )


def build_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW over ``parameters``."""
    betas = (config.beta1, config.beta2)
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=config.weight_decay, fused=fused)


def build_schedule(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int):
    """Learning rate as a function of optimizer steps. Not passed to Accelerate, which would step it once per process."""
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


class MeanGradient:
    """The gradient of the mean loss over the global batch: what training without a defense at seam 4 uses.

    Args:
        max_grad_norm: clips that mean to this l2 norm; None: never.
    """

    prepares_model = True

    def __init__(self, max_grad_norm: float | None = None):
        self.max_grad_norm = max_grad_norm

    def backward(
        self, model: nn.Module, loss: LossFunction, microbatches: list[Batch], batch_size: int, accelerator: Any
    ) -> torch.Tensor:
        """See `defenses.base.GradientRule`. DDP averages over ranks, hence the factor ``num_processes``."""
        scale = accelerator.num_processes / batch_size
        losses = []
        for position, microbatch in enumerate(microbatches):
            last = position == len(microbatches) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                examples = loss(model, microbatch)  # [b]
                (examples.sum() * scale).backward()
            losses.append(examples.detach())
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
        return torch.cat(losses)
