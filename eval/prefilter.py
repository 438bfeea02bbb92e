"""The pre-filter: prompts scored before anything is generated, kept over stops, and held against what the attack then found."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.stats import rankdata

from defenses.blocklog import BlockLog
from defenses.errors import UserError
from defenses.ranks import on_main
from eval import captions, roc, samples
from eval.denoiser import Denoiser
from eval.detectors import score
from eval.intervals import rate_interval
from eval.suite import Finding, Scene
from eval.target import Target
from train.data import Dataset

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)  # of the prompts, by score, that recall is told for
COLUMNS = ["number", "prompt", "score", "rank", "copies", "flagged", "verified"]
_BLOCK = 1024  # prompts whose scores are written at once
_NOTE = (
    "Recall and AUC are those of the attack's own answers: the prompts that it did not flag are of the same data, not of another "
    "corpus. Nothing is said of what the attack itself missed."
)


def prompt_scores(
    target: Target, model: Denoiser, config: SimpleNamespace, accelerator: Accelerator, prompts: Sequence[str]
) -> list[float]:
    """Score of each prompt, on all ranks. What was scored before is read from ``attack/prompt_scores-0.jsonl``.

    Raises:
        UserError: the prompts were put in order by other settings, and images of that order may exist.
    """
    settings, log = _settings(config), BlockLog(target.output.attack, "prompt_scores", 0)
    if config.generate.order == "prefilter":
        on_main(accelerator, lambda: _refuse_other(log, settings))
    known, _ = on_main(accelerator, lambda: _known(log, settings))
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    for start in range(0, len(missing), _BLOCK):
        began, some = time.perf_counter(), missing[start : start + _BLOCK]
        found = score(model, some, config.attack.prefilter, config.run.seed, accelerator)
        scores = dict(zip(some, found.tolist(), strict=True))
        line = {"settings": settings, "scores": scores, "seconds": time.perf_counter() - began}
        on_main(accelerator, partial(log.add, line))
        known |= scores
    return [known[prompt] for prompt in prompts]


def run(scene: Scene) -> Finding:
    """Scores the prompts that were attacked, or reads their scores, and measures what the pre-filter would have found."""
    target, config = scene.target, scene.config
    dataset = captions.for_prompts(target, config)
    scores: dict[str, float] = {}  # of the prompts that this configuration asks about: the log may have others

    def scorer(prompts: list[str]) -> list[float]:
        found = prompt_scores(target, scene.denoiser, config, scene.accelerator, prompts)
        scores.update(zip(prompts, found, strict=True))
        return found

    attacked = samples.prompts_of(config.generate, dataset, scorer)
    scorer(attacked)
    log = BlockLog(target.output.attack, "prompt_scores", 0)
    _, seconds = on_main(scene.accelerator, lambda: _known(log, _settings(config)))
    rows = table(scores, attacked, scene.extraction.cliques if scene.extraction else [], dataset)
    reason = _reason(scene, rows)
    unit = _units(rows, dataset)
    found = {name: None if reason else measured(rows, name, unit, config.run.seed) for name in ("flagged", "verified")}
    report = {
        "detector": config.attack.prefilter.detector,
        "settings": _settings(config),
        "prompts": len(rows),
        "attacked": sum(row["flagged"] is not None for row in rows),
        **{name: sum(bool(row[name]) for row in rows) for name in ("flagged", "verified")},
        **{key: {name: part and part[key] for name, part in found.items()} for key in ("recall", "recall_ci95", "auc")},
        "reason": reason,
        "seconds": seconds,
        "note": _NOTE,
    }
    return Finding(report, {"prompt_scores.csv": (COLUMNS, rows)})


def table(
    scores: dict[str, float], attacked: Sequence[str], cliques: Sequence[dict[str, Any]], dataset: Dataset
) -> list[dict[str, Any]]:
    """Rows of prompt_scores.csv, the highest score first.

    ``rank`` is the number of prompts whose score is not lower. ``copies`` of the picture of a caption; None for other prompts.
    ``flagged`` and ``verified`` are None where the attack did not run; ``number`` is the prompt's among those attacked.

    Args:
        cliques: rows of cliques.csv; ``prompt`` is the text, or the name of the folder of its generations.
    """
    number = {prompt: place for place, prompt in enumerate(attacked)}
    outcome = {row["prompt"]: row for row in cliques}
    copies: dict[str, int] = {}
    for record in (dataset.records[row] for row in dataset.rows("train")):
        copies[record.caption] = max(copies.get(record.caption, 0), record.copies)
    rank = rankdata([-score for score in scores.values()], method="max").astype(int)
    rows = []
    for (prompt, value), place in zip(scores.items(), rank.tolist(), strict=True):
        folder = f"{number[prompt]:05d}" if prompt in number else None
        found = outcome.get(folder, outcome.get(prompt)) if folder else None
        row = {"number": number.get(prompt), "prompt": prompt, "score": value, "rank": place}
        row |= {"copies": copies.get(prompt), "flagged": found and found["flagged"]}
        rows.append(row | {"verified": found and found["verified"]})
    return sorted(rows, key=lambda row: row["rank"])


def measured(rows: Sequence[dict[str, Any]], name: str, unit: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Recall of the top shares and AUC for the prompts that are ``name`` ("flagged" or "verified"); None: there are none.

    The top share s of P prompts are those of rank at most ceil(s P): of equal scores at the edge none.

    Args:
        unit: int64 [P], prompts of one unit (patient, picture) share it.

    Returns:
        ``recall`` and ``recall_ci95`` by share; ``auc``: ``{"auc", "ci95", "method"}``, None where all are ``name``.
    """
    rank, score = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("rank", "score"))
    hit = np.array([bool(row[name]) for row in rows])
    if not hit.any():
        return None
    grouped = len(np.unique(unit)) < len(unit)
    recall, ci95 = {}, {}
    for share in SHARES:
        caught = rank[hit] <= np.ceil(share * len(rows) - 1e-9)  # 0.1 * 30 is more than 3
        low, high, _ = rate_interval(caught, unit[hit], grouped, seed)
        recall[f"{share:g}"], ci95[f"{share:g}"] = float(caught.mean()), [low, high]
    area = None
    if not hit.all():
        found = roc.auc(score[hit], score[~hit], (unit[hit], unit[~hit]) if grouped else None)
        area = {"auc": found.auc, "ci95": [found.low, found.high], "method": found.method}
    return {"recall": recall, "recall_ci95": ci95, "auc": area}


