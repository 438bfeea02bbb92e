"""Copy metrics of the literature beside the attack's own score, all on the same matches.

A match is a generation and the training picture that is nearest to it by l2 (a row of matches.csv), shown in the view in
which it is nearest. Every metric judges these same two images, so where the metrics differ it is not the pair that differs.
Beside them stands SSCD's own search over all training pictures (`eval.sscdsearch`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeVar

import numpy as np
from scipy.stats import rankdata

from defenses.errors import UserError
from defenses.references import Rows
from eval.copyvalues import CopyValues
from eval.pairs import ssim_window
from eval.pictures import Pictures
from eval.sscd import Descriptors, load_sscd
from eval.sscdsearch import COLUMNS as SEARCH_COLUMNS
from eval.sscdsearch import SscdSearch

COLUMNS = ["generation", "record_id", "l2", "adaptive_score", "nn_ratio", "tiled_l2", "ssim", "sscd", *SEARCH_COLUMNS]
QUANTILE = 0.95
_MOST = 12  # generations in ``disagreements``
T = TypeVar("T")


@dataclass(kw_only=True)
class CopyMetricsConfig:
    """Section ``attack.copy_metrics``."""

    # published: the literature's threshold; where none carries over (ssim, sscd), that which 95 % of the calibration
    # pictures keep with their nearest training picture, never of the same patient; dar: all by Dar et al. (2024)
    threshold: Literal["published", "dar"] = "published"
    sscd_weights: str | None = None  # local file of Pizzi et al. (2022); null: SSCD is left out
    sscd_weights_sha256: str | None = None  # hex digest that `sscd_weights` must have; null: only without weights
    # cosine above which SSCD sees a copy (0.5: Somepalli et al. 2023; 0.7: Hintersdorf et al. 2024); null: calibrated
    sscd_threshold: float | None = None

    def __post_init__(self):
        section = "attack.copy_metrics"
        if self.sscd_weights is None and (self.sscd_weights_sha256, self.sscd_threshold) != (None, None):
            raise UserError(f"{section}.sscd_weights", "is not set, other keys of SSCD are", "name a local file")
        if self.sscd_threshold is None:
            return
        if not -1 < self.sscd_threshold < 1:
            raise UserError(
                f"{section}.sscd_threshold", f"{self.sscd_threshold} is not between -1 and 1", "0.5 is usual"
            )
        if self.threshold == "dar":
            raise UserError(
                f"{section}.sscd_threshold", "is set, and threshold=dar calibrates it", "leave one of them out"
            )


@dataclass(frozen=True)
class Metric:
    """How a metric tells a copy.

    Attributes:
        direction: a copy is a value that is "<", "<=" or ">" the threshold.
        published: threshold of the literature; None where none carries over to other data.
        source: of that threshold.
    """

    direction: Literal["<", "<=", ">"]
    published: float | None = None
    source: str = ""

    def passed(self, values: np.ndarray, threshold: float) -> np.ndarray:
        """Copies among the values [N], bool [N]; an undefined value (nan) is none."""
        compare = {"<": np.less, "<=": np.less_equal, ">": np.greater}[self.direction]
        return compare(values, threshold)

    def calibrated(self, values: np.ndarray) -> float | None:
        """The threshold on whose far side 95 % of the values [N] lie; None where all are undefined."""
        defined = values[~np.isnan(values)]
        level = QUANTILE if self.direction == ">" else 1 - QUANTILE
        return float(np.quantile(defined, level)) if len(defined) else None


METRICS = {
    "adaptive_score": Metric("<=", 1.0, "the attack's own rule (Carlini et al. 2023, section 5.1)"),
    "nn_ratio": Metric("<", 1 / 3, "Yoon et al. 2023; Gu et al. 2023"),
    "tiled_l2": Metric(
        "<", 0.15, "the l2 of an extracted image (Carlini et al. 2023, section 4.2), asked of every tile"
    ),
    "ssim": Metric(">"),
    "sscd": Metric(">"),
}
STRANGERS = "95 % of the calibration pictures are less like their nearest training picture, never of the same patient"
DAR = "95 % of the training pictures are less like their nearest calibration picture (Dar et al. 2024)"
GIVEN = "attack.copy_metrics.sscd_threshold"
UNSET = "none: there are no calibration pictures"


def copy_metrics(
    generations: Any,
    names: Sequence[str],
    matches: Sequence[dict[str, Any]],
    training: Pictures,
    heldout: Pictures | None,
    calibration: Pictures | None,
    config: CopyMetricsConfig,
    accelerator: Any = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judges all matches by all metrics, on all ranks; each returns the same.

    Args:
        generations: uint8 [G, C, H, W], array or memory map, of the shape of the pictures; G > 0.
        names: name of each generation, as in the matches.
        matches: rows of matches.csv, in any order.
        heldout: pictures that the model never saw; ``background`` is the share of them that a metric takes for copies.
        calibration: pictures that the model never saw, which set thresholds; of other people than ``heldout``.

    Returns:
        report.json, ``privacy.copy_metrics``, and the rows of copy_metrics.csv in the order of ``names``. A metric without
        a threshold counts nothing (None); without SSCD's weights ``sscd_search`` is None.

    Raises:
        UserError: a weights file that cannot be used; threshold=dar without calibration pictures.
    """
    if config.threshold == "dar" and calibration is None:
        remedy = "set data.calibration_fraction, or threshold=published"
        raise UserError("attack.copy_metrics.threshold", "dar needs calibration pictures", remedy)
    sscd = None
    if config.sscd_weights is not None:
        device = "cpu" if accelerator is None else accelerator.device
        sscd = Descriptors(load_sscd(config.sscd_weights, config.sscd_weights_sha256, device), accelerator)
    measure = CopyValues(sscd, accelerator)
    match_of = {match["generation"]: match for match in matches}
    ordered = [match_of[name] for name in names]
    row_of = {record_id: row for row, record_id in enumerate(training.record_id)}
    rows = np.array([row_of[match["record_id"]] for match in ordered], dtype=np.int64)
    values = measure.of(generations, training, rows)
    if ordered[0]["adaptive_score"] is not None:
        values = {"adaptive_score": np.array([match["adaptive_score"] for match in ordered])} | values
    thresholds = _thresholds(config, measure, training, calibration)
    control = None if heldout is None else measure.of(Rows(heldout.images, heldout.first), training)
    passed = {
        name: METRICS[name].passed(value, thresholds[name][0])
        for name, value in values.items()
        if thresholds[name][0] is not None
    }
    entries = []
    for name in values:
        copied = training.picture[rows[passed[name]]] if name in passed else None
        strangers = control.get(name) if control else None
        sha256 = config.sscd_weights_sha256 if name == "sscd" else None
        entries.append(_entry(name, *thresholds[name], copied, strangers) | {"weights_sha256": sha256})
    table, searched = _table(ordered, values), None
    if sscd is not None:
        search = SscdSearch(sscd, accelerator)
        threshold = _search_threshold(config, search, training, calibration)
        searched, found = search.report(generations, rows, training, heldout, *threshold)
        table = [row | columns for row, columns in zip(table, found, strict=True)]
    report = {
        "metrics": entries,
        "agreement": _agreement(passed),
        "disagreements": _disagreements(table, values, passed),
        "sscd_search": searched,
        "generations": len(names),
        "calibration": None if calibration is None else len(calibration.ids),
        "heldout": None if heldout is None else len(heldout.ids),
        "ssim_window": ssim_window(*training.images.shape[-2:]),
    }
    return report, table


