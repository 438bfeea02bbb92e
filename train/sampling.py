"""Sampling: every image is a function of (seed, sample index), whatever the number of processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from torch import nn

from defenses.errors import UserError
from defenses.seeding import derive, generator
from train.diffusion import autocast
from train.files import atomic


@dataclass(kw_only=True)
class SamplerConfig:
    """How images are drawn; the same for every arm of a comparison."""

    # DDIM with eta 0 (Song et al. 2021); DPM-Solver++ 2M (Lu et al. 2022); of a flow: euler, with the pipeline's own noise levels
    sampler: Literal["ddim", "dpm-solver++", "euler"] = "ddim"
    steps: int = 50  # network evaluations per image
    batch_size: int = 64  # images per forward pass; samples i*batch_size.. always share a pass
    # text-to-image models: weight of what the caption adds to the predicted noise; 1: no guidance, at half the cost
    guidance_scale: float = 7.5

    def __post_init__(self):
        for key in ("steps", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"generate.{key}", f"{getattr(self, key)} is less than 1", "take a positive number")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError("generate.guidance_scale", f"{self.guidance_scale} is negative", "7.5 is usual; 1: none")


def build_sampler(config: SamplerConfig, schedule_config: dict):
    """diffusers scheduler with the noise schedule the model was trained with."""
    if config.sampler == "euler":
        raise UserError("generate.sampler", "euler is for flows, not for models of pixels", "ddim or dpm-solver++")
    if config.sampler == "ddim":
        return DDIMScheduler.from_config(schedule_config, timestep_spacing="trailing", clip_sample=True)
    return DPMSolverMultistepScheduler.from_config(schedule_config, timestep_spacing="trailing", solver_order=2)


@torch.no_grad()
def sample(
    model: nn.Module,
    schedule_config: dict,
    config: SamplerConfig,
    indices: Sequence[int],
    shape: tuple[int, int, int],
    *,
    seed: int,
    labels: torch.Tensor | None = None,
    precision: str = "fp32",
    network: Callable | None = None,
) -> torch.Tensor:
    """Images for the given sample indices, float32 [n, C, H, W] in [0, 1], on the CPU.

    Args:
        shape: (C, H, W) of one image.
        seed: start noise of index i comes from (seed, "sample", i) alone.
        labels: int64 [n] class indices for class-conditional models.
        precision: "bf16" or "fp32" arithmetic inside the network.
        network: what is called in place of ``model``, e.g. its compiled form.
    """
    device = next(model.parameters()).device
    start = torch.stack([torch.randn(shape, generator=generator(seed, "sample", int(i))) for i in indices])
    scheduler = build_sampler(config, schedule_config)
    scheduler.set_timesteps(config.steps, device=device)
    images = (start * scheduler.init_noise_sigma).to(device)
    labels = None if labels is None else labels.to(device)
    for timestep in scheduler.timesteps:
        with autocast(device, precision):
            inputs = scheduler.scale_model_input(images, timestep)
            prediction = (network or model)(
                inputs, timestep.expand(len(images)), class_labels=labels, return_dict=False
            )[0]
        images = scheduler.step(prediction.float(), timestep, images, return_dict=False)[0]
    return (images / 2 + 0.5).clamp(0, 1).float().cpu()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[0, 1] to uint8 [n, C, H, W], rounded to the nearest level."""
    return (images * 255).round().to(torch.uint8).numpy()


def class_of_sample(indices: Sequence[int], frequency: np.ndarray, seed: int) -> np.ndarray:
    """Class of each sample index, int64 [n], drawn with the frequencies of the training labels."""
    edges = np.cumsum(frequency) / np.sum(frequency)
    draws = [np.random.Generator(np.random.Philox(derive(seed, "class", int(i)))).random() for i in indices]
    return np.minimum(np.searchsorted(edges, draws, side="right"), len(edges) - 1).astype(np.int64)


def blocks(count: int, block_size: int, rank: int, world_size: int) -> list[range]:
    """The blocks of sample indices 0..count-1 that one rank draws.

    Blocks are whole forward passes and the same for any number of processes: the arithmetic of a convolution may depend
    on its batch.
    """
    starts = range(0, count, block_size)
    return [range(start, min(start + block_size, count)) for start in starts[rank::world_size]]


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [C, H, W] with 1 or 3 channels to a grey or RGB picture."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def save_grid(path: Path, images: torch.Tensor) -> None:
    """Writes images, float32 [n, C, H, W] in [0, 1], as one nearly square PNG, row by row."""
    pixels = to_uint8(images)
    columns = int(np.ceil(np.sqrt(len(pixels))))
    blank = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    cells = np.concatenate([pixels, blank])  # [rows * columns, C, H, W]
    _, channels, height, width = cells.shape
    grid = cells.reshape(-1, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, "wb") as file:
        to_pil(grid.reshape(channels, -1, columns * width)).save(file, format="PNG")
