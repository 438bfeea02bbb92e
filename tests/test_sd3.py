"""Stable Diffusion 3: training, sampling and saving on tiny pipelines of its layout, with T5 and without."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from tests.pipelines import stable_diffusion, stable_diffusion_3
from tests.small import opened
from tests.test_latent import moved
from train.latent import LatentModel
from train.pipelines import load
from train.sampling import SamplerConfig
from train.stage import build_trainer, train_model
from train.textobjective import TextObjective
from train.textsampling import sample, start_noise

FLOW = [
    "model.family=latent",
    "data.channels=3",
    "data.caption_key=caption",
    "train.diffusion.prediction=flow",
    "train.diffusion.noise_schedule=null",
    "train.diffusion.snr_gamma=null",
    "generate.sampler=euler",
    "generate.max_prompts=2",
    "generate.per_prompt=4",
    "generate.control_prompts=0",
]
FROZEN = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion_3(root / "t5")
    stable_diffusion_3(root / "clip", t5=False)
    return {"t5": root / "t5", "clip": root / "clip"}


def theirs(folder: Path) -> DiffusionPipeline:
    """The pipeline as diffusers loads it; it wants to hear that there is no T5."""
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(folder: Path, base: Path, *overrides: str):
    arguments = opened(folder, *FLOW, f"model.pretrained={base}", *overrides)
    config, dataset, directory, defenses, accelerator = arguments
    facts = train_model(config, dataset, directory, defenses, accelerator)
    return facts, directory, arguments


def noise_of(prompts, seed: int = 3) -> torch.Tensor:
    return torch.stack([start_noise(seed, prompt, i, (16, 8, 8)) for i, prompt in enumerate(prompts)])


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_captions_are_read_as_the_pipeline_reads_them(folders, name):
    captions = ["a chest x ray", "left lung clear of " * 9, ""]  # the second is cut off by CLIP
    conditioner = LatentModel(load(folders[name])).conditioner
    found, pipeline = conditioner.encode(captions), theirs(folders[name])
    text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    assert found.text.shape == (3, 16 + 256, 40)
    assert torch.allclose(found.text, text, atol=1e-5) and torch.allclose(found.pooled, pooled, atol=1e-5)
    assert bool(found.text[:, 16:].any()) == (name == "t5")
    assert (found.text[0] - found.text[1]).abs().max() > 0.1
    assert torch.allclose(conditioner.empty().text[0], found.text[2], atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_our_sampler_equals_the_pipeline(folders, name, guidance):
    prompts = ["a chest", "left lung", "a chest"]
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "np"}
    expected = theirs(folders[name])(prompts, latents=noise_of(prompts), **options).images.transpose(0, 3, 1, 2)
    config = SamplerConfig(sampler="euler", steps=5, guidance_scale=guidance)
    ours = sample(LatentModel(load(folders[name])), config, range(3), (3, 16, 16), seed=3, prompts=prompts)
    assert np.abs(expected - ours.numpy()).max() < 1e-5
    assert np.abs(expected[0] - expected[2]).max() > 1e-2 < np.abs(expected[0] - expected[1]).max()


def objective_of(folder: Path, **options) -> TextObjective:
    from train.diffusion import DiffusionConfig, noise_schedule

    config = DiffusionConfig(prediction="flow", noise_schedule=None, snr_gamma=None)
    settings = {"caption_dropout": 0.0, "precision": "fp32"} | options
    return TextObjective(LatentModel(load(folder)), config, noise_schedule(config), **settings)


def batch_of(count: int = 3, **fields) -> Batch:
    random = RecordRandom(0, 0, range(count), [0] * count)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(images, np.arange(count), None, random, captions=["a chest", "left lung", "x ray"][:count], **fields)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_loss_against_diffusers_by_hand(folders, name):
    """As diffusers' example for Stable Diffusion 3 computes it, without its preconditioning."""
    objective = objective_of(folders[name], wants=["text_magnitude"])
    batch, pipeline = objective.draw(batch_of()), theirs(folders[name])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.no_grad():
        distribution = pipeline.vae.encode(batch_of().images).latent_dist
        latents = distribution.mean + distribution.std * batch_of().random.normal("latent", 16, 8, 8)
        latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        assert torch.allclose(batch.latents, latents, atol=1e-5)
        places = 999 - batch.timesteps  # their table begins with noise
        timesteps, sigmas = scheduler.timesteps[places], scheduler.sigmas[places][:, None, None, None]
        noisy = (1.0 - sigmas) * latents + sigmas * batch.noise
        outputs = []
        for captions in (batch.captions, [""] * 3):
            text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
            told = {"timestep": timesteps, "encoder_hidden_states": text, "pooled_projections": pooled}
            outputs.append(pipeline.transformer(hidden_states=noisy, **told).sample)
        expected = (outputs[0] - (batch.noise - latents)).square().mean(dim=(1, 2, 3))
        assert torch.allclose(objective.loss(objective.model, batch), expected, rtol=1e-4)
    predicted = [noisy + (1 - sigmas) * output for output in outputs]
    magnitude = (predicted[0] - predicted[1]).square().sum(dim=(1, 2, 3)).sqrt()
    assert torch.allclose(batch.told["text_magnitude"], magnitude, rtol=1e-2) and (magnitude > 0).all()


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_full_training_moves_the_network_and_nothing_else(folders, tmp_path, name):
    facts, directory, _ = run(tmp_path, folders[name])
    assert facts["steps"] == 7
    assert len(moved(folders[name], directory.model, "transformer")) > 40
    for part in FROZEN if name == "t5" else FROZEN[:-1]:
        assert not moved(folders[name], directory.model, part)
    assert theirs(directory.model)("a chest", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_clip_can_be_trained_too_and_t5_never_is(folders, tmp_path, name):
    options = ["model.train_text_encoder=true", "defenses.captions={noise_probability: 0.5}", "train.steps=3"]
    _, directory, _ = run(tmp_path, folders[name], *options, "train.gradient_checkpointing=true")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        changed = moved(folders[name], directory.model, part)
        assert len(changed) > 30 and (part == "transformer" or "text_projection.weight" in changed)
    for part in ("vae", *(["text_encoder_3"] if name == "t5" else [])):
        assert not moved(folders[name], directory.model, part)


@pytest.mark.parametrize("text", [True, False])
def test_every_trained_parameter_has_a_part_in_the_loss(folders, text):
    """Which several processes need: a gradient that never comes would stop them."""
    from train.latent import build
    from train.models import ModelConfig

    settings = ModelConfig(family="latent", pretrained=str(folders["t5"]), train_text_encoder=text)
    objective = objective_of(folders["t5"])
    objective.model = model = build(settings, 16, 3, 0, None)
    objective.loss(model, objective.draw(batch_of())).sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"transformer", *(["text_encoders"] if text else [])}
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in trained.values())
    assert all(value.grad is None for module in model.beside for value in module.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_option_at_once(folders, tmp_path, precision):
    options = [
        "train.gradient_checkpointing=true", f"train.precision={precision}", "train.ema_decay=0.5", "train.accumulation=2",
        "train.caption_dropout=0.5", "train.diffusion.flow.weighting=cosmap", "model.trainable=['*attn*']",
        "defenses.captions={noise_probability: 0.5}", "defenses.text_filter={threshold: 100.0}",
        "defenses.anti_gradient={}",
    ]  # fmt: skip
    _, directory, _ = run(tmp_path, folders["t5"], *options)
    changed = moved(folders["t5"], directory.model, "transformer")
    assert changed and all("attn" in name for name in changed)


def test_gradient_checkpointing_changes_no_weight(folders, tmp_path):
    saved = []
    for name in ("true", "false"):
        options = ["train.steps=3", "train.heldout_every=0", f"train.gradient_checkpointing={name}"]
        _, directory, _ = run(tmp_path / name, folders["clip"], *options)
        saved.append(load_file(directory.checkpoints / "step-3" / "model.safetensors"))
    assert all(name.startswith("transformer.") for name in saved[0])
    assert all(torch.allclose(saved[0][name], saved[1][name], atol=1e-6) for name in saved[0])


@pytest.mark.parametrize(("name", "text"), [("t5", "true"), ("t5", "false"), ("clip", "true")])
def test_lora_reproduces_the_merged_pipeline_and_the_previews(folders, tmp_path, name, text):
    options = [
        f"model.train_text_encoder={text}",
        "model.adapter.rank=2", "model.adapter.alpha=6", "train.learning_rate=0.05", "train.steps=6",
        "train.preview_every=3", "train.preview_count=3", "train.ema_decay=0.5",
    ]  # fmt: skip
    _, directory, _ = run(tmp_path, folders[name], *options)
    whole, added, plain = theirs(directory.model), theirs(folders[name]), theirs(folders[name])
    added.load_lora_weights(directory.model / "lora")
    assert bool(moved(folders[name], directory.model, "text_encoder")) == (text == "true")
    told = json.loads((directory.samples / "prompts.json").read_text())
    noise = load_file(directory.samples / "start_noise.safetensors")["noise"]
    assert noise.shape == (3, 16, 8, 8) and told["sampler"] == "euler" and "timestep_spacing" not in told
    options = {"num_inference_steps": told["steps"], "guidance_scale": told["guidance_scale"], "output_type": "np"}
    drawn = [pipeline(told["prompts"], latents=noise, **options).images for pipeline in (whole, added, plain)]
    assert np.abs(drawn[0] - drawn[1]).max() < 2e-3 < np.abs(drawn[0] - drawn[2]).max()
    grid = np.asarray(Image.open(directory.samples / "step-6.png").convert("RGB")).astype(float)
    for place, (y, x) in enumerate([(0, 0), (0, 16), (16, 0)]):
        assert np.abs(grid[y : y + 16, x : x + 16] - drawn[0][place] * 255).max() < 1.01


def test_caches_change_nothing_and_are_used(folders, tmp_path, monkeypatch):
    losses = {}
    for cache in ("true", "false"):
        _, directory, _ = run(tmp_path / cache, folders["t5"], f"model.cache={cache}", "train.heldout_every=0")
        lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        losses[cache] = [line["loss"] for line in lines if "loss" in line]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)
    made = sorted((tmp_path / "true" / "quickstart" / "cache").iterdir())
    assert [path.name.split("-")[0] for path in made] == ["latents", "pooled", "text"]
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path / "true", *FLOW, f"model.pretrained={folders['t5']}", "model.cache=true", "train.heldout_every=0"
    )
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    calls = []
    monkeypatch.setattr(LatentModel, "moments", lambda *arguments: calls.append("pictures"))
    monkeypatch.setattr(type(trainer.state.model.conditioner), "encode", lambda *arguments: calls.append("captions"))
    for batch in trainer.microbatches(trainer.plan.batch(0)):
        assert batch.latents is not None and batch.text.shape[1:] == (272, 40) and batch.pooled.shape[1:] == (16,)
    assert not calls


