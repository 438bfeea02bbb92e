"""How long the largest clique among 500 generations takes, and whether the bound on time holds.

python bench/cliques.py [--nodes 500] [--seconds 1] [--rounds 5]

Random graphs of every density; the figures are processor time (median of the rounds), and by how much the bound was exceeded
at most, in wall-clock time.
"""

import argparse
import os
import sys
import time
from statistics import median

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from eval.cliques import largest_clique


def random_graph(seed: int, nodes: int, density: float) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((nodes, nodes)) < density, 1)
    return upper | upper.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'density':>8} {'clique':>7} {'proved':>7} {'ms':>8} {'beyond the bound, ms':>21}")
    for density in (0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99):
        used, beyond, size, proved = [], 0.0, 0, 0
        for seed in range(args.rounds):
            adjacency = random_graph(seed, args.nodes, density)
            start, processor = time.monotonic(), time.process_time()
            clique = largest_clique(adjacency, seconds=args.seconds)
            used.append(time.process_time() - processor)
            beyond = max(beyond, time.monotonic() - start - args.seconds)
            size, proved = max(size, len(clique.nodes)), proved + clique.exact
        share = f"{proved}/{args.rounds}"
        print(f"{density:8g} {size:7d} {share:>7} {median(used) * 1e3:8.1f} {max(beyond, 0) * 1e3:21.1f}")


if __name__ == "__main__":
    main()