def _entry(
    name: str, threshold: float | None, rule: str, copied: np.ndarray | None, strangers: np.ndarray | None
) -> dict[str, Any]:
    """One of ``metrics``; ``copied``: picture of each generation that passes, ``strangers``: values of held-out pictures."""
    counted = copied is not None
    background = METRICS[name].passed(strangers, threshold).mean() if counted and strangers is not None else None
    return {
        "name": name,
        "threshold": threshold,
        "threshold_rule": rule,
        "direction": METRICS[name].direction,
        "copies": len(copied) if counted else None,
        "pictures": len(np.unique(copied)) if counted else None,
        "background": None if background is None else float(background),
    }


def _thresholds(
    config: CopyMetricsConfig, measure: CopyValues, training: Pictures, calibration: Pictures | None
) -> dict[str, tuple[float | None, str]]:
    """Threshold of each metric, and the rule that set it."""
    found = {name: (metric.published, metric.source) for name, metric in METRICS.items()}
    if config.sscd_threshold is not None:
        found["sscd"] = (config.sscd_threshold, GIVEN)
    measured, rule = _on_strangers(config, measure.of, training, calibration)
    for name, value in (measured or {name: np.array([np.nan]) for name in METRICS}).items():
        if config.threshold == "dar" or found[name][0] is None:
            found[name] = (METRICS[name].calibrated(value), rule)
    return found


