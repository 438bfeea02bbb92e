"""Detectors of memorised prompts: planted differences of known size, and one step of the sampler in closed form."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from torch import nn

from defenses.errors import UserError
from defenses.seeding import derive, generator
from eval.denoiser import Denoiser, load
from eval.detectors import PrefilterConfig, ordered, score, webster, wen
from tests.ideal import alphas_cumprod, gaussian
from tests.pipelines import stable_diffusion, stable_diffusion_xl

CPU = torch.device("cpu")
SHAPE = (2, 4, 4)
SIZES = {"a memorised prompt": 7.0, "another one": 2.5, "": 0.0}  # what a prompt adds to the noise; others: 1


def planted(prediction="epsilon", signal=None, size=None):
    """Predicted noise is 0.3 x, and along one axis each the prompt's own amount more: the difference has a known norm."""
    signal = alphas_cumprod() if signal is None else signal

    def epsilon(x, condition):
        added = torch.zeros_like(x)
        added[:, 0, 0, 0] = condition["amount"] * 0.6
        added[:, 1, 2, 3] = condition["amount"] * -0.8
        return 0.3 * x + added

    def predict(x, t, condition):
        a = signal[t].reshape(-1, 1, 1, 1)
        noise = epsilon(x, condition)
        if prediction == "epsilon":
            return noise
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        return clean if prediction == "sample" else a.sqrt() * noise - (1 - a).sqrt() * clean

    def amounts(prompts):
        return {"amount": torch.tensor([(size or (lambda p: SIZES.get(p, 1.0)))(prompt) for prompt in prompts])}

    return Denoiser(
        network=nn.Identity(), alphas_cumprod=signal, prediction=prediction, predict=predict, encode=None, decode=None,
        condition=amounts, kind="caption", latent=True, device=CPU, shape=SHAPE, null=lambda n: {"amount": torch.zeros(n)},
    )  # fmt: skip


PROMPTS = ["x", "a memorised prompt", "y", "another one", "z"]
TRUTH = [1.0, 7.0, 1.0, 2.5, 1.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 3])
def test_wen_is_the_planted_norm(prediction, steps):
    """Whatever the network predicts, whatever step of the trajectory: here the difference depends on the prompt alone."""
    found = wen(planted(prediction), PROMPTS, draws=2, steps=steps, seed=0, batch_size=2)
    assert found.dtype == np.float64 and found == pytest.approx(TRUTH, rel=2e-3)
    assert ordered(PROMPTS, found)[:2] == ["a memorised prompt", "another one"]


def test_wen_meets_the_noise_of_seed_prompt_and_draw():
    """A difference of the size of the noise itself: mean over draws of ||x_t|| / 10, from the documented seeds."""
    denoiser = planted()
    plain = denoiser.predict
    denoiser.predict = lambda x, t, condition: (
        plain(x, t, condition) + 0.1 * x * (condition["amount"] > 0)[:, None, None, None]
    )
    denoiser.condition = lambda prompts: {"amount": torch.full((len(prompts),), 1e-9)}
    found = wen(denoiser, PROMPTS, draws=3, seed=5, batch_size=3)
    noise = [[torch.randn(SHAPE, generator=generator(5, "detector/start", derive(0, prompt), draw)) for draw in range(3)]
             for prompt in PROMPTS]  # fmt: skip
    assert found == pytest.approx([np.mean([0.1 * x.norm().item() for x in each]) for each in noise], rel=1e-5)
    again = wen(denoiser, PROMPTS[::-1], draws=3, seed=5, batch_size=1)[::-1]
    assert again == pytest.approx(found, rel=1e-6)  # neither the batch nor the neighbours matter
    assert abs(wen(denoiser, PROMPTS, draws=3, seed=6, batch_size=3) - found).min() > 1e-4


