"""Canaries of an audit: units of which each is left out of training by a fair coin, so that guesses of the coins can be counted.

Steinke, Nasr and Jagielski 2023 ("Privacy auditing with one (1) training run"). The audit is valid when the coins are
fair, independent of each other and of everything else in training; they need not be secret. So they are functions of
``run.seed`` and of the unit's own name, like all randomness that protects nothing. The mechanism's secret has no part
in them.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from defenses.base import Pool
from defenses.errors import UserError
from defenses.seeding import derive

FILE = Path("audit", "canaries.csv")  # in the run directory: for its holder, never in model/
LEFT_OUT = "left out by coin"  # reason of a removal


@dataclass(frozen=True)
class Canary:
    """One record of a canary. ``unit``: name of the unit it belongs to; ``included``: whether it is trained on."""

    row: int
    record_id: str
    unit: str
    included: bool


def included(seed: int, unit: str) -> bool:
    """The fair coin of one unit: whether it is trained on.

    Args:
        seed: ``run.seed``.
    """
    return bool(derive(seed, "canary-included", unit) & 1)


def choose(units: Iterable[str], expected: int, population: int, seed: int) -> dict[str, bool]:
    """Canaries among ``units``, and whether each is trained on.

    Guarantee: both depend on the unit's own name and on public numbers alone, so that one unit more or less changes the
    fate of no other, and neighbouring data sets stay neighbours. The price is that the number of canaries is random,
    too.

    Args:
        units: names; one that occurs several times is one unit.
        expected: number of canaries, on average; at most ``population``.
        population: public number of units.
        seed: ``run.seed``.

    Raises:
        UserError: more canaries than units.
    """
    if expected > population:
        raise UserError(
            "defenses.dpsgd.canaries", f"{expected} is more than {population} units", f"at most {population}"
        )
    limit = expected * 2**63 // population
    return {unit: included(seed, unit) for unit in dict.fromkeys(units) if derive(seed, "canary", unit) < limit}


def draw(pool: Pool, names: Sequence[str | None], expected: int, population: int | None) -> list[Canary]:
    """All records of all canaries, by row.

    Args:
        names: unit of each row of ``pool.images``, None where it has none (never a canary).
        population: public number of units; None: as many as there are.
    """
    if not expected:
        return []
    rows = [row for row in pool.rows.tolist() if names[row] is not None]
    units = {names[row] for row in rows}
    chosen = choose(units, expected, population or len(units), pool.seed)
    return [Canary(row, pool.record_id[row], names[row], chosen[names[row]]) for row in rows if names[row] in chosen]


def settle(folder: Path, canaries: Sequence[Canary]) -> list[int]:
    """Writes the canaries for the evaluation, or checks that they are those with which the run began.

    Returns:
        Number of records of every unit that was left out: the mechanism counts these units, too, or its sampling
        probability and its noise would depend on the coins.

    Raises:
        UserError: the run began with other canaries.
    """
    file = folder / FILE
    if file.exists() and read(file) != list(canaries):
        raise UserError(
            "defenses.dpsgd.canaries", f"{file} names other canaries than these settings", "choose another run.name"
        )
    if canaries and not file.exists():
        _write(file, canaries)
    sizes: dict[str, int] = {}
    for canary in canaries:
        if not canary.included:
            sizes[canary.unit] = sizes.get(canary.unit, 0) + 1
    return list(sizes.values())


def read(file: Path) -> list[Canary]:
    """The table that `settle` wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            return [
                Canary(
                    int(line["row"]), line["record_id"], line["unit"], {"true": True, "false": False}[line["included"]]
                )
                for line in csv.DictReader(lines)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(file), "cannot be read as a table of canaries", "restore it") from error


def _write(file: Path, canaries: Sequence[Canary]) -> None:
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    with temporary.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(Canary.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(canary) | {"included": str(canary.included).lower()} for canary in canaries)
        lines.flush()
        os.fsync(lines.fileno())
    temporary.replace(file)
