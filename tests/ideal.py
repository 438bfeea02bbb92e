"""Denoisers in closed form, of which the right answer to an attack is known."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from eval.denoiser import Condition, Denoiser

Clean = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x_t [B, D], a_t [B, 1] -> E[x_0 | x_t] [B, D]


def alphas_cumprod(timesteps: int = 1000) -> torch.Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021), without its last, endless step; float32 [timesteps]."""
    angle = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps * 0.98 * torch.pi / 2
    return angle.cos().square().float()


def denoiser(clean: Clean, latent: bool = False, timesteps: int = 1000) -> Denoiser:
    """A denoiser whose prediction is the posterior mean of x_0; pixels in [-1, 1], clipped unless ``latent``."""
    signal = alphas_cumprod(timesteps)

    def predict(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return clean(x.flatten(1).double(), signal[t].double()[:, None]).reshape(x.shape).float()

    return Denoiser(
        network=nn.Identity(),
        alphas_cumprod=signal,
        prediction="sample",
        predict=predict,
        encode=lambda images: torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1,
        decode=lambda x: (x / 2 + 0.5).clamp(0, 1),
        condition=lambda values: {},
        kind="none",
        latent=latent,
        device=torch.device("cpu"),
    )


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Clean:
    """E[x_0 | x_t] of x_0 ~ N(mean [D], covariance [D, D])."""
    mean, covariance = torch.from_numpy(mean), torch.from_numpy(covariance)

    def clean(x: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        a = float(signal[0])
        gain = covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(len(mean), dtype=torch.float64))
        return mean + a**0.5 * (x - a**0.5 * mean) @ gain.T

    return clean


def memoriser(images: np.ndarray) -> Clean:
    """E[x_0 | x_t] of the empirical distribution of pictures, uint8 [N, C, H, W]: what a perfectly trained network would
    predict, which generates its training pictures and nothing else (Gu et al. 2023, equation 2)."""
    pictures = torch.from_numpy(images.reshape(len(images), -1)).double() / 127.5 - 1

    def clean(x: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(x, signal[:1].sqrt() * pictures).square()
        return torch.softmax(-distance / (2 * (1 - signal)), dim=1) @ pictures

    return clean


def isotropic(variance: float) -> Clean:
    """E[x_0 | x_t] of x_0 ~ N(0, variance) in every dimension."""
    return lambda x, signal: signal.sqrt() * variance * x / (signal * variance + 1 - signal)


def partial_memoriser(images: np.ndarray, mass: float, variance: float) -> Clean:
    """E[x_0 | x_t] where x_0 is one of the pictures, uint8 [N, C, H, W], with probability ``mass``, else ~ N(0, variance)."""
    pictures, rest = torch.from_numpy(images.reshape(len(images), -1)).double() / 127.5 - 1, isotropic(variance)
    size = pictures.shape[1]

    def clean(x: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        a = float(signal[0])
        spread = a * variance + 1 - a
        of_each = -torch.cdist(x, a**0.5 * pictures).square() / (2 * (1 - a))
        inside = np.log(mass / len(pictures)) + torch.logsumexp(of_each, 1) - size / 2 * np.log(1 - a)
        outside = np.log(1 - mass) - x.square().sum(1) / (2 * spread) - size / 2 * np.log(spread)
        share = torch.sigmoid(inside - outside)[:, None]
        return share * (torch.softmax(of_each, 1) @ pictures) + (1 - share) * rest(x, signal)

    return clean
