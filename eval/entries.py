"""Scores of a membership attack as parts of the report: entries with intervals, the risk of every record, curves."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval import roc
from eval.members import Candidates

FPRS = (0.01, 0.001)
# The attack whose figures stand for all: the strongest in the literature that was run, fixed beforehand. The best of all on these
# pictures, chosen after looking, would look better than it is.
PRIMARY = ("lira-strong", "lira", "lira-strong-offline", "lira-offline", "loss-strong", "clid", "loss-grid", "loss")
Table = tuple[list[str], list[dict[str, Any]]]  # columns, rows


@dataclass
class Scores:
    """What one attack says of every candidate.

    Attributes:
        values: float64 [N], larger for what seems to be a member.
        queries: passes of the network for one record.
        settings: everything that decides the values.
        more: further fields of the entry.
        parts: losses that the score sums up, float64 [N, P]; None: it has no parts.
    """

    attack: str
    values: np.ndarray
    queries: int
    settings: dict[str, Any]
    access: str = "weights"
    more: dict[str, Any] = field(default_factory=dict)
    parts: np.ndarray | None = None


def entries(scores: Scores, who: Candidates) -> list[dict[str, Any]]:
    """``privacy.membership`` of one attack: an entry per record, and one per group (patient) where there are groups.

    A group's score is the mean over its records. Intervals of the entry per record take the groups into account.
    ``tpr_at_fpr`` is None for a rate that too few non-members resolve; all figures are None where a score is NaN.
    """
    member, values = who.member, scores.values
    groups = (who.block[member], who.block[~member]) if who.grouped else None
    found = [_entry(scores, "record", values[member], values[~member], groups)]
    if groups is not None:
        sides = [roc.by_group(values[side], who.block[side]) for side in (member, ~member)]
        found.append(_entry(scores, "group", *sides, None))
    return found


def _entry(
    scores: Scores, unit: str, members: np.ndarray, nonmembers: np.ndarray, groups: roc.Groups | None
) -> dict[str, Any]:
    usable = not (np.isnan(members).any() or np.isnan(nonmembers).any())
    area = roc.auc(members, nonmembers, groups) if usable else None
    rates = {str(fpr): roc.tpr_at_fpr(members, nonmembers, fpr, groups) if usable else None for fpr in FPRS}
    return {
        "attack": scores.attack,
        "unit": unit,
        "auc": area.auc if area else None,
        "auc_ci95": [area.low, area.high] if area else None,
        "auc_method": area.method if area else "none: the model gives scores that are no numbers",
        "tpr_at_fpr": {fpr: rate and rate["tpr"] for fpr, rate in rates.items()},
        "tpr_ci95": {fpr: rate and rate["ci95"] for fpr, rate in rates.items()},
        "tpr_method": {fpr: rate and rate["method"] for fpr, rate in rates.items()},
        "fpr_upper95": {fpr: rate and rate["fpr_upper95"] for fpr, rate in rates.items()},
        "members": len(members),
        "nonmembers": len(nonmembers),
        "queries": scores.queries,
        "access": scores.access,
        "settings": scores.settings,
        **scores.more,
    }


def risks(every: list[Scores], who: Candidates) -> Table:
    """membership.csv: a row per record with every score and the false-positive rate at which it is recognised.

    ``<attack>_fpr`` is the share of non-members that score at least as high: 0.01 says that a threshold which lets this
    record pass lets one non-member in a hundred pass as well.
    """
    columns = ["record_id", "picture", "member", "group"]
    rows = [
        {"record_id": record.record_id, "picture": record.cluster, "member": bool(member), "group": record.group or ""}
        for record, member in zip(who.records, who.member, strict=True)
    ]
    for scores in every:
        columns += [scores.attack, f"{scores.attack}_fpr"]
        outside = np.sort(scores.values[~who.member & ~np.isnan(scores.values)])
        passing = (len(outside) - np.searchsorted(outside, scores.values, side="left")) / max(len(outside), 1)
        for row, value, rate in zip(rows, scores.values, passing, strict=True):
            known = not np.isnan(value)  # a score that is no number says nothing, least of all certainty
            row[scores.attack], row[f"{scores.attack}_fpr"] = (float(value), float(rate)) if known else (None, None)
    return columns, rows


def curves(every: list[Scores], who: Candidates) -> Table:
    """roc.csv: the corners of every attack's curve, per record and, where there are groups, per group."""
    rows = []
    for scores in every:
        if np.isnan(scores.values).any():
            continue
        sides = [scores.values[who.member], scores.values[~who.member]]
        units = {"record": sides}
        if who.grouped:
            blocks = (who.block[who.member], who.block[~who.member])
            units["group"] = [roc.by_group(*pair) for pair in zip(sides, blocks, strict=True)]
        for unit, (members, nonmembers) in units.items():
            fpr, tpr = roc.roc_curve(members, nonmembers)
            rows += [
                {"attack": scores.attack, "unit": unit, "fpr": float(x), "tpr": float(y)}
                for x, y in zip(*_corners(fpr, tpr), strict=True)
            ]
    return ["attack", "unit", "fpr", "tpr"], rows


def _corners(fpr: np.ndarray, tpr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve without the points in the middle of its horizontal and vertical stretches."""
    right, up = np.diff(fpr) > 0, np.diff(tpr) > 0
    straight = ~(right[:-1] | right[1:]) | ~(up[:-1] | up[1:])
    keep = np.r_[True, ~straight, True]
    return fpr[keep], tpr[keep]
