"""Inpainting reconstruction (Carlini et al. 2023, section 5.3): what half of a training picture brings back of its other half."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from defenses.errors import UserError
from defenses.ranks import on_main, together
from defenses.seeding import derive, generator
from eval.denoiser import Denoiser
from eval.members import Candidates, candidates, conditions
from eval.repaint import evaluations, repaint, walk
from eval.scores import Chunk, chunk_losses
from eval.suite import Finding, Scene
from train.files import atomic

FOLDER = "inpainting"  # below the output: what was kept of each picture, by its row in the data set
PLACE = 0.1  # of the schedule, where losses are compared: t = 100 of T = 1000
COLUMNS = [
    "record_id", "member", "group", "reference", "l2", "l2_hidden", "l2_first", "score_first", "l2_mirror", "l2_mean", "fill",
]  # fmt: skip
_EXAMPLES = 4  # pictures of either side that the report shows
_FEW = 20  # pictures on a side below which the report says so


@dataclass(kw_only=True)
class InpaintingConfig:
    """Section ``attack.inpainting``."""

    pictures: int = 24  # members, and as many held-out pictures at most; the paper: 100
    fills: int = 32  # of the hidden half of each picture; the paper: 5,000
    keep: int = 10  # fills with the lowest score whose distance to the original is averaged
    steps: int = 10  # noise levels of RePaint
    jump_length: int = 5  # levels that RePaint goes back up
    resamples: int = 1  # times that it comes down from there; 1: it never goes back up
    draws: int = 4  # of the noise in each loss of a score
    # folder of a pipeline that was not trained on these pictures; null: a shadow model where the run has them, else fills are
    # ranked by the loss of the attacked model alone
    reference: str | None = None
    batch_size: int = 64  # fills in one pass of the network
    permutations: int = 9999  # of the test; its smallest p-value is 1 / (permutations + 1)

    def __post_init__(self):
        for key in ("pictures", "fills", "keep", "steps", "jump_length", "resamples", "draws", "batch_size", "permutations"):
            if getattr(self, key) < 1:
                raise UserError(f"attack.inpainting.{key}", f"{getattr(self, key)} is less than 1", "take a positive number")
        if self.keep > self.fills:
            raise UserError("attack.inpainting.keep", f"{self.keep} of {self.fills} fills cannot be kept", "lower it, or raise fills")
        if self.resamples > 1 and self.jump_length >= self.steps:
            raise UserError(
                "attack.inpainting.jump_length", f"{self.jump_length} of {self.steps} steps leave no place to jump from", "lower it"
            )
