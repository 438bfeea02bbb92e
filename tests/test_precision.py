"""`train.precision=auto`: bf16 only where the machine multiplies in it."""

import pytest
import torch

from train import diffusion
from train.state import TrainConfig


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx2": True, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_of_processors(known, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert diffusion.native_precision() == expected
    assert TrainConfig().precision == expected and TrainConfig(precision="bf16").precision == "bf16"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_of_gpus(supported, expected, monkeypatch):
    """Emulated bf16 does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert diffusion.native_precision() == expected
