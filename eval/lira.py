"""LiRA: is the loss of a record that of models trained on it, or that of models trained without it?

Carlini et al. 2022 ("Membership inference attacks from first principles") for the statistic, Carlini et al. 2023
("Extracting training data from diffusion models", section 5.2) for diffusion models: the raw loss at one timestep, and its
mean over 20 draws of the noise and over the mirror image ("Strong LiRA").
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from defenses.errors import UserError
from defenses.references import Rows
from eval import gsa
from eval.denoiser import Denoiser
from eval.gradients import equally_spaced, gradient_features
from eval.members import Candidates, conditions
from eval.roc import paired_delong
from eval.scores import loss_values
from eval.shadows import train_shadows
from eval.suite import Scene

PLACE = 0.1  # of the timestep in the schedule: t = 100 of 1000
GRADIENT_TIMESTEPS = 10
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


@dataclass
class ShadowScores:
    """What the attacks with shadow models say of every candidate.

    Attributes:
        scores: attack -> float64 [N], larger for a member: those of `scores`, and ``gsa``.
        vs_loss: attack -> the paired test of its AUC against that of the loss threshold under the same draws and views
            (`eval.roc.paired_delong`), with that attack's name (``loss`` or ``loss-strong``) under ``attack``; None where a
            score is NaN.
        settings: of all of them, JSON values.
    """

    scores: dict[str, np.ndarray]
    vs_loss: dict[str, dict[str, Any] | None]
    settings: dict[str, Any]


def shadow_attacks(
    scene: Scene, denoiser: Denoiser, who: Candidates, config: LiraConfig, *, draws: int, flips: bool, batch: int
) -> ShadowScores:
    """Trains the shadows (`eval.shadows`) and asks them and the model about every candidate. All ranks.

    Args:
        denoiser: the attacked model.
        draws, flips: of Strong LiRA.
        batch: images in one pass of the network.

    Raises:
        UserError: the model was not trained here, or its shadows cannot be.
    """
    dataset, accelerator, seed = scene.target.dataset, scene.accelerator, scene.config.run.seed
    shadows = train_shadows(config.shadows, scene.target, scene.config, accelerator)
    asked = {"images": Rows(dataset.images, who.rows), "rows": who.rows, "seed": seed}
    common = {"accelerator": accelerator, "batch": batch, **asked}
    at = [denoiser.timestep(PLACE)]
    spaced = equally_spaced(denoiser.timesteps, GRADIENT_TIMESTEPS)

    def losses(model: Denoiser) -> np.ndarray:
        known = conditions(model, who.records)
        found = loss_values(model, conditions=known, timesteps=at, draws=draws, flips=flips, **common)
        return found[:, 0]

    def gradients(model: Denoiser) -> np.ndarray:
        return gradient_features(model, conditions=conditions(model, who.records), timesteps=spaced, **common)

    key = {"rows": hashlib.sha256(who.rows.tobytes()).hexdigest(), "seed": seed}
    if denoiser.kind == "caption":  # original or rewritten
        key["captions"] = hashlib.sha256(json.dumps(conditions(denoiser, who.records)).encode()).hexdigest()
    told = {"timesteps": at, "draws": draws, "flips": flips}
    shape = dataset.images.shape[1:]
    trained = shadows.trained[:, who.rows]
    own, others = losses(denoiser), shadows.values("losses", key | told, losses, shape, accelerator)
    found = scores(own, others, trained, config)
    norms = shadows.values("gradients", key | {"timesteps": spaced}, gradients, shape, accelerator)
    found["gsa"] = gsa.scores(gradients(denoiser), norms, trained)
    settings = asdict(config) | {
        "variance": "per-record" if config.own_variance else "global",
        **told,
        "gradient_timesteps": GRADIENT_TIMESTEPS,
        "records_per_shadow": int(np.median(shadows.trained.sum(1))),
        "records_of_run": len(dataset.rows("train", kept=True)),
        "train_seconds": shadows.seconds,
    }
    return ShadowScores(found, _against_loss(found, own, who), settings)


def _against_loss(found: dict[str, np.ndarray], own: np.ndarray, who: Candidates) -> dict[str, dict[str, Any] | None]:
    """Each attack against the threshold on what it was given: one loss, or the mean over draws and views."""
    member, groups = who.member, None
    if who.grouped:
        groups = who.block[member], who.block[~member]
    result = {}
    for name, score in found.items():
        threshold, loss = (
            ("loss", own[:, 0, 0]) if name in ("lira", "lira-offline") else ("loss-strong", own.mean((1, 2)))
        )
        sides = score[member], score[~member], -loss[member], -loss[~member]
        usable = not np.isnan(score + loss).any()
        result[name] = {"attack": threshold, **paired_delong(*sides, groups)} if usable else None
    return result


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