def _search_threshold(
    config: CopyMetricsConfig, search: SscdSearch, training: Pictures, calibration: Pictures | None
) -> tuple[float | None, str]:
    """Cosine above which SSCD's search sees a copy, and the rule that set it.

    Not that of the pairs: the largest of many cosines is larger than one of a pair that l2 chose, for strangers, too.
    """
    if config.sscd_threshold is not None:
        return config.sscd_threshold, GIVEN
    measured, rule = _on_strangers(config, search.largest, training, calibration)
    return None if measured is None else METRICS["sscd"].calibrated(measured[0]), rule


def _on_strangers(
    config: CopyMetricsConfig, measure: Callable[[Any, Pictures], T], training: Pictures, calibration: Pictures | None
) -> tuple[T | None, str]:
    """``measure`` of the pictures that set thresholds, against those they are held against, and the rule; None: there are none."""
    if config.threshold == "dar":
        return measure(Rows(training.images, training.first), calibration), DAR
    if calibration is not None:
        return measure(Rows(calibration.images, calibration.first), training), STRANGERS
    return None, UNSET


def _table(matches: Sequence[dict[str, Any]], values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of copy_metrics.csv; an undefined value is None."""
    rows = [dict.fromkeys(COLUMNS) | {name: match[name] for name in COLUMNS[:4]} for match in matches]
    for name, column in values.items():
        for row, value in zip(rows, column.tolist(), strict=True):
            row[name] = None if np.isnan(value) else value
    return rows


def _agreement(passed: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each two metrics: generations that both take for copies, only one, neither."""
    return [
        {
            "first": first,
            "second": second,
            "both": int((passed[first] & passed[second]).sum()),
            "only_first": int((passed[first] & ~passed[second]).sum()),
            "only_second": int((~passed[first] & passed[second]).sum()),
            "neither": int((~passed[first] & ~passed[second]).sum()),
        }
        for first, second in combinations(passed, 2)
    ]


def _disagreements(
    table: list[dict[str, Any]], values: dict[str, np.ndarray], passed: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Generations on which the metrics are divided, most evenly first; of those, with the widest spread of ranks first.

    The rank of a generation in a metric is the share of generations that are less like a copy by it: the one scale that
    all metrics have.
    """
    if len(passed) < 2:
        return []
    votes = np.stack(list(passed.values())).sum(axis=0)
    divided = np.minimum(votes, len(passed) - votes)
    ranks = np.stack([_ranks(values[name], METRICS[name].direction == ">") for name in passed])
    spread = ranks.max(axis=0) - ranks.min(axis=0)
    order = [row for row in np.lexsort((-spread, -divided)) if divided[row]]
    return [table[row] | {"copy_by": [name for name in passed if passed[name][row]]} for row in order[:_MOST]]


def _ranks(values: np.ndarray, rises: bool) -> np.ndarray:
    """Share of the values [N] that are less like a copy than each, ties counted half, float64 [N] in [0, 1)."""
    likeness = np.nan_to_num(values if rises else -values, nan=-np.inf)
    return (rankdata(likeness) - 1) / len(values)
