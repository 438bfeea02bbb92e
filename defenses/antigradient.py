"""Anti-gradient control (seam 3; AGC of IET-AGC, Liu et al. 2024, arXiv 2407.15328): records that are learnt too well sit out.

A memorised record's loss lies far below what is usual at its timestep. For every timestep an exponential moving average of the loss is
kept; a record whose loss is less than 1 / ``scale`` of it adds nothing, and the others weigh more in exchange.

Departures from the authors' code, for the same result on 1 and N processes and after a resume:

- The average that a step compares with is that of the steps before, and k losses of one step at one timestep move it by 1 - decay^k
  towards their mean: what their code does one after the other, if they are equal.
- The others are weighted by B / kept with the moving share of the steps before, not of the micro-batch. It is at least 1 / 10.

Their ensemble of shards, whose weights are averaged (IET), is not built.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce

from defenses.base import Batch, Defense, RunContext
from defenses.errors import UserError

SMALLEST_SHARE = 0.1  # of records that are kept: no record weighs more than ten times as much


@dataclass(kw_only=True)
class AntiGradientConfig:
    """Settings of `AntiGradient`; defaults are those of the authors' code."""

    scale: float = 2.0  # a record is dropped where scale x loss is below the average of its timestep; above 1
    decay: float = 0.8  # of the moving averages, per loss, 0 to below 1
    # averages that the schedule is cut into; null: one per timestep. Fewer settle sooner, but a bin in which the usual loss varies
    # by more than `scale` drops its easy timesteps instead of memorised records
    bins: int | None = None

    def __post_init__(self) -> None:
        key = "defenses.anti_gradient"
        if not 1 < self.scale < math.inf:
            raise UserError(f"{key}.scale", f"{self.scale} drops ordinary records", "more than 1; 2 is the paper's")
        if not 0 <= self.decay < 1:
            raise UserError(f"{key}.decay", f"{self.decay} is out of range", "0 to below 1; 0.8 is the paper's")
        if self.bins is not None and self.bins < 1:
            raise UserError(f"{key}.bins", f"{self.bins} is less than 1", "null: one per timestep")


class AntiGradient(Defense):
    """Drops records that are learnt too well for their timestep."""

    name = "anti_gradient"
    remembers = True

    def __init__(self, config: AntiGradientConfig):
        self.config = config
        self._timesteps = 0
        self._mean = torch.zeros(0, dtype=torch.float64)  # [bins], 0 where nothing was seen: drops nothing
        self._share = 1.0  # moving share of records that were kept
        self._seen = self._dropped = 0
        self._step: torch.Tensor | None = (
            None  # float64 [2 bins + 1]: this rank's sums and numbers of losses, dropped records
        )

    def begin(self, context: RunContext) -> None:
        """Makes the averages.

        Raises:
            UserError: more bins than timesteps.
        """
        self._timesteps, bins = context.timesteps, self.config.bins or context.timesteps
        if bins > context.timesteps:
            raise UserError(
                "defenses.anti_gradient.bins", f"{bins} for {context.timesteps} timesteps", "null: one per timestep"
            )
        self._mean = torch.zeros(bins, dtype=torch.float64, device=context.accelerator.device)

    def change_loss(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Losses with zero for dropped records and more weight for the others, float32 [B].

        Raises:
            UserError: the model is not trained at timesteps.
        """
        if batch.timesteps is None:
            raise UserError("defenses.anti_gradient", "the loss of this model has no timesteps", "switch it off")
        bins = len(self._mean)
        place = batch.timesteps.to(losses.device) * bins // self._timesteps  # [B]
        found = losses.detach().double()
        drop = self.config.scale * found < self._mean[place]  # a loss that is no number drops nothing: it must be seen
        if self._step is None:
            self._step = torch.zeros(2 * bins + 1, dtype=torch.float64, device=losses.device)
        self._step.index_add_(0, place, found).index_add_(0, bins + place, torch.ones_like(found))
        self._step[-1] += drop.sum()
        return torch.where(drop, torch.zeros_like(losses), losses / max(self._share, SMALLEST_SHARE))

    def end_step(self) -> None:
        """Moves the averages by the losses of all ranks."""
        bins = len(self._mean)
        step = self._mean.new_zeros(2 * bins + 1) if self._step is None else self._step
        self._step = None
        step = reduce(step, "sum")
        total, count, dropped = step[:bins], step[bins:-1], step[-1].item()
        kept = self.config.decay**count  # [bins], 1 where no loss was seen
        self._mean = kept * self._mean + (1 - kept) * total / count.clamp(min=1)
        seen = count.sum().item()
        self._seen, self._dropped = self._seen + int(seen), self._dropped + int(dropped)
        if seen:
            self._share += (1 - self.config.decay) * ((seen - dropped) / seen - self._share)

    def claim(self) -> dict[str, Any]:
        return {
            "kind": "heuristic",
            "statement": "Leaves a record out of a training step when its loss is far below what is usual at its timestep, a "
            "sign that it is memorised (Liu et al. 2024). No guarantee: what was learnt before stays learnt, easy pictures are "
            "left out like memorised ones, and a loss that stays above the limit may still be enough to recognise or to copy a "
            "record.",
        }

    def findings(self) -> dict[str, Any] | None:
        """Records seen and dropped over all steps; None before the first step."""
        if not self._seen:
            return None
        return {"seen": self._seen, "dropped": self._dropped, "share_dropped": self._dropped / self._seen}

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean": self._mean.tolist(),
            "share": self._share,
            "seen": self._seen,
            "dropped": self._dropped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean = torch.tensor(state["mean"], dtype=torch.float64, device=self._mean.device)
        self._share, self._seen, self._dropped = state["share"], state["seen"], state["dropped"]
