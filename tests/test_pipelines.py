"""Text-to-image pipelines: what is loaded, what is saved, and LoRA as diffusers itself reads it."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from tests.pipelines import WIDTH, change, stable_diffusion, stable_diffusion_xl
from train.adapters import AdapterConfig, apply
from train.pipelines import describe, frozen_digest, load, save, save_lora

TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines of every kind, saved by diffusers itself; never changed."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion(root / "sd")
    stable_diffusion(root / "v", prediction="v_prediction")
    stable_diffusion_xl(root / "sdxl")
    return root


def condition(kind: str, text: torch.Tensor) -> dict:
    if kind == "sd":
        return {"encoder_hidden_states": text}
    added = {
        "text_embeds": torch.linspace(-1, 1, 16).view(2, 8),
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2),
    }
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


@torch.no_grad()
def call(kind: str, unet: nn.Module) -> torch.Tensor:
    """Output of a unet for two fixed latents and texts."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 16, WIDTH * (2 if kind == "sdxl" else 1), generator=generator)
    return unet.eval()(latents, torch.tensor([3, 900]), return_dict=False, **condition(kind, text))[0]


@torch.no_grad()
def read(encoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What either kind of pipeline takes from a text encoder: all hidden states, and the pooled one."""
    output = encoder.eval()(ids, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2].flatten(), output[0].flatten()])


def ids(parts) -> torch.Tensor:
    texts = ["chest of a patient", "left lung clear"]
    return parts.tokenizers[0](texts, padding="max_length", return_tensors="pt").input_ids


def shaken(module: nn.Module) -> nn.Module:
    """Every adapter weight replaced: B starts at zero, where a test would see nothing."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return module


def equal_weights(module: nn.Module, other: nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "kind", "prediction"), [("sd", "sd", "epsilon"), ("v", "sd", "v_prediction"), ("sdxl", "sdxl", "epsilon")]
)
def test_loaded_parts_are_those_that_diffusers_loads(folders, name, kind, prediction):
    parts, theirs = load(folders / name), DiffusionPipeline.from_pretrained(folders / name)
    assert parts.kind == kind and parts.source == str(folders / name)
    assert equal_weights(parts.network, theirs.unet) and equal_weights(parts.vae, theirs.vae)
    assert [type(encoder) for encoder in parts.text_encoders] == [type(theirs.text_encoder)] + (
        [type(theirs.text_encoder_2)] if kind == "sdxl" else []
    )
    assert equal_weights(parts.text_encoders[0], theirs.text_encoder)
    if kind == "sdxl":
        assert torch.equal(read(parts.text_encoders[1], ids(parts)), read(theirs.text_encoder_2, ids(parts)))
    assert type(parts.scheduler) is type(theirs.scheduler) and parts.scheduler.config.prediction_type == prediction
    assert all(not module.training for module in parts.networks.values())
    assert {p.dtype for module in parts.networks.values() for p in module.parameters()} == {torch.float32}
    assert parts.latent_shape == (4, 8, 8) and parts.image_size == 16  # two blocks of the autoencoder: one halving


@pytest.mark.parametrize("name", ["sd", "v", "sdxl"])
def test_round_trip_keeps_every_weight(folders, tmp_path, name):
    parts = load(folders / name)
    save(tmp_path / "saved", parts)
    again = load(tmp_path / "saved")
    assert all(equal_weights(module, again.networks[part]) for part, module in parts.networks.items())
    assert dict(again.scheduler.config) == dict(parts.scheduler.config)
    assert torch.equal(ids(again), ids(parts))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index.get("safety_checker", [None, None]) == [None, None]
    assert index.get("requires_safety_checker", False) is False
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert not any(str(folders) in path.read_text() for path in (tmp_path / "saved").rglob("*.json"))


