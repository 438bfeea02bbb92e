"""Lower bounds on what a mechanism or a run gives away, to be held against the claimed guarantee.

A bound above the claim shows a mistake. A bound below it shows nothing: the attack may be weak, or the sample too
small.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DDPMScheduler, UNet2DModel
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import beta, binom, norm
from torch import nn

from defenses import canaries
from defenses.base import Batch
from defenses.seeding import RecordRandom
from eval.textsource import kind_of
from train.data import Dataset
from train.diffusion import DiffusionConfig, Schedule, per_example_loss, schedule_of
from train.latent import LatentModel
from train.models import build, memory_format
from train.pipelines import load as load_pipeline
from train.records import labels_of
from train.release import RECORD
from train.textobjective import TextObjective

CONFIDENCE = 0.95
# Share of the canaries whose coin is guessed, half of them "in" and half "out"; the others are abstentions. Fixed,
# because the bound does not hold for the best of several shares. In simulations 0.2 was near
# the best for epsilon 2 to 10.
GUESSED = 0.2
# The loss of a canary is the mean over these parts of the schedule (what a picture looks like is decided in its first
# half) and over this many noise draws.
TIMESTEPS = tuple((place + 0.5) / 16 for place in range(8))
DRAWS = 2
BATCH = 64


def gdp_lower_bound(inside: np.ndarray, outside: np.ndarray) -> float:
    """Lower bound on mu of Gaussian differential privacy, 95 % confidence (Nasr et al. 2023, section 4; Dong et al. 2022).

    The threshold that tells trials with the canary from trials without is chosen on every other trial. On the others
    the two error rates are bounded from above (Clopper and Pearson, 97.5 % each), and no mu-GDP mechanism allows a
    smaller pair than its trade-off curve: mu >= norm.ppf(1 - false positives) - norm.ppf(false negatives).

    Args:
        inside, outside: float [n], statistics of independent trials with and without the canary; larger means inside.

    Returns:
        mu, at least 0.
    """
    thresholds = np.unique(np.concatenate([inside[::2], outside[::2]]))
    best = thresholds[np.argmax(_mu(inside[::2], outside[::2], thresholds))]
    return max(0.0, float(_mu(inside[1::2], outside[1::2], np.array([best]))[0]))


def _mu(inside: np.ndarray, outside: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Bound for every threshold, float64 [t]."""
    false_positives = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="right")
    false_negatives = np.searchsorted(np.sort(inside), thresholds, side="right")
    return norm.isf(_upper(false_positives, len(outside))) - norm.ppf(_upper(false_negatives, len(inside)))


