"""Arms of a comparison as files: which runs there are, what their reports say, which pictures they gave away."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from defenses.errors import UserError


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
            raise UserError("utility.at_most", f"is {self.at_most}", "take a number, or null for no floor")
