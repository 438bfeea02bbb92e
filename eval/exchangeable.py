"""Whether members and non-members can be told apart without the model: then no attack on the model shows anything."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.optimize import minimize
from scipy.special import expit

from defenses.seeding import derive
from eval import roc
from eval.features import build_extractor, features
from eval.members import Candidates

FOLDS = 5
LEAST = 10  # pictures, and independent units, on either side
PENALTY = 1.0  # of the squared weights of standardised features


def blind_check(images: Any, who: Candidates, drawn_alike: bool, seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """The i.i.d. check: a classifier that sees the pictures and never the model.

    Where members and non-members differ in source, camera or preprocessing, any score that depends on the picture tells them
    apart, and the difference is mistaken for memory (Dubinski et al. 2024 on attacks against large models).

    Args:
        images: uint8 [N, C, H, W], array-like, of the candidates.
        drawn_alike: whether the held-out pictures were split off at random (`train.dataconfig.DataConfig.exchangeable`).

    Returns:
        ``membership_check``: {exchangeable, blind_auc, blind_ci95, blind_method, passed, note}. ``passed`` is None where
        there are too few pictures to tell. A classifier that does worse than chance is no evidence of a difference.
    """
    found = {"exchangeable": drawn_alike, "blind_auc": None, "blind_ci95": None, "blind_method": None}
    if min(_units(who, True), _units(who, False)) < LEAST:
        note = f"fewer than {LEAST} independent members or non-members: whether they are drawn alike was not tested"
        return found | {"passed": None, "note": note}
    extractor = build_extractor("random-conv", None, None, accelerator.device)
    described = features(images, extractor, accelerator=accelerator)
    scores = cross_fitted(described, who.member, who.block, seed)
    groups = (who.block[who.member], who.block[~who.member]) if who.grouped else None
    area = roc.auc(scores[who.member], scores[~who.member], groups)
    apart = area.low > 0.5
    notes = []
    if not drawn_alike:
        notes.append("held-out pictures were not split off at random from the same source")
    if apart:
        notes.append("a classifier that never saw the model tells members from non-members")
    note = (
        f"{' and '.join(notes)}: the attacks may show this difference and not what the model remembers" if notes else ""
    )
    return found | {
        "blind_auc": area.auc,
        "blind_ci95": [area.low, area.high],
        "blind_method": area.method,
        "passed": drawn_alike and not apart,
        "note": note,
    }


def _units(who: Candidates, member: bool) -> int:
    return len(np.unique(who.block[who.member == member]))


def cross_fitted(described: np.ndarray, member: np.ndarray, block: np.ndarray, seed: int) -> np.ndarray:
    """Score of every record by a logistic regression that was fitted to the others, float64 [N].

    Blocks stay together, and every fold holds the same share of both sides: otherwise a fold with few members is scored by
    an intercept that many members shaped, and the area falls below 1/2 where there is nothing to find.

    Args:
        described: float [N, F], features.
        member: bool [N].
        block: int64 [N], independent units.
    """
    fold = np.empty(len(member), np.int64)
    random = np.random.default_rng(derive(seed, "attack/blind"))
    for side in (True, False):
        units, place = np.unique(block[member == side], return_inverse=True)
        fold[member == side] = (random.permutation(len(units)) % FOLDS)[place]
    scores = np.empty(len(member))
    for each in range(FOLDS):
        held = fold == each
        scores[held] = _fitted(described[~held], member[~held], described[held])
    return scores


def _fitted(described: np.ndarray, member: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log-odds without the intercept, float64 [n], by a ridge logistic regression in which both sides weigh the same."""
    centre, spread = described.mean(0), described.std(0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    x, sign = (described - centre) / spread, np.where(member, 1.0, -1.0)
    weight = np.where(member, 0.5 / member.sum(), 0.5 / (~member).sum()) * len(member)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w[1:] + w[0])
        pull = -weight * sign * expit(-margin)
        value = weight @ np.logaddexp(0, -margin) + PENALTY / 2 * w[1:] @ w[1:]
        return value, np.concatenate([[pull.sum()], x.T @ pull + PENALTY * w[1:]])

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return (asked - centre) / spread @ found[1:]
