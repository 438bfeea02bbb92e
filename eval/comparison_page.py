"""comparison.html from comparison.json and the run directories beside it: one file that opens offline."""

import base64
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from eval import attackwords, comparison_plots, evidence, pages, standings, wording
from eval.quoted import Quoted
from train.files import atomic

BUDGET_BYTES = 1_500_000  # of encoded pictures in the pairs of all arms, and again in their grids

# parts of comparison.json that may hold names of files or people: where the data are restricted they are not shown
NAMING = {"command", "overrides", "config", "error", "directory", "not_measured"}

# titles of `eval.otherattacks.ATTACKS` on the page; the guard's other side stands in the column of its attack
OTHERS = {
    "captions": "By their own captions",
    "finetuning": "Attack on the fine-tuning",
    "membership": "Membership, by picture",
    "membership_groups": "Membership, by person or group",
    "inpainting": "Inpainting from one half",
    "canaries": "Planted canaries",
    "audit": "Canaries of DP-SGD",
    "prefilter": "Pre-filter of the prompts",
    "risk": "Recognised, by copies",
}

FINDINGS = {
    "threshold": "threshold: what comes nearer is a copy",
    "false_alarm_rate": "false-alarm rate on calibration pictures, as asked for",
    "redrawn": "images drawn again",
    "withheld": "images withheld",
    "generations": "images drawn",
    "flagged": "flagged at their first drawing",
    "filter_seconds_per_image": "seconds per image that the filter takes",
    "calibration_pictures": "calibration pictures that set the threshold",
    "calibration_units": "people, or pictures without one, behind them",
    "calibration_flagged": "share of the calibration pictures that are flagged",
    "index_pictures": "training pictures in the index",
    "index_side": "pixels a side at which pictures are held against each other",
    "released_step": "step of the released checkpoint",
    "onset_step": "step at which copies set in",
    "released_is_clean": "released checkpoint is within the tolerance",
    "images": "generations looked at per checkpoint",
    "pictures": "pictures of either side compared",
}


def render(
    folder: Path,
    comparison: dict[str, Any],
    *,
    restricted: bool,
    images: Callable[[Path, str], np.ndarray] | None,
    pairs: int = 6,
    grid: int = 36,
) -> None:
    """Writes ``folder/comparison.html``; every number on it, but for the captions of the pairs, is one of ``comparison``.

    Args:
        folder: of the comparison; holds the run directories, of which a file that is not there leaves its part out.
        comparison: contents of comparison.json.
        restricted: ``data.restricted``: no picture, no record id, no command and no path is shown.
        images: training picture, uint8 [C, H, W], of a record of the run in a directory: in a comparison that varies the data the
            same record is another picture in every arm. Never called where ``restricted``. None: no pairs.
        pairs: extracted pictures shown per arm beside their generation, at most.
        grid: generations shown per arm, the same sample indices for all.
    """
    arms = comparison["arms"]
    script = Markup((pages.TEMPLATES / "comparison.js").read_text(encoding="utf-8").strip())
    page = pages.template("comparison.html.j2").render(
        c=comparison,
        show=Quoted(comparison),
        restricted=restricted,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        words=standings,
        groups=standings.groups(arms),
        level=standings.level(arms),
        titles=standings.TITLES,
        reference=_reference(comparison),
        distance="FID" if comparison["design"]["features"] == "inception" else "Fréchet distance",
        features_text=wording.FEATURES.get(features := comparison["design"]["features"], features),
        measured=[index for index, arm in enumerate(arms) if arm["summary"]],
        downstream=any("utility.downstream.accuracy" in arm["summary"] for arm in arms),
        figures=_figures(comparison),
        others=_others(arms),
        attack_names=attackwords.NAMES,
        correlated=any(standings.CORRELATED + ".verified" in arm["summary"] for arm in arms),
        findings=[_findings(arm) for arm in arms],
        evidence=[] if restricted else _evidence(folder, arms, images, pairs),
        grids=[] if restricted else _grids(folder, arms, grid),
        not_measured=_not_measured(comparison, restricted),
        fields=_fields(comparison, restricted),
    )
    with atomic(folder / "comparison.html") as file:
        file.write(page)


def _reference(comparison: dict[str, Any]) -> int:
    """Index of the arm that the others are held against."""
    return [arm["name"] for arm in comparison["arms"]].index(comparison["design"]["reference"])


