"""Folders of Stable Diffusion 3: what is loaded and saved, and what is refused with nothing executed and nothing changed."""

import json
import shutil

import pytest
import torch

from defenses.errors import UserError
from tests.pipelines import STEM, change, plant, stable_diffusion, stable_diffusion_3
from tests.test_pipeline_refusals import marker, refused  # noqa: F401 (a fixture)
from tests.test_pipelines import equal_weights, shaken
from tests.test_sd3 import theirs
from train.adapters import AdapterConfig, apply
from train.pipelinefit import check_fit
from train.pipelines import describe, load, save, save_lora


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion_3(root / "t5")
    stable_diffusion_3(root / "clip", t5=False)
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the one with T5, to be spoilt."""
    return shutil.copytree(originals / "t5", tmp_path / "spoilt")


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_what_is_loaded_is_what_diffusers_loads_and_survives_saving(originals, tmp_path, name):
    parts, pipeline = load(originals / name), theirs(originals / name)
    encoders = ["text_encoder", "text_encoder_2", *(["text_encoder_3"] if name == "t5" else [])]
    assert list(parts.networks) == ["transformer", "vae", *encoders]
    assert all(equal_weights(module, getattr(pipeline, part)) for part, module in parts.networks.items())
    assert all(not module.training for module in parts.networks.values())
    save(tmp_path / "saved", parts)
    again = load(tmp_path / "saved")
    assert all(equal_weights(module, again.networks[part]) for part, module in parts.networks.items())
    assert dict(again.scheduler.config) == dict(parts.scheduler.config)
    texts = ["chest of a patient", "left lung"]
    assert [each(texts).input_ids for each in again.tokenizers] == [each(texts).input_ids for each in parts.tokenizers]
    assert theirs(tmp_path / "saved").transformer.config.sample_size == 8
    assert not any(str(originals) in path.read_text() for path in (tmp_path / "saved").rglob("*.json"))
    line = describe(parts)
    assert line.startswith("StableDiffusion3Pipeline: parameters transformer ") and line.endswith("predicts flow")
    assert "latents 16 x 8 x 8 of 16 px pictures" in line


def test_lora_weights_on_the_base_give_the_merged_pipeline(originals, tmp_path):
    """alpha is 2.5 times the rank, so a lost scale would show; B is not zero."""
    parts = load(originals / "t5")
    shaken(apply(parts.network, AdapterConfig(rank=2, alpha=5.0), None))
    for encoder in parts.text_encoders:
        encoder.requires_grad_(False)
    save(tmp_path / "merged", parts)
    assert save_lora(tmp_path / "lora", parts.network, parts.text_encoders)
    base, merged, plain = (theirs(path) for path in (originals / "t5", tmp_path / "merged", originals / "t5"))
    base.load_lora_weights(tmp_path / "lora")
    told = {"timestep": torch.tensor([3.0, 900.0]), "pooled_projections": torch.linspace(-1, 1, 32).view(2, 16)}
    told["encoder_hidden_states"] = torch.randn(2, 20, 40)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        found, expected, before = (each.transformer(x, **told).sample for each in (base, merged, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.05


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_3"])
def test_a_part_with_a_pickle_alone(folder, marker, part):  # noqa: F811
    stem = STEM if part == "transformer" else "model"
    (folder / part / f"{stem}.safetensors").unlink()
    plant(folder / part / f"{stem}.bin", marker)
    plant(folder / part / "pytorch_model.bin", marker)
    refused(folder, rf"{part} holds its weights as a pickle alone .*safe_serialization=True\)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer is diffusers.Flux.*not diffusers.SD3"),
        (
            {"transformer": ["my_module", "SD3Transformer2DModel"]},
            "my_module.SD3Transformer2DModel.*custom code is never",
        ),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "is diffusers.DDIMScheduler, not diffusers.FlowMatchEuler"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "not transformers.CLIPTextModelWithProjection"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2"),
        ({"text_encoder_3": [None, None]}, "has tokenizer_3 without text_encoder_3"),
        ({"tokenizer_3": [None, None]}, "has text_encoder_3 without tokenizer_3"),
        ({"tokenizer_3": ["transformers", "LlamaTokenizer"]}, "tokenizer_3 is transformers.LlamaTokenizer, not"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "has a further part unet"),
    ],
)
def test_indexes_that_are_refused(folder, changes, message):
    change(folder / "model_index.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "scheduler has use_dynamic_shifting True"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "only noise levels by a shift are known"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal 0.1"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "joint_attention_dim 48, the text 32 of CLIP and 40 of T5"),
        ("transformer/config.json", {"pooled_projection_dim": 8}, "pooled_projection_dim 8, pooled text has 16"),
        ("transformer/config.json", {"in_channels": 33}, "transformer takes 33 channels and returns 16, the latents"),
        ("transformer/config.json", {"num_layers": 3}, "weights of its transformer do not fit .*: mismatched"),
        ("text_encoder_3/config.json", {"num_layers": 1}, "weights of its text_encoder_3 do not fit .*: unexpected"),
        ("text_encoder_3/config.json", {"auto_map": {"AutoModel": "a.B"}}, "has auto_map .custom code is never run"),
        ("text_encoder_3/config.json", {"vocab_size": 7}, "tokenizer knows 13 tokens, its text encoder 7|do not fit"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(folder, file, changes, message):
    change(folder / file, **changes)
    refused(folder, message)


def test_the_tokenizer_of_t5_needs_its_json(folder):
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    refused(folder, "tokenizer_3 holds no tokenizer.json")


@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtSigmaPipeline", "DiTPipeline"])
def test_other_transformers_stay_refused(tmp_path, name):
    stable_diffusion(tmp_path / "other")
    change(tmp_path / "other" / "model_index.json", _class_name=name)
    refused(tmp_path / "other", f"is a {name}: a transformer of a kind that is not offered")


# as published, of 3 medium and 3.5 medium
LAYOUTS = {
    "3": {"pos_embed_max_size": 192, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "3.5": {"pos_embed_max_size": 384, "num_layers": 24, "num_attention_heads": 24, "qk_norm": "rms_norm"},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("t5", [True, False])
def test_published_layouts_fit(name, t5):
    shared = {"sample_size": 128, "in_channels": 16, "out_channels": 16, "patch_size": 2, "joint_attention_dim": 4096}
    configs = {
        "transformer": shared | {"pooled_projection_dim": 2048, "attention_head_dim": 64} | LAYOUTS[name],
        "vae": {"latent_channels": 16, "shift_factor": 0.0609, "scaling_factor": 1.5305},
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False, "shift_terminal": None},
        "text_encoder": {"hidden_size": 768, "projection_dim": 768, "num_attention_heads": 12},
        "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280, "num_attention_heads": 20},
        **({"text_encoder_3": {"d_model": 4096, "d_ff": 10240, "num_heads": 64}} if t5 else {}),
    }
    check_fit("sd3", dict.fromkeys(configs, "Any"), configs, name)
    configs["text_encoder_2"]["projection_dim"] = 1024
    with pytest.raises(UserError, match="pooled_projection_dim 2048, pooled text has 1792"):
        check_fit("sd3", dict.fromkeys(configs, "Any"), configs, name)


def test_the_index_may_leave_t5_out(originals, tmp_path):
    """As a person does who has no room for it: two entries set to null."""
    folder = shutil.copytree(originals / "t5", tmp_path / "light")
    change(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    parts = load(folder)
    assert len(parts.text_encoders) == 2 == len(parts.tokenizers)
    save(tmp_path / "saved", parts)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None] == index["tokenizer_3"]
