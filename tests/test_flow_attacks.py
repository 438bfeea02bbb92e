"""Attacks on models that are rectified flows: predictions by hand, sampling against diffusers, whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from defenses.base import SamplingContext
from defenses.errors import UserError
from defenses.promptperturbation import PromptPerturbation, PromptPerturbationConfig
from defenses.seeding import derive, generator
from eval import run as evaluation
from eval.config import check
from eval.denoiser import Denoiser
from eval.denoiser import load as load_denoiser
from eval.detectors import webster, wen
from eval.extrapolation import Guidance, load_base, pair_of, sample
from eval.textsource import TextSampler, kind_of, load_model
from tests.pipelines import stable_diffusion, stable_diffusion_3
from tests.small import OVERRIDES, small_config
from tests.test_sd3 import FLOW, theirs
from train import cli
from train import run as training
from train.flow import levels
from train.sampling import SamplerConfig
from train.textsampling import start_noise

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pipelines with T5 and without, one without a shift, and the same with another network."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    stable_diffusion_3(root / "t5")
    stable_diffusion_3(root / "clip", t5=False)
    plain = stable_diffusion_3(root / "plain", t5=False, shift=1.0)
    plain.save_pretrained(root / "tuned", safe_serialization=True)
    stable_diffusion_3(root / "other", t5=False).transformer.save_pretrained(root / "tuned" / "transformer")
    return {path.name: path for path in root.iterdir()}


@torch.no_grad()
def velocity(pipeline: DiffusionPipeline, x: torch.Tensor, s: float, captions) -> torch.Tensor:
    """Output of a pipeline's transformer, its parts called as the pipeline calls them."""
    text, _, pooled, _ = pipeline.encode_prompt(list(captions), None, None, do_classifier_free_guidance=False)
    times = torch.full((len(x),), 1000 * s)
    return pipeline.transformer(x, timestep=times, encoder_hidden_states=text, pooled_projections=pooled).sample


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_predictions_by_hand(folders, name):
    denoiser, pipeline = load_denoiser(folders[name], SHAPE, CPU), theirs(folders[name])
    known = (denoiser.kind, denoiser.prediction, denoiser.latent, denoiser.shape)
    assert known == ("caption", "flow", True, (16, 8, 8))
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)
    with torch.no_grad():
        encoded = pipeline.vae.encode(torch.from_numpy(images) / 127.5 - 1).latent_dist.mean
    x = denoiser.encode(images)
    assert torch.allclose(x, (encoded - 0.06) * 1.5, atol=1e-5)
    noise, t, s = torch.randn(2, 16, 8, 8), torch.tensor([399, 399]), 3 * 0.4 / (1 + 2 * 0.4)
    noisy = denoiser.noised(x, noise, t)
    assert torch.allclose(noisy, (1 - s) * x + s * noise, atol=1e-6)
    captions = ["a chest", "left lung"]
    for condition, texts in ((denoiser.condition(captions), captions), (denoiser.null(2), ["", ""])):
        v = velocity(pipeline, noisy, s, texts)
        assert torch.allclose(denoiser.epsilon(noisy, t, condition), noisy + (1 - s) * v, atol=1e-5)
        assert torch.allclose(denoiser.predict_clean(noisy, t, condition), noisy - s * v, atol=1e-5)
        # either prediction with the other gives x_t back
        clean, predicted = denoiser.predict_clean(noisy, t, condition), denoiser.epsilon(noisy, t, condition)
        assert torch.allclose(denoiser.noised(clean, predicted, t), noisy, atol=1e-5)
    a = denoiser.alphas_cumprod[399]
    assert float(a / (1 - a)) == pytest.approx(((1 - s) / s) ** 2, rel=1e-4)


