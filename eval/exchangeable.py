"""Whether members and non-members can be told apart without the model: then no attack on the model shows anything."""

from typing import Any

import numpy as np
from accelerate import Accelerator

from eval import roc
from eval.features import build_extractor, features
from eval.members import Candidates
from eval.setlevel import ALPHA, cross_fitted_scores, set_test

LEAST = 10  # independent units (patients, or pictures) on either side


def blind_check(images: Any, who: Candidates, drawn_alike: bool, seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """The i.i.d. check: a classifier that sees the pictures and never the model.

    Where members and non-members differ in source, camera or preprocessing, any score that depends on the picture tells them
    apart, and the difference is mistaken for memory (Dubinski et al. 2024 on attacks against large models). The classifier
    is the linear one of `eval.setlevel` on the random convolutions of `eval.features`, fitted on other units; with groups a
    unit is a group, with the mean of its pictures' features. Its permutation test is exact, so where both sides are drawn alike
    the check fails with a probability of at most ALPHA.

    Args:
        images: uint8 [N, C, H, W], array-like, of the candidates.
        drawn_alike: whether held-out pictures were split off at random (`train.dataconfig.DataConfig.exchangeable`).

    Returns:
        ``membership_check``: {exchangeable, blind_auc, blind_ci95, blind_method, blind_p_value, passed, note}. ``passed`` is
        None where there are too few units to tell. The interval takes the scores of the units for independent, which
        cross-fitted ones are not quite; the p-value decides.
    """
    sides = [np.unique(who.block[side]) if who.grouped else who.rows[side] for side in (who.member, ~who.member)]
    if min(map(len, sides)) < LEAST:
        found = not_checked(f"fewer than {LEAST} independent members or non-members, too few to test")
        return found | {"exchangeable": drawn_alike}
    extractor = build_extractor("random-conv", None, None, accelerator.device)
    described = features(images, extractor, accelerator=accelerator).astype(np.float64)
    units = [described[side] for side in (who.member, ~who.member)]
    if who.grouped:
        units = [
            roc.by_group(unit, who.block[side]) for unit, side in zip(units, (who.member, ~who.member), strict=True)
        ]
    area = roc.auc(*cross_fitted_scores(*units, seed=seed))
    p_value = set_test(*units, seed=seed)
    notes = [] if drawn_alike else ["held-out pictures were not split off at random from the same source"]
    if p_value < ALPHA:
        notes.append("a classifier that never saw the model tells members from non-members")
    note = (
        f"{' and '.join(notes)}: the attacks may show this difference and not what the model remembers" if notes else ""
    )
    return {
        "exchangeable": drawn_alike,
        "blind_auc": area.auc,
        "blind_ci95": [area.low, area.high],
        "blind_method": area.method,
        "blind_p_value": p_value,
        "passed": not notes,
        "note": note,
    }


def not_checked(note: str) -> dict[str, Any]:
    """``membership_check`` where nothing could be tested."""
    names = ("exchangeable", "blind_auc", "blind_ci95", "blind_method", "blind_p_value", "passed")
    return dict.fromkeys(names) | {"note": note}
