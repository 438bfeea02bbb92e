"""Gradients of the loss on single records, as white-box attacks read them (Pang et al. 2023, GSA)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from eval.denoiser import Denoiser
from eval.scores import Chunk, Probe


def equally_spaced(timesteps: int, count: int) -> list[int]:
    """``count`` timesteps in the middle of as many equal stretches of a schedule of ``timesteps``."""
    return [int((place + 0.5) * timesteps / count) for place in range(count)]


def gradient_features(
    denoiser: Denoiser,
    images: Any,
    conditions: Sequence[Any],
    rows: np.ndarray,
    *,
    timesteps: Sequence[int],
    seed: int,
    accelerator: Accelerator,
    batch: int,
) -> np.ndarray:
    """Norm of the gradient with respect to every tensor of weights (Pang et al. 2023, section 4.2, GSA1).

    The loss is the mean over ``timesteps`` of the squared error of the predicted noise, one draw each, so that one backward
    pass serves all of them. Its noise is that of `scores.loss_values`' first draw: the same for every model.

    Args:
        images, conditions, rows, seed, accelerator: as in `scores.loss_values`.
        timesteps: K of them; one picture at a time is noised to all.
        batch: pictures read and encoded together.

    Returns:
        float64 [N, tensors], on every rank, in the order of ``denoiser.network.parameters()``; their root of sum of squares is
        the norm of the whole gradient.
    """
    probe = Probe(denoiser, images, conditions, rows, seed, accelerator, batch)
    with differentiable(denoiser.network) as weights:
        return probe.collect(lambda chunk: _norms(chunk, timesteps, weights))


@contextmanager
def differentiable(network: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All weights of a frozen network, which can be differentiated by inside of the block."""
    weights = list(network.parameters())
    before = [weight.requires_grad for weight in weights]
    try:
        yield [weight.requires_grad_(True) for weight in weights]
    finally:
        for weight, flag in zip(weights, before, strict=True):
            weight.requires_grad_(flag)


def _norms(chunk: Chunk, timesteps: Sequence[int], weights: list[nn.Parameter]) -> torch.Tensor:
    """float32 [B, tensors]."""
    x = chunk.clean()
    noise = torch.stack([chunk.noise(x, timestep, 0, 0) for timestep in timesteps], 1)  # [B, K, ...]
    times = torch.tensor(timesteps, device=x.device)
    found = []
    for place in range(len(x)):
        copies = x[place].expand(len(times), *x.shape[1:])
        condition = {name: value[place].expand(len(times), *value.shape[1:]) for name, value in chunk.condition.items()}
        noisy = chunk.denoiser.noised(copies, noise[place], times)
        loss = (chunk.denoiser.epsilon(noisy, times, condition) - noise[place]).square().mean()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        found.append(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    return torch.stack(found)
