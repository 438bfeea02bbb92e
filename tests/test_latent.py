"""Text-to-image training on tiny pipelines of the Stable Diffusion layouts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from tests.pipelines import change, stable_diffusion, stable_diffusion_xl
from tests.small import opened
from train.latent import LatentModel
from train.pipelines import load
from train.stage import build_trainer, train_model
from train.textobjective import TextObjective
from train.textsampling import sample, start_noise

SD = [
    "model.family=latent",
    "data.channels=3",
    "data.caption_key=caption",
    "train.diffusion.prediction=epsilon",
    "train.diffusion.noise_schedule=scaled_linear",
    "train.diffusion.beta_start=0.0001",
    "train.diffusion.beta_end=0.02",
    "train.preview_every=3",
    "train.preview_count=3",
    "generate.max_prompts=2",
    "generate.per_prompt=4",
    "generate.control_prompts=0",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion(root / "sd")
    stable_diffusion_xl(root / "sdxl")
    return {"sd": root / "sd", "sdxl": root / "sdxl"}


def run(folder: Path, base: Path, *overrides: str):
    arguments = opened(folder, *SD, f"model.pretrained={base}", *overrides)
    config, dataset, directory, defenses, accelerator = arguments
    facts = train_model(config, dataset, directory, defenses, accelerator)
    return facts, directory, arguments


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = load_file(next((folder / part).glob("*.safetensors")))
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}


def moved(before: Path, after: Path, part: str) -> set[str]:
    old, new = weights(before, part), weights(after, part)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_full_training_moves_the_network_and_nothing_else(folders, tmp_path, kind):
    facts, directory, _ = run(tmp_path, folders[kind])
    assert facts["steps"] == 7
    assert len(moved(folders[kind], directory.model, "unet")) > 50
    for part in ("vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])):
        assert not moved(folders[kind], directory.model, part)
    DiffusionPipeline.from_pretrained(directory.model)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_option_at_once(folders, tmp_path, kind, precision):
    options = [
        "model.train_text_encoder=true", "train.gradient_checkpointing=true", "train.diffusion.offset_noise=0.1",
        "train.diffusion.snr_gamma=5.0", f"train.precision={precision}", "train.ema_decay=0.5", "train.accumulation=2",
    ]  # fmt: skip
    _, directory, _ = run(tmp_path, folders[kind], *options)
    assert moved(folders[kind], directory.model, "unet") and moved(folders[kind], directory.model, "text_encoder")
    assert not moved(folders[kind], directory.model, "vae")


def test_cross_attention_alone(folders, tmp_path):
    _, directory, _ = run(tmp_path, folders["sd"], "model.trainable=['*attn2*']")
    changed = moved(folders["sd"], directory.model, "unet")
    assert changed and all("attn2" in name for name in changed)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("text", ["true", "false"])
def test_lora_reproduces_the_merged_pipeline_and_the_previews(folders, tmp_path, kind, text):
    options = [
        "model.adapter.rank=2",
        "model.adapter.alpha=6",
        "train.learning_rate=0.1",
        f"model.train_text_encoder={text}",
    ]
    _, directory, _ = run(tmp_path, folders[kind], *options)
    assert not [path for path in (directory.checkpoints / "step-7").iterdir() if path.stat().st_size > 400_000]
    whole = DiffusionPipeline.from_pretrained(directory.model)
    added = DiffusionPipeline.from_pretrained(folders[kind])
    added.load_lora_weights(directory.model / "lora")
    told = json.loads((directory.samples / "prompts.json").read_text())
    shape, drawn = (4, 8, 8), []
    for pipeline in (whole, added):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.stack([start_noise(told["seed"], prompt, i, shape) for i, prompt in enumerate(told["prompts"])])
        drawn.append(pipeline(told["prompts"], latents=noise, num_inference_steps=3, output_type="np").images)
    plain = DiffusionPipeline.from_pretrained(folders[kind])
    plain.set_progress_bar_config(disable=True)
    base = plain(told["prompts"], latents=noise, num_inference_steps=3, output_type="np").images
    assert np.abs(drawn[0] - drawn[1]).max() < 2e-3 < np.abs(drawn[0] - base).max()


def test_whoever_has_the_model_draws_the_last_previews_again(folders, tmp_path):
    from diffusers import DDIMScheduler
    from PIL import Image

    _, directory, _ = run(tmp_path, folders["sd"], "train.steps=3", "train.learning_rate=0.01", "model.cache=false")
    told = json.loads((directory.samples / "prompts.json").read_text())
    noise = load_file(directory.samples / "start_noise.safetensors")["noise"]
    assert noise.shape == (3, 4, 8, 8) and noise.dtype == torch.float32
    pipeline = DiffusionPipeline.from_pretrained(directory.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing=told["timestep_spacing"], clip_sample=False
    )
    options = {"num_inference_steps": told["steps"], "guidance_scale": told["guidance_scale"], "output_type": "np"}
    drawn = pipeline(told["prompts"], latents=noise, **options).images * 255
    grid = np.asarray(Image.open(directory.samples / "step-3.png").convert("RGB")).astype(float)
    for place, (y, x) in enumerate([(0, 0), (0, 16), (16, 0)]):
        assert np.abs(grid[y : y + 16, x : x + 16] - drawn[place]).max() < 1.01


def test_our_sampler_equals_the_pipeline(folders):
    from train.sampling import SamplerConfig

    for kind, folder in folders.items():
        pipeline = DiffusionPipeline.from_pretrained(folder)
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
        pipeline.set_progress_bar_config(disable=True)
        prompts = ["a chest", "left lung", "a chest"]
        noise = torch.stack([start_noise(3, prompt, i, (4, 8, 8)) for i, prompt in enumerate(prompts)])
        theirs = pipeline(prompts, latents=noise, num_inference_steps=5, guidance_scale=4.0, output_type="np").images
        config = SamplerConfig(steps=5, guidance_scale=4.0)
        ours = sample(LatentModel(load(folder)), config, range(3), (3, 16, 16), seed=3, prompts=prompts)
        assert np.abs(theirs.transpose(0, 3, 1, 2) - ours.numpy()).max() < 1e-5, kind


def test_a_preview_without_caption_takes_the_empty_condition_of_training(folders):
    """XL: zeros, what the pipeline takes where its guidance leads away from; a user's empty prompt stays the embedding of ""."""
    from diffusers import DDIMScheduler

    from train import families
    from train.sampling import SamplerConfig

    pipeline = DiffusionPipeline.from_pretrained(folders["sdxl"])
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    text, _, pooled, _ = pipeline.encode_prompt([""] * 2, do_classifier_free_guidance=False)
    noise = torch.stack([start_noise(3, "", i, (4, 8, 8)) for i in range(2)])
    options = {"latents": noise, "num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    zeros = {"prompt_embeds": torch.zeros_like(text), "pooled_prompt_embeds": torch.zeros_like(pooled)}
    zeros |= {f"negative_{name}": value for name, value in zeros.items()}
    model, config = LatentModel(load(folders["sdxl"])), SamplerConfig(steps=5, guidance_scale=4.0)
    arguments = {"seed": 3, "prompts": [""] * 2}
    preview = families.FAMILIES["latent"].sample(model, None, config, range(2), (3, 16, 16), **arguments).numpy()
    asked = sample(model, config, range(2), (3, 16, 16), **arguments).numpy()
    assert np.abs(pipeline(**zeros, **options).images.transpose(0, 3, 1, 2) - preview).max() < 1e-5
    assert np.abs(pipeline([""] * 2, **options).images.transpose(0, 3, 1, 2) - asked).max() < 1e-5
    assert np.abs(preview - asked).max() > 1e-3


def test_caches_change_nothing_and_are_used(folders, tmp_path, monkeypatch):
    losses = {}
    for cache in ("true", "false"):
        _, directory, _ = run(tmp_path / cache, folders["sd"], f"model.cache={cache}", "train.heldout_every=0")
        lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        losses[cache] = [line["loss"] for line in lines if "loss" in line]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)
    made = sorted((tmp_path / "true" / "quickstart" / "cache").iterdir())
    assert [path.name.split("-")[0] for path in made] == ["latents", "text"]
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path / "true", *SD, f"model.pretrained={folders['sd']}", "model.cache=true", "train.heldout_every=0"
    )
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    calls = []
    monkeypatch.setattr(LatentModel, "moments", lambda *arguments: calls.append("pictures"))
    monkeypatch.setattr(type(trainer.state.model.conditioner), "encode", lambda *arguments: calls.append("captions"))
    for batch in trainer.microbatches(trainer.plan.batch(0)):
        assert batch.latents is not None and batch.text is not None
    assert not calls


