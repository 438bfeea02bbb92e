"""Filtering by text-conditional noise magnitude (seam 3; Wen et al. 2024).

Where a caption alone determines what the network predicts, its picture is being memorised: the difference between the noise predicted with
the caption and without it becomes large, || eps(x_t, c) - eps(x_t, empty) ||_2. Records beyond a threshold add nothing to the gradient in
that step. They are drawn again later and looked at anew.

Departures from the authors' code: the mean is still taken over the whole batch, dropped records counting zero (theirs is over those that
are left), so that records do not depend on each other and the filter can be used in a private run; and the threshold, which the paper
gives for latents of 4 x 64 x 64, is scaled with the square root of the number of latent values.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import reduce

from defenses.base import Batch, Defense, RunContext
from defenses.errors import UserError

DIMENSIONS = 4 * 64 * 64  # latent values of Stable Diffusion 1 at 512 px, for which the threshold is given
BINS, PER_OCTAVE, SMALLEST = 256, 8, 2.0**-16  # of the histogram of magnitudes: steps of 9 %, from 1.5e-5 to 6.5e4
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(kw_only=True)
class TextFilterConfig:
    """Settings of `TextFilter`."""

    # largest magnitude of a record that is trained on, in units of 4 x 64 x 64 latents: a network that differs as much per latent value
    # has the same magnitude whatever the size. The paper's; the findings give quantiles to choose from
    threshold: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise UserError("defenses.text_filter.threshold", f"{self.threshold} is not positive", "2 is the paper's")


class TextFilter(Defense):
    """Drops a record from a step whose text-conditional noise magnitude is too large; each record by itself."""

    name = "text_filter"
    needs_captions = True
    wants = ("text_magnitude",)

    def __init__(self, config: TextFilterConfig):
        self.config = config
        self._counts = torch.zeros(BINS + 1, dtype=torch.float64)  # dropped records, then records by magnitude
        self._step: torch.Tensor | None = None  # the same of this rank's part of the step
        self._quiet = True

    def begin(self, context: RunContext) -> None:
        self._quiet = context.quiet

    def change_loss(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Losses with zero for dropped records, float32 [B]. A magnitude that is no number drops nothing: it must be seen.

        Raises:
            UserError: the objective tells no magnitude.
        """
        if batch.told is None or "text_magnitude" not in batch.told or batch.latents is None:
            raise UserError("defenses.text_filter", "the model has no text to compare with none", "switch it off")
        values = math.prod(batch.latents.shape[1:])
        magnitude = batch.told["text_magnitude"].detach() * math.sqrt(DIMENSIONS / values)  # [B]
        drop = magnitude >= self.config.threshold
        # without rows: per-record gradients of a private run, where nothing may be counted and side effects are lost
        if not self._quiet and batch.rows is not None:
            self._count(magnitude, drop)
        return torch.where(drop, torch.zeros_like(losses), losses)

    def _count(self, magnitude: torch.Tensor, drop: torch.Tensor) -> None:
        """Stays on the device: a number that is asked for would hold up the step."""
        if self._step is None:
            self._step = torch.zeros(BINS + 1, dtype=torch.float64, device=magnitude.device)
        place = (magnitude.double() / SMALLEST).log2().mul(PER_OCTAVE).nan_to_num(nan=BINS, neginf=0).clamp(0, BINS - 1)
        self._step[0] += drop.sum()
        self._step[1:].index_add_(0, place.long(), torch.ones_like(place))

    def end_step(self) -> None:
        """Adds up the counts of all ranks."""
        if self._quiet:
            return
        step = self._counts.new_zeros(BINS + 1) if self._step is None else self._step
        self._step = None
        self._counts = self._counts.to(step.device) + reduce(step, "sum")

    def claim(self) -> dict[str, Any]:
        return {
            "kind": "heuristic",
            "statement": "Leaves a record out of a training step while its caption alone changes the prediction beyond a threshold, a "
            "sign that it is being memorised (Wen et al. 2024). No guarantee: what was learnt below the threshold stays learnt, "
            "the sign is weak for pictures that are memorised in part or without their text, and the threshold suits one model and "
            "resolution.",
        }

    def findings(self) -> dict[str, Any] | None:
        """Records seen and dropped over all steps, and quantiles of the magnitude (upper limits, 9 % too large at most) in the unit
        of ``threshold``; None: nothing was counted."""
        dropped, *histogram = self._counts.tolist()
        seen = sum(histogram)
        if not seen:
            return None
        return {
            "seen": int(seen),
            "dropped": int(dropped),
            "share_dropped": dropped / seen,
            "magnitude": {f"{share:.1%}": _quantile(histogram, share) for share in QUANTILES},
        }

    def state_dict(self) -> dict[str, Any]:
        return {"counts": [int(count) for count in self._counts.tolist()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = torch.tensor(state["counts"], dtype=torch.float64)


def _quantile(histogram: list[float], share: float) -> float:
    """Upper edge of the bin that the quantile lies in."""
    rank = math.ceil(round(share * sum(histogram), 6))  # 0.999 * 4000 is a little more than 3996
    place = next(place for place, count in enumerate(accumulate(histogram)) if count >= rank)
    return SMALLEST * 2 ** ((place + 1) / PER_OCTAVE)