def test_settings_of_xl_survive(folders, tmp_path):
    folder = shutil.copytree(folders / "sdxl", tmp_path / "xl")
    change(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    save(tmp_path / "saved", load(folder))
    assert DiffusionPipeline.from_pretrained(tmp_path / "saved").config.force_zeros_for_empty_prompt is False
    assert load(folders / "sdxl").force_zeros_for_empty_prompt is True


def test_names_of_files_are_those_of_published_pipelines(folders, tmp_path):
    """Stable Diffusion 1.5 as published: weights under text_model., tokenizer as vocab.json and merges.txt."""
    save(tmp_path / "saved", load(folders / "sd"))
    names = load_file(tmp_path / "saved" / "text_encoder" / "model.safetensors")
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    (tmp_path / "saved" / "tokenizer" / "tokenizer.json").unlink()
    again = load(tmp_path / "saved")
    assert torch.equal(ids(again), ids(load(folders / "sd")))
    assert equal_weights(again.text_encoders[0], load(folders / "sd").text_encoders[0])


def test_older_names_of_weights_are_read(folders, tmp_path):
    """As in the published Stable Diffusion 1.5: attention of the autoencoder, places of the text encoder as a buffer."""
    folder = shutil.copytree(folders / "sd", tmp_path / "old")
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert any("to_out.0." in name for name in weights)
    for new, old in older.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    text = load_file(folder / "text_encoder" / "model.safetensors") | {
        "embeddings.position_ids": torch.arange(16)[None]
    }
    text = {f"text_model.{name}": tensor for name, tensor in text.items()}
    save_file(text, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    parts, expected = load(folder), load(folders / "sd")
    assert all(equal_weights(module, expected.networks[part]) for part, module in parts.networks.items())


def test_half_precision_variants_are_read_in_float32(folders, tmp_path):
    StableDiffusionPipeline.from_pretrained(folders / "sd").to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    parts, exact = load(tmp_path / "half"), load(folders / "sd")
    for part, module in parts.networks.items():
        for ours, theirs in zip(module.parameters(), exact.networks[part].parameters(), strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs.half().float())


def test_sharded_weights_are_read(folders, tmp_path):
    folder = shutil.copytree(folders / "sd", tmp_path / "shards")
    for part in ("unet", "text_encoder"):
        shutil.rmtree(folder / part)
        getattr(StableDiffusionPipeline.from_pretrained(folders / "sd"), part).save_pretrained(
            folder / part, max_shard_size="20KB"
        )
        assert len(list((folder / part).glob("*.safetensors"))) > 1
    parts, whole = load(folder), load(folders / "sd")
    assert equal_weights(parts.network, whole.network) and equal_weights(parts.text_encoders[0], whole.text_encoders[0])


def adapted(folder, rank: int = 2, alpha: float = 5.0, parts=("unet", "text")):
    """Loaded parts with shaken adapters, the rest frozen as in training."""
    found = load(folder)
    found.vae.requires_grad_(False)
    unet = AdapterConfig(rank=rank, alpha=alpha, targets=["to_q", "to_v", "to_out.0", "conv1", "time_emb_proj"])
    text = AdapterConfig(rank=rank, alpha=alpha + 1, targets=TEXT_TARGETS)
    shaken(apply(found.network, unet, None)) if "unet" in parts else found.network.requires_grad_(False)
    for encoder in found.text_encoders:
        shaken(apply(encoder, text, None)) if "text" in parts else encoder.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_saved_pipeline_is_merged(folders, tmp_path, kind):
    base, parts = load(folders / kind), adapted(folders / kind)
    save(tmp_path, parts)
    theirs = DiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(call(kind, theirs.unet), call(kind, parts.network), atol=1e-5, rtol=1e-5)
    assert (call(kind, theirs.unet) - call(kind, base.network)).abs().max() > 0.05
    encoders = [theirs.text_encoder] + ([theirs.text_encoder_2] if kind == "sdxl" else [])
    for ours, saved, start in zip(parts.text_encoders, encoders, base.text_encoders, strict=True):
        torch.testing.assert_close(read(saved, ids(parts)), read(ours, ids(parts)), atol=1e-5, rtol=1e-5)
        assert (read(saved, ids(parts)) - read(start, ids(parts))).abs().max() > 0.05


def test_a_released_pipeline_can_be_trained_again(folders, tmp_path):
    """Its files have the published names, which are other ones than those in memory."""
    save(tmp_path / "first", adapted(folders / "sd"))
    parts = adapted(tmp_path / "first")
    save(tmp_path / "second", parts)
    assert save_lora(tmp_path / "lora", parts.network, parts.text_encoders)
    base = DiffusionPipeline.from_pretrained(tmp_path / "first")
    base.load_lora_weights(tmp_path / "lora")
    again = load(tmp_path / "second")
    torch.testing.assert_close(call("sd", base.unet), call("sd", again.network), atol=1e-5, rtol=1e-5)
    ours, theirs = (read(encoder, ids(parts)) for encoder in (again.text_encoders[0], base.text_encoder))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    names = load_file(tmp_path / "second" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names) and len(names) == len(
        again.text_encoders[0].state_dict()
    )


@pytest.mark.slow
def test_the_saved_pipeline_needs_no_peft(folders, tmp_path):
    save(tmp_path, adapted(folders / "sdxl"))
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(type(pipeline).__name__, pipeline('a', height=16, width=16, num_inference_steps=1).images[0].size)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "StableDiffusionXLPipeline (16, 16)", done.stderr


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("which", [("unet",), ("text",), ("unet", "text")], ids="+".join)
def test_lora_weights_on_the_base_give_the_merged_pipeline(folders, tmp_path, kind, which):
    """Read by diffusers; alpha is 2.5 and 3 times the rank, so a lost scale would show."""
    parts = adapted(folders / kind, parts=which)
    save(tmp_path / "merged", parts)
    assert save_lora(tmp_path / "lora", parts.network, parts.text_encoders)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    base, expected = (DiffusionPipeline.from_pretrained(path) for path in (folders / kind, tmp_path / "merged"))
    base.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(call(kind, base.unet), call(kind, expected.unet), atol=1e-5, rtol=1e-5)
    for part in ("text_encoder", "text_encoder_2")[: len(parts.text_encoders)]:
        ours, theirs = (read(getattr(pipeline, part), ids(parts)) for pipeline in (base, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_lora_file_against_plain_matrices(folders, tmp_path):
    """W + B A of the file is the merged weight, in the names that any reader knows."""
    base, parts = load(folders / "sd"), adapted(folders / "sd")
    assert save_lora(tmp_path / "lora", parts.network, parts.text_encoders)
    save(tmp_path / "merged", parts)
    merged, found = load(tmp_path / "merged"), load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    layers = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": (base.network, merged.network),
        "text_encoder.text_model.encoder.layers.1.mlp.fc1": (base.text_encoders[0], merged.text_encoders[0]),
    }
    for name, (before, after) in layers.items():
        inside = name.split(".", 1)[1].removeprefix("text_model.")
        difference = after.get_submodule(inside).weight - before.get_submodule(inside).weight
        product = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, difference, atol=1e-6, rtol=1e-4)
        assert difference.abs().max() > 0.05


def test_half_a_model_is_not_saved_as_lora(folders, tmp_path):
    plain = load(folders / "sd")
    plain.text_encoders[0].requires_grad_(False)
    assert not save_lora(tmp_path / "lora", plain.network, plain.text_encoders)  # trained in full
    beside = adapted(folders / "sd", parts=("unet",))
    beside.text_encoders[0].requires_grad_(True)
    assert not save_lora(tmp_path / "lora", beside.network, beside.text_encoders)  # text encoder trained in full
    more = adapted(folders / "sd", parts=("unet",))
    more.network.conv_norm_out.bias.requires_grad_(True)
    assert not save_lora(tmp_path / "lora", more.network, more.text_encoders)
    assert not (tmp_path / "lora").exists()


def test_saving_changes_nothing_in_memory(folders, tmp_path):
    parts = adapted(folders / "sdxl")
    before = {part: copy.deepcopy(module.state_dict()) for part, module in parts.networks.items()}
    save(tmp_path / "merged", parts)
    save_lora(tmp_path / "lora", parts.network, parts.text_encoders)
    for part, module in parts.networks.items():
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in module.state_dict().items())
        assert module.state_dict().keys() == before[part].keys()


def test_digest_sees_what_is_frozen_alone(folders):
    parts = adapted(folders / "sd", parts=("unet",))
    modules = [parts.network, *parts.text_encoders]
    start = frozen_digest(modules)
    shaken(parts.network)
    assert frozen_digest(modules) == start  # the adapter is trained
    for tensor in (
        parts.network.conv_in.weight,
        dict(parts.text_encoders[0].named_buffers())["embeddings.position_ids"],
    ):
        kept = tensor.detach().clone()
        tensor.data.view(-1)[0] += 1
        assert frozen_digest(modules) != start
        tensor.data.copy_(kept)
        assert frozen_digest(modules) == start
    assert frozen_digest(modules[::-1]) != start
    assert frozen_digest([parts.network.to(memory_format=torch.channels_last), *parts.text_encoders]) == start


def test_digest_by_hand():
    layer = nn.Linear(2, 1, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False).copy_(torch.tensor([[1.0, -2.0]]))
    # bfloat16 is the upper half of float32, little-endian: 1 is 0x3f80, -2 is 0xc000
    expected = hashlib.sha256(b"0 weight torch.bfloat16 (1, 2)\n" + bytes.fromhex("803f00c0"))
    assert frozen_digest([layer]) == expected.hexdigest()


def test_description(folders):
    parts = load(folders / "v")
    line = describe(parts)
    unet = sum(p.numel() for p in parts.network.parameters()) / 1e6
    assert line.startswith(f"StableDiffusionPipeline: parameters unet {unet:.1f} M, vae ")
    assert line.endswith("latents 4 x 8 x 8 of 16 px pictures; predicts v_prediction") and "\n" not in line
    assert "text_encoder_2" in describe(load(folders / "sdxl"))
