"""report.html and MODEL_CARD.md from report.json and the run directory; one process calls it, their only writer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from defenses.errors import UserError
from eval import attackwords, claims, evidence, pages, plots, wording
from eval.card import model_card
from eval.promptpage import flagged_prompts
from eval.verdict import verdict
from train.files import atomic

BUDGET_BYTES = 550_000  # of encoded pictures in the pairs, and again in the grid: the page stays below 2 MB
VERIFY_L2 = 0.15  # of the prompted protocol (Carlini et al. 2023, section 4.2), where the report does not say

# fields that may hold names of files or people, or ids that are made from them
NAMING = (
    "run.command", "data.source", "data.generations_rejected", "privacy.inpainting.examples",
    "privacy.copy_metrics.disagreements", "privacy.risk.top", "privacy.finetuning.base", "privacy.finetuning.examples",
)  # fmt: skip
# the curves that are drawn first, where there are more than a plot holds
PLOTTED = ("lira-strong", "gsa", "lira", "loss-strong", "loss", "loss-grid", "gsa-norm", "clid", "secmi", "pia")
BULKY = ("privacy.inpainting.pairs",)  # left out of the list of all fields

Images = Callable[[str], np.ndarray]  # record_id -> uint8 [C, H, W]


@dataclass(kw_only=True)
class ReportConfig:
    """Section ``report``."""

    # steps of earlier checkpoints that are attacked and measured too, so that privacy can be held against utility along
    # training; needs train.keep_checkpoints=null; []: the released weights alone
    along: list[int] = field(default_factory=list)
    pairs: int = 24  # extracted pictures shown beside their generation, at most; 0: none
    grid: int = 64  # generations in the sample grid, at most; 0: none
    push_to_hub: str | None = (
        None  # owner/name to upload the model and its card to when all is done; null: nothing leaves
    )
    # true: a differentially private run, too, logs losses and held-out metrics of its records, which its claim does not
    # cover; the report says so
    nonprivate_metrics: bool = False

    def __post_init__(self):
        for key in ("pairs", "grid"):
            if getattr(self, key) < 0:
                raise UserError(f"report.{key}", f"{getattr(self, key)} is negative", "take 0 for none, or more")
        if any(step < 1 for step in self.along) or len(set(self.along)) < len(self.along):
            raise UserError("report.along", f"{self.along} are not distinct steps", "e.g. [100, 200, 300]")


def render(
    run_dir: Path,
    report: dict[str, Any],
    *,
    images: Images,
    restricted: bool,
    config: ReportConfig,
    generations: Path | None = None,
    trained_in: Path | None = None,
) -> None:
    """Writes ``report.html`` (one file, no scripts, opens offline) and ``MODEL_CARD.md`` into ``run_dir``.

    Args:
        run_dir: holds ``attack/``; a file that is not there leaves its part of the page out.
        report: contents of report.json.
        images: training picture of a record; never called where ``restricted``.
        restricted: ``data.restricted``: no picture, no file name and no record id is shown.
        generations: folder of the generated images; None: ``run_dir/generations``.
        trained_in: directory with ``metrics.jsonl`` and ``manifest.csv``; None: ``run_dir``.
    """
    extraction = (report["privacy"] or {}).get("extraction")
    matches = evidence.read_matches(run_dir / "attack" / "matches.csv")
    manifest = evidence.read_table((trained_in or run_dir) / "manifest.csv")
    generations = generations or run_dir / "generations"
    files, pictures = evidence.generation_files(generations), None if restricted else images
    verify_l2 = float(((extraction or {}).get("settings") or {}).get("verify_l2", VERIFY_L2))
    page = pages.template("report.html.j2").render(
        **_texts(report, extraction, restricted),
        **evidence.pair_rows(matches, manifest, files, pictures, config.pairs, BUDGET_BYTES),
        **_grid(files, restricted, config.grid),
        restricted=restricted,
        cliques=flagged_prompts(
            run_dir / "attack" / "cliques.csv", generations / "index.csv", manifest, files, pictures, config.pairs
        ),
        curves=plots.training_curves(evidence.read_metrics((trained_in or run_dir) / "metrics.jsonl")),
        histogram=plots.match_histogram(matches, verify_l2),
        copies_plot=plots.copies_bars((extraction or {}).get("by_copies") or {}),
        memorisation=_memorisation(report),
        roc_plot=plots.roc_curves(_curves(run_dir)),
        risk_plot=plots.risk_scatter(_risks(run_dir)),
        reconstructions=_reconstructions(run_dir, report, pictures),
        extrapolated=_extrapolated(run_dir, report, pictures),
    )
    for name, text in (("report.html", page), ("MODEL_CARD.md", model_card(report))):
        with atomic(run_dir / name) as file:
            file.write(text)


def _texts(report: dict[str, Any], extraction: dict[str, Any] | None, restricted: bool) -> dict[str, Any]:
    """Context that comes from report.json alone."""
    utility, pictures = report.get("utility") or {}, wording.distinct_pictures(report)
    settings = wording.flatten((extraction or {}).get("settings") or {})
    return {
        "report": report,
        "extraction": extraction,
        "pictures": pictures,
        "zero_hits": wording.zero_hits((extraction or {}).get("rate_ci95"), pictures),
        "verdict": verdict(report),
        "not_measured": wording.not_measured(report),
        "alarms": claims.alarms(report),
        "claims": claims.of_report(report),
        "audit": claims.audit((report["privacy"] or {}).get("audit")),
        "recognised": attackwords.primary(report["privacy"] or {}),
        "rate_methods": sorted(
            {
                method
                for entry in (report["privacy"] or {}).get("membership") or []
                for method in (entry.get("tpr_method") or {}).values()
                if method
            }
        ),
        "attack_names": attackwords.NAMES,
        "metric_names": attackwords.METRICS,
        "detector_names": attackwords.DETECTORS,
        "distance_name": wording.distance_name(utility.get("features")),
        "features_text": wording.FEATURES.get(utility.get("features", ""), utility.get("features")),
        "settings": [(key, value) for key, value in settings if value is not None],  # None: not of this protocol
        "fields": [
            (key, value)
            for key, value in wording.flatten(report)
            if not key.startswith(BULKY) and not (restricted and key.startswith(NAMING))
        ],
        "defenses": [_defense(entry) for entry in report.get("defenses") or []],
    }


def _grid(files: dict[str, Path], restricted: bool, most: int) -> dict[str, Any]:
    """Context ``grid``: data URIs of the first generations. None of restricted data: a turned copy passes no distance."""
    first = [] if restricted else islice(files.values(), most)
    pictures = [image for path in first if (image := evidence.read_image(path)) is not None]
    return {"grid": evidence.encode(pictures, BUDGET_BYTES)}


def _defense(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of ``defenses``: settings as (key, value) rows, the claim in words (``dp``: of differential privacy, or None)."""
    claim = entry.get("claim") or {}
    return {
        "name": entry["name"],
        "settings": wording.flatten(entry.get("settings") or {}),
        "statement": claim.get("statement"),
        "findings": [row for row in wording.flatten(entry.get("findings") or {}) if not row[0].startswith("curve.")],
        "dp": claims.in_words(claim) if claim.get("kind") == "dp" else None,
    }


