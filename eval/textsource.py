"""Images of a saved text-to-image pipeline, ours or somebody else's: batches across prompts, each distinct prompt embedded once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.textmodel import TextCondition
from train import pipelines
from train.compiled import FixedBatch
from train.conditioner import Condition
from train.diffusion import autocast
from train.latent import LatentModel, conditions_of, time_ids
from train.models import memory_format
from train.pipelinefolder import KINDS
from train.sampling import SamplerConfig
from train.textsampling import latent_shape, sample, start_noise


def kind_of(folder: Path) -> str | None:
    """Which of the pipelines that `load_model` reads lies in ``folder`` (`train.pipelines.Parts.kind`); None: another one, or none."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):  # told by whoever loads it
        return None
    name = index.get("_class_name") if isinstance(index, dict) else None
    return KINDS.get(name) if isinstance(name, str) else None


def load_model(folder: Path, device: torch.device, precision: str = "fp32") -> LatentModel:
    """The whole pipeline, frozen, in evaluation mode.

    Args:
        precision: "bf16": weights of what autocast multiplies are kept in bf16, so that they are not converted in every step;
            the images are the same.

    Raises:
        UserError: see `train.pipelines.load`.
    """
    model = LatentModel(pipelines.load(folder)).eval().requires_grad_(False)
    if precision == "bf16":
        for module in (model, *model.beside):
            for layer in module.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    layer.to(torch.bfloat16)
    return model.to(device, memory_format=memory_format(device))


def side_of(model: LatentModel, known: dict[str, Any]) -> int:
    """Pixels of a side of its images: as it was trained by us, else its own default."""
    if "image_size" in known:
        return known["image_size"]
    return model.parts.image_size


class TextSampler:
    """``draw`` of `eval.source.Source` for a text-to-image model, and what a defense may ask of it (`defenses.textmodel.TextModel`).

    Args:
        channels: of the data; images are made grey where it is 1.
        compiles: whether the network is compiled for full passes.
    """

    def __init__(
        self,
        model: LatentModel,
        config: SamplerConfig,
        precision: str,
        seed: int,
        side: int,
        channels: int,
        compiles: bool = False,
    ):
        self.model, self.config, self.precision, self.seed = model, config, precision, seed
        self.shape = (channels, side, side)
        self.device = next(model.parameters()).device
        scheduler = model.kind.sampler(config)
        scheduler.set_timesteps(config.steps, device=self.device)
        self.first_timestep = int(scheduler.timesteps[0]) if model.kind.begins_with_signal else None
        self._null: Condition | None = None
        rows = config.batch_size * (1 if config.guidance_scale == 1 else 2)
        self.network = FixedBatch(model.parts.network, rows) if compiles else None

    def __call__(self, indices: Sequence[int], prompts: Sequence[str | TextCondition]) -> torch.Tensor:
        """Float32 [n, C, side, side] in [0, 1]."""
        texts = [each.prompt if isinstance(each, TextCondition) else each for each in prompts]
        conditions = None
        if any(isinstance(each, TextCondition) for each in prompts):
            conditions = self.condition(texts)
            for row, each in enumerate(prompts):
                if isinstance(each, TextCondition):
                    conditions.text[row] = each.text
                    if conditions.pooled is not None:
                        conditions.pooled[row] = each.pooled
        options = {"prompts": texts, "conditions": conditions, "precision": self.precision, "network": self.network}
        return sample(self.model, self.config, indices, self.shape, seed=self.seed, **options)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Condition:
        with autocast(self.device, self.precision):
            return conditions_of(self.model, prompts)

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `TextModel`."""
        found = self.condition(prompts)
        return found.text, found.pooled

    def null(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `TextModel`."""
        if self._null is None:
            with autocast(self.device, self.precision):
                self._null = self.model.conditioner.empty()
        return self._null.text, self._null.pooled

    def start(self, prompts: Sequence[str], indices: Sequence[int]) -> torch.Tensor:
        """See `TextModel`."""
        shape = latent_shape(self.model, self.shape[1])
        pairs = zip(prompts, indices, strict=True)
        noise = torch.stack([start_noise(self.seed, prompt, index, shape) for prompt, index in pairs])
        return noise.to(self.device)

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """See `TextModel`."""
        ids = torch.tensor([time_ids(self.shape[1])] * len(latents), device=self.device)
        kind, condition = self.model.kind, Condition(text, pooled)
        with autocast(self.device, self.precision):
            output = kind.predict(latents, kind.times(timesteps), condition, ids).float()
        return kind.epsilon(output, latents, timesteps)
