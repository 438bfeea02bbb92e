"""Shared fixtures: test data, a clean random state, small configurations."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach the network

import pytest
import torch

from train import cli

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean_state():
    """Every test starts with the same seed, one thread and no Accelerate state of another test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real test data beside the repository; absent in a plain clone."""
    folder = cli.ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this clone")
    return folder
