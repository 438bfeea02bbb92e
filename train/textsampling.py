"""Images of a text-to-image model: every one a function of (seed, prompt, sample index), whatever else is in its batch."""

from collections.abc import Callable, Sequence

import torch

from defenses.seeding import derive, generator
from train.conditioner import Condition
from train.diffusion import autocast
from train.latent import LatentModel, conditions_of, repeated, time_ids, to_channels, trained_conditions
from train.sampling import SamplerConfig


def latent_shape(model: LatentModel, size: int) -> tuple[int, int, int]:
    """(c, h, w) of the latents of pictures of ``size`` pixels."""
    side = size // model.parts.factor
    return model.network.config.in_channels, side, side


def start_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> torch.Tensor:
    """Start noise of one image, float32 of ``shape`` (c, h, w): of the prompt's text and the sample index alone."""
    return torch.randn(tuple(shape), generator=generator(seed, "sample", derive(0, prompt), int(index)))


@torch.no_grad()
def sample(
    model: LatentModel,
    config: SamplerConfig,
    indices: Sequence[int],
    shape: tuple[int, int, int],
    *,
    seed: int,
    prompts: Sequence[str],
    conditions: Condition | None = None,
    precision: str = "fp32",
    as_trained: bool = False,
    network: Callable | None = None,
) -> torch.Tensor:
    """Images for prompts and sample indices, float32 [n, C, H, W] in [0, 1], on the CPU.

    With ``guidance_scale`` s other than 1 the network's output is that without the caption plus s times the difference that the caption makes (Ho and
    Salimans 2022, in the form of diffusers' pipelines), at two network evaluations per step.

    Args:
        shape: (C, H, W) of one image; H = W.
        prompts: one per image.
        conditions: what to condition on in place of the prompts' own embeddings, one per image.
        as_trained: an empty prompt is the empty condition of training instead of the embedding of "" that a pipeline takes.
        network: what is called in place of the model's own network, e.g. its compiled form.
    """
    device = next(model.parameters()).device
    with autocast(device, precision):  # one block: within it the weights are converted once
        if conditions is None:
            conditions = (trained_conditions if as_trained else conditions_of)(model, prompts)
        return _sample(model, network, config, indices, shape, seed, prompts, conditions.to(device))


def _sample(model, network, config, indices, shape, seed, prompts, condition) -> torch.Tensor:
    size, device = shape[1], condition.text.device
    scheduler = model.kind.sampler(config)
    scheduler.set_timesteps(config.steps, device=device)
    own = latent_shape(model, size)
    latents = torch.stack([start_noise(seed, p, i, own) for p, i in zip(prompts, indices, strict=True)]).to(device)
    ids = torch.tensor([time_ids(size)] * len(latents), device=device)
    guided = config.guidance_scale != 1
    if guided:
        empty = model.conditioner.empty().to(device)
        condition, ids = joined(repeated(empty, len(latents)), condition), torch.cat([ids, ids])
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        output = model.kind.predict(inputs, timestep.expand(len(inputs)), condition, ids, network=network).float()
        if guided:
            without, with_caption = output.chunk(2)
            output = without + config.guidance_scale * (with_caption - without)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return to_channels(model.decode(latents), shape[0]).cpu()


def joined(first: Condition, second: Condition) -> Condition:
    """Both, one after the other in one batch."""
    pooled = None if second.pooled is None else torch.cat([first.pooled, second.pooled])
    return Condition(torch.cat([first.text, second.text]), pooled)
