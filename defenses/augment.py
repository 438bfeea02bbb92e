"""Augmentation (seam 2): every record is changed at random each time it is seen, so that no fixed target is repeated.

One random stream per record, step and transformation (`defenses.seeding`): what happens to a record depends neither on
the rest of the batch nor on which other transformations are on. Switching one off leaves the others as they were.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn.functional import affine_grid, grid_sample

from defenses.base import Batch, Defense
from defenses.errors import UserError
from defenses.seeding import RecordRandom


@dataclass(kw_only=True)
class AugmentConfig:
    """Settings of `Augment`. A probability of 0 turns a transformation off; strengths are upper limits."""

    flip_probability: float = 0.5  # mirror left to right
    crop_probability: float = 0.5  # cut a random square out and enlarge it to the full size
    crop_scale: float = 0.85  # shortest side of that square as a share of the picture's, 0.1 to 1
    rotate_probability: float = 0.5  # turn about the middle
    rotate_degrees: float = 7.0  # largest angle in either direction, 0 to 180
    brightness_probability: float = 0.5  # add a constant
    brightness: float = 0.1  # largest constant in either direction, pixels in [0, 1], 0 to 1
    contrast_probability: float = 0.5  # stretch around the picture's own mean
    contrast: float = 0.1  # factor between 1 - contrast and 1 + contrast, 0 to below 1
    noise_probability: float = (
        0.0  # add independent Gaussian noise to every pixel and channel; the model learns it, too
    )
    noise_std: float = 0.02  # its standard deviation, pixels in [0, 1], 0 to 1

    def __post_init__(self) -> None:
        limits = {"crop_scale": (0.1, 1.0), "rotate_degrees": (0.0, 180.0), "contrast": (0.0, 0.99)}
        for name in (field.name for field in fields(self)):
            low, high = limits.get(name, (0.0, 1.0))
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"defenses.augment.{name}", f"{getattr(self, name)} is out of range", f"{low} to {high}"
                )


class Augment(Defense):
    """Flip, crop, rotation, contrast, brightness and noise, in this order; all probabilities 0: the exact identity."""

    name = "augment"

    def __init__(self, config: AugmentConfig):
        self.config = config

    def change_batch(self, batch: Batch) -> Batch:
        """Changed images, float32 [B, C, H, W], clamped to [-1, 1]; a record that draws no change stays bit for bit."""
        if len(batch) == 0:
            return batch
        images = self._move(batch.images, batch.random)
        images = self._tone(images, batch.random)
        return replace(batch, images=self._noise(images, batch.random))

    def claim(self) -> dict[str, Any]:
        return {
            "kind": "heuristic",
            "statement": "Varies every picture each time it is seen, which delays memorisation. No guarantee: a "
            "memorised picture may come back mirrored, shifted, turned or brighter, and it is as much a leak.",
        }

    def _move(self, images: torch.Tensor, random: RecordRandom) -> torch.Tensor:
        """Flip, crop and rotation in one bilinear resampling; what lies outside is mirrored at the border."""
        config = self.config
        flip, _ = _draw(random, "flip", config.flip_probability)
        crop, place = _draw(random, "crop", config.crop_probability, 3)
        rotate, turn = _draw(random, "rotate", config.rotate_probability, 1)
        side = torch.where(crop, 1 - (1 - config.crop_scale) * place[:, 0], 1.0)
        centre = (1 - side)[:, None] * (2 * place[:, 1:] - 1)  # [B, 2] (x, y), grid units: the picture spans -1 to 1
        angle = torch.where(rotate, math.radians(config.rotate_degrees) * (2 * turn[:, 0] - 1), 0.0)
        # output -> input: turn, cut out; the picture was mirrored before, so x changes its sign last
        cosine, sine = side * torch.cos(angle), side * torch.sin(angle)
        mirror = torch.where(flip, -1.0, 1.0)
        x_row = mirror[:, None] * torch.stack([cosine, -sine, centre[:, 0]], dim=1)
        y_row = torch.stack([sine, cosine, centre[:, 1]], dim=1)
        theta = torch.stack([x_row, y_row], dim=1).to(images.device)  # [B, 2, 3]
        grid = affine_grid(theta, list(images.shape), align_corners=False)
        moved = grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        flipped = torch.where(_column(flip, images), images.flip(-1), images)  # exact where nothing else moves
        return torch.where(_column(crop | rotate, images), moved, flipped)

    def _tone(self, images: torch.Tensor, random: RecordRandom) -> torch.Tensor:
        """Contrast around each picture's mean, then brightness; in [-1, 1] a brightness b of [0, 1] is 2b."""
        config = self.config
        stretch, strength = _draw(random, "contrast", config.contrast_probability, 1)
        shift, constant = _draw(random, "brightness", config.brightness_probability, 1)
        factor = torch.where(stretch, 1 + config.contrast * (2 * strength[:, 0] - 1), 1.0)
        added = torch.where(shift, 2 * config.brightness * (2 * constant[:, 0] - 1), 0.0)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        toned = (images - mean) * _column(factor, images) + mean + _column(added, images)
        return torch.where(_column(stretch | shift, images), toned.clamp(-1, 1), images)

    def _noise(self, images: torch.Tensor, random: RecordRandom) -> torch.Tensor:
        config = self.config
        if config.noise_probability == 0:  # a normal number per pixel is the one costly draw
            return images
        hit, _ = _draw(random, "noise", config.noise_probability)
        noise = random.normal("augment/noise pixels", *images.shape[1:]).to(images.device)
        return torch.where(_column(hit, images), (images + 2 * config.noise_std * noise).clamp(-1, 1), images)


def _draw(random: RecordRandom, name: str, probability: float, count: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each record is changed, bool [B], and its ``count`` uniform numbers, float32 [B, count]; on the CPU."""
    if probability == 0:
        return torch.zeros(len(random), dtype=torch.bool), torch.zeros(len(random), count)
    numbers = random.uniform(f"augment/{name}", 1 + count)
    return numbers[:, 0] < probability, numbers[:, 1:]


def _column(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return values.to(images.device)[:, None, None, None]