def test_wen_follows_the_guided_trajectory_of_diffusers():
    """Three of 50 DDIM steps of diffusers with the same start, timesteps and guidance; the difference grows with x_t."""
    signal = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    denoiser = planted(signal=signal)
    plain = denoiser.predict
    denoiser.predict = lambda x, t, c: plain(x, t, c) + 0.2 * x * c["amount"].reshape(-1, 1, 1, 1)
    found = wen(denoiser, ["another one"], draws=1, steps=3, guidance=4.0, seed=1, batch_size=1)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    x = torch.randn(SHAPE, generator=generator(1, "detector/start", derive(0, "another one"), 0))[None]
    norms, own, null = [], denoiser.condition(["another one"]), denoiser.null(1)
    for timestep in scheduler.timesteps[:3]:
        t = timestep.expand(1)
        difference = denoiser.predict(x, t, own) - denoiser.predict(x, t, null)
        norms.append(difference.norm().item())
        x = scheduler.step(denoiser.predict(x, t, null) + 4.0 * difference, timestep, x).prev_sample
    assert scheduler.timesteps[:3].tolist() == [999, 979, 959]
    assert len({round(norm, 2) for norm in norms}) == 3
    assert found[0] == pytest.approx(np.mean(norms), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_webster_on_a_gaussian(prediction):
    """x_0 of a prompt is N(m, S): z_0 - z_1 = sigma n - m - S (S + sigma^2 I)^-1 (sigma n - m), in Karras' variables."""
    signal, dimension = alphas_cumprod(), int(np.prod(SHAPE))
    random = np.random.default_rng(0)
    root = random.standard_normal((dimension, dimension)) * 0.1
    covariance = root @ root.T + 0.05 * np.eye(dimension)
    means = {
        "": np.zeros(dimension),
        "x": random.standard_normal(dimension),
        "y": 3 * random.standard_normal(dimension),
    }
    names = list(means)

    def predict(x, t, condition):
        a = signal[t].double()[:, None]
        cleaned = [gaussian(means[names[k]], covariance)(x[[row]].flatten(1).double(), a[[row]])
                   for row, k in enumerate(condition["k"].tolist())]  # fmt: skip
        clean = torch.cat(cleaned)
        noise = (x.flatten(1).double() - a.sqrt() * clean) / (1 - a).sqrt()
        output = {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}
        return output[prediction].reshape(x.shape).float()

    denoiser = planted(prediction)
    denoiser.predict = predict
    denoiser.condition = lambda prompts: {"k": torch.tensor([names.index(prompt) for prompt in prompts])}
    denoiser.null = lambda count: {"k": torch.zeros(count, dtype=torch.int64)}
    found = webster(denoiser, ["x", "y"], draws=2, guidance=3.0, seed=4, batch_size=1)
    sigma = float(((1 - signal[-1]) / signal[-1]).sqrt())
    gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(dimension))
    expected = []
    for name in ("x", "y"):
        of_draws = []
        for draw in range(2):
            noise = torch.randn(SHAPE, generator=generator(4, "detector/common", draw)).numpy().ravel().astype(float)
            z0 = sigma * noise
            own, null = (means[key] + gain @ (z0 - means[key]) for key in (name, ""))
            of_draws.append(np.mean((z0 - null - 3.0 * (own - null)) ** 2))
        expected.append(np.mean(of_draws))
    assert found == pytest.approx(expected, rel=1e-3)


