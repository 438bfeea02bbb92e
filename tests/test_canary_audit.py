"""The demonstration of the one-run audit: counted rightly, and noise that is missing is found."""

import pytest
import torch
from accelerate import Accelerator

from bench import canary_audit
from defenses.mechanism import NoisyClippedSum
from train import models


def row(seed, noise, bound, claimed=2.0):
    return {
        "seed": seed,
        "noise": noise,
        "epsilon_lower_bound": bound,
        "claimed_epsilon": claimed,
        "correct": 9,
        "guesses": 10,
        "seconds": 1.5,
    }


def test_the_table_counts_what_was_held_and_what_was_caught():
    rows = [
        row(0, True, 0.1),
        row(0, False, 2.5),
        row(1, True, 2.1),
        row(1, False, 2.0),
        row(2, True, 2.0),
        row(2, False, 3.0),
    ]
    text = canary_audit.markdown([*rows, row(3, True, 0.0)])
    assert "at most the claim in 2 of 3 seeds" in text
    assert "exceeds the claim in 2 of 3 seeds" in text
    assert "| 1 | 2.000 | 2.10 | 9 of 10 | 2.00 | 9 of 10 |" in text


def test_what_is_taken_away_comes_back():
    noise, size = NoisyClippedSum.noise, models.SIZES["nano"]
    with canary_audit.network(), canary_audit.without_noise():
        assert not NoisyClippedSum.noise(None, torch.ones(3), 0).any() and models.SIZES["nano"] == canary_audit.NETWORK
    assert NoisyClippedSum.noise is noise and models.SIZES["nano"] == size


@pytest.mark.slow
def test_missing_noise_is_found(tmp_path, monkeypatch):
    """A smaller audit of the same kind: 200 canaries against a claim of epsilon 1, which 40 right guesses refute to 2.6."""
    monkeypatch.setattr(canary_audit, "CLASSES", 200)
    small = {
        "data.canaries.coins": 200,
        "defenses.dpsgd.epsilon": 1,
        "train.batch_size": 400,
    }
    monkeypatch.setattr(
        canary_audit, "PRIVATE", [*canary_audit.PRIVATE, *(f"{key}={value}" for key, value in small.items())]
    )
    monkeypatch.setattr(canary_audit, "PUBLIC", [*canary_audit.PUBLIC, "train.steps=200"])
    accelerator = Accelerator(cpu=True)
    start = canary_audit.public(tmp_path, accelerator)
    private, broken = (canary_audit.audited(tmp_path, start, 0, noise, accelerator) for noise in (True, False))
    assert private["claimed_epsilon"] == broken["claimed_epsilon"] <= 1
    assert private["epsilon_lower_bound"] < private["claimed_epsilon"] < broken["epsilon_lower_bound"]
