"""Sampling from what fine-tuning changed: closed forms, diffusers' own steps, parts of pipelines called by hand, models that do not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from defenses.errors import UserError
from defenses.seeding import derive, generator
from eval.denoiser import Denoiser, load
from eval.extrapolation import Guidance, Pair, load_base, pair_of, sample
from tests import ideal
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from tests.reference import fabricated
from tests.test_denoiser import schedule, unet

CPU, SHAPE = torch.device("cpu"), (1, 2, 2)


def pair(tuned, base, latent=True) -> Pair:
    return Pair(ideal.denoiser(tuned, latent), ideal.denoiser(base, latent), SHAPE)


def start(index: int, seed: int = 7, condition=None, shape=SHAPE) -> np.ndarray:
    """The start noise of an image as the documentation defines it."""
    stream = generator(seed, "attack/finetuning", derive(0, str(condition)), index)
    return torch.randn(shape, generator=stream).double().numpy()


MEANS = np.array([[0.1, -0.3, 0.2, 0.0], [0.4, 0.1, 0.3, -0.5]])  # of base and fine-tuned model


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0, 5.0])
def test_two_gaussians_give_the_gaussian_beyond(weight):
    """Both of variance 0.09: the extrapolated score is that of N(m_0 + w (m_1 - m_0), 0.09), whose probability flow is known in
    closed form; 1,000 steps follow it."""
    covariance = 0.09 * np.eye(4)
    models = pair(ideal.gaussian(MEANS[1], covariance), ideal.gaussian(MEANS[0], covariance))
    found = sample(models, Guidance(weight), [None] * 3, [0, 1, 5], steps=1000, seed=7)
    mean = MEANS[0] + weight * (MEANS[1] - MEANS[0])
    last = float(ideal.alphas_cumprod()[-1])
    for image, index in zip(found, (0, 1, 5), strict=True):
        noise = start(index).reshape(-1)
        expected = mean + 0.3 * (noise - last**0.5 * mean) / (0.09 * last + 1 - last) ** 0.5
        assert image.flatten().numpy() == pytest.approx(expected, abs=0.01)


def test_two_points_give_the_point_beyond():
    """Models of one picture each: every step predicts m_0 + w (m_1 - m_0), and the last step is that."""
    nothing = 1e-12 * np.eye(4)
    models = pair(ideal.gaussian(MEANS[1], nothing), ideal.gaussian(MEANS[0], nothing))
    for weight in (1.0, 3.0):
        image = sample(models, Guidance(weight), [None], [0], steps=4, seed=7)
        expected = MEANS[0] + weight * (MEANS[1] - MEANS[0])
        assert image.flatten().numpy() == pytest.approx(expected, abs=1e-4)
    clipped = sample(replace_latent(models, False), Guidance(3.0), [None], [0], steps=4, seed=7)
    assert clipped.flatten().numpy() == pytest.approx(np.clip(MEANS[0] + 3 * (MEANS[1] - MEANS[0]), -1, 1), abs=1e-4)


def replace_latent(models: Pair, latent: bool) -> Pair:
    return Pair(replace(models.tuned, latent=latent), replace(models.base, latent=latent), models.shape)


@pytest.mark.parametrize(("weight", "correction"), [(3.0, 0.0), (2.0, -0.3), (4.5, 0.2)])
def test_a_linear_prediction_follows_the_formula(weight, correction):
    """eps = eps_base + w (eps_tuned - eps_base) + k eps_base, in DDIM steps written down in float64."""
    variances, signal = (0.25, 0.04), ideal.alphas_cumprod().double().numpy()
    models = pair(*(ideal.gaussian(MEANS[k], variances[k] * np.eye(4)) for k in (1, 0)))
    found = sample(models, Guidance(weight, correction), [None], [3], steps=5, seed=7)

    def epsilon(x, a, model):
        """-sqrt(1 - a) times the score of N(sqrt(a) m, a v + 1 - a)."""
        return (1 - a) ** 0.5 * (x - a**0.5 * MEANS[model]) / (a * variances[model] + 1 - a)

    x = start(3).reshape(-1)
    for timestep in (999, 799, 599, 399, 199):
        now, after = signal[timestep], 1.0 if timestep == 199 else signal[timestep - 200]
        base, tuned = epsilon(x, now, 0), epsilon(x, now, 1)
        noise = base + weight * (tuned - base) + correction * base
        x = after**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - after) ** 0.5 * noise
    assert found.flatten().numpy() == pytest.approx(x, rel=1e-3, abs=1e-3)


def test_the_correction_is_no_part_of_the_model_alone():
    models = pair(*(ideal.gaussian(mean, 0.1 * np.eye(4)) for mean in MEANS[::-1]))
    alone, corrected = (sample(models, Guidance(1.0, k), [None], [0], steps=5, seed=7) for k in (0.0, -0.5))
    assert torch.equal(alone, corrected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_model_alone_is_sampled_as_diffusers_does(prediction, tmp_path):
    """Deterministic DDIM with clipped x_0, timesteps from the last on."""
    DDIMPipeline(unet(), schedule(prediction)).save_pretrained(tmp_path / "tuned")
    DDIMPipeline(unet(), schedule(prediction)).save_pretrained(tmp_path / "base")
    tuned = load(tmp_path / "tuned", (1, 8, 8), CPU)
    models = load_base(tuned, tmp_path / "tuned", tmp_path / "base", (1, 8, 8))
    found = sample(models, Guidance(1.0), [None] * 2, [0, 4], steps=20, seed=7)
    config = schedule(prediction).config
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(20)
    x = torch.from_numpy(np.stack([start(index, shape=(1, 8, 8)) for index in (0, 4)])).float()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = tuned.network(x, timestep).sample
            x = scheduler.step(output, timestep, x, use_clipped_model_output=True).prev_sample
    assert torch.allclose(found, x, atol=1e-4) and not torch.allclose(found, torch.zeros(()), atol=0.1)


def two_pipelines(folder, make=stable_diffusion, **options):
    """Base, and the same with another network: (base pipeline, fine-tuned pipeline), saved as base/ and tuned/."""
    base = make(folder / "base", **options)
    base.save_pretrained(folder / "tuned", safe_serialization=True)
    tuned = make(folder / "other", **options)
    tuned.unet.save_pretrained(folder / "tuned" / "unet", safe_serialization=True)
    return base, tuned


def predicted(pipeline, text_of, x, t, caption):
    """Noise predicted by a Stable Diffusion pipeline, its parts called by hand."""
    tokens = text_of.tokenizer([caption], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        return pipeline.unet(x, t, encoder_hidden_states=text_of.text_encoder(tokens.input_ids)[0]).sample


def test_captions_follow_the_formulas_of_the_paper(tmp_path):
    """One step of DDIM is the prediction of x_0 itself."""
    base, tuned = two_pipelines(tmp_path)
    models = load_base(load(tmp_path / "tuned", (3, 16, 16), CPU), tmp_path / "tuned", tmp_path / "base", (3, 16, 16))
    caption, t = "a chest x ray", torch.tensor([999])
    x = torch.from_numpy(start(2, condition=caption, shape=(4, 8, 8)))[None].float()
    a = float(base.scheduler.alphas_cumprod[999])
    ours, null = (predicted(tuned, base, x, t, text) for text in (caption, ""))
    theirs, empty = (predicted(base, base, x, t, text) for text in (caption, ""))
    cases = {
        Guidance(3.0): empty + 3 * (ours - empty),
        Guidance(3.0, base_caption="same"): theirs + 3 * (ours - theirs),
        Guidance(3.5, -0.02): empty + 3.5 * (ours - empty) - 0.02 * empty,
        Guidance(1.0): ours,
        Guidance(1.0, scale=3.0): null + 3 * (ours - null),
        Guidance(3.0, scale=3.0): empty + 3 * (ours - empty),  # its guidance is for the model alone
    }
    for guidance, noise in cases.items():
        found = sample(models, guidance, [caption], [2], steps=1, seed=7)[0]
        expected = (x - (1 - a) ** 0.5 * noise)[0] / a**0.5
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), guidance


def test_xl_is_led_away_from_zeros_as_its_own_pipeline(tmp_path):
    two_pipelines(tmp_path, stable_diffusion_xl)
    shape, caption, t = (3, 16, 16), "a chest x ray", torch.tensor([999])
    models = load_base(load(tmp_path / "tuned", shape, CPU), tmp_path / "tuned", tmp_path / "base", shape)
    x = torch.from_numpy(start(2, condition=caption, shape=(4, 8, 8)))[None].float()
    zeros = {name: value * (name == "time_ids") for name, value in models.base.condition([""]).items()}
    with torch.no_grad():
        ours = models.tuned.predict_clean(x, t, models.tuned.condition([caption]))
        null, empty = (each.predict_clean(x, t, zeros) for each in (models.tuned, models.base))
    for guidance, expected in (
        (Guidance(1.0, scale=3.0), null + 3 * (ours - null)), (Guidance(3.0), empty + 3 * (ours - empty)),
    ):  # fmt: skip
        found = sample(models, guidance, [caption], [2], steps=1, seed=7)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), guidance


def test_start_noise_is_shared_by_the_weights_and_not_by_the_captions():
    models = pair(*(ideal.gaussian(mean, 0.1 * np.eye(4)) for mean in MEANS[::-1]))
    many = sample(models, Guidance(3.0), [None] * 3, [0, 1, 2], steps=3, seed=7)
    assert torch.allclose(sample(models, Guidance(3.0), [None], [1], steps=3, seed=7)[0], many[1], atol=1e-6)
    same = replace(models, base=models.tuned)  # nothing is extrapolated: the weight can only matter through the noise
    one, three = (sample(same, Guidance(weight), [None], [0], steps=3, seed=7) for weight in (1.0, 3.0))
    assert torch.allclose(one, three, atol=1e-5)
    told = sample(same, Guidance(1.0), ["a", "b"], [0, 0], steps=3, seed=7)
    assert not torch.allclose(told[0], told[1], atol=0.01)


def refused(tmp_path, base, name="tuned", model: Denoiser | None = None) -> str:
    shape = (3, 16, 16)
    model = load(tmp_path / name, shape, CPU) if model is None else model
    with pytest.raises(UserError, match=r"attack\.finetuning\.base") as caught:
        load_base(model, tmp_path / name, tmp_path / base, shape)
    return caught.value.problem


def test_models_that_do_not_fit_are_refused(tmp_path):
    base, _ = two_pipelines(tmp_path)
    tuned = load(tmp_path / "tuned", (3, 16, 16), CPU)
    assert "another autoencoder" in refused(tmp_path, "other", model=tuned)
    assert "nothing was fine-tuned" in refused(tmp_path, "base", "base")
    base.vae.register_to_config(scaling_factor=0.5)
    base.save_pretrained(tmp_path / "scaled", safe_serialization=True)
    assert "scaling_factor 0.5" in refused(tmp_path, "scaled", model=tuned)
    base.vae.register_to_config(scaling_factor=0.3)
    base.scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    base.save_pretrained(tmp_path / "velocity", safe_serialization=True)
    assert "predicts v_prediction, the fine-tuned model epsilon" in refused(tmp_path, "velocity", model=tuned)
    base.scheduler = DDIMScheduler(beta_schedule="linear")
    base.save_pretrained(tmp_path / "linear", safe_serialization=True)
    assert "noise schedule" in refused(tmp_path, "linear", model=tuned)
    DDIMPipeline(unet(3, 16), schedule()).save_pretrained(tmp_path / "pixels")
    assert "is conditioned on none, the fine-tuned model caption" in refused(tmp_path, "pixels", model=tuned)


def test_pixel_models_that_do_not_fit_are_refused(tmp_path):
    DDIMPipeline(unet(3, 16), schedule()).save_pretrained(tmp_path / "pixels")
    DDIMPipeline(unet(3, 16, classes=2), schedule()).save_pretrained(tmp_path / "two")
    DDIMPipeline(unet(3, 16, classes=3), schedule()).save_pretrained(tmp_path / "three")
    DDIMPipeline(unet(3, 8), schedule()).save_pretrained(tmp_path / "small")
    assert "is conditioned on class" in refused(tmp_path, "two", "pixels")
    assert "has a condition of 3, the fine-tuned model 2" in refused(tmp_path, "three", "two")
    assert "x_0 of (3, 8, 8)" in refused(tmp_path, "small", "pixels")
    assert "model_index.json" in refused(tmp_path, "nowhere", "pixels")


def test_an_autoencoder_stored_in_half_precision_is_the_same(tmp_path):
    base, _ = two_pipelines(tmp_path)
    base.vae.half().save_pretrained(tmp_path / "base" / "vae", safe_serialization=True)
    tuned = load(tmp_path / "tuned", (3, 16, 16), CPU)
    assert load_base(tuned, tmp_path / "tuned", tmp_path / "base", (3, 16, 16)).shape == (4, 8, 8)


def test_other_schedules_are_refused():
    pictures = ideal.memoriser(fabricated.blobs(0, 2))
    with pytest.raises(UserError, match="has timesteps 10, the fine-tuned model 1000"):
        pair_of(ideal.denoiser(pictures), ideal.denoiser(pictures, timesteps=10), (1, 16, 16))