def _figures(comparison: dict[str, Any]) -> dict[str, Any]:
    metric = comparison["design"]["utility"]["metric"]
    return {
        "weights": comparison_plots.plane(comparison, "weights"),
        "outputs": comparison_plots.plane(comparison, "outputs"),
        "trajectories": comparison_plots.trajectories(comparison),
        "verified": comparison_plots.over_images(comparison, "verified"),
        "metric": comparison_plots.over_images(comparison, metric),
        "copies": [comparison_plots.copies(arm) for arm in comparison["arms"]],
        "trend": comparison_plots.trend(comparison["trend"]) if comparison["trend"] else None,
    }


def _others(arms: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of the table of the other attacks, (name, title), and the titles of those that no arm made."""
    made = {name: any(arm["other_attacks"][name] is not None for arm in arms) for name in OTHERS}
    return {
        "columns": [(name, title) for name, title in OTHERS.items() if made[name]],
        "missing": [title for name, title in OTHERS.items() if not made[name]],
    }


def _findings(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """What the defenses of an arm measured, run by run: rows of (label, path below the arm, value), and a curve."""
    return [
        {
            "name": finding["name"],
            "seed": f"runs.{number}.seed",
            "rule": finding.get("rule"),
            "curve": comparison_plots.early_stop(finding),
            "rows": [
                (
                    FINDINGS.get(key, key.replace("_", " ").replace(".", ", ")),
                    f"runs.{number}.findings.{place}.{key}",
                    value,
                )
                for key, value in wording.flatten(finding)
                if key not in ("name", "rule") and not key.startswith("curve") and value is not None
            ],
        }
        for number, run in enumerate(arm["runs"])
        for place, finding in enumerate(run["findings"] or [])
    ]


def _evidence(
    folder: Path, arms: list[dict[str, Any]], images: Callable[[Path, str], np.ndarray] | None, most: int
) -> list[dict[str, Any]]:
    """Pairs of each arm's first finished seed: {arm, run, verified, closest}; arms without any are left out."""
    shown = []
    for index, arm in enumerate(arms):
        number = _first_done(arm)
        if number is None or images is None:
            continue
        directory = folder / arm["runs"][number]["directory"]
        manifest = directory / "manifest.csv"
        if not manifest.exists():  # an arm that shares a training lies in <training>/eval/<arm>
            manifest = directory.parent.parent / "manifest.csv"
        rows = evidence.pair_rows(
            evidence.read_matches(directory / "attack" / "matches.csv"),
            evidence.read_table(manifest),
            evidence.generation_files(directory / "generations"),
            partial(images, manifest.parent),
            most,
            BUDGET_BYTES // len(arms),
        )
        if rows["verified"] or rows["closest"]:
            shown.append({"arm": index, "run": number, **rows})
    return shown


def _grids(folder: Path, arms: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Generations of the same sample indices for every arm: {arm, run, pictures}; None where an arm has no such file."""
    numbers = {index: number for index, arm in enumerate(arms) if (number := _first_done(arm)) is not None}
    files = {
        index: evidence.generation_files(folder / arms[index]["runs"][number]["directory"] / "generations")
        for index, number in numbers.items()
    }
    # images of one prompt show nearly one picture: the first of every prompt, then the second
    names = sorted(set().union(*files.values()), key=lambda name: (name.rpartition("/")[2], name))[:most]
    pictures = {
        (index, name): evidence.read_image(found[name]) if name in found else None
        for index, found in files.items()
        for name in names
    }
    uris = iter(evidence.encode([picture for picture in pictures.values() if picture is not None], BUDGET_BYTES))
    shown = {key: None if picture is None else next(uris) for key, picture in pictures.items()}
    return [
        {"arm": index, "run": number, "pictures": [shown[index, name] for name in names]}
        for index, number in numbers.items()
        if files[index]
    ]


def _first_done(arm: dict[str, Any]) -> int | None:
    return next((number for number, run in enumerate(arm["runs"]) if run["status"] == "done"), None)


def _not_measured(comparison: dict[str, Any], restricted: bool) -> list[str]:
    """The sentences, without what failed runs said where that may name a file."""
    errors = [error for arm in comparison["arms"] for error in standings.errors(arm)] if restricted else []
    sentences = comparison["not_measured"]
    for error in errors:
        sentences = [sentence.replace(error, "its message is withheld") for sentence in sentences]
    return sentences


def _fields(comparison: dict[str, Any], restricted: bool) -> list[tuple[str, Any]]:
    """Every field of comparison.json, (dotted key, value); values of a run that the page does not show are among them."""
    rows = wording.flatten(comparison)
    return [(key, value) for key, value in rows if not (restricted and NAMING & set(key.split(".")))]
