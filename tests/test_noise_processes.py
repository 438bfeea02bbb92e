"""One, two and four processes (gloo): the same plan dealt out, the same sum, noise once, the same learning rate."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed_noise import CLIP, DIVISOR, SIGMA, WORLDS

pytestmark = [pytest.mark.multi, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("distributed_noise.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each world size reports, and its sum without noise, float64 [parameters]."""
    folder = tmp_path_factory.mktemp("noise")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return {w: (json.loads((folder / f"{w}.json").read_text()), np.load(folder / f"{w}.npy")) for w in WORLDS}


def test_noise_does_not_depend_on_the_number_of_processes(results):
    """On a zero-gradient run in several physical batches: sigma C / divisor within 1 %, on all ranks the same to the bit.

    Noise on every rank would be sqrt(W) times as large, an average over the ranks 1/W.
    """
    for world, (told, _) in results.items():
        assert told["std"] == pytest.approx(SIGMA * CLIP / DIVISOR, rel=0.01), world
        assert len(told["noise_digests"]) == world and set(told["noise_digests"]) == {results[1][0]["noise_digests"][0]}


def test_the_sum_does_not_depend_on_the_number_of_processes(results):
    single = results[1][1]
    assert np.linalg.norm(single) > 0.1 * CLIP / DIVISOR
    for world in WORLDS[1:]:
        assert np.linalg.norm(results[world][1] - single) < 1e-6 * np.linalg.norm(single), world


def test_ranks_share_the_plan_without_overlap(results):
    """Disjoint, complete, several micro-batches of at most two units; the plan itself is that of one process."""
    several = 0
    for world, (told, _) in results.items():
        for step, drawn in enumerate(told["drawn"]):
            assert drawn["plan"] == results[1][0]["drawn"][step]["plan"]
            parts = [part for rank in drawn["ranks"] for part in rank]
            assert len(drawn["ranks"]) == world and all(len(part) <= 2 for part in parts)
            assert sorted(row for part in parts for row in part) == sorted(drawn["plan"])
            several += any(len(rank) > 1 for rank in drawn["ranks"])
    assert several > 10


def test_ranks_stay_together(results):
    """After five noisy steps the weights are equal on all ranks; the secret was sent to all; every step is booked once. DDP,
    which averages raw gradients, has no part in it."""
    for world, (told, _) in results.items():
        assert len(told["weight_digests"]) == world and len(set(told["weight_digests"])) == 1
        assert told["secrets_agree"] and told["booked"] == 7 and not told["wrapped"]


def test_the_learning_rate_does_not_depend_on_the_number_of_processes(results):
    """Five of twenty steps of warm-up to 1e-3. A schedule stepped once per process would be W times as far."""
    for told, _ in results.values():
        assert told["learning_rate"] == pytest.approx(5 / 20 * 1e-3)
