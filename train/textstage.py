"""What the trainer does beyond the ordinary for models with text: first pipeline, captions, caches, prompts of previews.

For models without text every function here gives nothing.
"""

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors
from torch import nn

from defenses import registry
from defenses.base import Batch, Defense
from defenses.errors import UserError
from defenses.seeding import RecordRandom, derive
from train import adapters, families, scratch
from train.cache import cached_conditions, cached_moments, momentary_conditions, momentary_moments
from train.conditioner import Condition
from train.data import Dataset
from train.diffusion import noise_schedule
from train.files import atomic, write_json
from train.records import trained_rows
from train.runlog import RunDirectory
from train.textsampling import latent_shape, start_noise

BASE = "base"  # folder of a run from scratch: the pipeline as training finds it, tokenizer and autoencoder ready
CACHE = "cache"
PREVIEWS = "prompts.json"  # in samples/: what the previews were drawn with
START_NOISE = (
    "start_noise.safetensors"  # beside it: the start noise of each preview, for whoever has the model but not Deffuse
)


@dataclass
class Texts:
    """Captions of a run.

    Attributes:
        captions: of every record as it is trained on, length N; "" where it has none. None: a model without text.
        more: further captions of every record, length N.
        moments: rows -> cached moments of their latents, or None.
        encode: captions -> condition from the cache, or None.
    """

    captions: list[str] | None = None
    more: list[list[str]] | None = None
    moments: Callable[[np.ndarray], torch.Tensor] | None = None
    encode: Callable[[Sequence[str]], Condition] | None = None

    def fields(self, rows: np.ndarray) -> dict[str, Any]:
        """Fields of `Batch` for some rows."""
        if self.captions is None:
            return {}
        found: dict[str, Any] = {
            "captions": [self.captions[row] for row in rows],
            "more_captions": [self.more[row] for row in rows],
        }
        if self.moments is not None:
            found["moments"] = self.moments(rows)
        return found


def base_of(config: SimpleNamespace, run: Path | None) -> Path | None:
    """Folder of the pipeline that a run from scratch begins with; None where there is none."""
    return run / BASE if config.model.family == "latent" and config.model.pretrained is None else None


def autoencoder_facts(config: SimpleNamespace, directory: RunDirectory) -> dict[str, Any] | None:
    """How near the autoencoder of a run from scratch comes to pictures: what is generated can hardly be nearer. None elsewhere."""
    base = base_of(config, directory.path)
    if base is None:
        return None
    found = json.loads((base / scratch.FACTS).read_text())
    return {name: found[name] for name in ("reconstruction_l2", "reconstruction_of", "seconds")}


def prepare_base(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    defenses: list[Defense],
    accelerator: Accelerator,
    trained: bool = True,
) -> None:
    """Makes the pipeline that a text-to-image run from scratch begins with: tokenizer, autoencoder, random networks.

    Args:
        trained: false for a dry run: the autoencoder stays random.

    Raises:
        UserError: there are no captions; or the run is private, whose guarantee would not cover tokenizer and autoencoder.
    """
    base = base_of(config, directory.path)
    if base is None:
        return
    private = registry.private(config.defenses)
    if private:
        raise UserError(
            "model.pretrained",
            f"null: tokenizer and autoencoder would be made from the records, outside the guarantee of {private[0]}",
            "give a pipeline that was trained on public pictures",
        )
    if config.model.trainable is not None and config.model.size in scratch.SIZES:  # before the autoencoder is trained
        with torch.device("meta"):
            network = scratch.network(scratch.SIZES[config.model.size], config.data.image_size)
        adapters.apply(network, None, config.model.trainable)
    rows = trained_rows(dataset)
    captions, more = captions_of(config, dataset, defenses)
    settings = (
        config.model.scratch if trained else replace(config.model.scratch, autoencoder_steps=1, autoencoders=None)
    )
    # one of each picture: its copies would draw the autoencoder's attention to it. Also of those that a defense removed: their copies
    # are trained on, and arms with and without deduplication begin alike
    everything = np.union1d(dataset.rows("train"), rows)
    first = dict(reversed([(dataset.records[row].cluster, row) for row in everything]))
    scratch.make(
        base,
        config=settings,
        size=config.model.size,
        captions=sorted({text for row in rows for text in (captions[row], *more[row])}),
        images=dataset.images,
        rows=np.sort(np.array(list(first.values()), dtype=np.int64)),
        heldout=dataset.rows("heldout"),
        schedule=noise_schedule(config.train.diffusion),
        seed=config.run.seed,
        precision=config.train.precision,
        accelerator=accelerator,
    )


def captions_of(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense]
) -> tuple[list[str], list[list[str]]]:
    """Captions of every record as they are trained on: rewritten by the defenses; "" where there is none. They are rewritten once
    per data set and defenses, since that takes minutes for a million; the lists are shared and must not be changed.

    Raises:
        UserError: no training record has a caption.
    """
    known = dataset.rewritten
    if known is not None and len(known[0]) == len(defenses) and all(map(operator.is_, known[0], defenses)):
        return known[1]
    rows = trained_rows(dataset)
    if config.data.caption_key is None or not any(dataset.records[row].caption for row in rows):
        key = config.data.caption_key
        what = (
            "is null, and a text-to-image model is trained on captions" if key is None else f"{key}: no caption there"
        )
        raise UserError("data.caption_key", what, "name the column of the captions")
    captions = [record.caption or "" for record in dataset.records]
    more = [list(record.more_captions) for record in dataset.records]
    for defense in defenses:
        flat = defense.rewrite([*captions, *(text for texts in more for text in texts)])
        captions, rest = flat[: len(captions)], iter(flat[len(captions) :])
        more = [[next(rest) for _ in texts] for texts in more]
    dataset.rewritten = list(defenses), (captions, more)
    return captions, more


