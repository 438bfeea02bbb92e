"""comparison.csv: the numbers of every run of a comparison, for a spreadsheet or a program that reads no JSON."""

from collections.abc import Iterator
from typing import Any

COLUMNS = ["arm", "seed", "path", "value"]


def rows(comparison: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each number of each finished run, by its dotted path in that run's report.json; what was not measured has none.

    Args:
        comparison: contents of comparison.json.
    """
    for arm in comparison["arms"]:
        for run in arm["runs"]:
            for path, value in figures(run).items():
                yield {"arm": arm["name"], "seed": run["seed"], "path": path, "value": value}


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Numbers of one run by path: `eval.arms.numbers`, and those of the other attacks (`eval.otherattacks`), each once."""
    found = dict(run["values"] or {})
    for attack in (run["other_attacks"] or {}).values():
        if attack is not None:
            found |= {f"{attack['at']}.{path}": value for path, value in attack["figures"].items() if value is not None}
    return found
