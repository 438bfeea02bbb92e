"""CLiD: how much a caption helps a text-to-image model with a picture (Zhai et al. 2024)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.scores import Probe, chunk_losses

KEPT = (0.75, 0.5, 0.25, 0.0)  # shares of a caption's words that its reductions keep; the last one is the null caption
PLACES = (0.44, 0.45, 0.46)  # of the schedule (Zhai et al. 2024, section 5.1: t = 440, 450, 460)
MIX = 0.5  # weight of the discrepancy against the loss; the authors tune it on shadow models, here it is fixed


def reduced(caption: str, kept: float) -> str:
    """The first words of a caption. (The authors also clip by the importance of words, which needs a language model.)"""
    words = caption.split()
    return " ".join(words[: int(len(words) * kept)])


def clid(probe: Probe) -> np.ndarray:
    """Robustly scaled mix of the conditional likelihood discrepancy and of the loss, float64 [N] (Zhai et al. 2024, section 4).

    Discrepancy: loss under a reduced caption minus loss under the caption, mean over reductions and timesteps, same noise. A
    model that has learnt a picture by heart needs the caption that it was learnt with.

    Args:
        probe: its conditions are captions.
    """
    timesteps = [probe.denoiser.timestep(place) for place in PLACES]
    own = _losses(probe, timesteps)
    others = [
        _losses(replace(probe, conditions=[reduced(caption, kept) for caption in probe.conditions]), timesteps)
        for kept in KEPT
    ]
    return mixed(np.mean(others, axis=0) - own, own)


def mixed(discrepancy: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Both on one scale, float64 [N]: larger discrepancy, smaller loss, larger score."""
    return MIX * _robust(discrepancy) - (1 - MIX) * _robust(loss)


def _losses(probe: Probe, timesteps: Sequence[int]) -> np.ndarray:
    return probe.collect(lambda chunk: chunk_losses(chunk, timesteps, 1, False)).mean((1, 2, 3))


def _robust(values: np.ndarray) -> np.ndarray:
    """Distance from the median in interquartile ranges of all records, members or not: no label is used."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return (values - middle) / (high - low if high > low else 1.0)
