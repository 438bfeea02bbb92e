"""Prompt perturbation: AdamW in closed form, prompts by themselves, and the first step of real pipelines looked at from outside."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from defenses.base import SamplingContext
from defenses.errors import UserError
from defenses.perturbation import PipelineModel, perturb, perturbed
from defenses.promptperturbation import PromptPerturbation, PromptPerturbationConfig
from defenses.textmodel import TextCondition
from eval import samples
from eval.generations import save
from eval.source import Source
from tests.pipelines import stable_diffusion, stable_diffusion_xl

LENGTH, WIDTH, SHAPE = 3, 5, (2, 4, 4)
MIX = torch.randn(LENGTH * WIDTH, int(np.prod(SHAPE)), generator=torch.Generator().manual_seed(0))
MIX[:WIDTH] *= 0.05  # the first token, which nothing changes
NULL = torch.zeros(1, LENGTH, WIDTH)


def linear(latents, timesteps, text, pooled=None):
    """Predicted noise that is linear in the text: the magnitude of a prompt is ||text MIX||."""
    return 0.3 * latents + (text.flatten(1) @ MIX).reshape(len(text), *SHAPE)


def magnitude(text):
    return (text.flatten(1) @ MIX).norm(dim=1)


def texts(count, seed=1, size=0.3):
    return size * torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(text, **options):
    latents = torch.randn(len(text), *SHAPE, generator=torch.Generator().manual_seed(2))
    return perturb(linear, text, NULL, latents, 999, **({"target": 1.0} | options))


def test_the_first_update_is_that_of_adamw():
    """Loshchilov and Hutter 2019: the first step is the sign of the gradient, after a decay of 1 % of the rate."""
    text = texts(4)
    found = run(text, steps=1, learning_rate=0.01)
    flat = text.flatten(1).double()
    gradient = (flat @ MIX.double() @ MIX.double().T) / magnitude(text)[:, None]
    expected = flat * (1 - 0.01 * 0.01) - 0.01 * gradient.sign()
    expected = torch.cat([text[:, :1], expected.reshape(text.shape)[:, 1:]], dim=1)  # the first token stays
    assert torch.allclose(found.text.double(), expected, atol=1e-6)
    assert torch.allclose(found.before, magnitude(text), rtol=1e-5)
    assert torch.allclose(found.after, magnitude(found.text), rtol=1e-5) and (found.after < found.before).all()
    assert found.updates.tolist() == [1] * 4


def test_each_prompt_stops_by_itself():
    """Targets between the magnitudes: what is below stays to the bit, the others go just below, as each would alone."""
    text = texts(6) * torch.tensor([0.05, 1.0, 0.4, 0.02, 1.5, 0.7])[:, None, None]
    own = magnitude(text)
    target = float(own.sort().values[2:4].mean())
    found = run(text, target=target, steps=100, learning_rate=0.01)
    still = own <= target
    assert still.sum() == 3 and torch.equal(found.text[still], text[still]) and (found.updates[still] == 0).all()
    assert (found.after <= target).all() and (found.updates[~still] > 1).all() and len(set(found.updates.tolist())) >= 3
    for row in range(6):
        alone = run(text[row : row + 1], target=target, steps=100, learning_rate=0.01)
        assert torch.allclose(alone.text[0], found.text[row], atol=1e-5)
        assert alone.updates[0] == found.updates[row]
        if not still[row]:  # one update less would not have been enough
            short = run(text[row : row + 1], target=target, steps=int(found.updates[row]) - 1, learning_rate=0.01)
            assert short.after[0] > target


def test_the_best_embedding_is_kept_where_the_target_is_not_reached():
    """A rate that overshoots: no result is worse than the prompt itself, and the least magnitude seen is returned."""
    text = texts(8, size=0.05)
    found = run(text, target=1e-6, steps=6, learning_rate=0.5)
    seen = torch.stack([run(text, target=1e-6, steps=k, learning_rate=0.5).after for k in range(7)])
    assert torch.equal(found.after, seen.min(dim=0).values) and (found.after <= found.before).all()
    assert torch.allclose(magnitude(found.text), found.after, rtol=1e-4)
    assert (found.updates == 0).any() and torch.equal(found.text[found.updates == 0], text[found.updates == 0])


class Recorder:
    """What the network of a pipeline is given at its first step."""

    def __init__(self, unet: UNet2DConditionModel):
        self.unet, self.calls = unet, []
        self.handle = unet.register_forward_pre_hook(
            lambda module, args, options: self.calls.append((args, options)), with_kwargs=True
        )

    def magnitude(self, as_noise: float) -> torch.Tensor:
        """Of the conditional half against the unconditional one: both as the pipeline itself gave them."""
        self.handle.remove()
        args, options = self.calls[0]
        with torch.no_grad():
            null, given = self.unet(*args, **options)[0].chunk(2)
        return as_noise * (given - null).flatten(1).norm(dim=1)


def unchanged(pipeline):
    """Arguments under a target that nothing exceeds, the images they give, and what the network saw."""
    generator = torch.Generator().manual_seed(5)
    plain = perturbed(pipeline, PROMPTS, target=1e9, generator=generator, num_inference_steps=2)
    recorder = Recorder(pipeline.unet)
    images = pipeline(**plain, num_inference_steps=2, output_type="np").images
    return plain, images, recorder


PROMPTS = ["a chest x ray", "left lung clear"]


@pytest.mark.parametrize(
    ("make", "scheduler", "prediction"),
    [
        (stable_diffusion, DDIMScheduler, "epsilon"),
        (stable_diffusion, DDIMScheduler, "v_prediction"),
        (stable_diffusion, EulerDiscreteScheduler, "epsilon"),
        (stable_diffusion, DPMSolverMultistepScheduler, "epsilon"),
        (stable_diffusion_xl, EulerDiscreteScheduler, "epsilon"),
    ],
)
def test_the_first_step_of_a_pipeline_is_what_was_aimed_at(tmp_path, make, scheduler, prediction):
    torch.manual_seed(3)
    pipeline = make(tmp_path, prediction) if make is stable_diffusion else make(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    first = PipelineModel(pipeline, 2).first_timestep
    as_noise = float(pipeline.scheduler.alphas_cumprod[first].sqrt()) if prediction == "v_prediction" else 1.0
    plain, images, recorder = unchanged(pipeline)
    before = recorder.magnitude(as_noise)
    assert round(float(recorder.calls[0][0][1])) == first
    # below every magnitude nothing is changed: the images are those of the prompts themselves
    theirs = pipeline(PROMPTS, latents=plain["latents"], num_inference_steps=2, output_type="np").images
    assert np.allclose(images, theirs, atol=1e-5)
    target = 0.6 * float(before.min())
    changed = perturbed(
        pipeline,
        PROMPTS,
        target=target,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=2,
        steps=60,
        learning_rate=0.02,
    )
    assert torch.equal(changed["latents"], plain["latents"])
    assert torch.equal(changed["negative_prompt_embeds"], plain["negative_prompt_embeds"])
    recorder = Recorder(pipeline.unet)
    pipeline(**changed, num_inference_steps=2, output_type="np")
    after = recorder.magnitude(as_noise)
    assert (after <= target * 1.001).all() and (before > 1.5 * after).all()
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_half_precision_pipelines_get_arguments_of_their_own_kind(tmp_path):
    pipeline = stable_diffusion(tmp_path).to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    found = perturbed(pipeline, PROMPTS, target=1e-3, num_inference_steps=2, steps=2)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert np.isfinite(pipeline(**found, num_inference_steps=2, output_type="np").images).all()


def test_other_pipelines_are_refused():
    with pytest.raises(UserError, match="no Stable Diffusion"):
        perturbed(SimpleNamespace(scheduler=None), ["a"], target=1.0)


class FakeModel:
    """A text model in closed form: a prompt is as many units of text as it has letters."""

    first_timestep = 999

    def __init__(self, pooled=False):
        self.pooled = pooled

    def encode(self, prompts):
        text = torch.stack([texts(1, seed=len(prompt))[0] * len(prompt) / 4 for prompt in prompts])
        return text, torch.full((len(prompts), 2), 7.0) if self.pooled else None

    def null(self):
        return NULL, torch.zeros(1, 2) if self.pooled else None

    def start(self, prompts, indices):
        return torch.stack(
            [torch.full(SHAPE, float(index + len(prompt))) for prompt, index in zip(prompts, indices, strict=True)]
        )

    def predict(self, latents, timesteps, text, pooled):
        assert (timesteps == 999).all() and (pooled is None) == (not self.pooled)
        # the start noise matters: what a prompt does grows with it
        return linear(latents, timesteps, text) * (1 + latents.flatten(1).mean(1))[:, None, None, None] / 40


class Sampled:
    """A sampler that notes what it was told."""

    def __init__(self):
        self.told = {}

    def __call__(self, indices, conditions):
        self.told |= {
            (int(index), getattr(each, "prompt", each)): each for index, each in zip(indices, conditions, strict=True)
        }
        return torch.zeros(len(indices), 1, 4, 4)


def context(folder, model, rank=0):
    accelerator = SimpleNamespace(process_index=rank)
    return SamplingContext(None, np.zeros(0, np.int64), folder, accelerator, text_model=model)


CONDITIONS = ["a", "a long prompt", "b", "a long prompt", "medium"]


def sampled(folder, model=None, calls=((0, 1, 2, 3, 4),), rank=0, **settings):
    defense, inner = (
        PromptPerturbation(PromptPerturbationConfig(**({"target": 4.0, "steps": 50} | settings))),
        Sampled(),
    )
    guarded = defense.wrap_sampler(inner, context(folder, model or FakeModel(), rank))
    for call in calls:
        guarded([10 + k for k in call], [CONDITIONS[k] for k in call])
    return defense, inner.told


@pytest.mark.parametrize("pooled", [False, True])
def test_the_sampler_is_told_what_is_below_the_target(tmp_path, pooled):
    model = FakeModel(pooled)
    defense, told = sampled(tmp_path, model)
    assert told[10, "a"] == "a" and told[12, "b"] == "b"  # these stay prompts
    for index, prompt in ((11, "a long prompt"), (13, "a long prompt"), (14, "medium")):
        each = told[index, prompt]
        assert isinstance(each, TextCondition) and (each.pooled is not None) == pooled
        latents, (own, more) = model.start([prompt], [index]), model.encode([prompt])
        time = torch.tensor([999])
        given, null = (model.predict(latents, time, x, more) for x in (each.text[None], NULL))
        assert (given - null).norm() <= 4.0 * (1 + 1e-5)
        assert (model.predict(latents, time, own, more) - null).norm() > 4.0
        assert pooled is False or torch.equal(each.pooled, more[0])
    first, second = told[11, "a long prompt"].text, told[13, "a long prompt"].text
    assert not torch.equal(first, second)  # of the start noise of each image


def test_the_embedding_is_a_function_of_prompt_and_index(tmp_path):
    _, together = sampled(tmp_path / "a")
    _, apart = sampled(tmp_path / "b", calls=((3, 0), (4,), (1,), (2,)), batch_size=1)
    for key, each in together.items():
        same = each == apart[key] if isinstance(each, str) else torch.allclose(each.text, apart[key].text, atol=1e-5)
        assert same


def test_findings_count_every_image_once_over_ranks_and_stops(tmp_path):
    sampled(tmp_path, calls=((0, 1), (2,)), rank=1)
    defense, _ = sampled(tmp_path, calls=((2, 3), (4,), (2,)))
    found = defense.findings()
    model, own = FakeModel(), []
    for place, prompt in enumerate(CONDITIONS):
        latents, time = model.start([prompt], [10 + place]), torch.tensor([999])
        text = model.encode([prompt])[0]
        own.append(float((model.predict(latents, time, text, None) - model.predict(latents, time, NULL, None)).norm()))
    assert (found["generations"], found["perturbed"], found["reached"]) == (5, 0.6, 1.0)
    assert found["magnitude_before_mean"] == pytest.approx(np.mean(own), rel=1e-4)
    assert found["magnitude_after_mean"] < 4 < found["magnitude_before_mean"] and found["updates_mean"] >= 1
    assert found["seconds_per_image"] > 0
    assert PromptPerturbation(PromptPerturbationConfig()).findings() is None
    log = b"".join(file.read_bytes() for file in (tmp_path / "prompt_perturbation").iterdir())
    assert b"long" not in log and defense.claim()["kind"] == "heuristic"


def test_an_embedding_of_another_defense_is_the_starting_point(tmp_path):
    defense, inner = PromptPerturbation(PromptPerturbationConfig(target=1e6)), Sampled()
    given = TextCondition("a", texts(1)[0])
    defense.wrap_sampler(inner, context(tmp_path, FakeModel()))([3], [given])
    assert inner.told[3, "a"] is given
    changing = PromptPerturbation(PromptPerturbationConfig(target=0.5, steps=1))
    changing.wrap_sampler(inner, context(tmp_path, FakeModel()))([3], [given])
    moved = inner.told[3, "a"].text - given.text
    assert torch.equal(moved[0], torch.zeros(WIDTH)) and torch.allclose(moved[1:].abs(), torch.tensor(0.05), atol=2e-3)


def test_what_is_changed_is_drawn_and_the_rest_is_read(tmp_path):
    """With the bare images on disk only the images of changed prompts are drawn again."""
    inner = Sampled()
    source = Source("prompted", inner, np.zeros(0, np.int64), {})
    for number in range(2):
        for index in range(2):
            save(tmp_path / f"{number:05d}" / f"{index:06d}.png", torch.full((1, 4, 4), 0.4))
    samples.reuse(source, tmp_path, ["a", "a long prompt"])
    images = source.draw([0, 1, 0], ["a", TextCondition("a long prompt", NULL[0]), "a long prompt"])
    assert [float(image.mean()) for image in images] == pytest.approx([0.4, 0.0, 0.4], abs=1e-6)
    assert list(inner.told) == [(1, "a long prompt")]


def test_models_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="text-to-image"):
        PromptPerturbation(PromptPerturbationConfig()).wrap_sampler(Sampled(), context(tmp_path, None))


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"target": 0.0}, "target"),
        ({"target": float("nan")}, "target"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_name_their_key(bad, key):
    with pytest.raises(UserError, match=f"defenses.prompt_perturbation.{key}"):
        PromptPerturbationConfig(**bad)
