"""Membership scores of single records, float64 [N] each, larger for what was trained on; and the losses that they rest on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from defenses.ranks import together
from defenses.seeding import generator
from eval.denoiser import Condition, Denoiser


@dataclass
class Probe:
    """A model and the records that it is asked about.

    Attributes:
        images: uint8 [N, C, H, W], array-like, read one batch at a time.
        conditions: what the model is told of each record (`eval.members.conditions`), length N.
        rows: row of each record in the data set, int64 [N]. Noise depends on it, so a record meets the same noise in every
            model, beside whatever other records.
        batch: images in one pass of the network.
    """

    denoiser: Denoiser
    images: Any
    conditions: Sequence[Any]
    rows: np.ndarray
    seed: int
    accelerator: Accelerator
    batch: int

    def collect(self, measure: Callable[["Chunk"], torch.Tensor]) -> np.ndarray:
        """``measure`` of all records, batch after batch, shared among the ranks; each rank returns all, float64 [N, ...].

        Args:
            measure: a batch -> tensor [B, ...].
        """
        starts = range(0, len(self.rows), self.batch)[self.accelerator.process_index :: self.accelerator.num_processes]
        found = together(
            self.accelerator, lambda: [(start, measure(self._chunk(start)).double().cpu().numpy()) for start in starts]
        )
        return np.concatenate([part for _, part in sorted(gather_object(found), key=lambda pair: pair[0])])

    def _chunk(self, start: int) -> "Chunk":
        part = slice(start, start + self.batch)
        condition = self.denoiser.condition(self.conditions[part])
        return Chunk(self.denoiser, np.asarray(self.images[part]), condition, self.rows[part], self.seed)


@dataclass
class Chunk:
    """One batch of records.

    Attributes:
        pictures: uint8 [B, C, H, W].
    """

    denoiser: Denoiser
    pictures: np.ndarray
    condition: Condition
    rows: np.ndarray
    seed: int

    def clean(self, mirrored: bool = False) -> torch.Tensor:
        """x_0, [B, ...]; of the pictures' mirror images where ``mirrored``."""
        return self.denoiser.encode(self.pictures[..., ::-1] if mirrored else self.pictures)

    def noise(self, like: torch.Tensor, *purpose: int) -> torch.Tensor:
        """Standard normal numbers of the shape of ``like``: of each record alone, drawn on the CPU."""
        draws = [
            torch.randn(like.shape[1:], generator=generator(self.seed, "attack/noise", *purpose, int(row)))
            for row in self.rows
        ]
        return torch.stack(draws).to(like.device)

    def at(self, timestep: int) -> torch.Tensor:
        """The timestep of every record, int64 [B]."""
        return torch.full((len(self.rows),), timestep, device=self.denoiser.device)


def loss_values(
    denoiser: Denoiser,
    images: Any,
    conditions: Sequence[Any],
    rows: np.ndarray,
    *,
    timesteps: Sequence[int],
    draws: int,
    flips: bool,
    seed: int,
    accelerator: Accelerator,
    batch: int,
) -> np.ndarray:
    """Mean squared error of the predicted noise (Carlini et al. 2023, section 5.2), whatever the network itself predicts.

    The noise is a function of (seed, timestep, draw, view, row): the same for every model, timesteps, draws and views
    independent of each other, a draw the same whatever else is asked for.

    Args:
        images: uint8 [N, C, H, W], array-like.
        conditions: what the model is told of each record, length N.
        rows: row of each record in the data set, int64 [N].
        timesteps: T of them, each in [0, denoiser.timesteps).
        draws: of the noise.
        flips: asks about the mirror image as well.
        batch: images in one pass of the network.

    Returns:
        float64 [N, T, draws, views], on every rank; view 0 is the picture, view 1 its mirror image.
    """
    probe = Probe(denoiser, images, conditions, rows, seed, accelerator, batch)
    return probe.collect(lambda chunk: chunk_losses(chunk, timesteps, draws, flips))


@torch.no_grad()
def chunk_losses(chunk: Chunk, timesteps: Sequence[int], draws: int, flips: bool) -> torch.Tensor:
    """The losses of one batch, float32 [B, T, draws, views]."""
    views = [chunk.clean(), chunk.clean(mirrored=True)] if flips else [chunk.clean()]
    found = torch.empty(len(chunk.rows), len(timesteps), draws, len(views))
    for column, timestep in enumerate(timesteps):
        for draw in range(draws):
            for view, x in enumerate(views):
                found[:, column, draw, view] = error(chunk, x, timestep, chunk.noise(x, timestep, draw, view)).cpu()
    return found


