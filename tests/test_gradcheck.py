"""The start-up check: right backends pass, every planted bug is refused."""

import copy

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from defenses import persample
from defenses.base import Batch
from defenses.errors import UserError
from defenses.gradcheck import check, refuse_coupled
from defenses.persample import Hooks, Loop, Vmap, group_views, reference, trainable
from tests.networks import NETWORKS, batch, error, trained

TOLERANCE = 1e-4


def units_of(name: str, count: int = 2):
    return group_views(batch(NETWORKS[name], count), np.arange(count))


def checked(chosen, name: str, model=None, tolerance: float = TOLERANCE, precision: str = "fp32") -> float:
    model = NETWORKS[name].build().train() if model is None else model
    loop = reference(chosen.name, precision)
    return check(chosen, loop, model, NETWORKS[name].loss, units_of(name), tolerance)


class Bug:
    """A right backend whose gradients are changed."""

    name = "bug"

    def __init__(self, change, right=None):
        self.change, self.right = change, right or Vmap("fp32")

    def __call__(self, model, loss, units):
        names = list(trainable(model))
        for gradients, losses in self.right(model, loss, units):
            yield [self.change(name, gradient.clone()) for name, gradient in zip(names, gradients, strict=True)], losses


class Layers(nn.Sequential):
    """Convolution, something, and a head, on images [B, 1, 4, 4]."""

    def __init__(self, *between: nn.Module, **conv):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3, padding=1, **conv), *between, nn.Flatten(), nn.Linear(64, 3))


def small_check(model, chosen, loop=None, loss=None):
    numbers = torch.Generator().manual_seed(0)
    examples = Batch(torch.randn(3, 1, 4, 4, generator=numbers), np.arange(3), None, None)
    loss = loss or (lambda m, b: error(m(b.images), torch.ones(1)))
    return check(chosen, loop or Loop("fp32"), model, loss, group_views(examples, np.arange(3)), TOLERANCE)


@pytest.mark.parametrize("chosen", [Vmap("fp32"), Hooks("fp32")], ids=["vmap", "hooks"])
@pytest.mark.parametrize("name", ["UNet2DModel", "LoRA", "DiT", "AutoencoderKL"])
def test_right_backends_pass_on_fresh_models(name, chosen):
    model = NETWORKS[name].build().train()
    before = copy.deepcopy(model.state_dict())
    assert checked(chosen, name, model) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["default", "channels_last"]
)
def test_the_layout_defect_of_opacus_is_there_and_refused(monkeypatch, memory_format):
    monkeypatch.setattr(persample, "_mended_hooks", lambda: GradSampleHooks)
    with pytest.raises(UserError, match="hooks disagrees with one-by-one gradients by .* in .*conv.*weight.*loop"):
        checked(Hooks("fp32"), "UNet2DModel", trained("UNet2DModel", memory_format))
    monkeypatch.undo()
    assert checked(Hooks("fp32"), "UNet2DModel", trained("UNet2DModel", memory_format)) < 1e-5


def test_one_unit_alone_is_not_accepted():
    with pytest.raises(ValueError, match="at least two"):
        check(Vmap("fp32"), Loop("fp32"), Layers(), NETWORKS["UNet2DModel"].loss, units_of("UNet2DModel", 1), TOLERANCE)


def test_gradients_behind_a_zero_adapter_are_tested():
    bug = Bug(lambda name, gradient: gradient * 1.5 if "mid_block" in name and "lora_A" in name else gradient)
    model = NETWORKS["LoRA"].build().train()
    gradients, _ = next(Vmap("fp32")(model, NETWORKS["LoRA"].loss, units_of("LoRA")))
    behind = [gradient for name, gradient in zip(trainable(model), gradients, strict=True) if "lora_A" in name]
    assert behind and not any(gradient.any() for gradient in behind)  # without the noise the bug would multiply zeros
    with pytest.raises(UserError, match="mid_block.*lora_A"):
        checked(bug, "LoRA", model)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, gradient: gradient * 1.5,
        lambda name, gradient: gradient / 2,  # mean for sum
        lambda name, gradient: gradient.flip(0),  # gradients of another unit
        lambda name, gradient: gradient.mean(0, keepdim=True).expand_as(gradient),
        lambda name, gradient: gradient * torch.tensor([1.0, 1.0, 1.5]).view(-1, *[1] * (gradient.ndim - 1)),
        lambda name, gradient: gradient * torch.nan if name == "0.bias" else gradient,
        lambda name, gradient: gradient * 0 if name == "0.bias" else gradient,
        lambda name, gradient: gradient[:1],
    ],
    ids=["scaled", "mean", "swapped", "batch", "one unit", "nan", "missing tensor", "missing unit"],
)
def test_wrong_gradients_are_refused(change):
    assert small_check(Layers(), Bug(lambda name, gradient: gradient)) < 1e-5
    with pytest.raises(UserError, match="^defenses.dpsgd.backend: bug "):
        small_check(Layers(), Bug(change))


