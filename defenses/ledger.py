"""The ledger of a private run: one line per noisy gradient, on disk before the gradient is used.

Append-only JSON lines. What it holds is public: constants of the mechanism and a random name of the process that ran it,
never a seed, a mask, a realised batch size or a loss.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from defenses.accounting import Spend
from defenses.errors import UserError


@dataclass(frozen=True)
class Mechanism:
    """The constants of one segment: all that the accountant and the gradient rule use, from one object.

    Attributes:
        unit: what one clip bounds and the guarantee protects.
        copies: records of one unit that may be drawn in one step, each by itself (1 where the unit is drawn as a whole).
        adjacency: "add-remove", or "zero-out" where the number of units is public.
        sample_rate: probability of a unit (or record) to be in a step.
        noise_multiplier: standard deviation of the noise in units of ``clip_norm``.
        clip_norm: bound of the l2 norm of what a unit (or record) adds to the sum.
        divisor: constant by which the noisy sum is divided.
        settings: digest of everything else that the mechanism depends on.
        test: whether noise and sampling came from a seed that is known.
    """

    unit: str
    copies: int
    adjacency: str
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    divisor: float
    settings: str
    test: bool


@dataclass(frozen=True)
class Segment:
    """Consecutive steps with the same constants."""

    mechanism: Mechanism
    steps: int


class Ledger:
    """``ledger.jsonl`` of a run directory. Only the main process writes."""

    def __init__(self, file: Path):
        self.file = file

    def append(self, mechanism: Mechanism, segment: int, step: int, process: str) -> None:
        """Books one step; on disk when this returns."""
        line = {"segment": segment, "step": step, **asdict(mechanism), "process": process}
        with self.file.open("ab") as file:
            if file.tell() and not self._ends_whole():
                file.write(b"\n")  # a kill cut the last line short: it stays, and counts
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def lines(self) -> list[dict[str, Any]]:
        """All booked steps, oldest first. A line that a kill cut short counts as one more step like its neighbour.

        Raises:
            UserError: the file is damaged in another way: what was spent cannot be known.
        """
        if not self.file.exists():
            return []
        found: list[dict[str, Any] | None] = [_parse(line) for line in self.file.read_bytes().splitlines()]
        torn = [place for place, line in enumerate(found) if line is None]
        known = [line for line in found if line is not None]
        if torn and not known:  # the very first line: booked, but its step was never made
            return []
        starts = sum(
            1 for before, after in zip(known, known[1:], strict=False) if before["process"] != after["process"]
        )
        if len(torn) > starts + 2:  # a process can be killed once
            raise UserError(
                str(self.file), f"{len(torn)} lines cannot be read", "restore it: the budget is counted by it"
            )
        return [line or _neighbour(found, place) for place, line in enumerate(found)]

    def segments(self) -> list[Segment]:
        """The booked steps by their constants, in the order in which these came into force."""
        runs: list[tuple[int, Mechanism, int]] = []
        names = set(Mechanism.__dataclass_fields__)
        for line in self.lines():
            mechanism = Mechanism(**{key: value for key, value in line.items() if key in names})
            if runs and runs[-1][1] == mechanism:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((line["segment"], mechanism, 1))
        return [Segment(mechanism, steps) for _, mechanism, steps in runs]

    def processes(self) -> int:
        """How many times training was started, as far as a step was booked."""
        return len({line["process"] for line in self.lines()})


def history(segments: list[Segment]) -> list[Spend]:
    """What the accountant needs of the segments."""
    return [Spend(s.mechanism.noise_multiplier, s.mechanism.sample_rate, s.steps) for s in segments]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    whole = isinstance(value, dict) and {"segment", "step", "process", *Mechanism.__dataclass_fields__} <= value.keys()
    return value if whole else None


def _neighbour(lines: list[dict[str, Any] | None], place: int) -> dict[str, Any]:
    """The nearest readable line before a torn one, or after it. Of two, the one with less noise per draw."""
    before = next((line for line in reversed(lines[:place]) if line is not None), None)
    after = next((line for line in lines[place + 1 :] if line is not None), None)
    both = [line for line in (before, after) if line is not None]
    return max(both, key=lambda line: (line["copies"], line["sample_rate"] / max(line["noise_multiplier"], 1e-12)))
