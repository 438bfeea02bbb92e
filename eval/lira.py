"""LiRA: is the loss of a record that of models trained on it, or that of models trained without it?

Carlini et al. 2022 ("Membership inference attacks from first principles") for the statistic, Carlini et al. 2023
("Extracting training data from diffusion models", section 5.2) for diffusion models: the raw loss at one timestep, and its
mean over 20 draws of the noise and over the mirror image ("Strong LiRA").
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from defenses.errors import UserError

FEWEST_FOR_OWN_VARIANCE = (
    64  # shadows; with fewer one variance for all records does better (Carlini et al. 2022, figure 9)
)


@dataclass(kw_only=True)
class LiraConfig:
    """Section ``attack.membership.lira``: shadow models and what is done with them; {} takes the defaults."""

    shadows: int = (
        16  # models trained like the run's, each on a random half of its training and held-out pictures; even
    )
    # of the Gaussians: one for all records, one for each, or auto: global below 64 shadows
    variance: Literal["auto", "global", "per-record"] = "auto"
    statistic: Literal["loss", "log-loss"] = "loss"  # what is taken as normally distributed over models

    def __post_init__(self) -> None:
        if self.shadows < 4 or self.shadows % 2:
            raise UserError(
                "attack.membership.lira.shadows", f"is {self.shadows}", "take an even number of at least 4; 16 is usual"
            )

    @property
    def own_variance(self) -> bool:
        """Whether every record has its own variance."""
        many = self.shadows >= FEWEST_FOR_OWN_VARIANCE
        return self.variance == "per-record" or (self.variance == "auto" and many)


def scores(target: np.ndarray, shadows: np.ndarray, trained: np.ndarray, config: LiraConfig) -> dict[str, np.ndarray]:
    """Scores of every variant, float64 [N] each, larger for a member.

    Args:
        target: losses of the attacked model, float64 [N, draws, views]; draw 0 of view 0 is what plain LiRA looks at.
        shadows: losses of the shadow models under the same noise, float64 [S, N, draws, views].
        trained: whether each shadow was trained on each record, bool [S, N]; at least two are, and two are not.

    Returns:
        ``lira``, ``lira-strong``: likelihood ratio (online); ``lira-offline``, ``lira-strong-offline``: from those
        shadows alone that were not trained on the record.
    """
    found = {}
    for name, (own, others) in {
        "lira": (target[:, 0, 0], shadows[:, :, 0, 0]),
        "lira-strong": (target.mean((1, 2)), shadows.mean((2, 3))),
    }.items():
        if config.statistic == "log-loss":
            own, others = np.log(own), np.log(others)
        found[name] = likelihood_ratio(own, others, trained, config.own_variance)
        found[f"{name}-offline"] = one_sided(own, others, trained, config.own_variance)
    return found


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, trained: np.ndarray, own_variance: bool) -> np.ndarray:
    """log p(loss | trained on) - log p(loss | not), both Gaussian over models, float64 [N].

    Args:
        target: statistic of the attacked model, float64 [N].
        shadows: of the shadows, float64 [S, N].
        trained: bool [S, N].
        own_variance: a variance for each record, or one for all.
    """
    return _log_density(target, *_normal(shadows, trained, own_variance)) - _log_density(
        target, *_normal(shadows, ~trained, own_variance)
    )


def one_sided(target: np.ndarray, shadows: np.ndarray, trained: np.ndarray, own_variance: bool) -> np.ndarray:
    """By how many standard deviations the loss is below that of models without the record, float64 [N].

    Ranks records as the tail probability of the offline attack of Carlini et al. 2022 does, which would saturate at 1.
    """
    mean, deviation = _normal(shadows, ~trained, own_variance)
    return (mean - target) / deviation


def _normal(values: np.ndarray, chosen: np.ndarray, own_variance: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the chosen models of each record, float64 [N] each.

    The common variance is that around each record's own mean: the spread between records is not chance of training.
    """
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0.0).sum(0) / count
    squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(0)
    variance = squares / (count - 1) if own_variance else np.full(len(mean), squares.sum() / (count - 1).sum())
    # models that agree to the last digit leave rounding as the only spread
    return mean, np.maximum(np.sqrt(variance), np.finfo(np.float64).eps * np.abs(mean) + np.finfo(np.float64).tiny)


def _log_density(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return -np.log(deviation) - ((values - mean) / deviation) ** 2 / 2 - np.log(2 * np.pi) / 2
