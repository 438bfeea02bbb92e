"""Arms of a comparison as files: which runs there are, what their reports say, which pictures they gave away."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from defenses.errors import UserError
from eval.evidence import read_matches, read_table
from train.splits import blocks

SECTIONS = ("data", "defenses", "model", "privacy", "utility", "cost")  # of report.json, where its figures are
NOT_FIGURES = {
    "settings", "findings", "by_copies", "guard_off", "extraction_guard_off", "reasons", "notes", "generations_rejected",
    # lists whose places mean another attack, picture or pair in each run: they stay in the arms' own reports
    "membership", "pairs", "examples", "metrics", "agreement", "disagreements", "top", "by_outlierness", "correlation", "curve",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm with one seed.

    Attributes:
        directory: holds ``report.json`` and ``attack/matches.csv`` where ``status`` is done.
        manifest: manifest.csv of the training, in the directory that trained; the comparison's folder is above that.
        command: exact command that reproduces the run.
        error: last line that a failed run printed.
    """

    seed: int
    directory: Path
    manifest: Path
    command: str
    status: Literal["done", "failed", "missing"]
    error: str | None = None

    @property
    def path(self) -> str:
        """Directory relative to the comparison's folder, with forward slashes."""
        return self.directory.relative_to(self.manifest.parent.parent).as_posix()


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: overrides of the base configuration, over the seeds.

    Attributes:
        overrides: key=value, as the user wrote them.
        shares: arm whose training it evaluates again under another defense; None: it trains.
        runs: one per seed, in the order of the configured seeds, the same for all arms.
        level: value of the varied factor; None where the comparison varies none.
    """

    name: str
    overrides: list[str]
    shares: str | None
    runs: list[ArmRun]
    level: float | int | str | None = None


@dataclass(kw_only=True)
class UtilityFloor:
    """Section ``utility`` of a comparison: what an arm must reach to be ranked."""

    metric: Literal["kid", "fid"] = "kid"  # lower is better
    # an arm whose mean over the seeds is above it is "not comparable"; null: no floor was stated, all are ranked
    at_most: float | None = None

    def __post_init__(self):
        if self.at_most is not None and not -float("inf") < self.at_most < float("inf"):
            raise UserError("floor.at_most", f"is {self.at_most}", "take a number, or null for no floor")


@dataclass
class Training:
    """What a manifest says of the data.

    Attributes:
        records: record_id -> (sha256, split, cluster) of every usable record; the same for runs on the same data and split.
        picture: record_id -> distinct picture (cluster), training records only.
        unit_of: distinct training picture -> independent unit: records connected by group or by cluster.
        unit: what the units are, in words.
    """

    records: dict[str, tuple[str, str, int]]
    picture: dict[str, int]
    unit_of: dict[int, int]
    unit: str

    def by_copies(self) -> dict[int, set[int]]:
        """Distinct training pictures by how often they occur among the training records, fewest copies first."""
        found: dict[int, set[int]] = {}
        for picture, copies in sorted(Counter(self.picture.values()).items(), key=lambda pair: pair[1]):
            found.setdefault(copies, set()).add(picture)
        return found


@dataclass
class Outcome:
    """What one run gave. A run that is not done has no report, and no numbers.

    Attributes:
        report: contents of report.json, or None.
        values: its numbers by dotted path, see `numbers`; empty without a report.
        training: of the run that trained; None without a report.
        verified: distinct training pictures in attack/matches.csv that are verified; None where there was no attack.
    """

    run: ArmRun
    report: dict[str, Any] | None = None
    values: dict[str, float] = field(default_factory=dict)
    training: Training | None = None
    verified: frozenset[int] | None = None

    @property
    def guarded(self) -> bool:
        """Whether a defense worked on the sampling alone."""
        return self.report is not None and self.report["privacy"].get("extraction_guard_off") is not None

    @property
    def silenced(self) -> bool:
        """Whether the guard withheld every image: nothing was attacked, and there is no quality."""
        return self.guarded and self.report["privacy"]["extraction"]["generations"] == 0

    @property
    def by_construction(self) -> bool:
        """Whether little is found behind the guard by construction: a defense there judges images by the attack's own score, or does
        not say that it does not."""
        claims = [each["claim"] for each in self.report["defenses"]] if self.guarded else []
        guards = [claim for claim in claims if claim.get("protects") == "outputs"]
        return self.guarded and not (guards and all(claim.get("uses_attack_score") is False for claim in guards))

    @property
    def asked(self) -> dict[str, Any] | None:
        """``privacy.extraction`` of the images that were asked for: an output filter may have withheld some of them."""
        if self.report is None:
            return None
        return self.report["privacy"]["extraction_guard_off" if self.guarded else "extraction"]


def read_outcomes(arms: Sequence[Arm]) -> list[tuple[Arm, list[Outcome]]]:
    """Reads the files of every run; a run that is not done gives an empty outcome.

    Raises:
        UserError: a file of a finished run is missing or broken, or its files contradict each other.
    """
    trainings: dict[Path, Training] = {}  # arms that share a training share its manifest
    return [(arm, [_read_outcome(run, trainings) for run in arm.runs]) for arm in arms]


def _read_outcome(run: ArmRun, trainings: dict[Path, Training]) -> Outcome:
    if run.status != "done":
        return Outcome(run)
    try:
        text = (run.directory / "report.json").read_text(encoding="utf-8")
        report = json.loads(text, parse_constant=_no_json)
    except (OSError, ValueError) as error:
        raise UserError(f"{run.path}/report.json", "cannot be read", "evaluate this run again") from error
    if run.manifest not in trainings:
        trainings[run.manifest] = read_training(run.manifest)
    training = trainings[run.manifest]
    extraction = report["privacy"]["extraction"]
    verified = None if extraction is None else _verified(run, training, extraction["verified"])
    return Outcome(run, report, numbers(report), training, verified)


def read_training(manifest: Path) -> Training:
    """Reads manifest.csv.

    Raises:
        UserError: there is none.
    """
    rows = [row for row in read_table(manifest) if row["split"]]
    if not rows:
        raise UserError(str(manifest), "is missing or empty", "run the arm again")
    records = {row["record_id"]: (row["sha256"], row["split"], int(row["cluster"])) for row in rows}
    mine = [row for row in rows if row["split"] == "train"]
    clusters = np.array([int(row["cluster"]) for row in mine], dtype=np.int64)
    groups = [row["group"] or None for row in mine]
    unit_of = dict(zip(clusters.tolist(), blocks(groups, clusters).tolist(), strict=True))
    unit = "groups (patients) connected by copies" if any(groups) else "distinct pictures"
    return Training(
        records, dict(zip([row["record_id"] for row in mine], clusters.tolist(), strict=True)), unit_of, unit
    )


def numbers(report: dict[str, Any]) -> dict[str, float]:
    """Finite numbers of report.json by dotted path; a place in a list counts from 0 ("rate_ci95.0").

    Left out are `NOT_FIGURES`: settings, notes whose keys come from the data, and what a comparison keeps elsewhere.
    """
    found: dict[str, float] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if key not in NOT_FIGURES:
                    visit(item, f"{path}.{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[path] = value

    for section in SECTIONS:
        visit(report.get(section), section)
    return found


def lookup(report: Any, dotted: str) -> Any:
    """Value at a dotted path; None where a part of the way is missing or null."""
    for key in dotted.split("."):
        report = report.get(key) if isinstance(report, dict) else None
    return report


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _verified(run: ArmRun, training: Training, reported: int) -> frozenset[int]:
    matches = [match for match in read_matches(run.directory / "attack" / "matches.csv") if match.verified]
    unknown = [match.record_id for match in matches if match.record_id not in training.picture]
    found = frozenset(training.picture[match.record_id] for match in matches if not unknown)
    if unknown or len(found) != reported:
        problem = f"has {len(found)} verified pictures, report.json has {reported}"
        if unknown:
            problem = f"names record {unknown[0]}, which is not in the training split of manifest.csv"
        raise UserError(f"{run.path}/attack/matches.csv", problem, "evaluate this run again")
    return found
