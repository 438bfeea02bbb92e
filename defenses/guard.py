"""A saved model's guard: the index of its training pictures, the threshold, and a call that holds back what comes too near.

The score is the adaptive one of the attack (Carlini et al. 2023, section 5.1), by the same engine (`defenses.neighbours`).
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from safetensors import SafetensorError
from safetensors.numpy import load, save

from defenses.errors import UserError
from defenses.neighbours import adaptive_score, search_sharded

ALPHA, NEIGHBOURS = 0.5, 50  # the attack's defaults (`attack.extraction`)
ATTACK = 1.0  # a score up to this is what the attack calls extracted
PIXELS, SETTINGS = "index.safetensors", "filter.json"
_REMEDY = "copy the whole folder output_filter of the run, or run the evaluation again"


@dataclass(frozen=True)
class Guard:
    """An index with its threshold.

    Attributes:
        pixels: uint8 [R, C, H, W], the training pictures, reduced to the index's size.
        picture: picture id of each, int64 [R]; copies share it. At least two different ones.
        threshold: adaptive scores below it are flagged, and so are all up to 1 (see `is_near`).
        attempts: how often a flagged image is drawn anew; 0: never.
        facts: how the threshold came about (JSON values).
    """

    pixels: np.ndarray
    picture: np.ndarray
    threshold: float
    attempts: int
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self, images: np.ndarray, device: Any = "cpu", accelerator: Any = None) -> np.ndarray:
        """Adaptive score of each image, float64 [Q], from 0 (a copy) to 2.

        Args:
            images: uint8 [Q, c, h, w] with 1 or 3 channels, of any size.
            accelerator: shares the search among all ranks; null: this process alone.
        """
        queries = fitted(images, self.pixels.shape[1:])
        found = search_sharded(
            queries, self.pixels, self.picture, NEIGHBOURS, accelerator=accelerator, device=device
        ).distinct
        return adaptive_score(found.distance, ALPHA, NEIGHBOURS)

    def flagged(self, images: np.ndarray, device: Any = "cpu") -> np.ndarray:
        """Which of the images come too near to a training picture, bool [Q]; see `scores`."""
        if not len(images):
            return np.zeros(0, dtype=bool)
        return is_near(self.scores(images, device), self.threshold)

    def __call__(
        self, pipeline: Any, *, batch_size: int = 1, generator: Any = None, **options: Any
    ) -> ImagePipelineOutput:
        """Calls an unconditional diffusers pipeline, and draws anew what comes too near to a training picture.

        Args:
            pipeline: e.g. `DDIMPipeline` or `DDPMPipeline`; anything with ``batch_size``, ``generator`` and ``output_type``.
            generator: as the pipeline takes it: null, one, or a list of one per image. The same seeds give the same images;
                an image that is drawn anew goes on with the random numbers of its generator.
            options: passed on, ``output_type`` "pil" (default) or "np" [H, W, C] among them.

        Returns:
            ``images``: list of ``batch_size`` images, None in place of each that was withheld.
        """
        options["return_dict"] = True
        images = list(pipeline(batch_size=batch_size, generator=generator, **options).images)
        rows = self._near(images, range(batch_size), pipeline.device)
        for _ in range(self.attempts):
            if not rows:
                break
            some = [generator[row] for row in rows] if isinstance(generator, list) else generator
            drawn = pipeline(batch_size=len(rows), generator=some, **options).images
            for row, image in zip(rows, drawn, strict=True):
                images[row] = image
            rows = self._near(images, rows, pipeline.device)
        return ImagePipelineOutput(images=[None if row in rows else image for row, image in enumerate(images)])

    def _near(self, images: list, rows: Sequence[int], device: Any) -> list[int]:
        near = self.flagged(np.stack([levels_of(images[row]) for row in rows]), device)
        return [row for row, hit in zip(rows, near, strict=True) if hit]


def is_near(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Scores below the threshold, bool [Q], and never less than all that the attack calls extracted: a filter that let
    those through would miss its purpose, whatever its false alarms."""
    return (scores < threshold) | (scores <= ATTACK)


def levels_of(image: Any) -> np.ndarray:
    """A pipeline's image (PIL, or float [H, W, C] in [0, 1]) as it is saved: uint8 [C, H, W], rounded to the nearest level."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [n, c, h, w] in the index's shape (C, H, W): channels by luma or repetition, size by an antialiased bicubic
    filter. Index, calibration pictures and generations all come through here, so that they are compared alike."""
    if images.shape[1:] == shape:
        return images
    parts = [_fitted(images[start : start + 256], shape) for start in range(0, len(images), 256)]
    return np.concatenate(parts) if parts else np.zeros((0, *shape), dtype=np.uint8)