def test_the_models_noise_at_the_first_step_is_its_input(folders):
    sampler = TextSampler(load_model(folders["t5"], CPU), SamplerConfig(sampler="euler", steps=3), "fp32", 5, 16, 3)
    assert sampler.first_timestep is None
    start, pipeline = sampler.start(["a chest"], [4]), theirs(folders["t5"])
    assert torch.equal(start[0], start_noise(5, "a chest", 4, (16, 8, 8)))
    text, pooled = sampler.encode(["a chest"])
    for t, s in ((999, 1.0), (499, 0.75)):
        found = sampler.predict(start, torch.tensor([t]), text, pooled)
        assert torch.allclose(found, start + (1 - s) * velocity(pipeline, start, s, ["a chest"]), atol=1e-5)
    context = SamplingContext(None, None, Path(), None, text_model=sampler)
    with pytest.raises(UserError, match="does not depend on the prompt"):
        PromptPerturbation(PromptPerturbationConfig()).wrap_sampler(sampler, context)


@pytest.mark.parametrize("detector", [wen, webster])
def test_detectors_by_hand(folders, detector):
    """At the last timestep with a hundredth of signal: there noise differs by 1 - s times what velocities do."""
    denoiser, pipeline, prompts = load_denoiser(folders["t5"], SHAPE, CPU), theirs(folders["t5"]), ["a chest", "lung"]
    found = detector(denoiser, prompts, draws=1, seed=2, batch_size=2)
    s = max(each for each in levels(1000, 3.0).tolist() if each <= 0.99)
    if detector is wen:
        keys = [("detector/start", derive(0, prompt), 0) for prompt in prompts]
    else:
        keys = [("detector/common", 0)] * 2
    x = torch.stack([torch.randn(16, 8, 8, generator=generator(2, *key)) for key in keys])
    x = x if detector is wen else s * x
    given, null = velocity(pipeline, x, s, prompts), velocity(pipeline, x, s, ["", ""])
    if detector is wen:
        expected = (1 - s) * (given - null).flatten(1).norm(dim=1)
    else:
        clean = x - s * (null + 7.5 * (given - null))
        expected = (x / (1 - s) - clean).square().flatten(1).mean(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-3) and found.min() > 0


def test_the_fine_tuned_model_alone_is_sampled_as_the_pipeline_does(folders):
    """Without a shift their table can be given as it is: Euler's steps are those of DDIM."""
    tuned = load_denoiser(folders["tuned"], SHAPE, CPU)
    pair = load_base(tuned, folders["tuned"], folders["plain"], SHAPE)
    prompts = ["a chest", "left lung"]
    found = sample(pair, Guidance(1.0, scale=3.0), prompts, [0, 4], steps=5, seed=7)
    keys = [("attack/finetuning", derive(0, prompt), index) for prompt, index in zip(prompts, (0, 4), strict=True)]
    noise = torch.stack([torch.randn(16, 8, 8, generator=generator(7, *key)) for key in keys])
    options = {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2], "num_inference_steps": 5, "guidance_scale": 3.0}
    expected = theirs(folders["tuned"])(prompts, latents=noise, output_type="latent", **options).images
    assert torch.allclose(found, expected, atol=1e-3) and expected.std() > 0.3


def test_the_step_from_base_to_tuned_is_taken_further(folders):
    """One step from pure noise is x_0 = x - v, with v = v_base(empty) + w (v_tuned(caption) - v_base(empty))."""
    tuned = load_denoiser(folders["tuned"], SHAPE, CPU)
    pair = load_base(tuned, folders["tuned"], folders["plain"], SHAPE)
    found = sample(pair, Guidance(3.0), ["a chest"], [2], steps=1, seed=7)
    x = torch.randn(16, 8, 8, generator=generator(7, "attack/finetuning", derive(0, "a chest"), 2))[None]
    ours, base = (
        velocity(theirs(folders[name]), x, 1.0, [text]) for name, text in (("tuned", "a chest"), ("plain", ""))
    )
    assert torch.allclose(found, x - (base + 3 * (ours - base)), atol=1e-4)


def test_a_base_of_another_shift_is_refused(folders):
    with pytest.raises(UserError, match="another noise schedule"):
        pair_of(*(load_denoiser(folders[name], SHAPE, CPU) for name in ("tuned", "clip")), SHAPE)


def test_weights_kept_in_bf16_give_the_same_images(folders):
    settings, images = SamplerConfig(sampler="euler", steps=3), []
    for kept in ("bf16", "fp32"):
        sampler = TextSampler(load_model(folders["t5"], CPU, kept), settings, "bf16", 5, 16, 3)
        images.append(sampler([0, 1], ["a chest", "left lung"]))
    assert torch.equal(images[0], images[1])


