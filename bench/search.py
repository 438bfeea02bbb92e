"""Exact nearest neighbours beside faiss (IndexFlatL2) and beside the bare matrix product of the same shape, in one run.

python bench/search.py [--rounds 5] [--threads 2] [--queries 2000] [--scale 1.0]

Every round times all sides once, in turn, so that a change of the machine's speed hits all alike; figures are medians over the
rounds, of seconds and of ratios within a round. The product is the faster of torch's and numpy's, in blocks of 2,048 references. Peak
memory is that of our search alone, in a process of its own, above the vectors. faiss is left out where it is not installed.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# numpy reads it once, on import
os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "2"

import numpy as np
import torch

from defenses.bounds import quickest_product
from defenses.knn import nearest, squared_distances
from defenses.neighbours import VIEWS, search

try:
    import faiss
except ImportError:
    faiss = None

K = 51
VECTORS = {"100,000 x 512": (100_000, 512), "50,000 x 3,072": (50_000, 3072)}
IMAGES = 4000, (3, 32, 32)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def product(queries: np.ndarray, references: np.ndarray, times: int = 1) -> None:
    left, right = torch.from_numpy(queries), torch.from_numpy(references)
    multiply = quickest_product(left.shape[1], torch.float32, torch.device("cpu"))
    out = torch.empty(len(left) * 2048)
    for _ in range(times):
        for block in right.split(2048):
            multiply(left, block, out[: len(left) * len(block)].view(len(left), -1))


def seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of every side in every round, after one untimed call of each."""
    used: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if repeat:
                used[name].append(time.perf_counter() - start)
    return used


def show(case: str, used: dict[str, list[float]]) -> None:
    print(f"\n{case}")
    for name, times in used.items():
        of_product = median(p / t for p, t in zip(used["product"], times, strict=True))
        beside = ""
        if name == "ours" and "faiss" in used:
            ratio = median(f / t for f, t in zip(used["faiss"], times, strict=True))
            beside = f", {ratio:.2f} x faiss's speed"
        print(f"  {name:8} {median(times):7.3f} s, {100 * of_product:4.0f} % of the product's speed{beside}")


def vectors(case: str, args: argparse.Namespace) -> None:
    count, size = VECTORS[case]
    references, queries = gaussian(0, round(count * args.scale), size), gaussian(1, args.queries, size)
    sides = {
        "product": lambda: product(queries, references),
        "ours": lambda: nearest(queries, references, K),
    }
    if faiss is not None:
        index = faiss.IndexFlatL2(size)
        index.add(references)
        sides["faiss"] = lambda: index.search(queries, K)
    show(f"{args.queries} queries, {case}, k = {K}, float32", seconds(sides, args.rounds))
    if faiss is not None:
        compare(queries, references, index.search(queries, K)[1])
    command = [sys.executable, __file__, "--peak", case, "--threads", str(args.threads), "--queries", str(args.queries)]
    peak = subprocess.run([*command, "--scale", str(args.scale)], check=True, capture_output=True, text=True).stdout
    print(f"  peak memory above the vectors: {float(peak):.0f} MiB")


def compare(queries: np.ndarray, references: np.ndarray, theirs: np.ndarray) -> None:
    """Whether both found the same; where faiss's rounding swapped two, ours must be the nearer in float64."""
    found = nearest(queries, references, K)
    query = np.repeat(np.arange(len(queries)), K)
    squared = squared_distances(queries, query, references, theirs.ravel()).reshape(theirs.shape)
    differ = found.row != theirs
    never_farther = bool((found.squared <= np.sort(squared, axis=1)).all())
    close = np.abs(np.sort(squared, axis=1) / found.squared - 1).max()
    print(
        f"  same neighbours at {100 * (1 - differ.mean()):.3f} % of all places; in float64 ours are never farther: "
        f"{never_farther}; largest relative difference of a distance {close:.1e}"
    )


def peak(case: str, args: argparse.Namespace) -> None:
    count, size = VECTORS[case]
    references, queries = gaussian(0, round(count * args.scale), size), gaussian(1, args.queries, size)
    nearest(queries[:1], references[:1], 1)  # what the libraries take
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _status("VmRSS")
    nearest(queries, references, K)
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """KiB, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def images(args: argparse.Namespace) -> None:
    count, shape = IMAGES
    random = np.random.default_rng(2)
    references, queries = (
        random.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (round(count * args.scale), args.queries)
    )
    flat = [side.reshape(len(side), -1).astype(np.float32) for side in (queries, references)]
    sides = {
        "product": lambda: product(*flat, times=len(VIEWS)),
        "ours": lambda: search(queries, references, np.arange(len(references)), K - 1),
    }
    case = f"{args.queries} queries, {len(references)} pictures of 3 x 32 x 32, ten views, k = {K - 1}, whole numbers"
    show(case, seconds(sides, args.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of references")
    parser.add_argument("--peak", choices=VECTORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(args.threads)
    if args.peak:
        peak(args.peak, args)
        return
    print(
        f"threads {args.threads}, rounds {args.rounds}, torch {torch.__version__}, faiss {getattr(faiss, '__version__', None)}"
    )
    for case in VECTORS:
        vectors(case, args)
    images(args)


if __name__ == "__main__":
    main()
