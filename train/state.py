"""What a run is told, and what must survive a stop."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from defenses.errors import UserError
from train.adversarial import GANConfig
from train.diffusion import DiffusionConfig, native_precision
from train.optim import OptimizerConfig


@dataclass(kw_only=True)
class TrainConfig:
    """Section ``train``."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # images per optimizer step, over all processes and accumulation
    caption_dropout: float = 0.1  # text-to-image: share of records that are trained without their caption, for guidance
    gradient_checkpointing: bool = (
        False  # recompute activations in the backward pass: less memory, about a third slower
    )
    compile: bool = False  # torch.compile of the network
    accumulation: int = 1  # micro-batches per process and step
    learning_rate: float = 1e-3
    precision: str = (
        "auto"  # bf16 or fp32 arithmetic; weights stay float32. auto: bf16 where the machine has it in hardware
    )
    ema_decay: float = 0.999  # of the averaged weights, which are what is saved, sampled and attacked
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_checkpoints: int | None = 2  # older ones are removed; null keeps all
    log_every: int = 50  # steps per line of metrics.jsonl
    preview_every: int = 500  # steps between sample grids; 0: none
    preview_count: int = 16  # images in a sample grid
    heldout_every: int = 250  # steps between held-out losses; 0: none
    heldout_records: int = 128  # records of the held-out split used for it, and as many of the training split
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # any Accelerate tracker; []: none
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        for key in ("steps", "batch_size", "accumulation", "log_every", "preview_count", "heldout_records"):
            if getattr(self, key) < 1:
                raise UserError(f"train.{key}", f"{getattr(self, key)} is less than 1", "take a positive number")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError("train.caption_dropout", f"{self.caption_dropout} is no probability", "0.1 is usual")
        if self.precision == "auto":
            self.precision = native_precision()
        if self.precision not in ("bf16", "fp32"):
            raise UserError(
                "train.precision",
                f"{self.precision} is not offered: fp16 needs loss scaling, which skips steps by what it sees in the data",
                "auto, bf16 or fp32",
            )
        for key in ("checkpoint_every", "preview_every", "heldout_every"):
            if getattr(self, key) < 0:
                raise UserError(f"train.{key}", f"{getattr(self, key)} is negative", "0 means never")
        if self.learning_rate <= 0:
            raise UserError("train.learning_rate", f"{self.learning_rate} is not positive", "1e-4 to 1e-3 is usual")
        if not 0 <= self.ema_decay < 1:
            raise UserError(
                "train.ema_decay", f"{self.ema_decay} is not in [0, 1)", "0.999 is usual; 0 switches it off"
            )
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise UserError(
                "train.keep_checkpoints", f"{self.keep_checkpoints} keeps none", "at least 1; null keeps all"
            )


@dataclass
class TrainState:
    """All that must survive a stop. Everything else follows from (seed, step)."""

    model: nn.Module  # not wrapped
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    step: int = 0
    images_seen: int = 0
    loss_sum: torch.Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float64)
    )  # since the last log line
    loss_count: int = 0
    seconds: float = 0.0  # spent training, over all stops
    stopped_by: str | None = None  # defense that ended training early
    release_step: int | None = None  # checkpoint that a defense chose

    def counters(self) -> dict[str, Any]:
        names = ("step", "images_seen", "seconds", "stopped_by", "release_step")
        return {name: getattr(self, name) for name in names}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is optimised, averaged and saved in checkpoints, in the order of ``model.parameters()``."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[nn.Module]:
    """The model with its EMA weights, in evaluation mode, for the length of a block."""
    model = state.model
    trained = trained_parameters(model)
    state.ema.store(trained)
    state.ema.copy_to(trained)
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train()
        state.ema.restore(trained)


def released_model(state: TrainState) -> nn.Module:
    """A copy of the model that holds the EMA weights, on the CPU. The accelerator never holds two of them."""
    with averaged_weights(state) as model:
        modules = [model, *getattr(model, "beside", ())]
        there = [each for module in modules for each in (*module.parameters(), *module.buffers())]
        # deepcopy takes from its memo what it would copy; a tensor on the CPU already it copies itself
        here = {id(each): _on_cpu(each) for each in there if each.device.type != "cpu"}
        return copy.deepcopy(model, here).to("cpu", memory_format=torch.contiguous_format).eval()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().to("cpu", memory_format=torch.contiguous_format)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