def _memorisation(report: dict[str, Any]) -> plots.Themed | None:
    """The curve that early stopping watched; None without it."""
    found = next((e["findings"] for e in report.get("defenses") or [] if (e.get("findings") or {}).get("curve")), None)
    return plots.memorisation_curve(found["curve"], found["released_step"]) if found else None


def _reconstructions(run_dir: Path, report: dict[str, Any], images: Images | None) -> list[dict[str, Any]]:
    """Rows of ``privacy.inpainting.examples`` with the best fill and the picture as data URIs; none of restricted data."""
    examples = ((report["privacy"] or {}).get("inpainting") or {}).get("examples") or []
    if images is None:
        return []
    shown = [(row, evidence.read_image(run_dir / row["fill"])) for row in examples if row["fill"]]
    shown = [(row, fill) for row, fill in shown if fill is not None]
    pictures = evidence.encode([each for row, fill in shown for each in (fill, images(row["record_id"]))], BUDGET_BYTES)
    return [row | {"fill": pictures[2 * i], "original": pictures[2 * i + 1]} for i, (row, _) in enumerate(shown)]


def _extrapolated(run_dir: Path, report: dict[str, Any], images: Images | None) -> list[dict[str, Any]]:
    """Rows of ``privacy.finetuning.examples`` with the candidate and the picture as data URIs; none of restricted data."""
    examples = ((report["privacy"] or {}).get("finetuning") or {}).get("examples") or []
    if images is None:
        return []
    read = [(row, evidence.read_image(run_dir / "finetuning" / row["generation"])) for row in examples]
    shown = [(row, image) for row, image in read if image is not None]
    pictures = evidence.encode(
        [each for row, image in shown for each in (image, images(row["record_id"]))], BUDGET_BYTES
    )
    return [row | {"image": pictures[2 * i], "original": pictures[2 * i + 1]} for i, (row, _) in enumerate(shown)]


def _curves(run_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both rates of every attack per record, from attack/roc.csv, those of shadow models first."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in evidence.read_table(run_dir / "attack" / "roc.csv"):
        if row["unit"] == "record":
            points.setdefault(row["attack"], []).append((float(row["fpr"]), float(row["tpr"])))
    names = sorted(points, key=lambda name: PLOTTED.index(name) if name in PLOTTED else len(PLOTTED))
    return {attackwords.NAMES.get(name, name): tuple(np.array(points[name]).T) for name in names}


def _risks(run_dir: Path) -> list[dict[str, Any]]:
    """What a plot needs of attack/risk.csv; an empty cell is None."""
    rows = evidence.read_table(run_dir / "attack" / "risk.csv")
    return [
        {name: float(row[name]) if row[name] else None for name in ("outlierness", "l2", "adaptive_score", "copies")}
        | {"verified": row["verified"] == "true"}
        for row in rows
    ]
