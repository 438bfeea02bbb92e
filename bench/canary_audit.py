"""A private run and the same run with its noise taken out, over many seeds: does the one-run audit tell them apart?

python bench/canary_audit.py [--seeds 20] [--out FOLDER] [--markdown FILE]

Both runs claim epsilon 2. 1,000 pictures of noise are canaries, each planted by a fair coin; the bound comes from the losses of the
released weights (`eval.exposure`), as in every report. The run is made for its audit: a public model has learned one picture per
class, and the private one goes on with its class embedding alone, so that what a canary adds is found again in the row of
its class. Runs without noise are NOT PRIVATE and tell everything; they exist only to be caught.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch
from accelerate import Accelerator

from defenses import registry
from defenses.mechanism import NoisyClippedSum
from eval.config import SECTIONS as EVAL_SECTIONS
from eval.exposure import measure
from train import config as configuration
from train import models
from train.data import prepare
from train.records import select_records
from train.runlog import RunDirectory
from train.stage import train_model

SIDE, CLASSES, CANARIES, POOL = 8, 1000, 1000, 32
CLAIM = 2.0  # epsilon
NETWORK = ((16, 16, 16, 16), 1, ())  # down to one pixel: an embedding there decides the whole picture
COMMON = [
    f"data.image_size={SIDE}",
    "data.label_key=label",
    "data.heldout_fraction=0",
    "data.calibration_fraction=0",
    "model.size=nano",
    "train.precision=fp32",
    "train.trackers=[]",
    "train.ema_decay=0",
    "train.checkpoint_every=0",
    "train.preview_every=0",
    "train.heldout_every=0",
    "train.log_every=1000",
    "train.optimizer.warmup_steps=0",
    "train.diffusion.snr_gamma=null",
    "train.diffusion.timesteps=2",  # a noisy picture at equal parts, and noise alone
]
PUBLIC = ["train.steps=600", "train.batch_size=128", "train.learning_rate=3e-3", "train.optimizer.schedule=linear"]
PRIVATE = [
    "model.trainable=[class_embedding*]",
    f"data.canaries.coins={CANARIES}",
    "data.canaries.copies=[]",
    f"data.canaries.pool={POOL}",
    f"defenses.dpsgd.epsilon={CLAIM}",
    "defenses.dpsgd.delta=1e-5",
    "defenses.dpsgd.physical_batch=128",
    "defenses.dpsgd.clip_norm=0.1",
    f"train.batch_size={CLASSES + CANARIES}",  # every unit in every step
    "train.steps=4",
    "train.learning_rate=0.3",
    "train.diffusion.timestep_weights=[1,0]",
]


HEADER = f"""# The one-run audit, with noise and without

`bench/canary_audit.py`: {CANARIES:,} pictures of noise, {SIDE} px, each planted by a fair coin; DP-SGD with a claim of epsilon {CLAIM:g} at delta 1e-5
per record; a network of {CLASSES:,} classes whose class embedding alone is trained privately, from public weights. The lower bounds hold at
95 % each (Steinke, Nasr and Jagielski 2023, Theorem 5.2). The runs without noise are the same with zeros in the place of the mechanism's noise
and the claim left as it was: a planted bug, NOT PRIVATE.
"""


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Within it ``model.size=nano`` is the network of this script."""
    known = models.SIZES["nano"]
    models.SIZES["nano"] = NETWORK
    try:
        yield
    finally:
        models.SIZES["nano"] = known


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Within it DP-SGD adds nothing to the clipped sum and claims what it claims with noise: NOT PRIVATE."""
    right = NoisyClippedSum.noise
    NoisyClippedSum.noise = lambda self, like, step: torch.zeros_like(like)
    try:
        yield
    finally:
        NoisyClippedSum.noise = right


def pictures(file: Path) -> None:
    """One picture of noise per class."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (CLASSES, SIDE, SIDE), dtype=np.uint8)
    np.savez(file, train_images=images, train_labels=np.arange(CLASSES))


def train(folder: Path, name: str, overrides: list[str], accelerator: Accelerator) -> Any:
    """A run by the trainer itself: (configuration, records, directory)."""
    sections = {**configuration.SECTIONS, **EVAL_SECTIONS}
    tree = configuration.load(sections, None, [*COMMON, f"run.output_dir={folder}", f"run.name={name}", *overrides])
    config = configuration.objects(tree)
    directory = RunDirectory(config.run)
    directory.open(tree, "bench/canary_audit.py")
    dataset = prepare(config.data, directory.prepared, accelerator)
    defenses = registry.build(config.defenses)
    select_records(config, dataset, defenses, accelerator)
    train_model(config, dataset, directory, defenses, accelerator)
    return config, dataset, directory


def public(folder: Path, accelerator: Accelerator) -> list[str]:
    """Trains the public model; returns what the private runs need to know of it."""
    source = folder / "public.npz"
    if not source.exists():
        pictures(source)
    with network():
        train(folder, "public", [f"data.source={source}", *PUBLIC], accelerator)
    return [f"data.source={source}", f"model.pretrained={folder / 'public' / 'model'}"]


def audited(folder: Path, start: list[str], seed: int, noise: bool, accelerator: Accelerator) -> dict[str, Any]:
    """One private run, audited: ``privacy.canaries.one_run``, and the processor's seconds."""
    began, name = time.process_time(), f"seed-{seed}-{'private' if noise else 'noiseless'}"
    with network(), contextlib.nullcontext() if noise else without_noise():
        config, dataset, directory = train(folder, name, [*start, *PRIVATE, f"run.seed={seed}"], accelerator)
        found = measure(directory.path, config, dataset, accelerator).report["one_run"]
    shutil.rmtree(directory.path)
    return {"seed": seed, "noise": noise, **found, "seconds": time.process_time() - began}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page under docs/results: the bounds as a table, and the two counts that matter. Seeds with one run alone are left out."""
    private = {row["seed"]: row for row in rows if row["noise"]}
    noiseless = {row["seed"]: row for row in rows if not row["noise"]}
    seeds = sorted(private.keys() & noiseless.keys())
    lines = [
        HEADER,
        "| seed | claim | with noise | right of guesses | without | right of guesses |",
        "|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        cells = [str(seed), f"{private[seed]['claimed_epsilon']:.3f}"]
        for row in (private[seed], noiseless[seed]):
            cells += [f"{row['epsilon_lower_bound']:.2f}", f"{row['correct']} of {row['guesses']}"]
        lines.append(f"| {' | '.join(cells)} |")
    held = sum(private[seed]["epsilon_lower_bound"] <= private[seed]["claimed_epsilon"] for seed in seeds)
    caught = sum(noiseless[seed]["epsilon_lower_bound"] > noiseless[seed]["claimed_epsilon"] for seed in seeds)
    lines += ["", f"With noise the bound is at most the claim in {held} of {len(seeds)} seeds."]
    lines += [f"Without noise it exceeds the claim in {caught} of {len(seeds)} seeds."]
    lines += [f"A run took {median(row['seconds'] for row in rows):.0f} s of one core (median)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/canary-audit"))
    parser.add_argument("--markdown", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    accelerator, log = Accelerator(cpu=True), arguments.out / "bounds.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["seed"], row["noise"]) for row in rows}
    start = public(arguments.out, accelerator)
    for seed in range(arguments.seeds):
        for noise in (True, False):
            if (seed, noise) not in done:
                rows.append(audited(arguments.out, start, seed, noise, accelerator))
                with log.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1] | {"note": None}), flush=True)
    table = markdown(rows)
    print(table)
    if arguments.markdown is not None:
        arguments.markdown.write_text(table)


if __name__ == "__main__":
    main()
