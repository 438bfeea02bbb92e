"""The comparison: every arm as its own run, then one report over all.

python launch/compare.py --config FILE [--dry-run] [key=value ...]

The same command again resumes; `select=ARM` exports an arm of a finished comparison, ready to use.
"""

import os
import sys

if not __package__:  # `python launch/compare.py` puts launch/ first on the path, not the repository
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    __import__("train.cli").cli.check_libraries()  # before diffusers is imported, which fails unclearly

import hashlib
import json
import shlex
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from defenses.errors import UserError
from eval import comparison, comparison_page, comparison_table
from eval.wording import duration
from launch import jobs, preview
from launch.export import export
from launch.plan import Plan, plan, shown
from train import cli
from train.data import Dataset
from train.files import atomic, write_csv, write_json
from train.runlog import hardware, lock, timestamp, versions


def main(arguments: cli.Arguments) -> int:
    """Runs or resumes a comparison; returns the exit status: 1 where an arm failed or it was stopped."""
    if arguments.config is None:
        raise UserError("--config", "is missing", "see configs/compare/")
    whole = plan(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return preview.show(whole)
    if whole.config.select is not None:
        return export(whole)
    open_folder(whole)
    for note in preview.not_comparable(whole):
        say(f"note: {note}")
    started, before = timestamp(), time.monotonic()
    try:
        outcomes = jobs.run_all(whole.jobs, whole.config.launcher, whole.folder / "logs", say)
    except jobs.Stopped as stop:
        record(whole, stop.outcomes, started, time.monotonic() - before)
        say("stopped; the same command goes on where it was")
        return 1
    record(whole, outcomes, started, time.monotonic() - before)
    report(whole, outcomes, started)
    failed = [label for label, outcome in outcomes.items() if outcome.status != "done"]
    say(f"{len(outcomes) - len(failed)} of {len(outcomes)} done, {duration(time.monotonic() - before)}")
    for label in failed:
        say(f"{label}: {outcomes[label].status}: {outcomes[label].error}")
    say(f"report: {whole.folder / 'comparison.html'}")
    return 1 if failed else 0


def say(text: str) -> None:
    print(text, flush=True)


def open_folder(whole: Plan) -> None:
    """Creates the comparison's folder (mode 0700: it holds training pictures) and keeps a second comparison out of it."""
    try:
        whole.folder.parent.mkdir(parents=True, exist_ok=True)
        whole.folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            "output_dir", f"{whole.folder}: {error.strerror}", "choose a folder that can be written"
        ) from error
    lock(whole.folder, "name")
    with atomic(whole.folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(whole.tree))


def record(whole: Plan, outcomes: dict[str, jobs.Outcome], started: str, seconds: float) -> None:
    """Remembers in ``progress.json`` the start and the wall-clock seconds, whole and of every job, over all stops."""
    file = whole.folder / "progress.json"
    known = json.loads(file.read_text()) if file.exists() else {"started": started, "total": 0.0, "seconds": {}}
    known["total"] += seconds
    for label, outcome in outcomes.items():
        if outcome.seconds is not None:
            known["seconds"][label] = known["seconds"].get(label, 0.0) + outcome.seconds
    write_json(file, known)


def report(whole: Plan, outcomes: dict[str, jobs.Outcome], started: str) -> None:
    """comparison.json, comparison.html and comparison.csv from the reports of the arms."""
    progress = json.loads((whole.folder / "progress.json").read_text())
    given = OmegaConf.to_container(whole.tree)  # unresolved: an ${oc.env:TOKEN} stays a name
    facts = {
        "started": progress["started"],
        "finished": timestamp(),
        "command": "python launch/compare.py " + shlex.join(sys.argv[1:]),
        "config_sha256": hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest(),
        "config": given,
        "hardware": hardware(),
        "versions": versions(),
        "seconds": progress["total"],
        "job_seconds": progress["seconds"],
    }
    config = whole.config
    result = comparison.assemble(
        [arm_of(whole, name, outcomes) for name in whole.overrides],
        name=config.name,
        reference=whole.reference,
        utility=config.floor,
        factor=config.factor.key if config.factor else None,
        facts=facts,
    )
    restricted = any(job.config.data.restricted for job in whole.jobs)
    write_csv(whole.folder / "comparison.csv", comparison_table.COLUMNS, comparison_table.rows(result))
    comparison_page.render(whole.folder, result, restricted=restricted, images=training_picture)
    write_json(whole.folder / "comparison.json", result)


def arm_of(whole: Plan, name: str, outcomes: dict[str, jobs.Outcome]) -> comparison.Arm:
    """An arm with what became of each of its seeds."""
    mine = whole.of(name)
    runs = [
        comparison.ArmRun(
            seed=job.seed,
            directory=job.directory,
            manifest=job.manifest,
            command=shown(whole.config.launcher, job),
            status=outcomes[job.label].status,
            error=outcomes[job.label].error,
        )
        for job in mine
    ]
    shares = mine[0].parent.arm if mine[0].parent else None
    return comparison.Arm(
        name=name, overrides=whole.overrides[name], shares=shares, runs=runs, level=whole.levels.get(name)
    )


def training_picture(run: Path, record_id: str) -> np.ndarray:
    """A record's picture, uint8 [C, H, W], from the prepared data of the run that trained on it."""
    dataset, row = prepared(run)
    return np.asarray(dataset.images[row[record_id]])


@cache
def prepared(run: Path) -> tuple[Dataset, dict[str, int]]:
    dataset = Dataset.load(run / "prepared")
    return dataset, {each.record_id: place for place, each in enumerate(dataset.records)}


if __name__ == "__main__":
    given = cli.parse(__doc__)
    cli.run(main, replace(given, config=given.config and Path(given.config)))
