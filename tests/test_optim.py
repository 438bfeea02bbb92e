"""The ordinary gradient against autograd on the whole batch."""

import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from train import checkpoint
from train.optim import MeanGradient, OptimizerConfig, build_optimizer, build_schedule


def microbatches(images: torch.Tensor, parts: int) -> list[Batch]:
    rows = torch.arange(len(images)).chunk(parts)
    return [Batch(images[r], r.numpy(), None, RecordRandom(0, 0, r.tolist(), [0] * len(r))) for r in rows]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_mean_gradient_does_not_depend_on_accumulation(parts):
    images = torch.randn(7, 5)
    model = nn.Linear(5, 1)

    def loss(module, batch):
        return module(batch.images).square().squeeze(1)

    returned = MeanGradient(7).backward(model, loss, microbatches(images, parts), 0, Accelerator(cpu=True))
    residual = images @ model.weight.detach().T + model.bias.detach()  # d/dw mean (wx + b)^2 = 2/N sum (wx + b) x
    expected = 2 / 7 * (residual * images).sum(0)
    torch.testing.assert_close(model.weight.grad[0], expected)
    torch.testing.assert_close(returned, residual.square().squeeze(1))


def test_learning_rates():
    """Linear warm-up over 10 steps, then cosine to zero at step 110: the closed form."""
    parameter = nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(schedule="cosine", warmup_steps=10)
    optimizer = build_optimizer(config, [parameter], 0.5)
    schedule = build_schedule(config, optimizer, 110)
    rates = []
    for _ in range(110):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[5] == pytest.approx(0.25) and rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25, rel=1e-6) and rates[109] < 1e-3


def test_eight_bit_moments_train_as_full_ones_and_resume_exactly(tmp_path):
    """bitsandbytes keeps the moments of large tensors in blocks of 8 bits, in a dictionary within the state. Not among the test
    extras: where it is installed, every start of a process takes a second longer."""
    pytest.importorskip("bitsandbytes")
    start = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))

    def made(eight_bit):
        model = nn.Linear(64, 128, bias=False)
        model.weight.data.copy_(start)
        return model, build_optimizer(OptimizerConfig(eight_bit=eight_bit), list(model.parameters()), 1e-2)

    def step(model, optimizer, number):
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (full, plain) = made(True), made(False)
    for number in range(5):
        step(model, optimizer, number)
        step(full, plain, number)
    moved = full.weight - start
    assert (model.weight - full.weight).norm() < 0.05 * moved.norm()
    checkpoint.save(tmp_path / "step-5", model, optimizer, [model.weight.detach()], {})
    assert any(tensor.dtype == torch.uint8 for tensor in load_file(tmp_path / "step-5/optimizer.safetensors").values())
    again, restored = made(True)
    checkpoint.load(tmp_path / "step-5", again, restored)
    for pair in ((model, optimizer), (again, restored)):
        step(*pair, 5)
    assert torch.equal(model.weight, again.weight)


def test_eight_bit_without_the_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"^train\.optimizer\.eight_bit: needs bitsandbytes[^\n]*$"):
        build_optimizer(OptimizerConfig(eight_bit=True), [nn.Parameter(torch.ones(3))], 1e-3)


def test_dictionaries_within_an_optimizers_state_are_saved_and_restored(tmp_path):
    """As 8-bit optimizers have them."""

    class Nested(torch.optim.SGD):
        def state_dict(self):
            inner = {"levels": torch.arange(4, dtype=torch.uint8), "deep": {"scale": torch.tensor([0.5]), "block": 256}}
            return {**super().state_dict(), "state": {0: {"step": 3, "quantised": inner}}}

        def load_state_dict(self, state):
            self.restored = state["state"]

    model = nn.Linear(2, 2, bias=False)
    checkpoint.save(tmp_path / "step-3", model, Nested(model.parameters(), lr=0.1), [model.weight.detach()], {})
    other = Nested(model.parameters(), lr=0.1)
    checkpoint.load(tmp_path / "step-3", model, other)
    found = other.restored[0]
    assert found["step"] == 3 and found["quantised"]["deep"]["block"] == 256
    assert torch.equal(found["quantised"]["levels"], torch.arange(4, dtype=torch.uint8))
    assert found["quantised"]["deep"]["scale"].item() == 0.5


def test_resume_of_convolutions_in_channels_last(tmp_path):
    """Files hold moments in row-major order; a fused step would pair them with other weights than theirs."""

    def made():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
        return model, build_optimizer(OptimizerConfig(), list(model.parameters()), 0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        model(images).square().sum().backward()
        optimizer.step()

    (whole, optimizer), (resumed, later) = made(), made()
    step(whole, optimizer)
    checkpoint.save(tmp_path / "step-1", whole, optimizer, list(whole.parameters()), {"step": 1})
    checkpoint.load(tmp_path / "step-1", resumed, later)
    step(whole, optimizer)
    step(resumed, later)
    assert torch.equal(resumed.weight, whole.weight)
