"""Prompt perturbation at sampling (Wen et al. 2024): the embedding of a prompt is changed until the prompt pulls less.

A memorised prompt changes the noise that the network predicts far more than others do, from the first step on. The embedding is
optimised at that step, for the start noise of the image at hand, until the difference is no longer than a target.

With any Stable Diffusion 1.x, 2.x or XL pipeline, defended in training or not:

    pipeline = DiffusionPipeline.from_pretrained("runs/x/model")
    images = pipeline(**perturbed(pipeline, ["a cat"], target=3.0), num_inference_steps=50).images
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defenses.errors import UserError

STEPS, LEARNING_RATE = 10, 0.05  # of the authors' program

# (latents [B, c, h, w], timesteps int64 [B], text [B, L, D], pooled [B, P] or None) -> predicted noise [B, c, h, w]
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Perturbed:
    """Outcome of `perturb`.

    Attributes:
        text: float32 [B, L, D].
        before, after: magnitude of the given embedding and of ``text``, float32 [B]; ``after`` is never larger.
        updates: made to each embedding, int64 [B]; 0: ``text`` is the given one, to the bit.
    """

    text: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    updates: torch.Tensor


def perturb(
    predict: Predict,
    text: torch.Tensor,
    null: torch.Tensor,
    latents: torch.Tensor,
    timestep: int,
    *,
    target: float,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    pooled: torch.Tensor | None = None,
    null_pooled: torch.Tensor | None = None,
) -> Perturbed:
    """Changes embeddings by AdamW until ||epsilon(x, text) - epsilon(x, null)||_2 <= target (Wen et al. 2024, section 5).

    Each embedding has its own loss, and stops by itself: neither the others nor their number matter. The first token (begin
    of text) and the pooled embedding stay; the smallest magnitude seen counts (docs/prompt-perturbation.md: differences).

    Args:
        predict: differentiable in ``text``.
        text: float32 [B, L, D], of each image.
        null: float32 [1, L, D] or [B, L, D], what guidance leads away from.
        latents: float32 [B, c, h, w], what the network is given at the first step.
        timestep: of the first step.
        target: of the magnitude, over all dimensions of one image's latents; above 0.
        steps: updates at most.
        pooled, null_pooled: further embeddings, [B, P] and [1, P] or [B, P], for networks that take them.
    """
    count = len(text)
    times = torch.full((count,), timestep, device=latents.device)
    with torch.no_grad():
        reference = predict(latents, times, _rows(null, count), None if pooled is None else _rows(null_pooled, count))
    first, best = text[:, :1].detach(), text.detach().clone()
    leaves = [row[1:].detach().clone().requires_grad_() for row in text]
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate)
    before, after = [math.inf] * count, [math.inf] * count
    updates, active = [0] * count, list(range(count))
    for update in range(steps + 1):
        with torch.enable_grad():
            now = torch.cat([first[active], torch.stack([leaves[row] for row in active])], dim=1)
            predicted = predict(latents[active], times[active], now, None if pooled is None else pooled[active])
            magnitude = (predicted - reference[active]).float().flatten(1).norm(dim=1)
        for place, (row, value) in enumerate(zip(active, magnitude.tolist(), strict=True)):
            before[row] = value if update == 0 else before[row]
            if value < after[row]:
                after[row], updates[row], best[row] = (
                    value,
                    update,
                    now[place].detach() if update else text[row].detach(),
                )
        going = [place for place, row in enumerate(active) if after[row] > target]
        if update == steps or not going:
            break
        optimizer.zero_grad()
        some = [leaves[active[place]] for place in going]
        for leaf, gradient in zip(some, torch.autograd.grad(magnitude[going].sum(), some), strict=True):
            leaf.grad = gradient
        optimizer.step()  # leaves it those without a gradient as they are
        active = [active[place] for place in going]
    return Perturbed(best, torch.tensor(before), torch.tensor(after), torch.tensor(updates))


def perturbed(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    target: float,
    generator: torch.Generator | None = None,
    latents: torch.Tensor | None = None,
    num_inference_steps: int = 50,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, torch.Tensor]:
    """Arguments for a call of a Stable Diffusion 1.x, 2.x or XL pipeline that stand in for ``prompt``; see the module's example.

    Among them are the ``latents`` that the embeddings were changed for: with another start noise they protect less.

    Args:
        pipeline: of diffusers; is left as it is.
        prompts: one per image.
        target: of the magnitude (see `perturb`): what ordinary prompts have with this model and this size of latents. Wen et al.
            take 3 for Stable Diffusion 1.4.
        generator: of the start noise; null: torch's own.
        latents: start noise instead, standard normal [B, c, h, w]; null: drawn in the network's own size.
        num_inference_steps: as in the call that follows: it decides at which timestep sampling begins.

    Raises:
        UserError: the pipeline is of another kind.
    """
    model = PipelineModel(pipeline, num_inference_steps)
    unet, device = pipeline.unet, pipeline.device
    if latents is None:
        shape = (len(prompts), unet.config.in_channels, *_sizes(unet))
        where = "cpu" if generator is None else generator.device
        latents = torch.randn(shape, generator=generator, device=where)
    latents = latents.to(device, torch.float32)
    (text, pooled), (null, null_pooled) = model.encode(prompts), model.null()
    with _frozen(unet):
        found = perturb(
            model.predict, text, null, model.first_input(latents), model.first_timestep,
            target=target, steps=steps, learning_rate=learning_rate, pooled=pooled, null_pooled=null_pooled,
        )  # fmt: skip
    count, dtype = len(prompts), unet.dtype
    arguments = {"prompt_embeds": found.text, "negative_prompt_embeds": _rows(null, count), "latents": latents}
    if pooled is not None:
        arguments |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": _rows(null_pooled, count)}
    return {name: value.to(dtype) for name, value in arguments.items()}


class PipelineModel:
    """A diffusers pipeline of Stable Diffusion 1.x, 2.x or XL as a `defenses.textmodel.TextModel`, but for ``start``.

    Args:
        pipeline: is left as it is.
        num_inference_steps: of the sampling.

    Raises:
        UserError: the pipeline is of another kind.
    """

    def __init__(self, pipeline: Any, num_inference_steps: int):
        scheduler = getattr(pipeline, "scheduler", None)
        if not hasattr(pipeline, "encode_prompt") or not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                "pipeline",
                f"{type(pipeline).__name__} is no Stable Diffusion 1.x, 2.x or XL",
                "only these are perturbed",
            )
        self.pipeline, self._scheduler = pipeline, type(scheduler).from_config(scheduler.config)
        self._scheduler.set_timesteps(num_inference_steps, device=pipeline.device)
        self.first_timestep = round(float(self._scheduler.timesteps[0]))
        signal = float(scheduler.alphas_cumprod[self.first_timestep])
        kind = scheduler.config.get("prediction_type", "epsilon")
        # (a, b) with epsilon = a output + b x (Salimans and Ho 2022, appendix D)
        self._as_noise = {
            "epsilon": (1.0, 0.0),
            "v_prediction": (signal**0.5, (1 - signal) ** 0.5),
            "sample": (-((signal / (1 - signal)) ** 0.5), (1 - signal) ** -0.5),
        }[kind]

    def first_input(self, noise: torch.Tensor) -> torch.Tensor:
        """What the network is given at the first step, of start noise as the pipeline's ``latents``, [B, c, h, w]."""
        first = self._scheduler.timesteps[0]
        return self._scheduler.scale_model_input(noise * self._scheduler.init_noise_sigma, first)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of prompts, float32 [B, L, D], and pooled ones [B, P] for XL."""
        found = self._encoded(list(prompts))
        return found[0].float(), found[2].float() if len(found) == 4 else None

    @torch.no_grad()
    def null(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the pipeline's guidance leads away from, as `encode` of one prompt."""
        found = self._encoded([""])
        return found[1].float(), found[3].float() if len(found) == 4 else None

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """Predicted noise at the first timestep, float32 [B, c, h, w]."""
        unet, more = self.pipeline.unet, {}
        if pooled is not None:
            height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=unet.dtype, device=latents.device)
            more = {"added_cond_kwargs": {"text_embeds": pooled.to(unet.dtype), "time_ids": _rows(sizes, len(text))}}
        text = text.to(unet.dtype)
        output = unet(latents.to(unet.dtype), timesteps, encoder_hidden_states=text, return_dict=False, **more)[0]
        scale, shift = self._as_noise
        return scale * output.float() + shift * latents.float()

    def _encoded(self, prompts: list[str]) -> tuple[torch.Tensor | None, ...]:
        """(text, null) or (text, null, pooled, pooled null), as the pipeline itself makes them."""
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        return self.pipeline.encode_prompt(prompt=prompts, device=self.pipeline.device, **options)


def _sizes(unet: nn.Module) -> tuple[int, int]:
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _rows(value: torch.Tensor, count: int) -> torch.Tensor:
    """[1, ...] or [count, ...] as [count, ...]."""
    return value.expand(count, *value.shape[1:])


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the weights, whose graph would take memory; afterwards as before."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
