"""The embedded data set `phantom`: procedurally drawn, chest-radiograph-like pictures whose right answer is known.

Patients with one to four films, four finding classes, captions, planted copies (half of them exact, half re-encoded),
outliers, and held-out pictures of other patients. The numbers come from Philox as doubles; pictures are computed in
float64 and quantised last: one seed gives the same bytes wherever cos, sin and sqrt round alike (`tests/test_phantom.py`).

Nothing here resembles a person, and no medical meaning should be read into it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from defenses.errors import UserError
from defenses.seeding import derive
from train.radiograph import Film, draw_film

FINDINGS = ("normal", "effusion", "cardiomegaly", "nodule")
DEVICES = ("", "pacemaker", "central line", "ECG leads", "tube")
OUTLIERS = (
    "white lung", "inverted film", "spinal rods", "film on its side",
    "foreign body", "situs inversus", "pneumothorax", "scoliosis",
)  # fmt: skip
REENCODE_GAIN = 0.02  # a re-encoded copy is up to this much brighter or darker, each pixel up to 1 level off


@dataclass(kw_only=True)
class PhantomConfig:
    """Size and seed of the embedded data set."""

    pictures: int = 400  # distinct training pictures, the copied ones and the outliers among them
    copied: int = 8  # distinct training pictures that are planted several times; 0: none
    copies: int = 40  # how often each of those occurs in the training split
    outliers: int = 8  # training pictures of unusual look, one copy each; 0: none
    heldout: int = 400  # held-out pictures, of other patients, drawn like ordinary training pictures
    calibration: int = 80  # calibration pictures, likewise
    seed: int = 0  # of the pictures; independent of run.seed

    def __post_init__(self) -> None:
        for name in ("copied", "outliers", "heldout", "calibration", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"data.phantom.{name}", "is negative", "use 0 or more")
        if self.copies < 1:
            raise UserError("data.phantom.copies", "must be at least 1", "use data.phantom.copied=0 for no copies")
        if self.pictures < max(1, self.copied + self.outliers):
            raise UserError(
                "data.phantom.pictures",
                f"{self.pictures} cannot hold {self.copied} copied pictures and {self.outliers} outliers",
                "raise it, or lower data.phantom.copied or data.phantom.outliers",
            )


@dataclass(frozen=True)
class PhantomItem:
    """One record of the embedded data set, with the planted truth.

    Attributes:
        source: ``phantom/0012``; every record has its own, copies too.
        split: ``train``, ``calibration`` or ``heldout``.
        planted: number 0..copied-1 of the copied picture that this record shows, else None.
        outlier: kind of unusual look (one of `OUTLIERS`), else None.
        film: what is drawn; equal films are equal pictures.
        copy: 0 for the original and for exact copies; k > 0: the k-th re-encoding.
    """

    source: str
    patient: str
    caption: str
    label: str
    split: str
    planted: int | None
    outlier: str | None
    film: Film
    copy: int = 0

    def draw(self, image_size: int, channels: int) -> np.ndarray:
        """The picture, uint8 [channels, image_size, image_size] (1 or 3 channels, any size from 16)."""
        levels = draw_film(self.film, image_size, channels)
        return levels if self.copy == 0 else _reencode(levels, derive(self.film.film_key, "copy", self.copy))


def phantom_items(config: PhantomConfig) -> list[PhantomItem]:
    """All records: training pictures, further copies of the planted ones, calibration, held-out.

    A picture depends on the seed, its split and its place there, so more held-out pictures or other copies leave the
    training pictures as they are.
    """
    train = list(_pictures(config.seed, "train", config.pictures))
    order = np.argsort(_doubles(derive(config.seed, "phantom/roles"), config.pictures), kind="stable")
    copied, unusual = order[: config.copied], order[config.copied : config.copied + config.outliers]
    for kind, index in enumerate(unusual):
        train[index] = _as_outlier(train[index], OUTLIERS[kind % len(OUTLIERS)])
    for number, index in enumerate(copied):
        train[index] = replace(train[index], planted=number)
    extra = [
        replace(train[index], copy=0 if number % 2 == 0 else copy)
        for number, index in enumerate(copied)
        for copy in range(1, config.copies)
    ]
    calibration = list(_pictures(config.seed, "calibration", config.calibration))
    heldout = list(_pictures(config.seed, "heldout", config.heldout))
    items = train + extra + calibration + heldout
    return [replace(item, source=f"phantom/{row:04d}") for row, item in enumerate(items)]


def _pictures(seed: int, split: str, count: int) -> Iterator[PhantomItem]:
    """Ordinary pictures: patients with one to four films each, until there are ``count``."""
    made, patient = 0, 0
    while made < count:
        patient_key = derive(seed, "phantom/patient", split, patient)
        films = 1 + int(4 * _doubles(patient_key, 1)[0])
        for film in range(min(films, count - made)):
            yield _ordinary(split, f"{split}-p{patient:04d}", patient_key, derive(patient_key, "film", film))
        made, patient = made + films, patient + 1


def _ordinary(split: str, patient: str, patient_key: int, film_key: int) -> PhantomItem:
    finding, side, device = _doubles(derive(film_key, "traits"), 3)
    film = Film(
        patient_key=patient_key,
        film_key=film_key,
        finding=FINDINGS[int(4 * finding)],
        right=side < 0.5,
        device=DEVICES[max(0, int(8 * device) - 3)],  # half of the films have no device
    )
    return PhantomItem("", patient, _caption(film), film.finding, split, None, None, film)


def _as_outlier(item: PhantomItem, kind: str) -> PhantomItem:
    film = replace(item.film, outlier=kind)
    return replace(item, film=film, outlier=kind, caption=_caption(film))


def _caption(film: Film) -> str:
    side = "right" if film.right != (film.outlier == "situs inversus") else "left"
    finding = {
        "normal": "no finding",
        "effusion": f"{side} pleural effusion",
        "cardiomegaly": "enlarged heart",
        "nodule": f"nodule in the {side} lung",
    }[film.finding]
    return ", ".join(filter(None, ["chest phantom", finding, film.device, film.outlier]))


def _reencode(levels: np.ndarray, key: int) -> np.ndarray:
    """The picture as another program might have saved it: slightly brighter or darker, each pixel up to a level off."""
    draws = _doubles(key, 1 + levels.size)
    gain = 1 + REENCODE_GAIN * (2 * draws[0] - 1)
    jitter = np.floor(3 * draws[1:]).reshape(levels.shape) - 1
    return np.clip(np.floor(levels * gain + 0.5) + jitter, 0, 255).astype(np.uint8)


def _doubles(key: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=key)).random(count)
