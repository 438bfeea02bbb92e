"""What a private step costs beside an ordinary one of the same model: time as a ratio within one run, and peak memory.

python bench/dp_step.py [--rounds 5] [--threads 2] [--precision fp32]

Every round times all ways once, in turn, so that a change of the machine's speed hits all alike; the figure is the median over
rounds of time / time of the ordinary step of that round. Peak memory is of a process of its own per way, above what the model
and the libraries need.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from defenses.base import Batch, Microbatches
from defenses.mechanism import NoisyClippedSum
from defenses.persample import backend, reference
from train.adapters import AdapterConfig, apply
from train.diffusion import DiffusionConfig, noise_schedule, per_example_loss
from train.models import ModelConfig, build
from train.optim import MeanGradient

WAYS = ("ordinary", "vmap", "hooks", "loop")


def pixel(size: str, image: int, batch: int) -> tuple[nn.Module, Batch]:
    """The trainer's own UNet, all parameters."""
    model = build(ModelConfig(size=size), image, 1, 10)
    return model, example(batch, (1, image, image), torch.zeros(batch, dtype=torch.int64))


class Conditioned(nn.Module):
    """A text-conditional UNet with fixed text embeddings, called like an unconditional one."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet
        self.register_buffer("text", torch.randn(1, 8, unet.config.cross_attention_dim))

    def forward(self, noisy, timesteps, class_labels=None, return_dict=False):
        text = self.text.to(noisy.dtype).expand(len(noisy), -1, -1)
        return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=return_dict)


def conditioned(lora: bool, batch: int) -> tuple[nn.Module, Batch]:
    """12 M parameters on 4 x 32 x 32 latents, trained whole or through LoRA of rank 8 on the attention."""
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    model = Conditioned(apply(unet, AdapterConfig() if lora else None, None))
    return model, example(batch, (4, 32, 32), None)


def example(count: int, shape: tuple[int, int, int], labels: torch.Tensor | None) -> Batch:
    images, noise = torch.randn(count, *shape), torch.randn(count, *shape)
    return Batch(images, np.arange(count), labels, None, torch.randint(0, 1000, (count,)), noise)


CASES = {
    "UNet2D tiny, full, 28 px, batch 32": lambda: pixel("tiny", 28, 32),
    "UNet2D small with attention, full, 32 px, batch 16": lambda: pixel("small", 32, 16),
    "UNet2DCondition, full, 32 px, batch 8": lambda: conditioned(False, 8),
    "UNet2DCondition, LoRA, 32 px, batch 8": lambda: conditioned(True, 8),
}


def step(case: str, way: str, precision: str, accelerator: Accelerator):
    """A function that makes one whole optimizer step."""
    torch.manual_seed(0)
    model, batch = CASES[case]()
    model.to(accelerator.device).train()
    batch = batch.to(accelerator.device)
    schedule: DDPMScheduler = noise_schedule(DiffusionConfig())

    def loss(network, part: Batch) -> torch.Tensor:
        return per_example_loss(network, part, schedule, 5.0)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    if way == "ordinary":
        rule = MeanGradient(len(batch), 1.0, precision)
    else:
        units = np.arange(len(batch))
        chosen, oracle = backend(way, precision), reference(way, precision)
        rule = NoisyClippedSum(chosen, oracle, 1e-3, 1.0, len(batch), units, 7, lambda step: None, False, 1.0)
    done = iter(range(10**9))

    def once() -> None:
        rule.backward(model, loss, Microbatches([lambda: batch]), next(done), accelerator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    once.trained = sum(parameter.numel() for parameter in trained)
    return once


def memory(case: str, way: str, precision: str, accelerator: Accelerator) -> int:
    """Bytes at the peak of two steps above those before the first."""
    once = step(case, way, precision, accelerator)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(), once()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _status("VmRSS")
    once(), once()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WAY"), help="print the peak memory of one way and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    accelerator = Accelerator(mixed_precision="no")
    if arguments.memory:
        print(json.dumps(memory(*arguments.memory, arguments.precision, accelerator)))
        return
    print(f"{accelerator.device}, {arguments.threads} threads, {arguments.precision}, torch {torch.__version__}")
    for case in CASES:
        steps = {way: step(case, way, arguments.precision, accelerator) for way in WAYS}
        for once in steps.values():
            once()
        ratios: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            seconds = {}
            for way, once in steps.items():
                started = time.perf_counter()
                once()
                seconds[way] = time.perf_counter() - started
            for way in WAYS:
                ratios[way].append(seconds[way] / seconds["ordinary"])
        print(f"{case}, {steps['vmap'].trained} trained: ordinary {seconds['ordinary']:.3f} s")
        for way in WAYS:
            command = [sys.executable, __file__, "--memory", case, way, "--precision", arguments.precision]
            peak = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            low, high = min(ratios[way]), max(ratios[way])
            print(
                f"  {way:9s} {median(ratios[way]):.2f} x ({low:.2f} to {high:.2f}), {peak / 2**20:.0f} MiB at the peak"
            )


if __name__ == "__main__":
    main()
