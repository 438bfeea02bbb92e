"""What the training loop needs to know of a loss, whatever the kind of model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from defenses.base import Batch, LossFunction


def unchanged(batch: Batch, *position: np.ndarray) -> Batch:
    """For losses that draw nothing beforehand."""
    return batch


@dataclass(frozen=True)
class Objective:
    """How a batch becomes per-example losses.

    Attributes:
        loss: float32 [B], before the defenses' seam 3; a pure function of (weights, batch).
        heldout_loss: float32 [B], of the averaged weights on held-out and on training pictures; the gap between the two tells
            memorisation.
        draw: adds what the loss needs, from each record's own random stream, after the batch seam.
        fix: `draw` without chance, for held-out losses; its second argument, float64 [B] in (0, 1), is spread evenly over the records.
    """

    loss: LossFunction
    heldout_loss: LossFunction
    draw: Callable[[Batch], Batch] = unchanged
    fix: Callable[[Batch, np.ndarray], Batch] = unchanged


class Process(Protocol):
    """How clean latents become noise, and what a network is trained to predict on the way; timesteps are int64 [B], clean to noisy."""

    def draw(self, batch: Batch) -> Batch:
        """Adds timesteps and noise from each record's own random stream."""
        ...

    def fix(self, batch: Batch, position: np.ndarray) -> Batch:
        """Adds timesteps at places of the schedule, float64 [B] in (0, 1), and noise that depends on the record alone."""
        ...

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, [B, c, h, w]."""
        ...

    def error(self, prediction: torch.Tensor, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weighted mean squared error of what the network predicted, float32 [B]."""
        ...

    def noise_share(self, timesteps: torch.Tensor) -> torch.Tensor:
        """How much larger a difference in predicted noise is than the difference of two outputs at the same x_t, float32 [B]."""
        ...
