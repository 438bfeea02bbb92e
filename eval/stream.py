"""The prompted attack while images are drawn: what they show is kept, the images only where a prompt is flagged.

The paper's tier is 350,000 prompts of 500 images (Carlini et al. 2023, section 4.2). A prompt's images are drawn, compared and
forgotten before the next ones; a record of each prompt (``prompts/000/000012.json``) and, per process, the nearest generation of
every training picture so far (``prompts/nearest-0.npz``) stay. A prompt counts as done when both know it.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from defenses.errors import UserError
from defenses.ranks import together
from eval.extraction import Extraction, ExtractionConfig, check_tier
from eval.generations import Generations, file_of, withheld, write
from eval.pictures import Pictures
from eval.prompted import attack_prompt, conclude, refuse_hopeless
from eval.promptrecords import NearestGenerations, PromptFinding, PromptRecords, blank_row
from eval.samples import INDEX, passes, units
from eval.source import Source
from eval.target import pictures_of
from train.data import Dataset
from train.files import write_csv
from train.sampling import to_uint8

SAVE_SECONDS = 60.0  # between two files of the nearest generations: what a kill may cost
KEPT = "matches.csv and generations/ hold the images that were kept: all of flagged prompts, the first of the others"


@dataclass
class Streamed:
    """What the attack found, of all prompts, the same on every rank.

    Attributes:
        asked: images that were drawn of every prompt, those that a defense withheld among them.
    """

    findings: list[PromptFinding]
    asked: int
    nearest: NearestGenerations
    draw_seconds: float
    attack_seconds: float


@dataclass(frozen=True)
class Stream:
    """A streamed attack in progress, of one rank.

    Attributes:
        first: images of each prompt that are kept whatever they show, int64 [prompts].
    """

    source: Source
    records: PromptRecords
    prompts: list[str]
    first: np.ndarray
    training: Pictures
    config: SimpleNamespace
    device: Any

    def run(self, rank: int, world: int) -> None:
        """Draws and attacks what this rank has not finished yet."""
        records, fresh = self.records, (NearestGenerations.none(len(self.training.ids)), set())
        nearest, covered = records.nearest_of(records.nearest_file(rank)) or fresh
        everywhere = covered.union(*(other for _, other in records.nearest()))
        settings, saved = self.config.generate, time.monotonic()
        mine = units(len(self.prompts), settings.per_prompt, settings.batch_size)[rank::world]
        for unit in tqdm(mine, desc="generate and attack", unit="unit", disable=rank != 0):
            todo = [prompt for prompt in unit if not (prompt in everywhere and records.read(prompt))]
            if not todo:
                continue
            started = time.perf_counter()
            images = self.draw(unit)
            seconds = (time.perf_counter() - started) / len(unit)
            for prompt in todo:
                self.attack(prompt, images.pop(prompt), nearest, seconds)
                covered.add(prompt)
            if time.monotonic() - saved > SAVE_SECONDS:
                records.write_nearest(rank, nearest, covered)
                saved = time.monotonic()
        records.write_nearest(rank, nearest, covered)

    def draw(self, unit: range) -> dict[int, list[np.ndarray | None]]:
        """Images of the prompts of a unit as they would be saved, uint8 [C, H, W]; None where one was withheld."""
        settings = self.config.generate
        images: dict[int, list[np.ndarray | None]] = {prompt: [] for prompt in unit}
        for block in passes(unit, settings.per_prompt, settings.batch_size):
            drawn = self.source.draw([index for _, index in block], [self.prompts[prompt] for prompt, _ in block])
            gone = drawn.isnan().flatten(1).any(1).tolist()
            for (prompt, _), levels, missing in zip(block, to_uint8(torch.nan_to_num(drawn)), gone, strict=True):
                images[prompt].append(None if missing else levels)
        return images

    def attack(
        self, prompt: int, images: list[np.ndarray | None], nearest: NearestGenerations, draw_seconds: float
    ) -> None:
        """Looks at one prompt, keeps what is to be kept, and writes its record last."""
        started, records = time.perf_counter(), self.records
        files = [file_of(records.images, prompt, index) for index in range(len(images))]
        there = [index for index, levels in enumerate(images) if levels is not None]
        finding = None
        if there:
            finding, near = attack_prompt(
                prompt, files[0].parent.name, [records.name(prompt, index) for index in there],
                np.stack([images[index] for index in there]), self.training, self.config.attack.extraction, self.device,
                asked=len(images),
            )  # fmt: skip
            if near is not None:
                nearest.add(prompt, near, there)
        flagged = finding is not None and finding.row["flagged"]
        kept = len(images) if flagged else int(self.first[prompt])
        shutil.rmtree(files[0].parent, ignore_errors=True)  # of an attack with other settings, or one that was killed
        for file, levels in zip(files[:kept], images, strict=False):
            write(file, levels)
        shown = {records.name(prompt, index) for index in range(kept)}
        record = {
            "row": finding and finding.row,
            "medoid": finding and finding.medoid,
            "matches": [match for match in finding.matches if match["generation"] in shown] if finding else [],
            "kept": kept,
            "draw_seconds": draw_seconds,
        }
        records.write(prompt, record | {"attack_seconds": time.perf_counter() - started})


def stream(
    source: Source,
    folder: Path,
    records: Path,
    prompts: list[str],
    dataset: Dataset,
    config: SimpleNamespace,
    accelerator: Accelerator,
    *,
    split: str = "train",
) -> Generations:
    """Draws and attacks all prompts on all ranks; what an earlier start of the same attack finished is not drawn again.

    Args:
        folder: of the images that are kept; ``records`` of the rest; both on a file system that all ranks share.
        split: of the pictures that the images are held against; of others than training pictures no image is kept for quality.

    Returns:
        The images that were kept, with what the attack found (``streamed``), for `conclude_stream`.

    Raises:
        UserError: too few images for the attack asked for.
    """
    settings, count = config.generate, len(prompts)
    if not prompts:
        raise UserError("generate.keep", "flagged needs a text-to-image model", "set generate.keep=all")
    check_tier(config.attack.extraction, count * settings.per_prompt, count, settings.per_prompt)
    refuse_hopeless(config.attack.extraction, [settings.per_prompt] * count)
    known = PromptRecords(records, folder, _digest(prompts, dataset, config, split))
    measured = settings.count if split == "train" else 0
    first = first_images(count, settings.per_prompt, measured)
    work = Stream(source, known, prompts, first, pictures_of(dataset, split), config, accelerator.device)
    records.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    together(accelerator, lambda: work.run(accelerator.process_index, accelerator.num_processes))
    return together(accelerator, lambda: collect(work, write_index=accelerator.is_main_process))


def first_images(prompts: int, per_prompt: int, count: int) -> np.ndarray:
    """How many first images of each prompt are kept whatever they show, int64 [prompts]: those that measure image quality.

    Together about ``count``: as many of every prompt, or one of ``count`` prompts evenly spaced where there are more
    prompts. Never more of a flagged prompt, or memorised images would weigh more in the quality than among all.
    """
    chosen = min(prompts, count)
    first = np.zeros(prompts, dtype=np.int64)
    first[np.arange(chosen) * prompts // max(1, chosen)] = min(per_prompt, math.ceil(count / prompts))
    return first


def collect(work: Stream, *, write_index: bool) -> Generations:
    """Everything that the ranks wrote, and ``index.csv`` of the images that were kept.

    Raises:
        UserError: a record is missing.
    """
    records, images, index = work.records, Generations(work.records.images, [], {}, []), []
    nearest = NearestGenerations.merged([nearest for nearest, _ in records.nearest()])
    images.streamed = found = Streamed([], work.config.generate.per_prompt, nearest, 0.0, 0.0)
    for prompt, text in enumerate(work.prompts):
        record = records.read(prompt)
        if record is None:
            raise UserError(
                "run.output_dir", f"{records.file(prompt)} is not there", "all processes need the same file system"
            )
        names = [records.name(prompt, place) for place in range(record["kept"])]
        gone = [withheld(images.folder / name).exists() for name in names]
        there = [name for name, missing in zip(names, gone, strict=True) if not missing]
        images.measured += [name for name in names[: work.first[prompt]] if name in there]
        images.groups += [(file_of(images.folder, prompt, 0).parent.name, there)] if there else []
        for place, (name, missing) in enumerate(zip(names, gone, strict=True)):
            index.append(dict(zip(INDEX, (name, place, work.config.run.seed, text, missing), strict=True)))
        found.draw_seconds += record["draw_seconds"]
        found.attack_seconds += record["attack_seconds"]
        found.findings.append(_finding(prompt, record, images, work.training.images.shape))
    if write_index:
        write_csv(images.folder / "index.csv", INDEX, index)
    return images


def _finding(prompt: int, record: dict[str, Any], images: Generations, shape: tuple[int, ...]) -> PromptFinding:
    if record["row"] is None:  # a defense withheld every image
        return PromptFinding(prompt, blank_row(file_of(images.folder, prompt, 0).parent.name), [], -1, None)
    row = record["row"]
    image = images.read([row["medoid"]], shape[-1], shape[1])[0] if row["flagged"] else None
    return PromptFinding(prompt, row, record["matches"], record["medoid"], image)


def conclude_stream(
    images: Generations,
    training: Pictures,
    heldout: Pictures | None,
    config: ExtractionConfig,
    accelerator: Any = None,
    *,
    exchangeable: bool,
    seed: int,
) -> Extraction:
    """Verifies the candidates of a streamed attack: the report of `eval.prompted.prompted` on all images, to the bit.

    ``matches`` are those of the images that were kept, and the report says so (``streamed``).
    """
    found = images.streamed
    nearest = zip(found.nearest.prompt.tolist(), found.nearest.place.tolist(), strict=True)
    names = [
        str(file_of(images.folder, prompt, place).relative_to(images.folder)) if prompt >= 0 else None
        for prompt, place in nearest
    ]
    result = conclude(
        found.findings, [found.asked] * len(found.findings), found.nearest.distance, names, training, heldout, config, accelerator,
        exchangeable=exchangeable, seed=seed,
    )  # fmt: skip
    result.report["streamed"] = {
        "kept": KEPT,
        "images_kept": sum(len(files) for _, files in images.groups),
        "images_measured": len(images.measured or []),
        "draw_seconds": found.draw_seconds,
        "attack_seconds": found.attack_seconds,
        "attack_share": found.attack_seconds / found.draw_seconds if found.draw_seconds else None,
    }
    return result


def _digest(prompts: Sequence[str], dataset: Dataset, config: SimpleNamespace, split: str) -> str:
    """Of everything that decides what a prompt's images and its record are."""
    records = [dataset.records[row] for row in dataset.rows(split)]
    chosen = ("prompts", "max_prompts", "control_prompts", "keep")
    drawn = {key: value for key, value in asdict(config.generate).items() if key not in chosen}
    extraction = config.attack.extraction
    parts = [
        list(prompts), drawn, config.run.seed, list(dataset.images.shape[1:]),
        [extraction.edge_threshold, extraction.clique_size, extraction.clique_seconds, extraction.nearest],
        [[record.record_id, record.pixel_hash, record.cluster] for record in records],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
