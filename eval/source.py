"""Saved pipelines as something that draws images: ours, and any other that diffusers loads."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from defenses.errors import UserError
from defenses.seeding import derive, generator
from defenses.textmodel import TextModel
from eval.config import GenerateConfig
from eval.textsource import TextSampler, kind_of, load_model, side_of
from train.compiled import FixedBatch, refuse_without_compiler
from train.gan import PIPELINE as GAN_PIPELINE
from train.gan import GANPipeline
from train.gan import sample as sample_gan
from train.models import memory_format, parameter_count
from train.release import SIDECAR
from train.sampling import sample

UNKNOWN = ("trainable_parameters", "steps", "images_seen", "classes", "autoencoder")  # of a foreign model

Draw = Callable[
    [Sequence[int], Sequence[Any] | None], torch.Tensor
]  # (indices, classes or prompts) -> [n, C, H, W] in [0, 1]


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
    facts |= {**dict.fromkeys(UNKNOWN), **_known_facts(known), "absent_parts": model.parts.absent}
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
