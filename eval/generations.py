"""Generated images as files: written once, read back, found in folders of our own and of others."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from defenses.errors import UserError
from train.files import atomic
from train.imagefolder import read_file
from train.images import Rejected, decode
from train.sampling import to_pil, to_uint8

WITHHELD = ".withheld"  # suffix of the empty file that stands where a defense let no image out
MAX_PIXELS, MAX_BYTES = 64_000_000, 512_000_000  # of one foreign generation


@dataclass
class Generations:
    """Image files to attack: one group per prompt, or a single unnamed group.

    Attributes:
        groups: (sub-folder or "", file names relative to ``folder``).
        rejected: file -> reason.
        measured: files on which image quality is measured; None: all.
        streamed: what the attack found when the images were drawn, most of which are gone (`eval.stream`); None: it is yet
            to be made, on the files.
        withheld: sub-folder or "" -> images that a defense let nobody have there (a marker stands in the place of each); of the files
            on disk, so not all of a streamed attack.
        control: the same of captions that the model never saw (`eval.captioncontrol`); None: not asked for.
    """

    folder: Path
    groups: list[tuple[str, list[str]]]
    rejected: dict[str, str]
    measured: list[str] | None = None
    streamed: Any = None
    withheld: dict[str, int] = field(default_factory=dict)
    control: Any = None

    @property
    def prompted(self) -> bool:
        return "" not in self.asked

    @property
    def asked(self) -> dict[str, int]:
        """Images that were drawn of each group, those that a defense withheld among them, by its name and in order of the names."""
        left = {name: len(files) for name, files in self.groups}
        return {name: left.get(name, 0) + self.withheld.get(name, 0) for name in sorted(left | self.withheld)}

    def read(self, names: Sequence[str], image_size: int, channels: int) -> np.ndarray:
        """uint8 [n, C, S, S]."""
        if not names:
            return np.zeros((0, channels, image_size, image_size), dtype=np.uint8)
        return np.stack([_read(self.folder / name, image_size, channels) for name in names])


def find(folder: Path, image_size: int, channels: int) -> Generations:
    """Images in ``folder`` (untargeted), or in its sub-folders, one per prompt (prompted). Unreadable files are listed.

    Raises:
        UserError: no usable image, unless a defense withheld them all.
    """
    if not folder.is_dir():
        raise UserError(
            "generations", f"{folder} is no folder", "give a folder of images, or of one sub-folder per prompt"
        )
    flat, held = _images(folder), {"": _withheld(folder)}
    nested = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if flat and nested:
        raise UserError(
            "generations",
            f"{folder} holds both images and sub-folders",
            "images (untargeted) or a sub-folder per prompt, not both",
        )
    rejected: dict[str, str] = {}
    groups = []
    held |= {path.name: _withheld(path) for path in nested}
    for name, files in [("", flat)] if flat else [(p.name, _images(p)) for p in nested]:
        usable = []
        for file in files:
            relative = str(file.relative_to(folder))
            try:
                _read(file, image_size, channels)
                usable.append(relative)
            except (Rejected, OSError) as reason:
                rejected[relative] = str(reason)
        if usable:
            groups.append((name, usable))
    held = {name: count for name, count in held.items() if count}
    if not groups and not held:
        raise UserError("generations", f"{folder} holds no usable image", next(iter(rejected.values()), "it is empty"))
    return Generations(folder, groups, rejected, withheld=held)


def _withheld(folder: Path) -> int:
    """Markers that stand where a defense let no image out."""
    return sum(path.suffix == WITHHELD and not path.name.startswith(".") for path in folder.iterdir())


def _images(folder: Path) -> list[Path]:
    """Files that may be generations: no hidden (half-written) ones, no tables and texts."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix not in (".csv", ".json", ".txt", WITHHELD))


def _read(file: Path, image_size: int, channels: int) -> np.ndarray:
    if file.suffix == ".png":  # our own files, and any that need no conversion, without the general decoder
        with contextlib.suppress(Exception), Image.open(file, formats=["PNG"]) as image:
            plain = image.size == (image_size, image_size) and not getattr(image, "is_animated", False)
            plain = plain and not image.has_transparency_data
            if plain and image.mode == ("L" if channels == 1 else "RGB"):
                pixels = np.asarray(image)
                return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    content = read_file(file, MAX_BYTES)
    return decode(content, image_size=image_size, channels=channels, max_pixels=MAX_PIXELS, name=file.name).pixels


def save(file: Path, image: torch.Tensor) -> None:
    """One image, float32 [C, H, W] in [0, 1], as a PNG; an empty marker in its place where a defense withheld it (NaN)."""
    write(file, None if image.isnan().any() else to_uint8(image[None])[0])


def write(file: Path, levels: np.ndarray | None) -> None:
    """One image, uint8 [C, H, W], as a PNG; an empty marker in its place where it was withheld (None)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if levels is None:
        withheld(file).touch()
        return
    with atomic(file, "wb") as handle:
        to_pil(levels).save(handle, format="PNG")


def pixels(file: Path) -> torch.Tensor:
    """A PNG of ours, float32 [C, H, W] in [0, 1]."""
    with Image.open(file) as image:
        pixels = np.array(image)  # a copy: torch wants to be able to write
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).float() / 255


def withheld(file: Path) -> Path:
    return file.with_suffix(WITHHELD)


def file_of(folder: Path, prompt: int | None, index: int) -> Path:
    return folder / f"{index:06d}.png" if prompt is None else folder / f"{prompt:05d}" / f"{index:06d}.png"
