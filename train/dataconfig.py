"""Settings of the section ``data``."""

from dataclasses import dataclass, field
from typing import Literal

from defenses.errors import UserError
from train.canaryconfig import CanariesConfig
from train.images import PILLOW_LIMIT
from train.phantom import PhantomConfig

SMALLEST_PHANTOM = 16  # pixels


@dataclass(kw_only=True)
class DataConfig:
    """Which pictures, how they are read, and how they are divided."""

    # "phantom" (embedded), a folder of pictures, a .npz file, a folder saved by `datasets`, hub:owner/name[@revision];
    # "#part" at the end chooses a part of a data set that has several (train, test ...)
    source: str = "phantom"
    # pictures that the model never sees, in any of these forms; null: a part of data.source is held out
    heldout_source: str | None = None
    image_size: int = 32  # pixels; central square, resized
    channels: int = 1  # 1: grey, 3: RGB
    group_key: str | None = None  # column of the patient (or artist, ...): never on two sides; null: every record alone
    # column of the caption, a text or a list of several for one picture (metadata.jsonl, data sets): the first is the prompt of
    # the attack, defenses.captions chooses among all; null: none
    caption_key: str | None = None
    # column of the class, for a class-conditional model (for sub-folders: label); null: an unconditional model
    label_key: str | None = None
    # column with your own split: train | valid, validation, val, calibration | test, heldout; null: split at random
    split_key: str | None = None
    heldout_fraction: float = 0.2  # share of the records; 0: none. Not used with split_key, heldout_source, phantom
    calibration_fraction: float = 0.1  # share of the records; 0: none. Not used with split_key, phantom
    split_seed: int = 0  # of the random split; apart from run.seed, so that arms and seeds share one split
    # whether held-out pictures are drawn like training pictures, which the control's p-value needs;
    # null: true for a random split and for phantom, false for heldout_source and split_key
    heldout_exchangeable: bool | None = None
    max_pixels: int = 64_000_000  # a file that claims more is rejected before it is decoded
    # bits of grey files of more than 8; null: per file the smallest of 8, 10, 12, 14, 16 that holds its maximum, which
    # brightens dark files: set it where brightness means something
    bit_depth: int | None = None
    on_bad_image: Literal["reject", "fail"] = "reject"  # list an unusable file in the manifest, or stop
    restricted: bool = False  # true: no training picture in reports, no upload
    phantom: PhantomConfig = field(default_factory=PhantomConfig)  # only for source=phantom
    canaries: CanariesConfig | None = None  # pictures that the trainer plants to measure what is memorised; null: none

    def __post_init__(self) -> None:
        _check_range("data.image_size", self.image_size, 8, 4096)
        _check_range("data.max_pixels", self.max_pixels, 1, PILLOW_LIMIT)
        if self.channels not in (1, 3):
            raise UserError("data.channels", f"is {self.channels}", "use 1 (grey) or 3 (RGB)")
        if self.bit_depth is not None:
            _check_range("data.bit_depth", self.bit_depth, 8, 16)
        for name in ("heldout_fraction", "calibration_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"data.{name}", f"is {getattr(self, name)}", "use a share of at least 0 and below 1")
        if self.heldout_fraction + self.calibration_fraction >= 1:
            raise UserError(
                "data.heldout_fraction", "leaves nothing to train on", "lower it or data.calibration_fraction"
            )
        for name in ("source", "heldout_source", "group_key", "caption_key", "label_key", "split_key"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise UserError(f"data.{name}", "is empty", "use null for none")
        if self.source == "phantom" and self.image_size < SMALLEST_PHANTOM:
            raise UserError("data.image_size", f"phantom needs at least {SMALLEST_PHANTOM}")
        if self.split_key is not None and self.heldout_source is not None:
            raise UserError("data.split_key", "cannot be used with data.heldout_source", "choose one of the two")

    def exchangeable(self) -> bool:
        """Whether held-out and training pictures are draws from one population, split by groups."""
        if self.heldout_exchangeable is not None:
            return self.heldout_exchangeable
        return self.heldout_source is None and (self.split_key is None or self.source == "phantom")


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(key, f"is {value}", f"use {low} to {high}")