def test_levels_and_betas_are_told_apart(folders, tmp_path):
    stable_diffusion(tmp_path / "sd")
    ours = load_denoiser(tmp_path / "sd", SHAPE, CPU)
    assert isinstance(ours, Denoiser) and ours.levels is None
    signal, spread = ours.shares(np.array([499]))
    assert (signal[0], spread[0]) == (1.0, 0.0) and signal[1] ** 2 + spread[1] ** 2 == pytest.approx(1.0)
    signal, spread = load_denoiser(folders["clip"], SHAPE, CPU).shares(np.array([499]))
    assert (signal, spread) == (pytest.approx([1.0, 0.25]), pytest.approx([0.0, 0.75]))


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["generate.sampler=ddim"], "generate.sampler", "set it to euler"),
        (["generate.sampler=dpm-solver++"], "generate.sampler", "set it to euler"),
        (["attack.inpainting={}"], "attack.inpainting", "not defined for a flow"),
    ],
)
def test_what_is_refused_before_anything_is_done(folders, tmp_path, overrides, key, message):
    """For a run of ours by its settings, for a pipeline of others by its folder."""
    for own in (True, False):
        _, config = small_config(tmp_path, *FLOW, f"model.pretrained={folders['clip']}", *overrides)
        config.pipeline = None if own else str(folders["clip"])
        with pytest.raises(UserError, match=message) as caught:
            check(config)
        assert caught.value.key == key


@pytest.mark.parametrize(
    "text", ["", "[]", '{"_class_name": ["my_module", "Pipeline"]}', '{"_class_name": "DDIMPipeline"}']
)
def test_other_folders_are_no_text_to_image_pipelines(folders, tmp_path, text):
    assert (kind_of(folders["t5"]), kind_of(tmp_path)) == ("sd3", None)
    (tmp_path / "model_index.json").write_text(text)
    assert kind_of(tmp_path) is None


def test_the_sampler_of_flows_is_refused_elsewhere(tmp_path):
    stable_diffusion(tmp_path / "sd")
    _, config = small_config(tmp_path, "generate.sampler=euler")
    for pipeline in (None, str(tmp_path / "sd")):
        config.pipeline = pipeline
        with pytest.raises(UserError, match="does not draw what is no flow .set it to ddim"):
            check(config)
    model = load_model(tmp_path / "sd", CPU)
    with pytest.raises(UserError, match="euler is for flows"):
        model.kind.sampler(SamplerConfig(sampler="euler"))


@pytest.mark.slow
def test_a_whole_run_with_its_attacks_and_an_evaluation_of_the_pipeline(folders, tmp_path):
    options = [
        *OVERRIDES, *FLOW, f"run.output_dir={tmp_path}", f"model.pretrained={folders['t5']}", "model.adapter.rank=2",
        "train.preview_every=3", "train.preview_count=2", "generate.order=prefilter", "attack.prefilter.draws=1",
        "attack.membership={}", "attack.finetuning={per_prompt: 4, max_prompts: 2, steps: 2, permutations: 99}",
        "utility.features=random-conv",
    ]  # fmt: skip
    overrides = [each for each in options if not each.startswith("attack.membership=null")]
    assert training.main(cli.Arguments(None, False, [*overrides, "run.name=whole"])) == 0
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["privacy"]["extraction"]["protocol"] == "prompted"
    assert report["privacy"]["extraction"]["generations"] == 8
    assert report["privacy"]["membership"] and report["privacy"]["finetuning"]["pictures"] > 0
    assert (tmp_path / "whole" / "attack" / "prompt_scores.csv").exists()
    arguments = [*OVERRIDES, f"run.output_dir={tmp_path}", f"pipeline={folders['clip']}", "data.source=phantom"]
    arguments += ["data.channels=3", "data.caption_key=caption", "generate.sampler=euler", "generate.max_prompts=2"]
    evaluation.main(cli.Arguments(None, False, [*arguments, "generate.per_prompt=4", "generate.control_prompts=0"]))
    foreign = json.loads((tmp_path / "eval-pipeline" / "report.json").read_text())
    assert foreign["privacy"]["extraction"]["protocol"] == "prompted"