def error(chunk: Chunk, x: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the noise that the model predicts in the noised ``x``, float32 [B]."""
    timesteps = chunk.at(timestep)
    noisy = chunk.denoiser.noised(x, noise, timesteps)
    predicted = chunk.denoiser.epsilon(noisy, timesteps, chunk.condition)
    return (predicted - noise).square().flatten(1).mean(1)


@torch.no_grad()
def secmi(probe: Probe, t_sec: int, step: int) -> np.ndarray:
    """SecMI-stat: minus the t-error of a deterministic trip, mean over dimensions (Duan et al. 2023, section 3.3).

    DDIM inversion leads from x_0 to t_sec in steps of ``step``; from there one step on and one step back. What the model knows
    comes back nearer. (The authors' program ends one step before t_sec, at 90 for 100.)

    Args:
        t_sec: timestep of the comparison, a multiple of ``step``.
        step: of the inversion, in timesteps; t_sec + step must lie in the schedule.
    """

    def measure(chunk: Chunk) -> torch.Tensor:
        x = chunk.clean()
        for timestep in range(0, t_sec, step):
            x = _ddim(chunk, x, timestep, timestep + step)
        back = _ddim(chunk, _ddim(chunk, x, t_sec, t_sec + step), t_sec + step, t_sec)
        return -(back - x).square().flatten(1).mean(1)

    return probe.collect(measure)


def _ddim(chunk: Chunk, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """One deterministic step in either direction (Song et al. 2021, Eq. 12 with sigma 0)."""
    epsilon = chunk.denoiser.epsilon(x, chunk.at(start), chunk.condition)
    return chunk.denoiser.noised(chunk.denoiser.clean(x, epsilon, chunk.at(start)), epsilon, chunk.at(end))


@torch.no_grad()
def pia(probe: Probe, timestep: int, norm: float = 4.0) -> np.ndarray:
    """PIA and PIAN, float64 [N, 2] (Kong et al. 2024, section 3): minus the l_p distance of two predictions.

    The noise predicted in x_0 at t = 0 stands in for the true noise: x_0 is noised with it to ``timestep``, and the noise
    predicted there is compared with it. PIAN first rescales it to the mean absolute value of a normal variable, sqrt(2 / pi).
    """

    def measure(chunk: Chunk) -> torch.Tensor:
        x = chunk.clean()
        first = chunk.denoiser.epsilon(x, chunk.at(0), chunk.condition)
        size = first.abs().flatten(1).mean(1).clamp_min(1e-12).reshape(-1, *[1] * (x.ndim - 1))
        found = []
        for noise in (first, first * math.sqrt(2 / math.pi) / size):
            noisy = chunk.denoiser.noised(x, noise, chunk.at(timestep))
            found.append(-_norm(chunk.denoiser.epsilon(noisy, chunk.at(timestep), chunk.condition) - noise, norm))
        return torch.stack(found, 1)

    return probe.collect(measure)


@torch.no_grad()
def sima(probe: Probe, timestep: int, norm: float = 4.0) -> np.ndarray:
    """SimA: minus the l_p norm of the noise predicted in the picture itself, which holds none (Rao et al. 2025).

    The prediction points from the picture to the mean of the training pictures near it; for one of them that is itself.
    """

    def measure(chunk: Chunk) -> torch.Tensor:
        return -_norm(chunk.denoiser.epsilon(chunk.clean(), chunk.at(timestep), chunk.condition), norm)

    return probe.collect(measure)


def _norm(x: torch.Tensor, order: float) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), order, dim=1)


def standardised(losses: np.ndarray) -> np.ndarray:
    """Minus the mean over columns of losses in standard deviations of all records, float64 [N].

    Losses of different timesteps differ by orders of magnitude. Centre and spread are those of members and non-members
    together, so one affine map is applied to all records and no label is used: whoever holds candidates can do the same.

    Args:
        losses: float64 [N, T].
    """
    spread = losses.std(0)
    return -((losses - losses.mean(0)) / np.where(spread > 0, spread, 1.0)).mean(1)