def _fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    levels = torch.from_numpy(np.ascontiguousarray(images)).float()
    if levels.shape[1] != shape[0]:
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        levels = (levels * luma).sum(1, keepdim=True) if shape[0] == 1 else levels.expand(-1, shape[0], -1, -1)
    if tuple(levels.shape[2:]) != shape[1:]:
        levels = torch.nn.functional.interpolate(levels, shape[1:], mode="bicubic", antialias=True)
    return levels.round().clamp(0, 255).to(torch.uint8).numpy()


def conformal_threshold(scores: np.ndarray, unit: Sequence[Any], rate: float) -> float:
    """The score below which an image is flagged: at most ``rate`` of new pictures like the calibration pictures are.

    With n calibration pictures of n people it is their k-th smallest score, k = floor(rate * (n + 1)), and a new picture's
    lies below it with probability k / (n + 1), or less where scores are tied (Vovk et al. 2005; Bates et al. 2023, equation
    2: flagged where the conformal p-value (1 + #{calibration scores <= s}) / (n + 1) is at most ``rate``). A person's pictures
    are alike, so each counts 1 / (number of them), and n is the number of people (Lee et al. 2023, "Distribution-free
    inference with hierarchical data"): the rate holds for a picture of a person who is in neither split. It is an average
    over the choice of calibration pictures: with n people the rate of one threshold varies by about sqrt(rate / n).

    Args:
        scores: of the calibration pictures, float [n], n > 0.
        unit: person (or whatever is independent) behind each.

    Raises:
        UserError: too few units for this rate.
    """
    _, member, size = np.unique(np.asarray(unit), return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    p_value = (1 + np.cumsum(1 / size[member[order]])) / (len(size) + 1)
    limit = rate * (1 + 1e-9)  # 0.07 * 100 and the sums are not exact
    if 1 / (len(size) + 1) > limit:
        raise UserError(
            "defenses.output_filter.false_alarm_rate",
            f"{rate:g} needs calibration pictures of {math.ceil(1 / limit) - 1} different people, there are {len(size)}",
            "raise data.calibration_fraction, or the rate",
        )
    return float(scores[order[np.argmax(p_value > limit)]])


def save_filter(folder: Path, guard: Guard) -> None:
    """Writes the index and then, under its SHA-256, the settings; each file whole or not at all. Owner's eyes only."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pixels = save({"pixels": np.ascontiguousarray(guard.pixels), "picture": np.asarray(guard.picture, dtype=np.int64)})
    settings = {
        "schema": 1,
        "threshold": guard.threshold,
        "attempts": guard.attempts,
        "facts": guard.facts,
        "sha256": hashlib.sha256(pixels).hexdigest(),
    }
    for name, content in ((PIXELS, pixels), (SETTINGS, json.dumps(settings, indent=1, allow_nan=False).encode())):
        temporary = folder / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)


def load_filter(folder: str | Path) -> Guard:
    """Reads what `save_filter` wrote: JSON and safetensors, nothing that could run code.

    Raises:
        UserError: a file is missing or damaged, or they do not belong together.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        content = (folder / PIXELS).read_bytes()
        if hashlib.sha256(content).hexdigest() != settings["sha256"]:
            raise ValueError(f"{PIXELS} is not the one that {SETTINGS} was written for")
        tensors = load(content)
        names = {each.name for each in fields(Guard)} - {"pixels", "picture"}
        guard = Guard(tensors["pixels"], tensors["picture"], **{name: settings[name] for name in names})
        _check(guard)
    except OSError as error:
        raise UserError(str(folder), f"{error.strerror}: {Path(error.filename or folder).name}", _REMEDY) from error
    except KeyError as error:
        raise UserError(str(folder), f"holds no {error.args[0]}", _REMEDY) from error
    except (ValueError, TypeError, SafetensorError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise UserError(str(folder), f"is no output filter: {str(error).splitlines()[0][:200]}", _REMEDY) from error
    return guard


def _check(guard: Guard) -> None:
    pixels, picture = guard.pixels, guard.picture
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not all(pixels.shape):
        raise ValueError(f"pictures are {pixels.dtype} {list(pixels.shape)}, not uint8 [R, 1 or 3, H, W]")
    if picture.dtype != np.int64 or picture.shape != pixels.shape[:1]:
        raise ValueError(f"picture ids are {picture.dtype} {list(picture.shape)}, not int64 [{len(pixels)}]")
    if type(guard.threshold) is not float or not 0 <= guard.threshold <= 1 / ALPHA:
        raise ValueError(f"threshold {guard.threshold!r} is no number from 0 to {1 / ALPHA:g}")
    if type(guard.attempts) is not int or guard.attempts < 0:
        raise ValueError(f"attempts {guard.attempts!r} is no number from 0 on")
