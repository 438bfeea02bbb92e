"""Detectors of memorised prompts: one score per prompt from the weights alone, without a training picture (high = memorised).

They cost a few passes of the network per prompt, the attack itself hundreds of whole generations: so the prompts can be put in
order before the budget is spent (`eval.prefilter` measures what is lost by it).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from defenses.errors import UserError
from defenses.ranks import together
from defenses.seeding import derive, generator
from eval.denoiser import Condition, Denoiser

TRAJECTORY = 50  # steps of the DDIM trajectory whose first ones `wen` looks at
GUIDANCE = 7.5  # of both authors


@dataclass(kw_only=True)
class PrefilterConfig:
    """Section ``attack.prefilter``."""

    # wen: difference that the caption makes to the predicted noise (Wen et al. 2024); webster: distance that one step of the
    # sampler goes (Webster 2023)
    detector: Literal["wen", "webster"] = "wen"
    draws: int = 4  # start noises that a score is the mean over
    steps: int = 1  # wen: steps of the sampler, from pure noise on, that a score is the mean over; at most 50
    guidance: float = GUIDANCE  # its scale in webster's step, and between the steps of wen
    batch_size: int = 16  # prompts in one pass of the network

    def __post_init__(self):
        for key, most in (("draws", 1000), ("steps", TRAJECTORY), ("batch_size", 100_000)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"attack.prefilter.{key}", f"{getattr(self, key)} is not in 1..{most}", "lower it")
        if not 0 <= self.guidance <= 100:
            raise UserError("attack.prefilter.guidance", f"{self.guidance} is not in 0..100", "7.5 is usual")
        if self.detector == "webster" and self.steps != 1:
            raise UserError("attack.prefilter.steps", "webster takes a single step", "set it to 1, or detector=wen")


def score(
    denoiser: Denoiser, prompts: Sequence[str], config: PrefilterConfig, seed: int, accelerator: Any
) -> np.ndarray:
    """Scores of the detector that the configuration names, float64 [P], on every rank."""
    common = {"draws": config.draws, "guidance": config.guidance, "seed": seed, "batch_size": config.batch_size}
    if config.detector == "wen":
        return wen(denoiser, prompts, steps=config.steps, **common, accelerator=accelerator)
    return webster(denoiser, prompts, **common, accelerator=accelerator)


def ordered(prompts: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Prompts, the highest score first; equal ones stay as they were."""
    return [prompts[place] for place in sorted(range(len(prompts)), key=lambda place: -scores[place])]


def wen(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    draws: int = 4,
    steps: int = 1,
    guidance: float = GUIDANCE,
    seed: int,
    batch_size: int,
    accelerator: Any = None,
) -> np.ndarray:
    """Magnitude of the text-conditional noise prediction, float64 [P] (Wen et al. 2024).

    ||epsilon(x_t, caption) - epsilon(x_t, null)||_2 over all latent dimensions, mean over start noises and over the first
    ``steps`` steps of a guided DDIM trajectory of 50. It begins at the last timestep with signal; the authors' program begins
    at t = 981 of 1000, and takes the output of the network, whatever that predicts, where this is always the noise.

    Args:
        denoiser: of a text-to-image model.
        draws: start noises per prompt, each a function of (seed, prompt, draw), the same for every model.
        guidance: scale of the trajectory; without effect where ``steps`` is 1.
        batch_size: prompts in one pass of the network.
        accelerator: shares the batches among all ranks; null: this process alone.

    Raises:
        UserError: the model takes no captions, or predicts no finite numbers.
    """
    timesteps = _trajectory(denoiser)[:steps]

    def measure(chunk: "_Chunk") -> torch.Tensor:
        found = [
            norm for draw in range(draws) for norm in _magnitudes(chunk, chunk.start(seed, draw), timesteps, guidance)
        ]
        return torch.stack(found).double().mean(0)

    return _collect(denoiser, prompts, measure, batch_size, accelerator)


def _magnitudes(chunk: "_Chunk", x: torch.Tensor, timesteps: Sequence[int], guidance: float) -> Iterator[torch.Tensor]:
    """||epsilon(x_t, caption) - epsilon(x_t, null)||_2 of each prompt at each step of the trajectory from ``x`` on, [B] each."""
    for place, timestep in enumerate(timesteps):
        given, null = chunk.both(chunk.denoiser.epsilon, x, timestep)
        yield (given - null).flatten(1).norm(dim=1)
        if place + 1 < len(timesteps):
            guided = null + guidance * (given - null)
            clean = chunk.denoiser.clean(x, guided, chunk.at(timestep))
            x = chunk.denoiser.noised(clean, guided, chunk.at(timesteps[place + 1]))