def _units(rows: Sequence[dict[str, Any]], dataset: Dataset) -> np.ndarray:
    """Independent unit behind each prompt, int64 [P]: of the first record with that caption, else the prompt itself."""
    block: dict[str, int] = {}
    for record in (dataset.records[row] for row in dataset.rows("train")):
        block.setdefault(record.caption, record.block)
    labels = [f"block {block[row['prompt']]}" if row["prompt"] in block else f"prompt {row['prompt']}" for row in rows]
    return np.unique(labels, return_inverse=True)[1]


def _reason(scene: Scene, rows: Sequence[dict[str, Any]]) -> str | None:
    """Why there is no recall; None: there is."""
    if scene.extraction is None or not scene.extraction.cliques:
        return "the prompted attack did not run"
    attacked = sum(row["flagged"] is not None for row in rows)
    if attacked < len(rows):
        return (
            f"the attack ran on {attacked} of {len(rows)} scored prompts: what the others would have given is not known"
        )
    return None if any(row["flagged"] for row in rows) else "the attack flagged no prompt"


def _settings(config: SimpleNamespace) -> dict[str, Any]:
    """All that decides a score but the model, which is one for each folder of results."""
    found = asdict(config.attack.prefilter) | {"seed": config.run.seed}
    del found["batch_size"]
    return found


def _known(log: BlockLog, settings: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Scores with these settings by prompt, in the order in which they were made, and the seconds that they took."""
    lines = [line for line in log.lines() if line["settings"] == settings]
    return {prompt: value for line in lines for prompt, value in line["scores"].items()}, sum(
        line["seconds"] for line in lines
    )


def _refuse_other(log: BlockLog, settings: dict[str, Any]) -> None:
    other = next((line["settings"] for line in log.lines() if line["settings"] != settings), None)
    if other is not None:
        key = next(key for key in settings if settings[key] != other.get(key))
        raise UserError(
            f"attack.prefilter.{key}",
            f"the prompts were put in order with {other.get(key)!r}, now {settings[key]!r}",
            "give the same settings, or another run.name",
        )