@pytest.mark.parametrize("text", ["true", "false"])
def test_resume_is_exact(folders, tmp_path, text):
    options = ["model.adapter.rank=2", "train.keep_checkpoints=null", f"model.train_text_encoder={text}"]
    _, whole, _ = run(tmp_path / "whole", folders["t5"], *options)
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path / "killed", *FLOW, f"model.pretrained={folders['t5']}", *options
    )
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    while trainer.state.step < 3:
        trainer.step()
        trainer.state.step += 1
    trainer.save()
    train_model(config, dataset, directory, defenses, accelerator)
    for file in ("model", "ema", "optimizer"):
        first, second = (load_file(d.checkpoints / "step-7" / f"{file}.safetensors") for d in (whole, directory))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("precision", "text"), [("fp32", "true"), ("bf16", "true"), ("bf16", "false")])
def test_dp_sgd_on_lora(folders, tmp_path, precision, text):
    """Gradients per record; the start-up check compares them with a loop."""
    options = [
        f"model.train_text_encoder={text}",
        "defenses.dpsgd.epsilon=8",
        "defenses.dpsgd.test_seed=1",
        "model.adapter.rank=2",
        "train.steps=2",
    ]
    options += ["train.checkpoint_every=2", f"train.precision={precision}"]
    facts, directory, _ = run(tmp_path, folders["t5"], *options)
    assert facts["defenses"][0]["claim"]["kind"] == "dp"
    assert moved(folders["t5"], directory.model, "transformer")
    assert bool(moved(folders["t5"], directory.model, "text_encoder_2")) == (text == "true")


