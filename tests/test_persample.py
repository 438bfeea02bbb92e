"""Gradients per privacy unit on real diffusers networks, against ordinary autograd on one example at a time."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Batch
from defenses.persample import Hooks, Loop, Units, Vmap, backend, group_views, reference, trainable
from tests.networks import NETWORKS, batch, error, trained

FORMATS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
# bfloat16 keeps 8 bits: every operation rounds by up to 2^-9 = 0.002. Over some 20 layers these errors add up to 0.01-0.02 of a
# gradient's norm per tensor (measured against float32: 0.005-0.016), and two backends round independently of each other.
BF16_BOUND = 0.04


def collected(chosen, model, loss, units) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients [U, *shape] and losses [U] of all chunks."""
    chunks = list(chosen(model, loss, units))
    for gradients, losses in chunks:
        assert all(gradient.dtype == torch.float32 and not gradient.requires_grad for gradient in gradients)
        assert losses.dtype == torch.float32 and not losses.requires_grad
    gradients = [torch.cat(parts) for parts in zip(*(gradients for gradients, _ in chunks), strict=True)]
    return gradients, torch.cat([losses for _, losses in chunks])


def plain(model, scalar) -> list[torch.Tensor]:
    """Gradient of a scalar function of the model by backward() on a copy."""
    model = copy.deepcopy(model)
    scalar(model).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def worst(found, right) -> float:
    """Largest l2 error of a tensor as a share of its unit's whole gradient."""
    norms = sum(gradient.flatten(1).square().sum(1) for gradient in right).sqrt()
    errors = [((a - b).flatten(1).norm(dim=1) / norms).max().item() for a, b in zip(found, right, strict=True)]
    assert all(a.shape == b.shape for a, b in zip(found, right, strict=True))
    return max(errors)


def far(found, right) -> float:
    """Largest l2 error of a unit's whole gradient as a share of its norm."""
    flat = [torch.cat([gradient.flatten(1) for gradient in gradients], 1) for gradients in (found, right)]
    return ((flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)).max().item()


def units_of(name: str, owners=(0, 1, 2, 3)) -> Units:
    return group_views(batch(NETWORKS[name], len(owners)), np.array(owners))


