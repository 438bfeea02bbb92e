"""Training throughput against the loop of diffusers' unconditional example, same model and arithmetic, in one run.

    .venv/bin/python bench/train_throughput.py [key=value ...]      (on a GPU or on all cores of the CPU)

Both sides train the same UNet on the same pictures in alternating rounds, so that a slow minute of the machine hits both.
The peer follows examples/unconditional_image_generation/train_unconditional.py of diffusers: DataLoader with resize,
flip-free transforms and normalisation done beforehand (as with a cached data set), `accelerator.prepare`, AdamW,
gradient clipping, EMA after every step. Prints images/s of each round and the ratio of medians.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset

from eval.config import SECTIONS as EVAL_SECTIONS
from train import cli
from train import config as configuration
from train.data import prepare
from train.models import build
from train.records import select_records
from train.runlog import RunDirectory
from train.stage import build_trainer

ROUNDS, STEPS = 16, 6


class Peer:
    """The example's loop, one round at a time."""

    def __init__(self, config, images: torch.Tensor, accelerator: Accelerator):
        self.accelerator = accelerator
        model = build(config.model, config.data.image_size, config.data.channels, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.learning_rate)
        loader = DataLoader(TensorDataset(images), batch_size=config.train.batch_size, shuffle=True, drop_last=True)
        schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.ema = EMAModel(model.parameters(), decay=0.9999)
        self.model, self.optimizer, self.loader, self.schedule = accelerator.prepare(model, optimizer, loader, schedule)
        self.noise_scheduler = DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon"
        )
        self.ema.to(accelerator.device)
        self.batches = self._endless()

    def _endless(self):
        while True:
            yield from self.loader

    def round(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            (clean,) = next(self.batches)
            noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
            timesteps = torch.randint(0, 1000, (clean.shape[0],), device=clean.device).long()
            noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
            with self.accelerator.accumulate(self.model):
                loss = F.mse_loss(self.model(noisy, timesteps).sample.float(), noise.float())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        defaults = ["run.name=bench", f"run.output_dir={folder}", "train.trackers=[]", "train.heldout_every=0"]
        tree = configuration.load({**configuration.SECTIONS, **EVAL_SECTIONS}, None, [*defaults, *overrides])
        config = configuration.objects(tree)
        ours_accelerator = cli.start(config)
        directory = RunDirectory(config.run)
        directory.open(tree, "bench")
        dataset = prepare(config.data, directory.prepared, ours_accelerator)
        select_records(config, dataset, [], ours_accelerator)
        trainer = build_trainer(config, dataset, directory, ours_accelerator, [], [])
        images = torch.from_numpy(dataset.images[dataset.rows("train")]).float() / 127.5 - 1
        peer_accelerator = ours_accelerator
        if config.train.precision == "bf16":
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state()
            peer_accelerator = Accelerator(mixed_precision="bf16")
        peer = Peer(config, images, peer_accelerator)

        def ours(steps: int) -> None:
            for _ in range(steps):
                trainer.step()
                trainer.state.step += 1

        seconds: dict[str, list[float]] = {"deffuse": [], "diffusers": []}
        for repeat in range(ROUNDS + 1):
            sides = [("deffuse", ours), ("diffusers", peer.round)]
            for name, work in sides if repeat % 2 else reversed(sides):
                started = time.perf_counter()
                work(STEPS)
                if ours_accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        report(config, seconds, Path(folder))


def report(config, seconds: dict[str, list[float]], folder: Path) -> None:
    images = STEPS * config.train.batch_size
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, model {config.model.size}, {config.data.image_size} px"
    )
    for name, rounds in seconds.items():
        speeds = sorted(images / value for value in rounds)
        print(f"{name:10} images/s: median {statistics.median(speeds):.1f}, rounds {speeds[0]:.1f} to {speeds[-1]:.1f}")
    ratio = statistics.median(seconds["diffusers"]) / statistics.median(seconds["deffuse"])
    print(f"deffuse / diffusers: {ratio:.3f} (goal: at least 1)")


if __name__ == "__main__":
    main(sys.argv[1:])
