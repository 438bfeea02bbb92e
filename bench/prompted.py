"""What the prompted attack costs for one prompt: the graph of tiled l2, the largest clique, the record, the nearest pictures.

python bench/prompted.py [--images 500] [--sides 64 512] [--pictures 2000] [--threads 1] [--device cpu]

Seconds, median of the rounds: of processor time on a CPU (which others may use meanwhile), else of wall clock. Images of one prompt are random but for 20 that agree. ``record`` is the JSON file
and the file of nearest generations together, the latter counted as if it were written after every prompt; the search among
pictures is measured on a part of them and scaled up.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch

from defenses.neighbours import search
from eval.cliques import largest_clique
from eval.prompted import tiled_l2
from eval.promptrecords import NearestGenerations, PromptRecords

SEARCHED = 16  # pictures of a search that is measured


def timed(work, args: argparse.Namespace) -> tuple[float, Any]:
    """Median seconds of a piece of work, and what it gave."""
    clock, seconds = time.process_time if args.device == "cpu" else time.perf_counter, []
    for _ in range(args.rounds):
        started = clock()
        result = work()
        seconds.append(clock() - started)
    return median(seconds), result


def measure(side: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of each part for one prompt."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (args.images, 3, side, side), dtype=np.uint8)
    images[:20] = np.clip(images[0].astype(np.int16) + random.integers(-8, 9, (20, 3, side, side)), 0, 255)
    found = {}
    found["tiled_l2"], distance = timed(lambda: tiled_l2(images, args.device), args)
    found["clique"], clique = timed(lambda: largest_clique(distance <= 0.15, seconds=30), args)
    assert len(clique.nodes) == 20
    records, nearest = PromptRecords(folder, folder, "digest"), NearestGenerations.none(args.pictures)
    row = {name: 0.123456789 for name in "abcdefghijk"}

    def record() -> None:
        records.write(0, {"row": row, "matches": [row], "kept": 0})
        records.write_nearest(0, nearest, set(range(1000)))

    found["record"], _ = timed(record, args)
    pictures = random.integers(0, 256, (SEARCHED, 3, side, side), dtype=np.uint8)
    ids = np.arange(SEARCHED)
    seconds, _ = timed(lambda: search(images, pictures, ids, 1, device=args.device), args)
    return found | {"search": seconds * args.pictures / SEARCHED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.images} images, {args.pictures} pictures, {args.threads} threads, {args.device}")
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides:
            found = measure(side, args, Path(folder))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(
                f"{side} px: "
                + ", ".join(f"{name} {value:.3f} s" for name, value in found.items())
                + f", peak {peak:.0f} MiB"
            )


if __name__ == "__main__":
    main()