def texts_of(
    config: SimpleNamespace,
    dataset: Dataset,
    directory: RunDirectory,
    defenses: list[Defense],
    model: nn.Module,
    accelerator: Accelerator,
    rehearsal: bool = False,
) -> Texts:
    """Captions, and the caches where they are of use.

    Args:
        rehearsal: for a dry run: only what is asked for is encoded, and nothing is written.
    """
    if not families.of(config.model).captioned:
        return Texts()
    captions, more = captions_of(config, dataset, defenses)
    found = Texts(captions, more)
    if not config.model.cache:
        return found
    rows, folder, precision = trained_rows(dataset), directory.path / CACHE, config.train.precision
    if rehearsal:
        if not changes_images(defenses, dataset):
            found.moments = momentary_moments(model, dataset.images, precision, accelerator)
        if not model.trains_text:
            found.encode = momentary_conditions(model, precision, accelerator)
        return found
    if not changes_images(defenses, dataset):
        stamps = [record.pixel_hash for record in dataset.records]
        found.moments = cached_moments(model, dataset.images, rows, stamps, folder, precision, accelerator)
    if not model.trains_text:
        known = {"", *(captions[row] for row in rows), *(text for row in rows for text in more[row])}
        found.encode = cached_conditions(model, sorted(known), folder, precision, accelerator)
    return found


def cache_bytes(config: SimpleNamespace, dataset: Dataset, defenses: list[Defense], model: nn.Module) -> int:
    """Bytes that the caches of a run will take on disk."""
    if not families.of(config.model).captioned or not config.model.cache:
        return 0
    rows, total = trained_rows(dataset), 0
    if not changes_images(defenses, dataset):
        channels, side, _ = latent_shape(model, config.data.image_size)
        total += 4 * len(rows) * 2 * channels * side**2
    if not model.trains_text:
        captions, more = captions_of(config, dataset, defenses)
        known = {"", *(captions[row] for row in rows), *(text for row in rows for text in more[row])}
        example = model.conditioner.encode([""])
        total += 4 * len(known) * (example.text.numel() + (0 if example.pooled is None else example.pooled.numel()))
    return total


def changes_images(defenses: list[Defense], dataset: Dataset) -> bool:
    """Whether a defense changes pictures at seam 2, tried on a black one: latents of unchanged pictures would be of no use."""
    images = torch.zeros(1, *dataset.images.shape[1:])
    batch = Batch(images, np.zeros(1, np.int64), None, RecordRandom(0, 0, [0], [0]), captions=[""], more_captions=[[]])
    for defense in defenses:
        batch = defense.change_batch(batch)
    return batch.images is not images or images._version > 0


def preview_prompts(
    config: SimpleNamespace, dataset: Dataset, defenses: list[Defense]
) -> Callable[[Sequence[int]], list[str]] | None:
    """Sample indices -> prompts of previews and of what defenses look at: a training caption for each, a function of (run.seed,
    index). In a private run the empty prompt."""
    if not families.of(config.model).captioned:
        return None
    if any(defense.private for defense in defenses) and not config.report.nonprivate_metrics:
        return lambda indices: [""] * len(indices)
    captions, _ = captions_of(config, dataset, defenses)
    known = sorted({captions[row] for row in trained_rows(dataset)})
    return lambda indices: [known[derive(config.run.seed, "preview prompt", int(i)) % len(known)] for i in indices]


def write_preview_prompts(
    directory: RunDirectory, config: SimpleNamespace, prompts: Callable | None, model: nn.Module
) -> None:
    """What the previews are drawn with, so that whoever has the model can draw them again: settings and prompts, and the start noise
    ``noise``, float32 [previews, c, h, w]."""
    if prompts is not None:
        texts = prompts(range(config.train.preview_count))
        settings = model.kind.preview | {"steps": min(25, config.train.diffusion.timesteps)}
        settings |= {"guidance_scale": config.generate.guidance_scale, "precision": config.train.precision}
        settings["seed"] = config.run.seed
        shape = latent_shape(model, config.data.image_size)
        noise = [start_noise(config.run.seed, text, index, shape) for index, text in enumerate(texts)]
        with atomic(directory.samples / START_NOISE, "wb") as file:
            file.write(safetensors({"noise": torch.stack(noise)}))
        write_json(directory.samples / PREVIEWS, settings | {"prompts": texts})


def notes(config: SimpleNamespace, model: nn.Module) -> list[str]:
    """Lines of the dry run about a text-to-image model."""
    if not families.of(config.model).captioned:
        return []
    beside = sum(parameter.numel() for module in model.beside for parameter in module.parameters())
    lines = [f"beside it frozen: {beside} parameters ({', '.join(type(module).__name__ for module in model.beside)})"]
    if config.model.pretrained is None:
        lines.append("from scratch: tokenizer and autoencoder are made from the training records before the first step")
    return lines
