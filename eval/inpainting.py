"""Inpainting reconstruction (Carlini et al. 2023, section 5.3): what half of a training picture brings back of its other half."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from defenses.errors import UserError
from defenses.ranks import on_main, together
from defenses.seeding import generator
from eval import captions
from eval.denoiser import Denoiser, load
from eval.members import Candidates, candidates, conditions
from eval.reconstructions import COLUMNS, Fills, MeanPicture, distances, left_half, mirrored, summary
from eval.repaint import evaluations, repaint, walk
from eval.scores import Chunk, chunk_losses
from eval.shadows import train_shadows
from eval.suite import Finding, Scene
from eval.target import Target
from train.data import Record
from train.files import atomic
from train.release import SIDECAR
from train.sampling import to_pil, to_uint8

FOLDER = "inpainting"  # below the output: what was kept of each picture, by its row in the data set
PLACE = 0.1  # of the schedule, where losses are compared: t = 100 of T = 1000


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
        for key in (
            "pictures",
            "fills",
            "keep",
            "steps",
            "jump_length",
            "resamples",
            "draws",
            "batch_size",
            "permutations",
        ):
            if getattr(self, key) < 1:
                raise UserError(
                    f"attack.inpainting.{key}", f"{getattr(self, key)} is less than 1", "take a positive number"
                )
        if self.keep > self.fills:
            raise UserError(
                "attack.inpainting.keep",
                f"{self.keep} of {self.fills} fills cannot be kept",
                "lower it, or raise fills",
            )
        if self.resamples > 1 and self.jump_length >= self.steps:
            raise UserError(
                "attack.inpainting.jump_length",
                f"{self.jump_length} of {self.steps} steps leave no place to jump from",
                "lower it",
            )
        if self.reference is not None and not (Path(self.reference) / "model_index.json").is_file():
            raise UserError(
                "attack.inpainting.reference",
                f"{self.reference} holds no model_index.json",
                "give the folder of a pipeline that was not trained on these pictures, or null",
            )


def run(scene: Scene) -> Finding | None:
    """Reconstructs members and held-out pictures from their right halves, on all ranks; each returns the same.

    Returns:
        The part ``inpainting`` of the report, with the table inpainting.csv; None where there is no model to ask.

    Raises:
        UserError: the reference cannot be loaded, or there are more steps than timesteps.
    """
    settings, target, accelerator = scene.config.attack.inpainting, scene.target, scene.accelerator
    if scene.denoiser is None:
        return None
    if settings.steps > scene.denoiser.timesteps:
        raise UserError(
            "attack.inpainting.steps", f"is more than the model's {scene.denoiser.timesteps} timesteps", "lower it"
        )
    seed, dataset = scene.config.run.seed, captions.for_losses(target, scene.config)
    asked = candidates(dataset, settings.pictures, seed)
    reference = reference_of(scene)
    folder = target.output.path / FOLDER
    on_main(accelerator, lambda: folder.mkdir(exist_ok=True, mode=0o700))
    mean = MeanPicture.of(dataset)

    def work() -> list[tuple[int, dict[str, Any]]]:
        mine = range(accelerator.process_index, len(asked), accelerator.num_processes)
        bar = tqdm(mine, desc="inpaint", unit="picture", disable=not accelerator.is_main_process)
        return [(place, _row(scene, asked, place, reference, mean, folder)) for place in bar]

    found = gather_object(together(accelerator, work))
    rows = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    report = {
        "settings": _settings(settings, scene.denoiser),
        "reference": reference.kind,
        "ranking": "L_target" if reference.kind == "none" else "L_target / L_reference",
        **summary(asked, rows, settings.permutations, seed, exchangeable=scene.config.data.exchangeable()),
    }
    return Finding(report, {"inpainting.csv": (COLUMNS, rows)})


def _settings(settings: InpaintingConfig, denoiser: Denoiser) -> dict[str, Any]:
    """All that decides the figures."""
    told = {key: value for key, value in asdict(settings).items() if key not in ("reference", "batch_size")}
    return told | {
        "evaluations": evaluations(walk(settings.steps, settings.jump_length, settings.resamples)),  # for one fill
        "timestep": denoiser.timestep(PLACE),
        "mask": "left half",
        "space": "latents" if denoiser.latent else "pixels",
        "condition": denoiser.kind,
    }


def reconstruct(
    denoiser: Denoiser,
    reference: Denoiser | None,
    blind: np.ndarray,
    record: Record,
    row: int,
    settings: InpaintingConfig,
    seed: int,
) -> Fills:
    """Fills the hidden half of one picture and keeps those that the model takes for most likely its own.

    The score of a fill is L_target(fill) / L_reference(fill) at t = 0.1 T (Carlini et al. 2023, section 5.3), the noise the same
    for all fills; without a reference L_target(fill). The original has no part in it.

    Args:
        reference: a model that was not trained on the picture, or None.
        blind: uint8 [C, H, W], a picture whose right half alone is the record's (`mirrored`).
        record: for its label or caption, which the attacker is taken to know.
        row: of the record in the data set; noise depends on it, not on the model.
    """
    levels = walk(settings.steps, settings.jump_length, settings.resamples)
    known = denoiser.encode(blind[None])[0]
    hidden = left_half(*known.shape[-2:]).to(denoiser.device)
    value = conditions(denoiser, [record])
    kept = Fills(np.zeros((0, *blind.shape), np.uint8), np.zeros(0))
    for start in range(0, settings.fills, settings.batch_size):
        indices = range(start, min(settings.fills, start + settings.batch_size))
        generators = [generator(seed, "attack/inpainting", row, index) for index in indices]
        x = repaint(denoiser, known, hidden, denoiser.condition(value * len(indices)), levels, generators)
        if not torch.isfinite(x).all():
            raise UserError("attack.inpainting", "the model's fills are no numbers", "set it to null")
        images = to_uint8(denoiser.decode(x).cpu())
        images[..., blind.shape[-1] // 2 :] = blind[..., blind.shape[-1] // 2 :]
        score = _loss(denoiser, images, record, row, settings.draws, seed)
        if reference is not None:
            score = score / _loss(reference, images, record, row, settings.draws, seed)
        kept = kept.best(Fills(images, score), settings.keep)
    return kept


def _loss(denoiser: Denoiser, images: np.ndarray, record: Record, row: int, draws: int, seed: int) -> np.ndarray:
    """Denoising loss of each image at t = 0.1 T, averaged over the draws of noise, float64 [n]."""
    condition = denoiser.condition(conditions(denoiser, [record]) * len(images))
    chunk = Chunk(denoiser, images, condition, np.full(len(images), row), seed)
    return chunk_losses(chunk, [denoiser.timestep(PLACE)], draws, flips=False).double().numpy().mean(axis=(1, 2, 3))


@dataclass
class Reference:
    """Models that were not trained on a picture.

    Attributes:
        kind: "pipeline", "shadow", or "none".
        of: row in the data set -> name of the model and the model; None where there is none.
    """

    kind: str
    of: Callable[[int], tuple[str, Denoiser] | None]


def reference_of(scene: Scene) -> Reference:
    """The configured pipeline, else of the run's first two shadows the one without the picture, else nothing.

    Raises:
        UserError: the pipeline cannot be loaded, or the shadows were made under other settings.
    """
    settings, target, device = scene.config.attack.inpainting, scene.target, scene.accelerator.device
    shape = target.dataset.images.shape[1:]
    if settings.reference is not None:
        try:
            own = scene.denoiser  # a text-to-image model may have been trained at another size than the reference
            model = load(Path(settings.reference), shape, device, own.shape[-1] if own.latent else None)
        except UserError as error:
            raise UserError("attack.inpainting.reference", error.problem, error.remedy) from error
        return Reference("pipeline", lambda row: (settings.reference, model))
    if target.run is None or not all((folder / "model" / SIDECAR).exists() for folder in _first_two(target)):
        return Reference("none", lambda row: None)
    shadows = train_shadows(2, target, scene.config, scene.accelerator)  # they are finished: none is trained here
    models = [load(folder / "model", shape, device) for folder in shadows.folders]

    def of(row: int) -> tuple[str, Denoiser]:
        number = int(shadows.trained[:, row].argmin())  # of two complementary halves one is without the picture
        return shadows.folders[number].name, models[number]

    return Reference("shadow", of)


def _first_two(target: Target) -> list[Path]:
    return [target.run.path / "shadows" / f"{number:02d}" for number in range(2)]


def _row(
    scene: Scene, asked: Candidates, place: int, reference: Reference, mean: MeanPicture, folder: Path
) -> dict[str, Any]:
    """One picture's row of inpainting.csv; its fills are drawn, or read where they were drawn before."""
    settings, row, record = scene.config.attack.inpainting, int(asked.rows[place]), asked.records[place]
    original = np.asarray(scene.target.dataset.images[row])
    judge = reference.of(row)
    told = conditions(scene.denoiser, [record]) if scene.denoiser.kind == "caption" else []
    key = json.dumps([asdict(settings), scene.config.run.seed, record.record_id, judge and judge[0], *told])
    file = folder / f"{row:06d}.npz"
    kept = _read(file, key)
    if kept is None:
        kept = reconstruct(
            scene.denoiser, judge and judge[1], mirrored(original), record, row, settings, scene.config.run.seed
        )
        with atomic(file, "wb") as handle:
            np.savez(handle, key=np.array(key), images=kept.images, score=kept.score)
    shown = None if scene.config.data.restricted else file.with_suffix(".png")
    if shown is not None:
        with atomic(shown, "wb") as handle:
            to_pil(kept.images[0]).save(handle, format="PNG")
    return {
        "record_id": record.record_id,
        "member": bool(asked.member[place]),
        "group": record.group,
        "reference": judge and judge[0],
        **distances(kept, original, mean.without(original, bool(asked.member[place]))),
        "fill": None if shown is None else f"{FOLDER}/{shown.name}",
    }


def _read(file: Path, key: str) -> Fills | None:
    """What an earlier run kept; None where there is nothing, or it was made under other settings or with another reference."""
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return Fills(stored["images"], stored["score"]) if stored["key"].item() == key else None
