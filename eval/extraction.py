"""The extraction attack of Carlini et al. (2023): settings, counts, and the untargeted protocol (section 5.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from defenses.errors import UserError
from defenses.neighbours import VIEWS, Neighbours, SearchResult, adaptive_score, search_sharded
from defenses.seeding import derive
from eval.control import Rule, control
from eval.intervals import rate_interval
from eval.pictures import Pictures

__all__ = ["Extraction", "ExtractionConfig", "PictureFindings", "Pictures", "check_tier", "tier_of", "untargeted"]

# the sizes of a tier: generations (untargeted); prompts and generations of each (prompted)
TIERS: dict[str, tuple[int, int, int]] = {
    "smoke": (2**8, 8, 16),
    "small": (2**13, 200, 64),
    "standard": (2**16, 1_000, 500),
    "paper": (16 * 2**16, 350_000, 500),
}
_LEVELS = ("0.05", "0.10", "0.15")  # of ``at_l2``


@dataclass(kw_only=True)
class ExtractionConfig:
    """Section ``attack.extraction``."""

    # untargeted: any generation may copy any picture; prompted: cliques among the generations of each prompt;
    # auto: prompted where the generations are grouped by prompt
    protocol: Literal["auto", "untargeted", "prompted"] = "auto"
    alpha: float = 0.5  # untargeted: share of the mean distance to the n nearest pictures below which a copy lies
    n: int = 50  # untargeted: nearest distinct pictures in that mean
    edge_threshold: float = 0.15  # prompted: largest tiled l2 of two generations that are joined
    verify_l2: float = 0.15  # prompted: largest l2 of a candidate to its nearest picture
    # prompted: generations in a clique that flags a prompt; null: 10, or max(4, ceil(N/10)) for N < 100 generations
    clique_size: int | None = None
    clique_seconds: float = 30.0  # prompted: time for the clique search of one prompt; 0: one greedy clique alone
    # prompted: generations that are held against the training pictures beside the candidates. all: every one, which costs
    # images x pictures x 10 views; flagged: those of flagged prompts (matches.csv, at_l2 and risk then know no others)
    nearest: Literal["all", "flagged"] = "all"
    permutations: int = 9999  # of the control's test; its smallest p-value is 1 / (permutations + 1)
    # size that the attack must reach, or it is refused; null: any size, which the report then names
    tier: Literal["smoke", "small", "standard", "paper"] | None = None

    def __post_init__(self):
        for key in ("alpha", "edge_threshold", "verify_l2"):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise UserError(f"attack.extraction.{key}", f"{value} is not positive", "take a number above 0")
        for key, least in (("n", 2), ("clique_size", 2), ("permutations", 1), ("clique_seconds", 0)):
            value = getattr(self, key)
            if value is not None and not least <= value < math.inf:
                raise UserError(f"attack.extraction.{key}", f"{value} is less than {least}", f"take at least {least}")


@dataclass
class PictureFindings:
    """What the attack knows of every distinct training picture, in the order of ``Pictures.ids``.

    Attributes:
        l2: to the nearest generation, float64 [P]; inf without generations.
        generation: name of that generation, or None.
        score: lowest adaptive score with this picture in the numerator, of the generations to which it is the nearest picture
            and of the one that is nearest to it, float64 [P]; None in the prompted protocol. At most 1 where verified.
        verified: bool [P].
    """

    l2: np.ndarray
    generation: list[str | None]
    score: np.ndarray | None
    verified: np.ndarray


@dataclass
class Extraction:
    """What the attack found.

    Attributes:
        report: report.json, ``privacy.extraction``, without ``sampler`` and ``seconds``.
        matches: rows of matches.csv, one per generation.
        pictures: the same seen from the training pictures.
        cliques: rows of cliques.csv, flagged prompts first, tightest first; empty for the untargeted protocol.
        candidates: one image of each flagged prompt, uint8 [C, H, W], by the prompt's name; empty for the untargeted protocol.
    """

    report: dict[str, Any]
    matches: list[dict[str, Any]]
    pictures: PictureFindings
    cliques: list[dict[str, Any]] = field(default_factory=list)
    candidates: dict[str, np.ndarray] = field(default_factory=dict)


def tier_of(generations: int, prompts: int | None = None, per_prompt: int | None = None) -> str:
    """The largest tier whose sizes are reached, or "below smoke". ``prompts`` null: untargeted."""
    reached = "below smoke"
    for name, (count, least_prompts, least_each) in TIERS.items():
        if generations >= count if prompts is None else prompts >= least_prompts and (per_prompt or 0) >= least_each:
            reached = name
    return reached


def check_tier(
    config: ExtractionConfig, generations: int, prompts: int | None = None, per_prompt: int | None = None
) -> None:
    """Refuses a planned attack that is smaller than the tier asked for.

    Raises:
        UserError: attack.extraction.tier.
    """
    if config.tier is None:
        return
    names = ["below smoke", *TIERS]
    if names.index(tier_of(generations, prompts, per_prompt)) < names.index(config.tier):
        count, least_prompts, least_each = TIERS[config.tier]
        need = f"generate.count={count}" if prompts is None else f"{least_prompts} prompts, {least_each} images of each"
        raise UserError("attack.extraction.tier", f"{config.tier} needs {need}", "generate more, or set it to null")


def adaptive_rule(config: ExtractionConfig) -> Rule:
    """Carlini et al. 2023, section 5.1: the nearest picture lies much nearer than the n nearest do on average."""
    return Rule(config.n, lambda distance: adaptive_score(distance, config.alpha, config.n))


def untargeted(
    generations: Any,
    training: Pictures,
    heldout: Pictures | None,
    config: ExtractionConfig,
    accelerator: Any = None,
    *,
    exchangeable: bool,
    seed: int,
    names: Sequence[str] | None = None,
) -> Extraction:
    """Compares every generation with every training picture, on all ranks; each returns the same.

    Args:
        generations: uint8 [G, C, H, W], of the shape of the training images.
        exchangeable: whether held-out pictures are drawn like training pictures (see `control`).
        names: name of each generation for matches.csv; null: its index, six digits.
    """
    rule = adaptive_rule(config)
    names = [f"{index:06d}" for index in range(len(generations))] if names is None else names
    found = search_sharded(generations, training.images, training.picture, config.n, accelerator=accelerator)
    passed = rule.passed(found.distinct)
    verified = rule.verified(found.distinct)
    variants = {"identity_view": rule.verified(found.identity), "paper_rule": rule.verified(found.records)}
    score = rule.score(found.distinct.distance)
    matches = match_rows(names, training, found.distinct, score, passed)
    settings = {
        "alpha": config.alpha,
        "n": config.n,
        "n_effective": min(config.n, len(training.ids)),
        "views": list(VIEWS),
        "edge_threshold": None,
        "clique_size": None,
        "permutations": config.permutations,
    }
    report = {
        "protocol": "untargeted",
        "tier": tier_of(len(generations)),
        "settings": settings,
        "generations": len(generations),
        "candidates": int(passed.sum()),
        **counts(training, verified, variants, seed),
        "at_l2": at_l2(found.best_distance),
        "control": control(
            generations, training, heldout, rule, accelerator,
            exchangeable=exchangeable, permutations=config.permutations, seed=seed,
        ),
        "by_copies": training.by_copies(verified),
    }  # fmt: skip
    pictures = PictureFindings(
        l2=found.best_distance,
        generation=[names[query] if query >= 0 else None for query in found.best_query],
        score=_picture_scores(found, score, config),
        verified=np.isin(training.ids, verified),
    )
    return Extraction(report, matches, pictures)


def _picture_scores(found: SearchResult, score: np.ndarray, config: ExtractionConfig) -> np.ndarray:
    """`PictureFindings.score`.

    Args:
        score: adaptive score of each generation, float64 [G].
    """
    mean = found.distinct.distance[:, : config.n].mean(axis=1, dtype=np.float64)
    reached = np.full(len(found.pictures), np.inf)
    near = np.flatnonzero(found.best_query >= 0)
    of_nearest = mean[found.best_query[near]]
    reached[near] = np.divide(
        found.best_distance[near],
        config.alpha * of_nearest,
        out=np.full(len(near), 1 / config.alpha),
        where=of_nearest > 0,
    )
    np.minimum.at(reached, np.searchsorted(found.pictures, found.distinct.picture[:, 0]), score)
    return reached


def match_rows(
    names: Sequence[str], training: Pictures, found: Neighbours, score: np.ndarray | None, verified: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of matches.csv: each generation with the record that is nearest; ``score`` null in the prompted protocol."""
    return [
        {
            "generation": name,
            "record_id": training.record_id[int(found.row[index, 0])],
            "l2": float(found.distance[index, 0]),
            "adaptive_score": None if score is None else float(score[index]),
            "clique": "",
            "verified": bool(verified[index]),
        }
        for index, name in enumerate(names)
    ]


def counts(training: Pictures, verified: np.ndarray, others: dict[str, np.ndarray | None], seed: int) -> dict[str, Any]:
    """Verified distinct pictures by the rule and its variants, the people behind them, and the rate with its interval."""
    flags, block = np.isin(training.ids, verified), training.block[training.first]
    low, high, method = rate_interval(flags, block, training.grouped, derive(seed, "attack/interval"))
    return {
        "verified": len(verified),
        "verified_units": training.units(verified),
        **{f"verified_{name}": None if ids is None else len(ids) for name, ids in others.items()},
        "rate": len(verified) / len(training.ids),
        "rate_ci95": [low, high],
        "rate_ci95_method": method,
    }


def at_l2(best_distance: np.ndarray) -> dict[str, int]:
    """Distinct pictures whose nearest generation lies within each l2."""
    return {level: int((best_distance <= float(level)).sum()) for level in _LEVELS}