def webster(
    denoiser: Denoiser,
    prompts: Sequence[str],
    *,
    draws: int = 1,
    guidance: float = GUIDANCE,
    seed: int,
    batch_size: int,
    accelerator: Any = None,
) -> np.ndarray:
    """Denoising confidence of one step, mean((z_0 - z_1)^2), float64 [P] (Webster 2023, white-box attack).

    One step of Heun's method in the variables of Karras et al. (2022), from pure noise z_0 of standard deviation sigma_max to
    sigma = 0 under guidance. A step that ends at 0 has no second evaluation (their algorithm 1), so z_1 is the predicted x_0. As
    in the authors' program all prompts meet the same start noises, here a function of (seed, draw) and not of the prompt: their
    own size would hide the differences between prompts. Arithmetic is float32 (theirs: float16), several draws are averaged
    (theirs keeps the last one).

    Args, Raises: as `wen`.
    """
    last = _last(denoiser)

    def measure(chunk: "_Chunk") -> torch.Tensor:
        found = []
        for draw in range(draws):
            noise = chunk.noise(seed, draw)
            signal, spread = denoiser.rates(chunk.at(last), noise)
            given, null = chunk.both(denoiser.predict_clean, spread * noise, last)
            step = noise * (spread / signal) - (null + guidance * (given - null))  # z_0 - z_1
            found.append(step.double().square().flatten(1).mean(1))
        return torch.stack(found).mean(0)

    return _collect(denoiser, prompts, measure, batch_size, accelerator)


@dataclass
class _Chunk:
    """One batch of prompts.

    Attributes:
        given, null: what the network is told of the prompts, and of none, each [B, ...].
    """

    denoiser: Denoiser
    prompts: Sequence[str]
    given: Condition
    null: Condition

    def at(self, timestep: int) -> torch.Tensor:
        """The timestep of every prompt, int64 [B]."""
        return torch.full((len(self.prompts),), timestep, device=self.denoiser.device)

    def start(self, seed: int, draw: int) -> torch.Tensor:
        """Pure noise of every prompt's own, float32 [B, c, h, w]."""
        keys = [(derive(0, prompt), draw) for prompt in self.prompts]
        return self._normal([generator(seed, "detector/start", *key) for key in keys])

    def noise(self, seed: int, draw: int) -> torch.Tensor:
        """Pure noise that is the same for all prompts, float32 [B, c, h, w]."""
        return self._normal([generator(seed, "detector/common", draw)]).expand(len(self.prompts), *self.denoiser.shape)

    def both(self, predicted: Callable, x: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``predicted(x, timesteps, condition)`` with and without the prompts, each [B, c, h, w]."""
        return predicted(x, self.at(timestep), self.given), predicted(x, self.at(timestep), self.null)

    def _normal(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return torch.stack([torch.randn(self.denoiser.shape, generator=g) for g in generators]).to(self.denoiser.device)


def _last(denoiser: Denoiser) -> int:
    """The last timestep at which signal is left: where there is none, predicted noise does not depend on the network. Of a flow the
    last with a hundredth: noise differs by 1 - s times what the outputs do, which would drown in rounding."""
    least = 0 if denoiser.levels is None else 1e-4
    return int(torch.nonzero(denoiser.alphas_cumprod > least)[-1])


def _trajectory(denoiser: Denoiser) -> list[int]:
    """Timesteps of a sampler of 50 steps, from the last one down (diffusers: "trailing")."""
    count = _last(denoiser) + 1
    steps = min(TRAJECTORY, count)
    return [round(count - step * count / steps) - 1 for step in range(steps)]


def _collect(
    denoiser: Denoiser,
    prompts: Sequence[str],
    measure: Callable[[_Chunk], torch.Tensor],
    batch_size: int,
    accelerator: Any,
) -> np.ndarray:
    """``measure`` of all prompts, batch after batch, shared among the ranks; each rank returns all, float64 [P]."""
    if denoiser.kind != "caption" or denoiser.null is None:
        raise UserError("attack.prefilter", "scores prompts, and this model takes none", "set it to null")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    starts = range(0, len(prompts), batch_size)[rank::world]

    def work() -> list[tuple[int, np.ndarray]]:
        return list(_batches(denoiser, prompts, measure, batch_size, starts, quiet=rank > 0))

    parts = work() if accelerator is None else gather_object(together(accelerator, work))
    found = np.concatenate([np.zeros(0)] + [part for _, part in sorted(parts, key=lambda pair: pair[0])])
    if not np.isfinite(found).all():
        count = int((~np.isfinite(found)).sum())
        raise UserError("attack.prefilter", f"the model predicts no finite noise for {count} prompts", "set it to null")
    return found


@torch.no_grad()
def _batches(
    denoiser: Denoiser, prompts: Sequence[str], measure: Callable, batch_size: int, starts: Sequence[int], quiet: bool
) -> Iterator[tuple[int, np.ndarray]]:
    for start in tqdm(starts, desc="score prompts", unit="batch", disable=quiet):
        some = prompts[start : start + batch_size]
        chunk = _Chunk(denoiser, some, denoiser.condition(some), denoiser.null(len(some)))
        yield start, measure(chunk).double().cpu().numpy()