def _upper(errors: np.ndarray, trials: int) -> np.ndarray:
    """Upper end of a rate at half of the error allowed (Clopper and Pearson 1934)."""
    return np.where(errors < trials, beta.isf((1 - CONFIDENCE) / 2, errors + 1, np.maximum(trials - errors, 1)), 1.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP mechanism at ``delta`` in (0, 1) (Dong et al. 2022, Corollary 2.13)."""

    def excess(epsilon: float) -> float:
        tail = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(tail) - delta

    return brentq(excess, 0.0, mu * (mu + 40)) if mu > 0 and excess(0.0) > 0 else 0.0


class OneRun(NamedTuple):
    """What one run shows: the bound, and how many of the guesses that it rests on were right."""

    epsilon: float
    guesses: int
    correct: int


def one_run_lower_bound(
    scores: np.ndarray, included: np.ndarray, claimed_delta: float, confidence: float = CONFIDENCE
) -> OneRun:
    """Lower bound on epsilon from the fair, independent coins of one run (Steinke, Nasr and Jagielski 2023, Theorem 5.2).

    The canaries with the largest scores are guessed to be in, as many with the smallest to be out.

    Args:
        scores: float [m], larger for canaries that seem to be in; from anything in the run but the coins.
        included: bool [m], the coins.
        claimed_delta: delta of the claim.

    Raises:
        ValueError: fewer than two canaries.
    """
    sides = guesses(len(scores)) // 2
    order = np.argsort(-scores, kind="stable")
    correct = int(included[order[:sides]].sum() + (~included[order[-sides:]]).sum())
    return OneRun(_epsilon(len(scores), 2 * sides, correct, claimed_delta, 1 - confidence), 2 * sides, correct)


def guesses(count: int) -> int:
    """How many of ``count`` canaries are guessed: an even number, at least two."""
    if count < 2:
        raise ValueError(f"{count} canaries are too few to guess one in and one out")
    return 2 * max(1, round(count * GUESSED / 2))


def ceiling(count: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest bound that ``count`` canaries can give: every guess right."""
    return _epsilon(count, guesses(count), guesses(count), delta, 1 - confidence)


def p_value(count: int, guessed: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many correct guesses under (epsilon, delta)-DP (Steinke et al. 2023, Theorem 5.2).

    Without delta, correct guesses are at most as many as with randomised response: Binomial(guessed, 1 / (1 +
    e^-epsilon)). Delta adds 2 m delta max_i P[correct - i <= Binomial < correct] / i.
    """
    rate = expit(epsilon)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guessed, rate))
    steepest = np.max(below / np.arange(1, correct + 1), initial=0.0)
    return min(1.0, float(binom.sf(correct - 1, guessed, rate) + 2 * count * delta * steepest))


def _epsilon(count: int, guessed: int, correct: int, delta: float, error: float) -> float:
    """Largest epsilon that so many correct guesses refute, 0 where none, rounded down."""
    low, high = 0.0, 1.0
    if p_value(count, guessed, correct, low, delta) >= error:
        return low
    while p_value(count, guessed, correct, high, delta) < error:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(count, guessed, correct, middle, delta) < error else (low, middle)
    return low


@dataclass
class RunAudit:
    """``report``: the part ``privacy.audit`` of report.json; ``table``: one line per canary."""

    report: dict[str, Any]
    table: list[dict[str, Any]]


COLUMNS = ["unit", "included", "score"]
KIND = "one run, canaries left out by coin (Steinke, Nasr and Jagielski 2023)"


def audit_run(
    folder: Path,
    config: SimpleNamespace,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    model: Path | None = None,
    facts: dict[str, Any] | None = None,
) -> RunAudit | None:
    """Guesses from the released weights which canaries a run was trained on. All ranks take part.

    Args:
        folder: run directory of the training, with its ``model/``.
        model, facts: another checkpoint of the same training and what is known of it; None: what the training released.

    Returns:
        None where the run had no canaries.
    """
    file = folder / canaries.FILE
    if not file.exists():
        return None
    facts = facts or json.loads((folder / RECORD).read_text())
    claim = next((entry["claim"] for entry in facts["defenses"] if entry["name"] == "dpsgd"), {})
    table = canaries.read(file)
    rows = np.array([canary.row for canary in table], dtype=np.int64)
    losses = released_losses(model or folder / "model", config, dataset, rows, facts["classes"], accelerator)
    scores = unit_scores(losses, [canary.unit for canary in table])
    included = {canary.unit: canary.included for canary in table}
    lines = [{"unit": unit, "included": included[unit], "score": score} for unit, score in scores.items()]
    coins = np.array([line["included"] for line in lines], dtype=bool)
    return RunAudit(summary(np.array(list(scores.values())), coins, claim), lines)


def summary(scores: np.ndarray, included: np.ndarray, claim: dict[str, Any], kind: str = KIND) -> dict[str, Any]:
    """``privacy.audit`` of report.json.

    Args:
        kind: of audit, in words.
        claim: of the defense; its ``epsilon`` may be None (NOT PRIVATE).
    """
    delta, count = claim.get("delta") or 0.0, len(scores)
    found = one_run_lower_bound(scores, included, delta) if count >= 2 else None
    highest = ceiling(count, delta) if count >= 2 else None
    return {
        "kind": kind,
        "epsilon_lower_bound": found.epsilon if found else None,
        "confidence": CONFIDENCE,
        "canaries": count,
        "included": int(included.sum()),
        "guesses": found.guesses if found else 0,
        "correct": found.correct if found else 0,
        "ceiling": highest,
        "claimed_epsilon": claim.get("epsilon"),
        "delta": delta,
        "unit": claim.get("unit"),
        "note": _note(count, highest, claim.get("epsilon")),
    }


def _note(count: int, highest: float | None, claimed: float | None) -> str:
    if highest is None:
        return f"{count} canaries are too few to guess one in and one out: raise defenses.dpsgd.canaries."
    text = (
        f"With {count} canaries even a model trained without any noise could show at most {highest:.2f}. The guesses come from "
        "losses of the released weights; whoever sees every step can guess better. A low bound is no proof of privacy."
    )
    if claimed is not None and claimed >= highest:
        text += f" The claimed {claimed:g} is beyond what this audit can refute: it only tells noise from no noise."
    return text


def released_losses(
    model_folder: Path,
    config: SimpleNamespace,
    dataset: Dataset,
    rows: np.ndarray,
    classes: list[str],
    accelerator: Accelerator,
    draws: int = DRAWS,
) -> np.ndarray:
    """Losses of the released weights, float64 [rows, timesteps]; less those of the public weights that training began with.

    The difference is how much training on these records has changed what is known of each: without it, easy pictures
    seem to be in.
    """
    if kind_of(model_folder) is not None:
        released = LatentModel(load_pipeline(model_folder))
        schedule = schedule_of(released.parts.scheduler)
        losses = canary_losses(released, schedule, dataset, rows, classes, accelerator, draws)
        if config.model.pretrained is None:
            return losses
        start = LatentModel(load_pipeline(config.model.pretrained, config.model.revision))
        return losses - canary_losses(start, schedule, dataset, rows, classes, accelerator, draws)
    schedule = DDPMScheduler.from_pretrained(model_folder, subfolder="scheduler", local_files_only=True)
    released = UNet2DModel.from_pretrained(
        model_folder, subfolder="unet", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
    )
    losses = canary_losses(released, schedule, dataset, rows, classes, accelerator, draws)
    if config.model.pretrained is None:
        return losses
    settings = replace(config.model, adapter=None, trainable=None)
    start = build(settings, config.data.image_size, config.data.channels, len(classes))
    return losses - canary_losses(start, schedule, dataset, rows, classes, accelerator, draws)


@torch.no_grad()
def canary_losses(
    model: nn.Module,
    schedule: Schedule,
    dataset: Dataset,
    rows: np.ndarray,
    classes: list[str],
    accelerator: Accelerator,
    draws: int = DRAWS,
) -> np.ndarray:
    """Mean squared error of the network's output on each record at fixed timesteps, float64 [rows, timesteps]: 8, or fewer where the
    schedule is so short that some of `TIMESTEPS` fall together.

    The noise depends on the record and the draw alone. Each rank computes every W-th batch.
    """
    device = accelerator.device
    steps = sorted({int(place * schedule.config.num_train_timesteps) for place in TIMESTEPS})
    model = model.to(device, memory_format=memory_format(device)).eval()
    text = None
    if isinstance(model, LatentModel):
        text = TextObjective(model, DiffusionConfig(snr_gamma=None), schedule, caption_dropout=0.0, precision="fp32")
    starts = range(0, len(rows), BATCH)[accelerator.process_index :: accelerator.num_processes]
    found = {}
    for start in starts:
        part = rows[start : start + BATCH]
        images = (torch.from_numpy(dataset.images[part]).float() / 127.5 - 1).to(device)
        labels = labels_of(dataset, part, classes)
        total = np.zeros((len(part), len(steps)))
        for repeat in range(draws):
            random = RecordRandom(0, repeat, part, [0] * len(part))
            batch = Batch(images, part, None if labels is None else labels.to(device), random)
            if text is not None:
                batch.captions = [dataset.records[row].caption or "" for row in part]
                batch = text.conditioned(batch, text.moments_of(batch)[0])
            clean = images if batch.latents is None else batch.latents
            batch.noise = random.normal("audit", *clean.shape[1:]).to(device)
            for column, step in enumerate(steps):
                batch.timesteps = torch.full((len(part),), step, device=device)
                error = per_example_loss(model, batch, schedule, None) if text is None else text.loss(model, batch)
                total[:, column] += error.double().cpu().numpy()
        found[start] = total / draws
    everywhere = sorted(gather_object(list(found.items())), key=lambda pair: pair[0])
    return np.concatenate([np.zeros((0, len(steps))), *(part for _, part in everywhere)])


def unit_scores(losses: np.ndarray, units: list[str]) -> dict[str, float]:
    """Score of every unit: minus the mean loss of its records, each timestep in standard deviations of all canaries.

    Args:
        losses: float64 [n, timesteps], one line per record.
        units: name of each record's unit, length n.
    """
    spread = losses.std(0)
    standard = (losses - losses.mean(0)) / np.where(spread > 0, spread, 1.0)
    names = np.array(units)
    return {unit: -float(standard[names == unit].mean()) for unit in dict.fromkeys(units)}
