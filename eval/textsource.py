"""Images of a saved text-to-image pipeline, ours or somebody else's: batches across prompts, each distinct prompt embedded once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train import pipelines
from train.latent import LatentModel
from train.models import memory_format
from train.sampling import SamplerConfig
from train.textsampling import sample

CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def is_text_to_image(folder: Path) -> bool:
    """Whether ``folder`` holds a pipeline that `load_model` reads."""
    return json.loads((folder / "model_index.json").read_text()).get("_class_name") in CLASSES


def load_model(folder: Path, device: torch.device) -> LatentModel:
    """The whole pipeline, frozen, in evaluation mode.

    Raises:
        UserError: see `train.pipelines.load`.
    """
    model = LatentModel(pipelines.load(folder)).to(device, memory_format=memory_format(device))
    return model.eval().requires_grad_(False)


def side_of(model: LatentModel, known: dict[str, Any]) -> int:
    """Pixels of a side of its images: as it was trained by us, else its own default."""
    if "image_size" in known:
        return known["image_size"]
    side = model.unet.config.sample_size
    return (side if isinstance(side, int) else side[0]) * 2 ** (len(model.vae.config.block_out_channels) - 1)


class TextSampler:
    """``draw`` of `eval.samples.Source` for a text-to-image model.

    Args:
        channels: of the data; images are made grey where it is 1.
    """

    def __init__(self, model: LatentModel, config: SamplerConfig, precision: str, seed: int, side: int, channels: int):
        self.model, self.config, self.precision, self.seed = model, config, precision, seed
        self.shape = (channels, side, side)

    def __call__(self, indices: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Float32 [n, C, side, side] in [0, 1]."""
        return sample(
            self.model, self.config, indices, self.shape, seed=self.seed, prompts=prompts, precision=self.precision
        )
