"""Images of a saved pipeline: one file per sample index, the same for any number of processes, resumable."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel
from tqdm import tqdm

from defenses.base import Defense, SamplingContext
from defenses.errors import UserError
from defenses.seeding import derive, generator
from defenses.textmodel import TextCondition, TextModel
from eval.config import GenerateConfig
from eval.detectors import ordered
from eval.generations import file_of, pixels, save, withheld
from eval.textsource import TextSampler, kind_of, load_model, side_of
from train.compiled import FixedBatch, refuse_without_compiler
from train.data import Dataset
from train.files import write_csv
from train.gan import PIPELINE as GAN_PIPELINE
from train.gan import GANPipeline
from train.gan import sample as sample_gan
from train.models import memory_format, parameter_count
from train.release import SIDECAR
from train.sampling import blocks, class_of_sample, sample

INDEX = ["file", "index", "seed", "condition", "withheld"]  # columns of index.csv
UNKNOWN = ("trainable_parameters", "steps", "images_seen", "classes", "autoencoder")  # of a foreign model

Draw = Callable[
    [Sequence[int], Sequence[Any] | None], torch.Tensor
]  # (indices, classes or prompts) -> [n, C, H, W] in [0, 1]
Score = Callable[[list[str]], Sequence[float]]  # prompts -> a score of each, high: memorised


@dataclass
class Source:
    """A loaded pipeline. ``protocol`` is "prompted" for text-to-image models, else "untargeted"."""

    protocol: str
    draw: Draw
    class_frequency: np.ndarray  # int64 [classes]; empty for unconditional models
    facts: dict[str, Any]  # the part `model` of report.json
    sampler: dict[str, Any] | None = None  # what drew the images, where it is not the sampler of the configuration
    prompts: list[str] = field(default_factory=list)  # those that are attacked, of a text-to-image model
    text_model: TextModel | None = None  # what a defense at seam 6 may ask, of a text-to-image model


def load(folder: Path, config: GenerateConfig, seed: int, shape: tuple[int, int, int], device: torch.device) -> Source:
    """Loads a pipeline saved in diffusers' format, by us or by others: safetensors only, no remote code, no network.

    Args:
        shape: (C, H, W) that the attack compares; other sizes are resized to it.

    Raises:
        UserError: it is no such folder, a kind of pipeline that cannot be sampled here, or one whose network is not compiled.
    """
    if config.compile:
        refuse_without_compiler("generate.compile", device)
    if not (folder / "model_index.json").is_file():
        raise UserError("pipeline", f"{folder} holds no model_index.json", "give a folder written by save_pretrained")
    if json.loads((folder / "model_index.json").read_text()).get("_class_name") == GAN_PIPELINE:
        if config.compile:
            raise UserError("generate.compile", "is not offered for GANs: an image is one pass", "set it to false")
        return _gan_source(folder, config, seed, shape, device)
    if kind_of(folder) is not None:
        return _text_source(folder, config, seed, shape, device)
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(
            "pipeline", f"{folder}: {reason}", "it must load with DiffusionPipeline.from_pretrained"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    parameters = sum(
        p.numel()
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    )
    facts = {"family": type(pipeline).__name__, "parameters": parameters, **dict.fromkeys(UNKNOWN)}
    if isinstance(getattr(pipeline, "unet", None), UNet2DModel) and not hasattr(pipeline, "vqvae"):
        return _pixel_source(folder, pipeline, config, seed, shape, facts)
    if config.compile:
        raise UserError("generate.compile", f"is not offered for {type(pipeline).__name__}", "set it to false")
    return _pipeline_source(pipeline, config, seed, shape, facts)


def _pixel_source(
    folder: Path, pipeline, config: GenerateConfig, seed: int, shape: tuple[int, int, int], facts: dict
) -> Source:
    model = pipeline.unet.eval().to(memory_format=memory_format(pipeline.device))
    classes, size = model.config.num_class_embeds or 0, model.config.sample_size or shape[1]
    size = size if isinstance(size, int) else size[0]
    own = (model.config.in_channels, size, size)
    schedule = pipeline.scheduler.config
    known = _sidecar(folder)
    network = FixedBatch(model, config.batch_size) if config.compile else None

    def draw(indices: Sequence[int], labels: Sequence[int] | None) -> torch.Tensor:
        chosen = None if labels is None else torch.as_tensor(labels)
        options = {"labels": chosen, "precision": config.precision, "network": network}
        images = sample(model, schedule, config, indices, own, seed=seed, **options)
        return _fit(images, shape)

    return Source("untargeted", draw, _frequency(known, classes), facts | _known_facts(known))


def _gan_source(
    folder: Path, config: GenerateConfig, seed: int, shape: tuple[int, int, int], device: torch.device
) -> Source:
    """A generator of ours: one forward pass per image, without a noise schedule."""
    network = GANPipeline.from_pretrained(folder).to(device).generator.to(memory_format=memory_format(device))
    classes, known = network.config.num_class_embeds or 0, _sidecar(folder)
    count = parameter_count(network)
    facts = {"family": "gan", "parameters": count, **dict.fromkeys(UNKNOWN), **_known_facts(known)}

    def draw(indices: Sequence[int], labels: Sequence[int] | None) -> torch.Tensor:
        chosen = None if labels is None else torch.as_tensor(labels)
        return _fit(sample_gan(network, indices, seed=seed, labels=chosen, precision=config.precision), shape)

    sampler = {"name": "gan", "steps": 1, "precision": config.precision}
    return Source("untargeted", draw, _frequency(known, classes), facts, sampler)


def _text_source(
    folder: Path, config: GenerateConfig, seed: int, shape: tuple[int, int, int], device: torch.device
) -> Source:
    """Stable Diffusion 1.x, 2.x, XL, 3."""
    model, known = load_model(folder, device, config.precision), _sidecar(folder)
    facts = {"family": type(model).__name__, "parameters": parameter_count(model)}
    facts |= {**dict.fromkeys(UNKNOWN), **_known_facts(known)}
    side = side_of(model, known)
    sampler = TextSampler(model, config, config.precision, seed, side, shape[0], compiles=config.compile)

    def draw(indices: Sequence[int], prompts: Sequence[str] | None) -> torch.Tensor:
        return _fit(sampler(indices, prompts), shape)

    return Source("prompted", draw, np.zeros(0, dtype=np.int64), facts, text_sampler_of(config), text_model=sampler)


def text_sampler_of(config: GenerateConfig) -> dict[str, Any]:
    """How images of a text-to-image model are drawn, as in the report."""
    return {
        "name": config.sampler,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "precision": config.precision,
    }


def _sidecar(folder: Path) -> dict[str, Any]:
    """What our trainer noted beside the pipeline; empty for models of others."""
    return json.loads((folder / SIDECAR).read_text()) if (folder / SIDECAR).exists() else {}


def _frequency(known: dict[str, Any], classes: int) -> np.ndarray:
    """Weight of every class, int64 [classes]; equal where nothing is known."""
    return np.array(known.get("class_frequency") or [1] * classes, dtype=np.int64)[:classes]


def _known_facts(known: dict[str, Any]) -> dict[str, Any]:
    return {name: known[name] for name in ("family", "parameters", *UNKNOWN) if name in known}


def _pipeline_source(pipeline, config: GenerateConfig, seed: int, shape: tuple[int, int, int], facts: dict) -> Source:
    """Any other pipeline, called as its user would call it, one generator per image."""
    prompted = hasattr(pipeline, "tokenizer")

    def draw(indices: Sequence[int], prompts: Sequence[str] | None) -> torch.Tensor:
        generators = [
            generator(seed, "sample", *((derive(0, prompts[k]),) if prompts else ()), int(i))
            for k, i in enumerate(indices)
        ]
        options = {"prompt": list(prompts)} if prompts else {"batch_size": len(generators)}
        context = (
            torch.autocast(pipeline.device.type, torch.bfloat16)
            if config.precision == "bf16"
            else contextlib.nullcontext()
        )
        with torch.no_grad(), context:
            images = pipeline(
                **options, generator=generators, num_inference_steps=config.steps, output_type="np"
            ).images
        return _fit(torch.from_numpy(np.asarray(images, dtype=np.float32)).movedim(-1, 1), shape)

    return Source("prompted" if prompted else "untargeted", draw, np.zeros(0, dtype=np.int64), facts)


def _fit(images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Resizes and converts float32 [n, c, h, w] in [0, 1] to [n, C, H, W] as the data were."""
    if images.shape[1] != shape[0]:
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        images = (images * luma).sum(1, keepdim=True) if shape[0] == 1 else images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != shape[1:]:
        images = torch.nn.functional.interpolate(images, shape[1:], mode="bicubic", antialias=True).clamp(0, 1)
    return images


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