def test_small_tensors_need_the_check_in_float32():
    def missing(name, gradient):
        return gradient * 0 if name == "conv_in.bias" else gradient

    with pytest.raises(UserError, match="conv_in.bias"):
        checked(Bug(missing), "UNet2DModel")
    assert 1e-3 < checked(Bug(missing, Vmap("bf16")), "UNet2DModel", None, 0.04, "bf16")  # below bf16's rounding
    with pytest.raises(UserError, match="bug disagrees"):
        checked(Bug(lambda name, gradient: gradient * 1.5, Vmap("bf16")), "UNet2DModel", None, 0.04, "bf16")


def test_bf16_passes_at_its_own_tolerance_only():
    for kind in (Vmap, Hooks):
        assert checked(kind("bf16"), "UNet2DModel", None, 0.04, "bf16") < 0.04
    with pytest.raises(UserError, match="vmap disagrees"):
        checked(Vmap("bf16"), "UNet2DModel", None, 1e-5, "bf16")


def test_dropout_is_off_during_the_check():
    model = trained("DiT")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.9
    assert checked(Vmap("fp32"), "DiT", model) < 1e-5
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.modules())
    assert small_check(Layers(nn.Dropout(0.5)), Hooks("fp32")) < 1e-5


def test_layers_that_hooks_compute_wrongly_are_refused():
    model = Layers(padding_mode="circular")  # Opacus unfolds it as if padded with zeros
    assert small_check(model, Vmap("fp32")) < 1e-5
    with pytest.raises(UserError, match="hooks disagrees .* in 0.weight"):
        small_check(model, Hooks("fp32"))


@pytest.mark.parametrize("chosen", [Vmap("fp32"), Hooks("fp32")], ids=["vmap", "hooks"])
def test_checkpointing_is_refused_in_words(chosen):
    model = trained("UNet2DModel")
    model.enable_gradient_checkpointing()
    with pytest.raises(UserError, match=r"^defenses.dpsgd.backend: (vmap|hooks) (fails|disagrees).*backend: loop"):
        checked(chosen, "UNet2DModel", model)


def test_a_loss_that_reads_more_than_tensors_is_refused_in_words():
    with pytest.raises(UserError, match="loop fails on this model: .*NoneType.*switch off defenses"):
        small_check(Layers(), Vmap("fp32"), loss=lambda m, b: error(m(b.images), torch.ones(1)) * b.rows[0])


def test_no_gradient_at_all_is_refused():
    with pytest.raises(UserError, match="^model: .*zero or not finite"):
        small_check(Layers(), Vmap("fp32"), loss=lambda m, b: m(b.images).sum(1) * 0)
    broken = Layers()
    broken[0].weight.data[0] = torch.nan
    with pytest.raises(UserError, match="^model: .*zero or not finite"):
        small_check(broken, Vmap("fp32"))


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.BatchNorm2d(4), "normalises over the batch"),
        (nn.SyncBatchNorm(4), "normalises over the batch"),
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), "normalises over the batch"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "keeps running statistics"),
    ],
)
def test_coupling_layers_are_refused(layer, reason):
    with pytest.raises(UserError, match=f"^model: 1 {reason}.*GroupNorm"):
        refuse_coupled(Layers(layer))
    with pytest.raises(UserError, match=reason):
        small_check(Layers(layer), Vmap("fp32"))


def test_layers_within_an_example_are_accepted():
    model = Layers(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 4, 4]))
    refuse_coupled(model)
    assert small_check(model, Vmap("fp32")) < 1e-5


class LessMean(nn.Module):
    """Couples examples without any layer that is known for it."""

    def forward(self, x):
        return x - 0.5 * x.mean(0, keepdim=True)


def test_coupled_examples_are_found_by_replacing_the_others():
    with pytest.raises(UserError, match="hooks disagrees"):  # with the loop an example is coupled with itself only
        small_check(Layers(LessMean()), Hooks("fp32"))
    with pytest.raises(UserError, match="other examples change the gradient of an example"):
        small_check(Layers(LessMean()), Hooks("fp32"), loop=Hooks("fp32"))
    assert small_check(Layers(LessMean()), Vmap("fp32")) < 1e-5  # vmap cannot couple them


def test_a_buffer_that_moves_with_the_data_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += x.detach().sum()
            return x

    with pytest.raises(UserError, match="^model: .*changes 1.seen"):
        small_check(Layers(Counting()), Vmap("fp32"))
    with pytest.raises(UserError, match="^model: .*changes 1.*_u"):
        small_check(Layers(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))), Vmap("fp32"))
