"""Networks: sizes, starting from a pretrained pipeline, and what is refused."""

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from defenses.errors import UserError
from tests.small import opened
from train import config as configuration
from train.diffusion import DiffusionConfig, noise_schedule
from train.models import SIZES, ModelConfig, build, check_schedule, parameter_count, save_pipeline
from train.stage import train_model


def saved(folder, *, image_size=16, channels=1, classes=0, prediction="v_prediction"):
    model = build(ModelConfig(), image_size, channels, classes)
    save_pipeline(folder, model, noise_schedule(DiffusionConfig(prediction=prediction)))
    return model


def test_base_has_the_layout_of_ddpm_cifar10():
    """google/ddpm-cifar10-32 has 35,746,307 parameters in 3 channels (its model card's weights)."""
    with torch.device("meta"):
        assert parameter_count(build(ModelConfig(size="base"), 32, 3, 0)) == 35_746_307


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("classes", [0, 5])
def test_shapes(size, classes):
    model = build(ModelConfig(size=size), 28 if size == "tiny" else 32, 1, classes)
    side = model.config.sample_size
    labels = torch.tensor([0, 4]) if classes else None
    out = model(torch.randn(2, 1, side, side), torch.tensor([3, 900]), class_labels=labels, return_dict=False)[0]
    assert out.shape == (2, 1, side, side)


def test_every_level_sees_the_time():
    """In a group of one channel the norm would remove what the time embedding adds: no size has such groups."""
    for widths, _, _ in SIZES.values():
        assert widths[0] // min(32, widths[0] // 4) >= 4
    model = build(ModelConfig(), 16, 1, 0)
    model(torch.randn(2, 1, 16, 16), torch.tensor([1, 999]), return_dict=False)[0].square().sum().backward()
    first = dict(model.named_parameters())["down_blocks.0.resnets.0.time_emb_proj.weight"]
    assert first.grad.abs().max() > 1e-4


@pytest.mark.parametrize(("size", "image_size", "near"), [("tiny", 30, 32), ("base", 28, 32), ("large", 100, 96)])
def test_sizes_that_do_not_fit_name_one_that_does(size, image_size, near):
    with pytest.raises(UserError, match=f"data.image_size.*take {near}"):
        build(ModelConfig(size=size), image_size, 1, 0)


def test_pretrained_weights_and_the_new_size(tmp_path):
    """Weights come from the folder; the saved pipeline draws pictures of the data's size, not of the old one."""
    theirs = saved(tmp_path / "old", image_size=16)
    ours = build(ModelConfig(pretrained=str(tmp_path / "old"), dropout=0.25), 32, 1, 0)
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight) and ours.config.sample_size == 32
    assert {layer.p for layer in ours.modules() if isinstance(layer, torch.nn.Dropout)} == {0.25}
    save_pipeline(tmp_path / "new", ours, noise_schedule(DiffusionConfig()))
    assert UNet2DModel.from_pretrained(tmp_path / "new", subfolder="unet").config.sample_size == 32


def test_training_starts_from_the_pretrained_weights(tmp_path):
    theirs = saved(tmp_path / "old")
    arguments = opened(
        tmp_path,
        f"model.pretrained={tmp_path / 'old'}",
        "train.steps=1",
        "train.learning_rate=1e-9",
        "train.ema_decay=0",
    )
    train_model(*arguments)
    trained = load_file(arguments[2].model / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(trained["conv_in.weight"], theirs.conv_in.weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "classes"), [(3, 0), (1, 4)])
def test_pretrained_that_does_not_fit_the_data(tmp_path, channels, classes):
    saved(tmp_path / "old")
    with pytest.raises(UserError, match="model.pretrained: has 1 channels and 0 classes"):
        build(ModelConfig(pretrained=str(tmp_path / "old")), 16, channels, classes)


def test_pretrained_with_another_objective_is_refused(tmp_path):
    saved(tmp_path / "old", prediction="epsilon")
    config = ModelConfig(pretrained=str(tmp_path / "old"))
    with pytest.raises(UserError, match="train.diffusion.prediction.*set it to epsilon"):
        check_schedule(config, noise_schedule(DiffusionConfig()))
    check_schedule(config, noise_schedule(DiffusionConfig(prediction="epsilon")))


@pytest.mark.parametrize("content", [{}, {"unet": True}])
def test_pretrained_folder_without_a_model(tmp_path, content):
    if content:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model.pretrained"):
        build(ModelConfig(pretrained=str(tmp_path)), 16, 1, 0)


def configured(*overrides: str) -> ModelConfig:
    return configuration.objects(configuration.load({"model": ModelConfig}, None, overrides)).model


def test_adapter_and_patterns_from_the_command_line():
    assert configured().adapter is None and configured().trainable is None
    config = configured("model.pretrained=x", "model.adapter={}", "model.trainable=['*norm*']")
    assert config.adapter.targets == ["to_q", "to_k", "to_v", "to_out.0"] and config.trainable == ["*norm*"]
    config = configured("model.pretrained=x", "model.adapter.rank=4", "model.adapter.targets=[conv1]")
    assert (config.adapter.rank, config.adapter.targets) == (4, ["conv1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.adapter={}"], "model.adapter: would adapt random weights .give model.pretrained"),
        (["model.trainable=[]"], "model.trainable: trains no parameter"),
        (["model.pretrained=x", "model.adapter.rank=0"], "model.adapter.rank: 0 is less than 1"),
        (["model.pretrained=x", "model.adapter.ranks=4"], "model.adapter.ranks"),
    ],
)
def test_adapters_that_cannot_be(overrides, message):
    with pytest.raises(UserError, match=message):
        configured(*overrides)


def test_patterns_freeze_the_rest():
    model = build(ModelConfig(trainable=["*norm*"]), 16, 1, 0)
    assert parameter_count(model, trainable=True) == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)


def test_training_an_adapter_on_pretrained_weights(tmp_path):
    """Two configs: the released pipeline is the old one but for the adapted layers, and starts the next run."""
    theirs = saved(tmp_path / "old").state_dict()
    arguments = opened(
        tmp_path, f"model.pretrained={tmp_path / 'old'}", "model.adapter.rank=2", "train.steps=3", "train.ema_decay=0"
    )
    facts = train_model(*arguments)
    assert facts["trainable_parameters"] == 4 * 2 * 2 * 64  # the attention in the middle: 4 layers of 64 x 64
    trained = build(ModelConfig(pretrained=str(arguments[2].model)), 16, 1, 0).state_dict()
    changed = {name for name in theirs if not torch.equal(trained[name], theirs[name])}
    assert changed == {f"mid_block.attentions.0.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert (arguments[2].model / "adapter" / "adapter_model.safetensors").is_file()
