"""What the training loop needs to know of a loss, whatever the kind of model."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