def test_dp_sgd_on_all_weights(folders, tmp_path):
    options = ["defenses.dpsgd.epsilon=8", "defenses.dpsgd.test_seed=1", "train.steps=2", "train.checkpoint_every=2"]
    _, directory, _ = run(tmp_path, folders["clip"], *options)
    assert len(moved(folders["clip"], directory.model, "transformer")) > 40


def test_losses_of_the_audit_are_those_of_the_velocity(folders, tmp_path):
    from accelerate import Accelerator

    from eval.audit import TIMESTEPS, canary_losses
    from train.diffusion import schedule_of

    _, dataset, *_ = opened(tmp_path, *FLOW, f"model.pretrained={folders['clip']}")
    model, rows = LatentModel(load(folders["clip"])), np.array([1, 3])
    arguments = schedule_of(model.parts.scheduler), dataset, rows, [], Accelerator(cpu=True)
    found = canary_losses(model, *arguments, draws=1)
    place, pipeline = len(TIMESTEPS) // 2, theirs(folders["clip"])
    u = (int(sorted(TIMESTEPS)[place] * 1000) + 1) / 1000
    s = 3 * u / (1 + 2 * u)
    with torch.no_grad():
        pixels = torch.from_numpy(dataset.images[rows]).float() / 127.5 - 1
        x = (pipeline.vae.encode(pixels).latent_dist.mean - 0.06) * 1.5
        noise = RecordRandom(0, 0, rows, [0, 0]).normal("audit", 16, 8, 8)
        captions = [dataset.records[row].caption for row in rows]
        text, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
        told = {"timestep": torch.full((2,), 1000 * s), "encoder_hidden_states": text, "pooled_projections": pooled}
        output = pipeline.transformer((1 - s) * x + s * noise, **told).sample
    expected = (output - (noise - x)).square().mean(dim=(1, 2, 3))
    assert found[:, place].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_dry_run_tells_sizes(folders, tmp_path, capsys):
    from tests.small import OVERRIDES
    from train import cli
    from train import run as training

    options = [*OVERRIDES, *FLOW, f"run.output_dir={tmp_path}", f"model.pretrained={folders['t5']}"]
    assert training.main(cli.Arguments(None, True, [*options, "model.adapter={}"])) == 0
    told = capsys.readouterr().out
    assert "latents (6, 16, 8, 8)" in told and "text (6, 272, 40)" in told and "T5EncoderModel" in told


