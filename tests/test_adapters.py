"""Low-rank adapters and frozen parts: what is trained, what stays as it was, what is saved."""

import copy
import json
import math
import subprocess
import sys

import peft
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from defenses.errors import UserError
from train import checkpoint
from train.adapters import AdapterConfig, apply, merged, save
from train.models import parameter_count, save_pipeline
from train.optim import OptimizerConfig, build_optimizer
from train.state import TrainState, released_model, trained_parameters

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet() -> UNet2DModel:
    """A UNet with attention and classes, small enough for milliseconds."""
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )  # fmt: skip


def call(model: nn.Module) -> torch.Tensor:
    """Output for two fixed pictures."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0, 2])
    return model(images, torch.tensor([3, 900]), class_labels=labels, return_dict=False)[0]


def shaken(model: nn.Module) -> nn.Module:
    """The model with every adapter weight replaced: B starts at zero, where a test would see nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def adapted(*, trainable: list[str] | None = None, **settings) -> UNet2DModel:
    return apply(unet(), AdapterConfig(**settings), trainable)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """Some steps as the trainer does them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), trainable, 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (call(model) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


def test_parameters_of_the_adapter_by_hand():
    """Rank 3 on a d x d linear layer has 2 * 3 * d parameters; every attention of this UNet has four such layers, d = 16."""
    attentions = sum(name.endswith("to_q") for name, _ in unet().named_modules())
    model = adapted(rank=3)
    assert attentions == 4 and parameter_count(model, trainable=True) == attentions * 4 * 2 * 3 * 16
    assert trained_names(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert parameter_count(model) - parameter_count(model, trainable=True) == parameter_count(unet())


def test_parameters_of_an_adapted_convolution_by_hand():
    """A convolves k x k to r channels, B has r columns: r (9 in + out) each; up blocks see a skip connection more."""
    shapes = [layer.weight.shape for name, layer in unet().named_modules() if name.endswith("conv1")]
    model = adapted(rank=2, targets=["conv1"])
    assert parameter_count(model, trainable=True) == sum(2 * (9 * shape[1] + shape[0]) for shape in shapes)


def test_the_start_is_the_pretrained_model():
    base = unet()
    before = call(base)
    model = apply(base, AdapterConfig(), None)
    assert model is base
    assert torch.equal(call(model), before)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (12.0, 3.0), (1.0, 0.25)])
def test_merged_weight_is_w_plus_scaled_ba(alpha, factor):
    """Hu et al. 2021, section 4.1: W + (alpha / r) B A; for a convolution B A joins the two over the inner channels."""
    model = shaken(adapted(rank=4, alpha=alpha, targets=["to_q", "conv2"]))
    weights, folded = model.state_dict(), merged(model).state_dict()
    for layer in ("mid_block.attentions.0.to_q", "down_blocks.0.resnets.0.conv2"):
        a, b = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
        product = torch.einsum("or,ri...->oi...", b.flatten(1), a)
        expected = weights[f"{layer}.base_layer.weight"] + factor * product
        torch.testing.assert_close(folded[f"{layer}.weight"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", [ATTENTION, ("conv1", "time_emb_proj"), ("to_q", "conv_in", "conv_out")])
def test_merging_is_exact_and_leaves_nothing_of_peft(targets):
    base = unet()
    model = shaken(apply(copy.deepcopy(base), AdapterConfig(rank=4, alpha=8, targets=list(targets), dropout=0.3), None))
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = merged(model)
    assert (call(model) - call(base)).abs().max() > 0.05  # the adapter matters
    torch.testing.assert_close(call(folded), call(model), atol=1e-5, rtol=1e-5)
    assert list(folded.state_dict()) == list(base.state_dict()) and type(folded) is UNet2DModel
    assert set(vars(folded)) == set(vars(base)) and {type(m) for m in folded.modules()} == {
        type(m) for m in base.modules()
    }
    after = model.state_dict()  # the copy was merged, not the model
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_without_adapter_is_not_copied():
    model = unet()
    assert apply(model, None, None) is model and merged(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_patterns_choose_among_the_names_of_the_network(adapter):
    """Also a layer's own bias that PEFT renames to ``base_layer``."""
    own = {name for name, _ in unet().named_parameters()}
    model = apply(unet(), adapter, ["*norm*", "class_embedding*", "*to_q.bias"])
    chosen = {name.replace(".base_layer", "") for name in trained_names(model) if "lora_" not in name}
    assert chosen == {name for name in own if "norm" in name or "class_emb" in name or name.endswith("to_q.bias")}
    assert len(chosen) > 20 and any("lora_" in name for name in trained_names(model)) == (adapter is not None)


