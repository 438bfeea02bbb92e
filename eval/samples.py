"""Images of a saved pipeline: one file per sample index, the same for any number of processes, resumable."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from defenses.base import Defense, SamplingContext
from defenses.errors import UserError
from defenses.textmodel import TextCondition
from eval.config import GenerateConfig
from eval.detectors import ordered
from eval.generations import file_of, pixels, save, withheld
from eval.source import Source
from train.data import Dataset
from train.files import write_csv
from train.sampling import blocks, class_of_sample

INDEX = ["file", "index", "seed", "condition", "withheld"]  # columns of index.csv

Score = Callable[[list[str]], Sequence[float]]  # prompts -> a score of each, high: memorised


def wrap(source: Source, defenses: list[Defense], context: SamplingContext) -> None:
    """Seam 6: lets the defenses stand between the model and its user."""
    for defense in defenses:
        source.draw = defense.wrap_sampler(source.draw, context)


def prompts_of(config: GenerateConfig, dataset: Dataset, score: Score | None = None) -> list[str]:
    """Prompts of a text-to-image model: a file's lines, else training captions, those of the most copied pictures first.

    Args:
        score: tells how likely each prompt is memorised; needed where ``generate.order`` is "prefilter".
    """
    if config.prompts is not None:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "generate.prompts", f"{config.prompts}: {error}", "give a text file, a prompt a line"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
    else:
        records = [dataset.records[row] for row in dataset.rows("train")]
        found = [record.caption for record in sorted(records, key=lambda r: (-r.copies, r.source)) if record.caption]
    distinct = list(dict.fromkeys(found))
    if not distinct:
        raise UserError("generate.prompts", "there is no prompt", "set data.caption_key, or give a file of prompts")
    if config.order == "prefilter":
        distinct = distinct[: config.candidates]
        distinct = ordered(distinct, score(distinct))
    return distinct[: config.max_prompts]


def generate(
    source: Source, folder: Path, config: GenerateConfig, prompts: list[str], seed: int, accelerator: Accelerator
) -> None:
    """Draws what is not there yet: ``folder/000000.png``, or ``folder/00000/000.png`` per prompt, and ``folder/index.csv``."""
    groups = prompts or [None]
    count = config.per_prompt if prompts else config.count
    work = [
        each for unit in units(len(groups), count, config.batch_size) for each in passes(unit, count, config.batch_size)
    ]
    mine = work[accelerator.process_index :: accelerator.num_processes]
    for images in tqdm(mine, desc="generate", unit="batch", disable=not accelerator.is_main_process):
        files = [file_of(folder, number if prompts else None, index) for number, index in images]
        if all(file.exists() or withheld(file).exists() for file in files):
            continue
        indices, conditions = [index for _, index in images], None
        if prompts:
            conditions = [prompts[number] for number, _ in images]
        elif len(source.class_frequency):
            conditions = class_of_sample(indices, source.class_frequency, seed)
        for file, image in zip(files, source.draw(indices, conditions), strict=True):
            save(file, image)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_csv(folder / "index.csv", INDEX, _index(source, folder, groups, count, seed))
    accelerator.wait_for_everyone()


def units(groups: int, count: int, batch_size: int) -> list[range]:
    """Consecutive groups (prompts) whose images share forward passes with no others: the smallest work that can be divided.

    Where a pass holds the images of several prompts, whole prompts are put together; else a prompt is a unit of its own. No
    prompt is cut in the middle of a pass, so that each can be attacked and forgotten before the next unit is drawn.

    Args:
        count: images of each group.
    """
    length = max(1, batch_size // count)
    return [range(start, min(start + length, groups)) for start in range(0, groups, length)]


def passes(unit: range, count: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """The forward passes of one unit, each a list of (group, sample index): the same for any number of processes."""
    if len(unit) > 1:
        yield [(number, index) for number in unit for index in range(count)]
        return
    for block in blocks(count, batch_size, 0, 1):
        yield [(unit.start, index) for index in block]


def reuse(source: Source, folder: Path, prompts: list[str]) -> None:
    """Lets ``source.draw`` read what `generate` has drawn into ``folder`` already; other sample indices and prompts are still drawn,
    and so are prompts whose embedding a defense has changed."""
    draw, number = source.draw, {prompt: place for place, prompt in enumerate(prompts)}

    def reading(indices: Sequence[int], conditions: Sequence[Any] | None) -> torch.Tensor:
        told = [None] * len(indices) if conditions is None else conditions
        files = [
            None
            if isinstance(each, TextCondition) or (prompts and each not in number)
            else file_of(folder, number[each] if prompts else None, index)
            for index, each in zip(indices, told, strict=True)
        ]
        missing = [place for place, file in enumerate(files) if file is None or not file.exists()]
        drawn = {}
        if missing:
            some = None if conditions is None else [conditions[place] for place in missing]
            drawn = dict(zip(missing, draw([indices[place] for place in missing], some), strict=True))
        read = [drawn[place] if place in drawn else pixels(file) for place, file in enumerate(files)]
        return torch.stack(read)

    source.draw = reading


def _index(source: Source, folder: Path, groups: list, count: int, seed: int):
    for number, prompt in enumerate(groups):
        for index in range(count):
            condition = prompt
            if prompt is None and len(source.class_frequency):
                condition = int(class_of_sample([index], source.class_frequency, seed)[0])
            file = file_of(folder, None if prompt is None else number, index)
            row = {"file": str(file.relative_to(folder)), "index": index, "seed": seed, "condition": condition}
            yield row | {"withheld": withheld(file).exists()}
