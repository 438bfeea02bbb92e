"""The ledger of a private run: one line per noisy gradient, on disk before the gradient is used.

Append-only JSON lines. What it holds is public: constants of the mechanism and a random name of the process that ran it,
never a seed, a mask, a realised batch size or a loss.
"""

import json
import math
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
        new = not self.file.exists()
        try:
            with self.file.open("ab") as file:
                if file.tell() and not self._ends_whole():
                    file.write(b"\n")  # a kill cut the last line short: it stays, and counts
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync(self.file.parent)
        except OSError as error:
            raise UserError(str(self.file), f"cannot be written: {error.strerror}", "the step was not made") from error

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
        raw = self.file.read_bytes().split(b"\n")
        raw = raw[:-1] if raw[-1] == b"" else raw
        found = [_parse(line) for line in raw]
        for place in [place for place, line in enumerate(found) if line is None]:
            before, after = _around(found, place)
            between = before and after and before["process"] == after["process"]
            if between or raw[place].endswith(b"}"):  # a kill cuts the end off the last line of a process
                raise self._damaged(place)
        start = next((place for place, line in enumerate(found) if line is not None), len(found))
        # lines torn before any whole one: cut short before they were on disk, so before their step was made
        return [line or _dearer(_around(found, place)) for place, line in enumerate(found) if place >= start]

    def _damaged(self, place: int) -> UserError:
        return UserError(
            str(self.file), f"line {place + 1} cannot be read", "restore the file: the budget is counted by it"
        )

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


def _sync(folder: Path) -> None:
    """Makes a new file's name as durable as its contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The line's values, None where it is not a whole line with values that can be."""
    try:
        value = json.loads(line)
        numbers = [1.0 * value[name] for name in ("noise_multiplier", "sample_rate", "copies", "clip_norm", "divisor")]
        whole = {"segment", "step", "process", *Mechanism.__dataclass_fields__} <= value.keys()
    except (ValueError, TypeError, KeyError, AttributeError):  # JSON and Unicode errors are ValueErrors
        return None
    possible = all(math.isfinite(number) for number in numbers) and min(numbers) >= 0 and numbers[1] <= 1
    return value if whole and possible else None


def _around(lines: list[dict[str, Any] | None], place: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The nearest readable lines before and after a place."""
    before = next((line for line in reversed(lines[:place]) if line is not None), None)
    return before, next((line for line in lines[place + 1 :] if line is not None), None)


def _dearer(lines: tuple[dict[str, Any] | None, dict[str, Any] | None]) -> dict[str, Any]:
    """Of two lines the one with less noise per draw."""
    both = [line for line in lines if line is not None]
    return max(both, key=lambda line: (line["copies"], line["sample_rate"] / max(line["noise_multiplier"], 1e-12)))
