"""The attacks of a run beside the main one, for a comparison: which numbers of report.json stand for each, and over the seeds.

In the order in which someone who answers for the data asks: what comes back by a caption, from the step of a fine-tuning, who can be
recognised, what half a picture brings back, what planted pictures show; then how well the attack finds its prompts, and who is at risk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.attackwords import primary
from eval.quoted import lookup
from eval.stratified import decisive

NO_MEAN = ("p_value", "p_value_holm", "auc_ci95", "tpr_ci95")  # parts of a path whose mean over seeds means nothing
Privacy = dict[str, Any]  # the part of that name of report.json


@dataclass(frozen=True)
class Attack:
    """One of the attacks.

    Attributes:
        place: its part of ``privacy`` as a dotted path; None where it did not run.
        figures: dotted paths of numbers below that part; what is null there stays null.
        note: what must be read beside them, or why there are none.
    """

    place: Callable[[Privacy], str | None]
    figures: Callable[[dict[str, Any]], Sequence[str]]
    note: Callable[[Privacy], str | None] = lambda privacy: None


def others(report: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Figures of every attack of `ATTACKS`, None for one that did not run.

    Returns:
        attack -> ``{"at": dotted path in report.json, "figures": {path below it: number or None}, "name": which of several attacks,
        "unit": of what it counts, "note"}``. The number of a figure is that of report.json at ``at.path``.
    """
    return {name: _of(report["privacy"], attack) for name, attack in ATTACKS.items()}


def over_seeds(runs: Sequence[dict[str, dict[str, Any] | None]]) -> dict[str, dict[str, Any] | None]:
    """Mean and range over the runs of an arm of every figure that has a mean: ``{"mean", "least", "most", "n"}``, ``n`` runs in
    which it was measured; an attack that no run made is None.

    Args:
        runs: `others` of each finished run; runs of which another of several attacks stands for all have no mean.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name in ATTACKS:
        made = [run[name] for run in runs if run[name] is not None]
        paths = dict.fromkeys(path for each in made for path in each["figures"] if _has_mean(path))
        alike = len({each["name"] for each in made}) <= 1
        spread = {path: _spread([each["figures"].get(path) for each in made]) for path in paths if alike}
        found[name] = spread if made else None
    return found


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "least": None, "most": None, "n": 0}
    return {"mean": sum(known) / len(known), "least": min(known), "most": max(known), "n": len(known)}


def _has_mean(path: str) -> bool:
    return not set(NO_MEAN) & set(path.split("."))


def _of(privacy: Privacy, attack: Attack) -> dict[str, Any] | None:
    place = attack.place(privacy)
    if place is None:
        return None
    part = lookup(privacy, place)
    figures = {path: lookup(part, path) for path in attack.figures(part)}
    return {
        "at": f"privacy.{place}",
        "figures": figures,
        "name": part.get("attack") or part.get("detector"),
        "unit": part.get("unit"),
        "note": attack.note(privacy),
    }


def beyond_captions(found: dict[str, Any] | None) -> float | None:
    """p-value of the control by captions on which the verdict rests (`eval.stratified.decisive`), from "captions" of `others`."""
    return None if found is None else decisive(*(found["figures"][path] for path in ("p_value", *STRATIFIED)))


def _part(name: str) -> Callable[[Privacy], str | None]:
    return lambda privacy: name if lookup(privacy, name) is not None else None


def _member(unit: str) -> Callable[[Privacy], str | None]:
    """The entry that stands for all membership attacks, chosen beforehand (`eval.attackwords.primary`), not the best."""

    def place(privacy: Privacy) -> str | None:
        entry = primary(privacy, unit)
        return None if entry is None else f"membership.{privacy['membership'].index(entry)}"

    return place


def _member_note(privacy: Privacy) -> str | None:
    check = privacy.get("membership_check") or {}
    return f"no evidence: {check.get('note')}" if check.get("passed") is False else check.get("note") or None


def _weights(part: dict[str, Any]) -> list[str]:
    names = ["weight", "verified", "control.verified", "control.verified_train_m", "control.n", "p_value_holm"]
    names += [f"captions.{name}" for name in ("training.own", "training.tested", "own", "tested", "p_value_holm")]
    return [f"weights.{place}.{name}" for place in range(len(part["weights"])) for name in names]


def _planted(part: dict[str, Any]) -> list[str]:
    """The bound of the canaries that a coin decided, and for every kind the exposure of those that were planted most often."""
    found = [f"one_run.{path}" for path in BOUND]
    for kind, figures in part["kinds"].items():
        most = max(figures["by_copies"], key=int)
        found += [f"kinds.{kind}.ceiling", f"kinds.{kind}.by_copies.{most}.median"]
    return found


def _ends_by_copies(part: dict[str, Any]) -> list[str]:
    """Pictures that occur least and most often: rows of ``by_copies``, which is in order."""
    rows = part["by_copies"]
    names = "copies", "recognised.count", "recognised.n", "recognised.rate"
    places = sorted({0, len(rows) - 1}) if rows else []
    return ["recognised_fpr", *(f"by_copies.{place}.{name}" for place in places for name in names)]


def _fixed(*paths: str) -> Callable[[dict[str, Any]], Sequence[str]]:
    return lambda part: paths


STRATIFIED = "stratified.p_value", "stratified.without_counterpart.own"
CAPTIONS = _fixed("training.own", "training.tested", "own", "tested", "p_value", *STRATIFIED)
MEMBERSHIP = _fixed(
    "auc", "auc_ci95.0", "auc_ci95.1", "tpr_at_fpr.0.01", "tpr_ci95.0.01.0", "tpr_ci95.0.01.1", "members", "nonmembers"
)
BOUND = ("epsilon_lower_bound", "ceiling", "claimed_epsilon", "canaries")
ATTACKS: dict[str, Attack] = {
    "captions": Attack(
        _part("extraction.control.captions"),
        CAPTIONS,
        lambda privacy: lookup(privacy, "extraction.control.captions.reason"),
    ),
    "captions_guard_off": Attack(
        _part("extraction_guard_off.control.captions"),
        CAPTIONS,
        lambda privacy: lookup(privacy, "extraction_guard_off.control.captions.reason"),
    ),
    "finetuning": Attack(_part("finetuning"), _weights),
    "membership": Attack(_member("record"), MEMBERSHIP, _member_note),
    "membership_groups": Attack(_member("group"), MEMBERSHIP, _member_note),
    "inpainting": Attack(
        _part("inpainting"),
        _fixed("auc", "auc_ci95.0", "auc_ci95.1", "member_l2_mean", "nonmember_l2_mean", "difference", "p_value"),
        lambda privacy: lookup(privacy, "inpainting.note"),
    ),
    "canaries": Attack(_part("canaries"), _planted),
    "audit": Attack(_part("audit"), _fixed(*BOUND)),
    "prefilter": Attack(
        _part("prefilter"),
        _fixed("recall.flagged.0.1", "recall.verified.0.1", "auc.flagged.auc", "prompts", "flagged", "verified"),
        lambda privacy: lookup(privacy, "prefilter.reason"),
    ),
    "risk": Attack(
        lambda privacy: "risk" if lookup(privacy, "risk.recognised_fpr") is not None else None,
        _ends_by_copies,
    ),
}  # fmt: skip