@pytest.mark.parametrize("name", NETWORKS)
def test_loop_is_ordinary_autograd(name):
    network, model = NETWORKS[name], trained(name)
    examples = batch(network, 2)
    gradients, losses = collected(Loop("fp32"), model, network.loss, group_views(examples, np.arange(2)))
    for place in range(2):
        right = plain(model, lambda m, place=place: network.loss(m, examples[place : place + 1])[0])
        assert worst([g[place : place + 1] for g in gradients], [g[None] for g in right]) < 1e-6
        assert losses[place].item() == pytest.approx(network.loss(model, examples[place : place + 1]).item(), rel=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_backends_agree_with_the_loop(name, memory_format):
    network, model, units = NETWORKS[name], trained(name, FORMATS[memory_format]), units_of(name)
    right, right_losses = collected(Loop("fp32"), model, network.loss, units)
    for chosen in (Vmap("fp32", chunk=3), Hooks("fp32", chunk=3)):
        found, losses = collected(chosen, model, network.loss, units)
        assert worst(found, right) < 1e-5, chosen.name
        torch.testing.assert_close(losses, right_losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["UNet2DModel", "LoRA", "DiT", "AutoencoderKL"])
def test_bf16_agrees_within_its_rounding(name, memory_format):
    network, model, units = NETWORKS[name], trained(name, FORMATS[memory_format]), units_of(name, (0, 1))
    exact, _ = collected(Loop("fp32"), model, network.loss, units)
    for kind in ("vmap", "hooks"):
        right, _ = collected(reference(kind, "bf16"), model, network.loss, units)
        found, _ = collected(backend(kind, "bf16"), model, network.loss, units)
        assert worst(found, right) < BF16_BOUND, kind
        # rounded indeed, and no worse than ordinary bf16 training
        assert 1e-3 < far(right, exact) and far(found, exact) < 1.5 * far(right, exact), kind


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_views_of_a_unit_are_averaged_and_padding_counts_nothing(kind, precision):
    network, model = NETWORKS["DiT"], trained("DiT")
    examples = batch(network, 6)
    units = group_views(examples, np.array([7, 7, 7, 2, 4, 4]))
    assert units.weights.tolist() == [pytest.approx([1 / 3] * 3), [1, 0, 0], [0.5, 0.5, 0]]
    whole = [(0, 3), (3, 4), (4, 6)]
    right = [plain(model, lambda m, a=a, b=b: network.loss(m, examples[a:b]).mean()) for a, b in whole]
    right = [torch.stack(tensors) for tensors in zip(*right, strict=True)]
    bound = 1e-5 if precision == "fp32" else BF16_BOUND
    found, losses = collected(backend(kind, precision, chunk=2), model, network.loss, units)
    assert worst(found, right) < bound
    expected = torch.stack([network.loss(model, examples[a:b]).mean().detach() for a, b in whole])
    torch.testing.assert_close(losses, expected, rtol=bound, atol=0)

    wider = {name: torch.cat([value, value[:, :1]], 1) for name, value in units.tensors.items()}
    wider["images"][:, 3] = 5.0
    wider["images"][1, 1:] = -5.0
    padded = Units(wider, torch.cat([units.weights, torch.zeros(3, 1)], 1))
    assert worst(collected(backend(kind, precision), model, network.loss, padded)[0], right) < bound


def test_single_views_are_not_copied():
    examples = batch(NETWORKS["UNet2DModel"], 3)
    units = group_views(examples, np.array([5, 1, 3]))
    assert len(units) == 3 and set(units.tensors) == {"images", "labels", "timesteps", "noise"}
    assert units.tensors["images"].data_ptr() == examples.images.data_ptr()
    assert units.weights.tolist() == [[1], [1], [1]]


def test_padding_repeats_the_first_view_of_its_own_unit():
    examples = batch(NETWORKS["UNet2DModel"], 3)
    images = group_views(examples, np.array([0, 1, 1])).tensors["images"]
    for place, row in {(0, 0): 0, (0, 1): 0, (1, 0): 1, (1, 1): 2}.items():
        assert torch.equal(images[place], examples.images[row])


def test_scattered_views_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        group_views(batch(NETWORKS["UNet2DModel"], 3), np.array([0, 1, 0]))


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
def test_empty_batch_has_no_chunks(kind):
    network = NETWORKS["UNet2DModel"]
    units = group_views(batch(network, 3)[:0], np.empty(0, np.int64))
    assert len(units) == 0 and list(backend(kind, "fp32")(trained("UNet2DModel"), network.loss, units)) == []


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
def test_a_unit_of_padding_alone_has_no_gradient(kind):
    network, model, units = NETWORKS["UNet2DModel"], trained("UNet2DModel"), units_of("UNet2DModel", (0, 1))
    weights = torch.tensor([[1.0], [0.0]])
    found, losses = collected(backend(kind, "fp32"), model, network.loss, Units(units.tensors, weights))
    assert losses[1] == 0 and not any(gradient[1].any() for gradient in found)
    assert all(gradient[0].any() for gradient in found[:4])


def state(model: nn.Module) -> dict:
    """All attributes of modules and parameters, hooks included."""
    modules = {}
    for name, module in model.named_modules():
        modules[name] = {k: copy.copy(v) if isinstance(v, dict | set | list) else v for k, v in vars(module).items()}
    return {"modules": modules, "parameters": {name: set(vars(p)) for name, p in model.named_parameters()}}


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
@pytest.mark.parametrize("end", ["whole", "closed", "error"])
def test_the_model_is_left_as_found(kind, end):
    network, model, units = NETWORKS["DiT"], trained("DiT"), units_of("DiT")
    model.pos_embed.requires_grad_(False)
    for parameter in trainable(model).values():
        parameter.grad = torch.full_like(parameter, 3.0)
    before, weights, calls = state(model), copy.deepcopy(model.state_dict()), []

    def loss(m, b):
        calls.append(len(b))
        if end == "error" and len(calls) == 2:
            network.loss(m, b).sum()  # hooks have stored activations by then
            raise ArithmeticError
        return network.loss(m, b)

    chunks = backend(kind, "fp32", chunk=1)(model, loss, units)
    if end == "whole":
        list(chunks)
    elif end == "closed":
        next(chunks)
        chunks.close()
    else:
        with pytest.raises(ArithmeticError):
            list(chunks)
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        assert (parameter.grad == 3.0).all() if parameter.requires_grad else parameter.grad is None


class Odd(nn.Module):
    """A tied weight, an unused layer, a frozen one, keyword arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, images, *, scale):
        return self.second(torch.tanh(self.frozen(torch.tanh(self.first(images.flatten(1)))))) * scale


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_unused_and_frozen_tensors(kind, precision):
    torch.manual_seed(0)
    model = Odd()
    examples = Batch(torch.randn(3, 1, 2, 2), np.arange(3), None, None)

    def loss(m, b):
        return error(m(b.images, scale=2.0), torch.ones(1))

    found, _ = collected(backend(kind, precision), model, loss, group_views(examples, np.arange(3)))
    right = [plain(model, lambda m, i=i: loss(m, examples[i : i + 1])[0]) for i in range(3)]
    right = [torch.stack(tensors) for tensors in zip(*right, strict=True)]
    assert list(trainable(model)) == ["first.weight", "first.bias", "second.bias", "unused.weight", "unused.bias"]
    assert worst(found, right) < (1e-6 if precision == "fp32" else BF16_BOUND)
    assert [gradient.any().item() for gradient in found] == [True, True, True, False, False]


def test_frozen_weights_may_be_bf16_under_float32_adapters():
    network, model, units = NETWORKS["LoRA"], trained("LoRA"), units_of("LoRA")
    right, _ = collected(Loop("bf16"), model, network.loss, units)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    found, _ = collected(Loop("bf16"), model, network.loss, units)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert worst(collected(Vmap("bf16"), model, network.loss, units)[0], right) < BF16_BOUND


def test_bf16_lowers_images_but_not_timesteps():
    seen = {}

    class Recorder(nn.Linear):
        def forward(self, images, timesteps, *, condition):
            seen.update(
                images=images.dtype, timesteps=timesteps.dtype, text=condition["text"].dtype, w=self.weight.dtype
            )
            return super().forward(images.flatten(1)) * timesteps[:, None]

    def loss(m, b):
        return error(m(b.images, b.timesteps.float(), condition={"text": b.noise}), b.noise.flatten(1))

    shape = (2, 1, 2, 2)
    examples = Batch(torch.randn(shape), np.arange(2), None, None, torch.tensor([999, 1]), torch.randn(shape))
    collected(Vmap("bf16"), Recorder(4, 4), loss, group_views(examples, np.arange(2)))
    half = torch.bfloat16
    assert seen == {"images": half, "timesteps": torch.float32, "text": half, "w": half}


def test_dropout_differs_between_units_under_vmap():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 64), nn.Dropout(0.5))
    examples = Batch(torch.ones(2, 1, 2, 2), np.arange(2), None, None)
    gradients, _ = collected(Vmap("fp32"), model, lambda m, b: m(b.images).sum(1), group_views(examples, np.arange(2)))
    kept = gradients[1] != 0  # [2, 64]
    assert 16 < (kept[0] != kept[1]).sum() < 48  # independent masks differ in 32 of 64 places, sd 4


def test_hooks_refuse_to_drop_a_gradient_that_they_missed():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, images):
            return self.outer(images.flatten(1) @ self.inner.weight.T)  # used, but not by calling it

    model = Aside()
    examples = Batch(torch.ones(2, 1, 2, 2), np.arange(2), None, None)
    with pytest.raises(RuntimeError, match="missed inner.weight"):
        list(Hooks("fp32")(model, lambda m, b: m(b.images).sum(1), group_views(examples, np.arange(2))))