@pytest.mark.parametrize(
    ("adapter", "patterns"), [(AdapterConfig(rank=2), None), (AdapterConfig(rank=2), ["*norm*"]), (None, ["*.bias"])]
)
def test_frozen_parts_are_unchanged_by_training_bit_for_bit(adapter, patterns):
    model = apply(unet(), adapter, patterns)
    ema = EMAModel(model.parameters(), decay=0.5, foreach=True)
    trainable = trained_names(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = train(model)
    ema.step(model.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = dict(model.named_parameters())
    assert {id(parameter) for parameter in held} == {id(named[name]) for name in trainable} and len(held) == len(
        trainable
    )
    for (name, parameter), average in zip(named.items(), ema.shadow_params, strict=True):
        if name in trainable:
            assert parameter.grad is not None and not torch.equal(parameter, before[name]), name
        else:
            assert (
                parameter.grad is None and torch.equal(parameter, before[name]) and torch.equal(average, before[name])
            ), name


def test_moving_the_model_keeps_the_parameters():
    """The trainer moves the model between `apply` and the optimizer: what is trained must still be the model's."""
    model = adapted(targets=["to_q", "conv1"])
    before, names = [id(parameter) for parameter in model.parameters()], trained_names(model)
    model = model.to("cpu", memory_format=torch.channels_last)
    assert [id(parameter) for parameter in model.parameters()] == before and trained_names(model) == names


def test_initial_weights_follow_the_global_generator_alone():
    def weights(seed):
        torch.manual_seed(seed)
        return adapted(targets=["to_q", "conv1"]).state_dict()

    first, again, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "mid_block.attentions.0.to_q.lora_A.default.weight"
    assert not torch.equal(first[name], other[name]) and first[name].abs().max() <= 1 / math.sqrt(16)


def test_checkpoints_hold_adapters(tmp_path):
    model = adapted(rank=2, targets=["to_q", "conv1"])
    optimizer = train(model)
    ema = [parameter.detach() + 1 for parameter in trained_parameters(model)]
    checkpoint.save(tmp_path / "step-3", model, optimizer, ema, {"step": 3})
    expected = [parameter.detach().clone() for parameter in trained_parameters(model)]
    assert load_file(tmp_path / "step-3" / "model.safetensors").keys() == trained_names(model)  # the base is not in it
    other = shaken(adapted(rank=2, targets=["to_q", "conv1"]))
    restored = train(other, 1)
    averaged, state = checkpoint.load(tmp_path / "step-3", other, restored)
    assert state == {"step": 3}
    for ours, theirs, average in zip(trained_parameters(other), expected, averaged, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(average, theirs + 1)
    moments = [
        [values.state[p]["exp_avg"] for p in values.param_groups[0]["params"]] for values in (optimizer, restored)
    ]
    assert all(torch.equal(saved, loaded) for saved, loaded in zip(*moments, strict=True))


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    model = adapted(rank=2)
    checkpoint.save(tmp_path / "step-3", model, train(model, 1), trained_parameters(model), {})
    other = adapted(rank=3)
    with pytest.raises(UserError, match="cannot be resumed"):
        checkpoint.load(tmp_path / "step-3", other, train(other, 1))


def state_with_averages(model: nn.Module) -> TrainState:
    """Trained weights, and averages that differ from them."""
    state = TrainState(model=model, optimizer=train(model), ema=EMAModel(trained_parameters(model), decay=0.5))
    for average in state.ema.shadow_params:
        average.mul_(1.25)
    return state


def test_the_saved_pipeline_has_the_averaged_weights(tmp_path):
    state = state_with_averages(adapted(rank=2, targets=["to_q", "conv1"], trainable=["*norm*"]))
    save_pipeline(tmp_path, released_model(state), DDPMScheduler())
    loaded = DiffusionPipeline.from_pretrained(tmp_path).unet
    state.ema.copy_to(trained_parameters(state.model))
    torch.testing.assert_close(call(loaded), call(state.model.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_saved_pipeline_needs_no_peft(tmp_path):
    save_pipeline(tmp_path, shaken(adapted(rank=2)), DDPMScheduler())
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"print(type(DiffusionPipeline.from_pretrained({str(tmp_path)!r}).unet).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "UNet2DModel", done.stderr


def test_averages_of_an_earlier_checkpoint_can_be_released(tmp_path):
    """Their names are those of the adapted model: merging must come after they are read, as release.release does."""
    state = state_with_averages(adapted(rank=2))
    checkpoint.save(tmp_path / "step-3", state.model, state.optimizer, state.ema.shadow_params, {})
    state.ema.copy_to(trained_parameters(state.model))
    expected = call(state.model.eval())
    train(state.model)
    state.ema.shadow_params = [parameter.detach().clone() for parameter in trained_parameters(state.model)]
    model = released_model(state)
    model.load_state_dict(load_file(tmp_path / "step-3" / "ema.safetensors"), strict=False)
    save_pipeline(tmp_path / "model", model, DDPMScheduler())
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model").unet
    torch.testing.assert_close(call(loaded), expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_alone_loads_with_peft(tmp_path):
    base = unet().eval()
    model = shaken(apply(copy.deepcopy(base), AdapterConfig(rank=2, alpha=6, targets=["to_q", "conv1"]), None)).eval()
    assert save(tmp_path, model)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(call(reloaded), call(model), atol=1e-6, rtol=0)
    assert (call(reloaded) - call(base)).abs().max() > 0.05
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["lora_alpha"] == 6


@pytest.mark.parametrize("model", [unet(), adapted(rank=2, trainable=["*norm*"])], ids=["none", "not all"])
def test_half_a_model_is_not_saved_as_an_adapter(tmp_path, model):
    assert not save(tmp_path / "adapter", model) and not (tmp_path / "adapter").exists()


def test_other_classes_of_diffusers():
    """Text-conditional UNet and transformer: merged equals adapted."""
    condition = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    images, times, text = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.randn(2, 4, 8)
    for model, inputs in ((condition, {"encoder_hidden_states": text}), (dit, {"class_labels": torch.tensor([1, 2])})):
        with torch.no_grad():
            for parameter in model.parameters():  # DiT's last layers start at zero
                parameter.add_(0.05 * torch.randn_like(parameter))
        names = list(model.state_dict())
        start = model.eval()(images, times, **inputs).sample
        shaken(apply(model, AdapterConfig(rank=2), None)).eval()
        folded, output = merged(model), model(images, times, **inputs).sample
        assert (output - start).abs().max() > 1e-3 and list(folded.state_dict()) == names
        torch.testing.assert_close(folded(images, times, **inputs).sample, output, atol=1e-5, rtol=1e-5)


def test_adapted_layer_against_plain_matrices():
    """The forward pass, without PEFT: W x + b + (alpha / r) B A x; dropout acts in training only."""
    layer = apply(nn.Sequential(nn.Linear(5, 7)), AdapterConfig(rank=2, alpha=3, targets=["0"], dropout=0.5), None)
    shaken(layer)
    x, inner = torch.randn(4, 5), layer[0]
    a, b = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    expected = F.linear(x, inner.base_layer.weight, inner.base_layer.bias) + 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer.eval()(x), expected)
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_qq", "'to_qq' fits no layer of UNet2DModel .there are for example to_q, "),
        ("q", "'q' fits no layer"),  # whole parts of the name only
        ("norm1", "'norm1' is not a linear layer or convolution but GroupNorm"),
        ("mid_block", "'mid_block' is not a linear layer or convolution but UNetMidBlock2D"),
    ],
)
def test_targets_that_do_not_fit(target, message):
    with pytest.raises(UserError, match=f"model.adapter.targets: {message}"):
        adapted(targets=["to_v", target])


def test_patterns_that_do_not_fit():
    with pytest.raises(UserError, match=r"model.trainable: '\*Norm\*' fits no parameter .there are for example .*norm"):
        apply(unet(), None, ["*.bias", "*Norm*"])


BAD = {"rank": [0], "alpha": [0.0, math.inf, math.nan], "targets": [[]], "dropout": [1.0, -0.1]}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_bad_values_name_their_key(key, value):
    with pytest.raises(UserError, match=f"model.adapter.{key}"):
        AdapterConfig(**{key: value})
