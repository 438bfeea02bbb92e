"""Figures of runs, as the parts of a comparison pick them."""

from collections.abc import Iterable
from typing import Any

from eval.arms import Arm, Outcome, lookup
from eval.pairedtests import t_interval

EXTRACTION = "privacy.extraction"
VERIFIED = f"{EXTRACTION}.verified"
METRICS = ("kid", "fid", "precision", "recall")
GUARD_OFF = ("generations", "candidates", "verified", "verified_units", "rate")

Loaded = list[tuple[Arm, list[Outcome]]]  # every arm with what its runs gave


def checkpoint(point: dict[str, Any]) -> dict[str, Any]:
    """Leakage and quality of one checkpoint, from an entry of ``along`` in report.json; ``control``: verified there."""
    figures = {name: lookup(point, f"extraction.{name}") for name in ("verified", "candidates", "rate")}
    figures |= {"control": lookup(point, "extraction.control.verified")}
    return (
        {"step": point["step"], "images_seen": point["images_seen"]}
        | figures
        | {metric: lookup(point, f"utility.{metric}") for metric in METRICS}
    )


# name in ``guard_off`` -> path in the extraction report
GUARD_OFF_PATHS = {
    "control": "control.verified",
    "p_value": "control.p_value",
    "by_correlation": "by_correlation.verified",
    "by_correlation_candidates": "by_correlation.candidates",
    "by_correlation_train": "by_correlation.control.verified_train_m",
    "by_correlation_control": "by_correlation.control.verified",
    "by_correlation_n": "by_correlation.control.n",
}


def guard_off(report: dict[str, Any]) -> dict[str, Any]:
    """What leaks where the output filter is switched off, that is, from the weights; ``control``: verified in held-out pictures."""
    extraction = report["privacy"]["extraction_guard_off"]
    return (
        {name: extraction.get(name) for name in GUARD_OFF}
        | {name: lookup(extraction, path) for name, path in GUARD_OFF_PATHS.items()}
        | {"by_copies": extraction.get("by_copies")}
        | {metric: lookup(report, f"utility.guard_off.{metric}") for metric in METRICS}
    )


def done_of(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes that have a report."""
    return [outcome for outcome in outcomes if outcome.report is not None]


def is_guarded(outcomes: list[Outcome]) -> bool:
    """Whether the arm protects its outputs only: a defense wraps the sampling."""
    return any(outcome.guarded for outcome in outcomes)


def is_by_construction(outcomes: list[Outcome]) -> bool:
    """Whether the arm's count says nothing of its images: the guard judges them by the attack's own score."""
    return any(outcome.by_construction for outcome in outcomes)


def values_of(outcomes: list[Outcome], path: str) -> list[float | None]:
    """Figure at a dotted path of report.json, run by run; None where it was not measured."""
    return [outcome.values.get(path) for outcome in outcomes]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that were measured; None without any."""
    return t_interval([value for value in values if value is not None])["mean"]


def common(reports: list[dict[str, Any]], path: str) -> Any:
    """Value that all reports have at this path, else None."""
    found = [lookup(report, path) for report in reports]
    return found[0] if found and all(value == found[0] for value in found) else None
