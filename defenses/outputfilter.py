"""Output filter (seam 6): generations that come too near to a training picture are drawn anew, or withheld.

It protects the images that leave through it, not the weights: whoever has the model can sample without it. The index
(`defenses.guard`) lies beside the saved pipeline and holds the training pictures themselves, reduced.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defenses.base import FIRST_PRIVATE_INDEX, Defense, Pool, RunContext, Sampler, SamplingContext
from defenses.blocklog import BlockLog
from defenses.errors import UserError
from defenses.guard import ATTACK, NEIGHBOURS, Guard, conformal_threshold, fitted, is_near, load_filter, save_filter
from defenses.ranks import on_main
from defenses.seeding import derive

__all__ = ["FOLDER", "Guard", "OutputFilter", "OutputFilterConfig", "load_filter"]

FOLDER = "output_filter"  # in the saved pipeline's folder; must not be published with it


@dataclass(kw_only=True)
class OutputFilterConfig:
    """Settings of `OutputFilter`."""

    false_alarm_rate: float = 0.05  # share of real pictures that the model never saw which would be flagged, on average
    attempts: int = 8  # how often a flagged image is drawn anew before it is withheld; 0: withheld at once
    side: int = 64  # pixels; larger pictures are reduced to it before they are compared

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise UserError(
                "defenses.output_filter.false_alarm_rate", f"{self.false_alarm_rate} is not between 0 and 1", "0.05"
            )
        if not 0 <= self.attempts <= 1000:
            raise UserError("defenses.output_filter.attempts", f"{self.attempts} is not in 0..1000", "8 is usual")
        if self.side < 8:
            raise UserError("defenses.output_filter.side", f"{self.side} pixels show no picture", "take at least 8")


class OutputFilter(Defense):
    """Stands between the saved model and its user; see `defenses.guard` for score and threshold."""

    name = "output_filter"
    after_training = True
    needs_calibration = True

    def __init__(self, config: OutputFilterConfig):
        self.config = config
        self._guard: Guard | None = None
        self._pool: Pool | None = None  # what the guard was built from
        self._log: DrawLog | None = None

    def begin(self, context: RunContext) -> None:
        """Refuses, before hours of training, a run whose filter could not be calibrated."""
        self.check(context.pool, context.control)

    def check(self, pool: Pool, control: np.ndarray) -> None:
        """Whether the filter can be calibrated at all; costs nothing, so it can be asked before training.

        Args:
            control: rows of the calibration split in ``pool.images``.

        Raises:
            UserError: too few calibration pictures for the false-alarm rate, or fewer than two training pictures.
        """
        if len({pool.picture[row] for row in pool.rows}) < 2:
            raise UserError("defenses.output_filter", "needs at least two different training pictures", "switch it off")
        rows, unit = calibration(pool, control)
        conformal_threshold(np.zeros(len(rows)), unit, self.config.false_alarm_rate)

    def wrap_sampler(self, sampler: Sampler, context: SamplingContext) -> Sampler:
        """Builds and saves the index, on all ranks, and returns the guarded sampler. Another sampler of the same pool, such as that of
        held-out captions, is guarded by the same index.

        Every image is a function of its sample index: attempt a of image i is sample index i + (a + 1) *
        `FIRST_PRIVATE_INDEX` under the same label or prompt. Those drawn anew share a pass, so for another block size they
        agree within the rounding of the network, as all samples do.

        Raises:
            UserError: see `check`.
        """
        records = (context.folder if context.records is None else context.records) / FOLDER
        if self._pool is not context.pool:
            self.check(context.pool, context.control)
            self._guard, self._pool = build_guard(self.config, context), context.pool
            on_main(context.accelerator, lambda: save_filter(context.folder / FOLDER, self._guard))
        log = self._log = DrawLog(records, context.accelerator.process_index)
        guard, device = self._guard, context.accelerator.device

        def guarded(indices: Sequence[int], conditions: Sequence[Any] | None = None) -> torch.Tensor:
            watch = _Watch(guard, device)
            images = sampler(indices, conditions).clone()
            near, redraws = watch(images), np.zeros(len(images), dtype=np.int64)
            for attempt in range(1, self.config.attempts + 1):
                rows = np.flatnonzero(near)
                if not len(rows):
                    break
                # 1 * FIRST_PRIVATE_INDEX + j are the samples that defenses look at during training
                anew = [int(indices[row]) + (attempt + 1) * FIRST_PRIVATE_INDEX for row in rows]
                images[rows] = sampler(anew, None if conditions is None else [conditions[row] for row in rows])
                redraws[rows], near[rows] = attempt, watch(images[rows])
            images[near] = torch.nan
            log.add(indices, conditions, redraws, near, watch.seconds)
            return images

        return guarded

    def claim(self) -> dict[str, Any]:
        """Heuristic: what is protected, by which rule, and what is not."""
        return {
            "kind": "heuristic",
            "protects": "outputs",
            "uses_attack_score": True,  # a count by that score says nothing of the images that passed
            "statement": "Protects the images that leave through the filter, not the weights: whoever holds the model can "
            "sample without it. The folder output_filter contains the training pictures, reduced in size, and must not be "
            "published with the weights. An image is held back where the extraction attack's own score finds it nearer to a "
            "training picture than real pictures of other people come, but for the stated share of them (an average over "
            "calibration sets, for pictures of people in neither split; every person counts once, however many pictures). "
            "No guarantee: copies that are cropped, turned, brighter or darker, or shown in part can pass. What is held "
            "back is decided by looking at the training pictures, so images that passed are no longer covered by a DP "
            "guarantee of the weights, and a refusal itself hints at a training picture.",
            "false_alarm_rate": self.config.false_alarm_rate,
            "attempts": self.config.attempts,
        }

    def findings(self) -> dict[str, Any] | None:
        """Threshold, calibration, and what happened to all generations so far, over all ranks and stops.

        ``generations`` drawn; ``flagged`` at their first drawing; ``redrawn`` drawings made in their place; ``withheld``;
        ``filter_seconds_per_image`` of the search, without the sampling of what was drawn anew. None before sampling.
        """
        return None if self._guard is None else self._guard.facts | self._log.counts()


def build_guard(config: OutputFilterConfig, context: SamplingContext) -> Guard:
    """Index and threshold from the training and calibration pictures, on all ranks alike; see `OutputFilter.check`."""
    pool = context.pool
    picture = np.asarray(pool.picture, dtype=np.int64)
    rows, unit = calibration(pool, context.control)
    channels, height, width = pool.images.shape[1:]
    shape = (channels, min(height, config.side), min(width, config.side))
    guard = Guard(_reduced(pool.images, pool.rows, shape), picture[pool.rows], 0.0, config.attempts)
    scores = guard.scores(_reduced(pool.images, rows, shape), context.accelerator.device, context.accelerator)
    threshold = conformal_threshold(scores, unit, config.false_alarm_rate)
    facts = {
        "threshold": max(threshold, ATTACK),
        "threshold_by_calibration": threshold,  # below 1: raised to the attack's own rule, at the price of more false alarms
        "false_alarm_rate": config.false_alarm_rate,
        "calibration_pictures": len(rows),
        "calibration_units": len(np.unique(unit)),
        "calibration_flagged": float(is_near(scores, threshold).mean()),
        "index_pictures": len(np.unique(guard.picture)),
        "index_side": shape[1],
        "neighbours": min(NEIGHBOURS, len(np.unique(guard.picture))),
    }
    return replace(guard, threshold=threshold, facts=facts)


def calibration(pool: Pool, control: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """One row of each different calibration picture, and the person behind it (a picture without a group is its own)."""
    picture = np.asarray(pool.picture, dtype=np.int64)[control]
    rows = control[np.unique(picture, return_index=True)[1]] if len(control) else control
    return rows, [f"row {row}" if pool.group[row] is None else f"group {pool.group[row]}" for row in rows]


def _reduced(images: np.ndarray, rows: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    parts = [fitted(images[rows[start : start + 256]], shape) for start in range(0, len(rows), 256)]
    return np.concatenate(parts)


class _Watch:
    """Flags float images [n, C, H, W] in [0, 1] by the pixels that will be saved, and takes the time."""

    def __init__(self, guard: Guard, device: Any):
        self.guard, self.device, self.seconds = guard, device, 0.0

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        started = time.perf_counter()
        there = np.flatnonzero(~images.isnan().flatten(1).any(1).cpu().numpy())  # others withheld the rest
        near = np.zeros(len(images), dtype=bool)
        near[there] = self.guard.flagged((images[there] * 255).round().to(torch.uint8).cpu().numpy(), self.device)
        self.seconds += time.perf_counter() - started
        return near


class DrawLog:
    """What happened to every image, a line per block of images (`defenses.blocklog`)."""

    def __init__(self, folder: Path, rank: int):
        self._log = BlockLog(folder, "draws", rank)

    def add(
        self,
        indices: Sequence[int],
        conditions: Sequence[Any] | None,
        redraws: np.ndarray,
        withheld: np.ndarray,
        seconds: float,
    ) -> None:
        """One block of images; a prompt is stored as a hash."""
        keys = [0] * len(indices) if conditions is None else [derive(0, str(each)) for each in conditions]
        images = zip(map(int, indices), keys, redraws.tolist(), withheld.tolist(), strict=True)
        self._log.add({"images": list(images), "seconds": seconds})

    def counts(self) -> dict[str, Any]:
        """Part of `OutputFilter.findings`."""
        images = {
            (index, key): (redraws, withheld, line["seconds"] / len(line["images"]))
            for line in self._log.lines()
            for index, key, redraws, withheld in line["images"]
        }
        redraws, withheld, seconds = (
            (list(column) for column in zip(*images.values(), strict=True)) if images else [[]] * 3
        )
        return {
            "generations": len(images),
            # drawn anew at least once, or, where nothing is drawn anew, withheld at once
            "flagged": sum(count > 0 or gone for count, gone in zip(redraws, withheld, strict=True)),
            "redrawn": sum(redraws),
            "withheld": sum(withheld),
            "filter_seconds_per_image": sum(seconds) / len(images) if images else None,
        }