def test_webster_is_the_first_step_of_diffusers_heun_scheduler():
    """Karras' sigmas, one step: diffusers ends at sigma = 0, where Heun's method has no second evaluation."""
    signal = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    denoiser = planted(signal=signal)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    scheduler = HeunDiscreteScheduler(**betas, use_karras_sigmas=True, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    sigma = float(((1 - signal[-1]) / signal[-1]).sqrt())
    assert float(scheduler.sigmas[0]) == pytest.approx(sigma, rel=1e-4) and float(scheduler.sigmas[-1]) == 0
    z0 = sigma * torch.randn(SHAPE, generator=generator(0, "detector/common", 0))[None]
    x = scheduler.scale_model_input(z0, scheduler.timesteps[0])
    t = torch.tensor([999])
    own, null = (denoiser.predict(x, t, each) for each in (denoiser.condition(["another one"]), denoiser.null(1)))
    z1 = scheduler.step(null + 7.5 * (own - null), scheduler.timesteps[0], z0).prev_sample
    expected = (z0 - z1).square().mean().item()
    assert webster(denoiser, ["another one"], seed=0, batch_size=4)[0] == pytest.approx(expected, rel=1e-4)


def test_a_schedule_that_ends_without_signal_is_begun_before_its_end():
    signal = alphas_cumprod().clone()
    signal[-1] = 0.0
    for detector in (wen, webster):
        cut = planted("v_prediction", signal=alphas_cumprod()[:-1])
        expected = detector(cut, PROMPTS, draws=2, seed=0, batch_size=8)
        assert np.isfinite(expected).all()
        assert detector(planted("v_prediction", signal), PROMPTS, draws=2, seed=0, batch_size=8) == pytest.approx(
            expected
        )


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_of_saved_pipelines_called_by_hand(tmp_path, make):
    """The embedding of "" for Stable Diffusion, zeros for XL, as their own guidance has it."""
    pipeline, prompts = make(tmp_path), ["a chest x ray", "left lung"]
    denoiser = load(tmp_path, (3, 16, 16), CPU)
    assert denoiser.shape == (4, 8, 8)
    found = wen(denoiser, prompts, draws=1, seed=2, batch_size=2)
    encoded = pipeline.encode_prompt(prompts, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True)
    x = torch.stack([torch.randn(4, 8, 8, generator=generator(2, "detector/start", derive(0, p), 0)) for p in prompts])
    outputs = []
    for place in (0, 1):
        more = {}
        if len(encoded) == 4:
            sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
            more = {"added_cond_kwargs": {"text_embeds": encoded[2 + place], "time_ids": sizes}}
        with torch.no_grad():
            outputs.append(pipeline.unet(x, 999, encoder_hidden_states=encoded[place], **more).sample)
    assert found == pytest.approx((outputs[0] - outputs[1]).flatten(1).norm(dim=1).tolist(), rel=1e-4)
    assert found.min() > 0


class _Rank:
    """One of two processes, without the other: what it would hand to the others is looked at."""

    is_main_process = True

    def __init__(self, rank):
        self.process_index, self.num_processes = rank, 2


def test_ranks_share_the_batches(monkeypatch):
    sent = []
    monkeypatch.setattr("eval.detectors.together", lambda accelerator, work: work())
    monkeypatch.setattr("eval.detectors.gather_object", lambda parts: sent.extend(parts) or list(sent))
    whole = wen(planted(), PROMPTS, draws=1, seed=0, batch_size=2)
    wen(planted(), PROMPTS, draws=1, seed=0, batch_size=2, accelerator=_Rank(0))
    assert [start for start, _ in sent] == [0, 4]
    assert np.array_equal(wen(planted(), PROMPTS, draws=1, seed=0, batch_size=2, accelerator=_Rank(1)), whole)
    assert np.array_equal(wen(planted(), PROMPTS, draws=1, seed=0, batch_size=2), whole)


def test_what_cannot_be_scored_is_refused():
    for detector in (wen, webster):
        broken = planted(size=lambda prompt: float("nan"))
        with pytest.raises(UserError, match="no finite noise for 5 prompts"):
            detector(broken, PROMPTS, seed=0, batch_size=2)
        classes = planted()
        classes.kind = "class"
        with pytest.raises(UserError, match="takes none"):
            detector(classes, PROMPTS, seed=0, batch_size=2)
        assert detector(planted(), [], seed=0, batch_size=2).shape == (0,)


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"draws": 0}, "draws"),
        ({"steps": 51}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"guidance": -1.0}, "guidance"),
        ({"detector": "webster", "steps": 2}, "steps"),
    ],
)
def test_bad_settings_name_their_key(bad, key):
    with pytest.raises(UserError, match=f"attack.prefilter.{key}"):
        PrefilterConfig(**bad)


def test_the_configuration_chooses_the_detector():
    accelerator = Accelerator(cpu=True)
    by_wen = score(planted(), PROMPTS, PrefilterConfig(draws=1), 0, accelerator)
    assert by_wen == pytest.approx(TRUTH, rel=1e-4)
    by_webster = score(planted(), PROMPTS, PrefilterConfig(detector="webster", draws=2, guidance=2.0), 0, accelerator)
    assert by_webster == pytest.approx(webster(planted(), PROMPTS, draws=2, guidance=2.0, seed=0, batch_size=16))