def test_augmented_pictures_are_encoded_anew(folders, tmp_path):
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, *SD, f"model.pretrained={folders['sd']}", "defenses.augment={}"
    )
    build_trainer(config, dataset, directory, accelerator, defenses, [])
    assert not [path for path in (directory.path / "cache").iterdir() if path.name.startswith("latents")]


def objective_of(folder: Path, prediction: str, **options) -> TextObjective:
    from train.diffusion import DiffusionConfig, noise_schedule

    config = DiffusionConfig(prediction=prediction, noise_schedule="scaled_linear", snr_gamma=None)
    model = LatentModel(load(folder))
    return TextObjective(
        model, config, noise_schedule(config), **{"caption_dropout": 0.0, "precision": "fp32"} | options
    )


def batch_of(count: int = 3, **fields) -> Batch:
    random = RecordRandom(0, 0, range(count), [0] * count)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(images, np.arange(count), None, random, captions=["a chest", "left lung", "x ray"][:count], **fields)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_against_diffusers_by_hand(folders, prediction):
    objective = objective_of(folders["sd"], prediction)
    batch = objective.draw(batch_of())
    pipeline = DiffusionPipeline.from_pretrained(folders["sd"])
    with torch.no_grad():
        distribution = pipeline.vae.encode(batch_of().images).latent_dist
        noise = batch_of().random.normal("latent", 4, 8, 8)
        latents = (distribution.mean + distribution.std * noise) * pipeline.vae.config.scaling_factor
        assert torch.allclose(batch.latents, latents, atol=1e-6)
        ids = pipeline.tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids
        text = pipeline.text_encoder(ids)[0]
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        noisy = schedule.add_noise(latents, batch.noise, batch.timesteps)
        output = pipeline.unet(noisy, batch.timesteps, encoder_hidden_states=text)[0]
        target = (
            batch.noise if prediction == "epsilon" else schedule.get_velocity(latents, batch.noise, batch.timesteps)
        )
        expected = (output - target).square().mean(dim=(1, 2, 3))
        assert torch.allclose(objective.loss(objective.model, batch), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_text_magnitude_is_the_norm_of_the_difference_in_noise(folders, prediction):
    objective = objective_of(folders["sd"], prediction, wants=["text_magnitude"])
    batch = objective.draw(batch_of())
    with torch.no_grad():
        objective.loss(objective.model, batch)
        noisy = objective.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        outputs = []
        for captions in (batch.captions, [""] * 3):
            text = objective.model.conditioner.encode(captions).text
            output = objective.model.unet(noisy, batch.timesteps, encoder_hidden_states=text)[0]
            if prediction == "v_prediction":
                signal = objective.schedule.alphas_cumprod[batch.timesteps][:, None, None, None]
                output = signal.sqrt() * output + (1 - signal).sqrt() * noisy
            outputs.append(output)
    expected = (outputs[0] - outputs[1]).square().sum(dim=(1, 2, 3)).sqrt()
    assert torch.allclose(batch.told["text_magnitude"], expected, rtol=1e-3)
    assert (expected > 0).all()


def test_text_noise_has_the_stated_size(folders):
    objective = objective_of(folders["sd"], "epsilon")
    plain = objective.draw(batch_of())
    noisy = objective.draw(batch_of(text_noise=torch.tensor([0.0, 1.0, 2.0])))
    ratio = (noisy.text - plain.text).flatten(1).std(1) / plain.text.flatten(1).std(1)
    assert ratio[0] == 0 and ratio[1:].tolist() == pytest.approx([1.0, 2.0], rel=0.12)  # 256 numbers each


def test_caption_dropout_is_the_stated_share(folders):
    objective = objective_of(folders["sd"], "epsilon", caption_dropout=0.3)
    count = 600
    random = RecordRandom(0, 0, range(count), [0] * count)
    batch = Batch(
        torch.zeros(count, 3, 16, 16), np.arange(count), None, random, captions=["a chest"] * count,
        moments=torch.zeros(count, 8, 8, 8),
    )  # fmt: skip
    drawn = objective.draw(batch)
    empty = (drawn.text == objective.model.conditioner.empty().text).flatten(1).all(1)
    assert 0.24 < empty.float().mean() < 0.36  # 3.2 standard deviations
    assert [not caption for caption in drawn.captions] == empty.tolist()


@pytest.mark.parametrize("trained", [False, True])
def test_no_caption_is_what_guidance_leads_away_from(folders, trained):
    """Zeros for XL, whose pipeline takes zeros for the missing negative prompt; the magnitude of such a record is 0."""
    objective = objective_of(folders["sdxl"], "epsilon", caption_dropout=0.5, wants=["text_magnitude"])
    objective.model = LatentModel(load(folders["sdxl"]), trained)
    batch = objective.draw(batch_of(text_noise=torch.full((3,), 0.5)))
    dropped = torch.tensor([not caption for caption in batch.captions])
    assert dropped.any() and not dropped.all()
    with torch.no_grad():
        condition = objective.model.condition(batch)
        objective.loss(objective.model, batch)
    empty = objective.model.conditioner.empty()
    for found, null in ((condition.text, empty.text), (condition.pooled, empty.pooled)):
        assert torch.equal(found[dropped], null.expand_as(found)[dropped]) and found[~dropped].any()
    assert torch.equal(batch.told["text_magnitude"] == 0, dropped)


def test_another_size_than_the_pipelines_own_is_released_and_attacked_as_trained(folders, tmp_path):
    """A network for 16 px trained at 32: pipeline calls, detectors and losses are of 32 px."""
    from eval import denoiser
    from eval.extrapolation import load_base

    _, directory, _ = run(tmp_path, folders["sd"], "data.image_size=32", "train.steps=2", "train.checkpoint_every=0")
    pipeline = DiffusionPipeline.from_pretrained(directory.model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a chest", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    tuned = denoiser.load(directory.model, (3, 32, 32), torch.device("cpu"))
    assert tuned.shape == (4, 16, 16) == tuned.encode(np.zeros((1, 3, 32, 32), np.uint8)).shape[1:]
    assert load_base(tuned, directory.model, folders["sd"], (3, 32, 32)).base.shape == (4, 16, 16)


@pytest.mark.parametrize("key, value", [("rescale_betas_zero_snr", True), ("trained_betas", [0.01] * 1000)])
def test_a_schedule_that_betas_alone_do_not_tell_is_refused(folders, tmp_path, key, value):
    shutil.copytree(folders["sd"], tmp_path / "other")
    change(tmp_path / "other" / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(UserError, match=key) as caught:
        run(tmp_path / "runs", tmp_path / "other")
    assert caught.value.key == "model.pretrained"


def test_another_schedule_is_refused_with_all_that_differs(folders, tmp_path):
    with pytest.raises(UserError, match="prediction=epsilon.*noise_schedule=scaled_linear") as caught:
        run(tmp_path, folders["sd"], "train.diffusion.prediction=v_prediction", "train.diffusion.noise_schedule=linear")
    assert caught.value.key == "train.diffusion.prediction"


def test_captions_must_be_there(folders, tmp_path):
    with pytest.raises(UserError) as caught:
        run(tmp_path, folders["sd"], "data.caption_key=null")
    assert caught.value.key == "data.caption_key"


def test_resume_with_another_base_is_refused(folders, tmp_path):
    from train.loop import Interrupted, Trainer

    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, *SD, f"model.pretrained={folders['sd']}", "model.adapter.rank=2"
    )
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    trainer.state.step = 3
    trainer.save()
    torch.manual_seed(5)
    stable_diffusion(tmp_path / "other")
    config.model = replace(config.model, pretrained=str(tmp_path / "other"))
    other = build_trainer(config, dataset, directory, accelerator, defenses, [])
    with pytest.raises(UserError) as caught:
        other.resume(directory.checkpoints / "step-3")
    assert caught.value.key == "model.pretrained"
    assert Interrupted and Trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dp_sgd_on_lora(folders, tmp_path, precision):
    """Gradients per record through the whole seam; the start-up check compares them with a loop."""
    options = [
        "defenses.dpsgd.epsilon=8",
        "defenses.dpsgd.test_seed=1",
        "model.adapter.rank=2",
        "train.preview_every=0",
        f"train.precision={precision}",
    ]
    facts, directory, _ = run(tmp_path, folders["sd"], *options)
    assert facts["defenses"][0]["claim"]["kind"] == "dp"
    assert moved(folders["sd"], directory.model, "unet")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dp_sgd_on_adapters_of_the_text_encoder_with_noise(folders, tmp_path, kind, precision):
    """The check of influence must not take rounding in another memory layout for influence: it refused this one."""
    _, directory, _ = run(
        tmp_path, folders[kind], "defenses.dpsgd.epsilon=8", "defenses.dpsgd.test_seed=1", "model.adapter.rank=2",
        "model.train_text_encoder=true", "defenses.captions={noise_probability: 0.5}", "train.steps=2",
        "train.checkpoint_every=2", "train.preview_every=0", "train.heldout_every=0", f"train.precision={precision}",
    )  # fmt: skip
    assert moved(folders[kind], directory.model, "text_encoder")


def test_dp_sgd_on_all_weights(folders, tmp_path):
    facts, directory, _ = run(
        tmp_path, folders["sdxl"], "defenses.dpsgd.epsilon=8", "defenses.dpsgd.test_seed=1", "train.steps=2",
        "train.checkpoint_every=2", "train.preview_every=0",
    )  # fmt: skip
    assert len(moved(folders["sdxl"], directory.model, "unet")) > 50


def test_resume_is_exact_at_every_checkpoint(folders, tmp_path):
    """Killed after a checkpoint and resumed: same weights, average and optimizer, with the text encoder in training."""
    options = ["model.train_text_encoder=true", "model.adapter.rank=2", "train.keep_checkpoints=null"]
    _, whole, _ = run(tmp_path / "whole", folders["sd"], *options)
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path / "killed", *SD, f"model.pretrained={folders['sd']}", *options
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


@pytest.mark.slow
def test_a_compiled_network_trains_alike_and_is_saved_under_its_own_names(folders, tmp_path, monkeypatch):
    """By the tracing part of the compiler: generating code for a CPU takes minutes."""

    def traced(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    saved = []
    for name in ("true", "false"):
        options = ["train.steps=3", "train.preview_every=0", "train.heldout_every=0", f"train.compile={name}"]
        _, directory, _ = run(tmp_path / name, folders["sd"], *options)
        saved.append(load_file(directory.checkpoints / "step-3" / "model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    differences = torch.cat([(saved[0][name] - saved[1][name]).abs().flatten() for name in saved[0]])
    assert differences.mean() < 1e-5
