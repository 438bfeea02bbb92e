"""Pipelines that are refused: one clear line, nothing executed, nothing changed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from defenses.errors import UserError
from tests.pipelines import STEM, change, contents, plant, stable_diffusion, stable_diffusion_xl
from train import models
from train.pipelinefit import check_fit
from train.pipelines import load


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion(root / "sd")
    stable_diffusion_xl(root / "sdxl")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the small Stable Diffusion, to be spoilt."""
    return shutil.copytree(originals / "sd", tmp_path / "spoilt")


@pytest.fixture
def marker(tmp_path):
    """What planted code would create; nothing may."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def refused(folder: Path, message: str, key: str = "model.pretrained") -> None:
    """The folder is refused by one line that names key, folder and problem, and stays as it was."""
    before = contents(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{key}: {folder}: ") and "\n" not in str(caught.value)
    assert contents(folder) == before


def module(marker: Path) -> str:
    return f"import os\nos.mkdir({str(marker)!r})\nclass UNet2DConditionModel: pass\n"


def test_the_planted_payload_works(tmp_path):
    plant(tmp_path / "a.bin", tmp_path / "made")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth", "pkl"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_with_a_pickle_alone(folder, marker, part, suffix):
    stem = "model" if part == "text_encoder" else STEM
    (folder / part / f"{stem}.safetensors").unlink()
    plant(folder / part / f"pytorch_model.{suffix}", marker)
    plant(folder / part / f"{stem}.{suffix}", marker)
    refused(folder, rf"{part} holds its weights as a pickle alone .*save_pretrained\(NEW, safe_serialization=True\)")


def test_pickles_beside_safetensors_are_never_opened(folder, originals, marker):
    for path in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("pytorch_model.bin", f"{STEM}.bin", f"{STEM}.fp16.bin", "model.ckpt", "training_args.bin"):
            plant(path / name, marker)
    expected = load_file(originals / "sd" / "unet" / f"{STEM}.safetensors")
    loaded = load(folder).network.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["shard.bin", "../../outside.safetensors", None])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_that_leads_elsewhere(folder, marker, part, name):
    stem = "model" if part == "text_encoder" else STEM
    (folder / part / f"{stem}.safetensors").unlink()
    plant(folder / part / "shard.bin", marker)
    plant(folder.parent / "outside.safetensors", marker)
    index = {"metadata": {"total_size": 4}, "weight_map": {"conv_in.weight": name}}
    (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, f"{part}/{stem}.safetensors.index.json names files other than safetensors beside it")


def test_a_pickle_under_the_name_of_safetensors(folder, marker):
    plant(folder / "unet" / f"{STEM}.safetensors", marker)
    refused(folder, f"unet/{STEM}.safetensors is damaged or missing: ")


def test_an_adapter_beside_the_text_encoder(folder, marker):
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(settings))
    plant(folder / "text_encoder" / "adapter_model.bin", marker)
    refused(folder, "text_encoder holds a PEFT adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["my_module", "UNet2DConditionModel"]}, "unet is my_module.UNet2DConditionModel, .*custom code is never"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is diffusers.UNet2DModel, not diffusers.UNet2DConditionModel"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is transformers.T5EncoderModel, not"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "scheduler is diffusers.FlowMatch"),
        ({"scheduler": ["my_module", "DDIMScheduler"]}, "scheduler is my_module.DDIMScheduler"),
        ({"further": ["my_module", "Thing"]}, "has a further part further"),
        ({"vae": [None, None]}, "has no vae"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"_class_name": None}, "names no class"),
        ({"_class_name": ["my_module", "MyPipeline"]}, "names no class of diffusers .custom code is never run"),
        ({"_class_name": "MyPipeline"}, "is a MyPipeline .known are StableDiffusionPipeline, StableDiffusionXLPipeline"),
        ({"_class_name": "GANPipeline"}, "a GAN, .*model.family=gan"),
        ({"_class_name": "DDIMPipeline"}, "a pixel-space pipeline, .*model.family=pixel"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "for inpainting .give the text-to-image pipeline"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "for image-to-image .give the text-to-image pipeline"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "has no transformer"),
        ({"_class_name": "FluxInpaintPipeline"}, "a transformer of a kind that is not offered"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "has no tokenizer_2"),
    ],
)  # fmt: skip
def test_indexes_that_are_refused(folder, marker, changes, message):
    for path in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (path / "my_module.py").write_text(module(marker))
    change(folder / "model_index.json", **changes)
    refused(folder, message)


CONFIGS = [
    ("unet", {"in_channels": 9}, "takes 9 channels and returns 4, the latents have 4 .inpainting"),
    ("unet", {"cross_attention_dim": 24}, r"cross_attention_dim 24, the text 16 "),
    ("unet", {"cross_attention_dim": [16, 24]}, r"cross_attention_dim \[16, 24\], the text 16 "),
    ("unet", {"sample_size": [8, 16]}, r"sample_size \[8, 16\] .only square"),
    ("unet", {"sample_size": None}, "sample_size None"),
    ("unet", {"sample_size": "8"}, "sample_size 8 "),
    ("unet", {"num_class_embeds": 1000}, "more than noisy latents, time and text .num_class_embeds 1000"),
    ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
    ("unet", {"_class_name": "UNet2DModel"}, "unet is UNet2DModel by its own configuration"),
    ("unet", {"auto_map": {"AutoModel": "my_module.X"}}, "unet has auto_map .custom code is never run"),
    ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "unet has quantization_config"),
    ("unet", {"block_out_channels": [8, 24]}, "weights of its unet do not fit its configuration: mismatched"),
    ("unet", {"layers_per_block": 2}, "weights of its unet do not fit its configuration: m"),
    ("vae", {"latent_channels": 8}, "the latents have 8"),
    ("vae", {"layers_per_block": 2}, "weights of its vae do not fit its configuration: missing"),
    ("text_encoder", {"hidden_size": 32}, "cross_attention_dim 16, the text 32"),
    ("text_encoder", {"hidden_size": "wide"}, "configuration cannot be read"),
    ("text_encoder", {"num_hidden_layers": 1}, "weights of its text_encoder do not fit its configuration: unexpected"),
    ("text_encoder", {"num_hidden_layers": 3}, "weights of its text_encoder do not fit its configuration: missing"),
    ("text_encoder", {"intermediate_size": 48}, "weights of its text_encoder do not fit its configuration: mismatched"),
    ("text_encoder", {"architectures": ["T5EncoderModel"]}, r"text_encoder is \['T5EncoderModel'\] by its own"),
    ("text_encoder", {"auto_map": {"AutoModel": "my_module.X"}}, "text_encoder has auto_map"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "changes", "message"), CONFIGS)
def test_configurations_that_do_not_fit(folder, marker, part, changes, message):
    (folder / part / "my_module.py").write_text(module(marker))
    change(folder / part / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("changes", [{"prediction_type": "sample"}, {"prediction_type": "flow_prediction"}])
def test_predictions_that_are_not_offered(folder, changes):
    change(folder / "scheduler" / "scheduler_config.json", **changes)
    refused(folder, f"prediction_type {changes['prediction_type']} .known are epsilon, v_prediction")


def test_schedules_that_are_not_known(folder):
    change(folder / "scheduler" / "scheduler_config.json", beta_schedule="spiral")
    refused(folder, "cannot be loaded: spiral")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model_index.json", "model_index.json is missing"),
        ("unet", "unet/config.json is missing"),
        ("unet/config.json", "unet/config.json is missing"),
        (f"unet/{STEM}.safetensors", f"unet holds no {STEM}.safetensors"),
        ("scheduler", "scheduler/scheduler_config.json is missing"),
        ("tokenizer", "tokenizer holds neither tokenizer.json nor"),
        ("tokenizer/tokenizer.json", "tokenizer holds neither tokenizer.json nor"),
    ],
)
def test_missing_files(folder, path, message):
    shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x80"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_files_that_are_not_json(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    refused(folder, f"{name} is not")


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_damaged_weights(folder, keep):
    file = folder / "vae" / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, f"vae/{STEM}.safetensors is damaged or missing: .* .copy it again")


def test_weights_of_another_network(folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    refused(folder, "weights of its unet do not fit its configuration: missing conv_in.bias")


def test_several_variants(folder):
    (folder / "unet" / f"{STEM}.safetensors").rename(folder / "unet" / f"{STEM}.ema.safetensors")
    load(folder)
    shutil.copy(folder / "unet" / f"{STEM}.ema.safetensors", folder / "unet" / f"{STEM}.old.safetensors")
    refused(folder, "unet has weights of the variants ema, old .keep one of them")


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}'])
def test_a_broken_tokenizer_is_named(folder, text):
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    refused(folder, "its tokenizer cannot be read: ")


def test_a_text_to_image_pipeline_for_a_model_of_pixels_is_told_its_family(folder):
    with pytest.raises(UserError, match="is a text-to-image pipeline .set model.family=latent.") as caught:
        models.build(models.ModelConfig(pretrained=str(folder)), 16, 3, 0)
    assert caught.value.key == "model.pretrained"


def test_a_tokenizer_that_does_not_fit(folder, originals):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    refused(folder, "tokenizer makes 77 tokens, its text encoder takes 16")
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=16, extra_special_tokens=["<zebra>"])
    refused(folder, "tokenizer knows 64 tokens, its text encoder 63")


def test_xl_parts_that_do_not_fit(originals, tmp_path):
    folder = shutil.copytree(originals / "sdxl", tmp_path / "xl")
    change(folder / "text_encoder_2" / "config.json", projection_dim=12)
    refused(folder, "projection_class_embeddings_input_dim 32, pooled text and sizes have 36")
    change(folder / "text_encoder_2" / "config.json", projection_dim=8)
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=12)
    refused(folder, r"texts of \[12, 16\] tokens")


# as published: width of each text encoder, size of the pooled one, of the latents, and of the unet's inputs
PUBLISHED = {
    "1.5": ("sd", [768], None, {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 4, "out_channels": 4}),
    "2.1": ("sd", [1024], None, {"sample_size": 96, "cross_attention_dim": 1024, "num_class_embeds": None}),
    "XL": (
        "sdxl", [768, 1280], 1280,
        {"sample_size": 128, "cross_attention_dim": 2048, "addition_embed_type": "text_time",
         "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "time_cond_proj_dim": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_fit(name):
    kind, widths, pooled, unet = PUBLISHED[name]
    text = [{"hidden_size": width, "num_attention_heads": width // 64} for width in widths]
    if pooled:
        text[1]["projection_dim"] = pooled
    encoders = dict(zip(("text_encoder", "text_encoder_2"), text, strict=False))
    configs = {"unet": unet, "vae": {"latent_channels": 4}, "scheduler": {}, **encoders}
    check_fit(kind, dict.fromkeys(configs, "Any"), configs, name)
    configs["text_encoder"]["hidden_size"] += 64
    configs["text_encoder"]["num_attention_heads"] += 1
    with pytest.raises(UserError, match="cross_attention_dim"):
        check_fit(kind, dict.fromkeys(configs, "Any"), configs, name)