def test_another_size_than_the_pipelines_own(folders, tmp_path):
    """24 px: places are cut out of the middle of the table, which the released pipeline keeps as it was."""
    _, directory, _ = run(tmp_path, folders["clip"], "data.image_size=24", "train.steps=2", "train.checkpoint_every=0")
    pipeline = theirs(directory.model)
    assert pipeline("a chest", num_inference_steps=1, output_type="np").images.shape == (1, 24, 24, 3)
    before = theirs(folders["clip"]).transformer.pos_embed.pos_embed
    assert torch.equal(pipeline.transformer.pos_embed.pos_embed, before)


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["train.diffusion.flow.shift=2.0"], "train.diffusion.flow.shift", "set train.diffusion.flow.shift=3.0"),
        (["train.diffusion.timesteps=500"], "train.diffusion.timesteps", "train.diffusion.timesteps=1000"),
        (
            ["train.diffusion.prediction=epsilon", "train.diffusion.noise_schedule=linear"], "train.diffusion.prediction",
            "prediction=flow train.diffusion.noise_schedule=null train.diffusion.snr_gamma=null",
        ),
        (["data.image_size=18"], "data.image_size", "not a multiple of 4, .*take 16"),
        (["data.image_size=52"], "data.image_size", "more than the 48 .*take 48"),
        (["defenses.prompt_perturbation={}"], "defenses.prompt_perturbation", "does not depend on the prompt"),
        (["model.pretrained=null"], "train.diffusion.prediction", "not offered for other models"),
        (["model.family=pixel"], "train.diffusion.prediction", "not offered for other models"),
    ],
)  # fmt: skip
def test_what_is_refused_before_training(folders, tmp_path, overrides, key, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, folders["clip"], *overrides)
    assert caught.value.key == key


def test_a_pipeline_of_betas_is_not_trained_as_a_flow(folders, tmp_path):
    stable_diffusion(tmp_path / "sd")
    with pytest.raises(UserError, match="set train.diffusion.prediction=epsilon .*noise_schedule=scaled_linear"):
        run(tmp_path, tmp_path / "sd")


def test_the_example_of_the_documentation_is_accepted(folders, tmp_path):
    """configs/sd3-lora.yaml as it stands, on small pictures: the text's part of attention has adapters too, all with a gradient."""
    import yaml

    from train.adapters import AdapterConfig
    from train.latent import build
    from train.models import ModelConfig

    told = yaml.safe_load((Path(__file__).parents[1] / "configs" / "sd3-lora.yaml").read_text())
    adapter = AdapterConfig(**told["model"]["adapter"])
    objective = objective_of(folders["t5"])
    settings = ModelConfig(family="latent", pretrained=str(folders["t5"]), adapter=adapter)
    objective.model = model = build(settings, 16, 3, 0, None)
    objective.loss(model, objective.draw(batch_of())).sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(any(f".{target}." in name for name in trained) for target in adapter.targets)
    assert all(value.grad is not None for value in trained.values())
