"""A log that survives stops: a line of JSON per block of work, one file per rank."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BlockLog:
    """Lines that were on disk before the results of their blocks could be.

    Counts in memory would be lost at a stop, and what is on disk is not made again. A block whose results were lost is done
    again, and its later line counts. So the main process has what all ranks did over all stops, without a collective.

    Args:
        folder: where the files lie; is made.
        name: of the log; a rank's file is ``NAME-RANK.jsonl``.
    """

    def __init__(self, folder: Path, name: str, rank: int):
        self._folder, self._name, self._file = folder, name, folder / f"{name}-{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        """Appends one line and waits until it is on disk."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(line)}\n")  # begins a line of its own where a kill cut the last one short
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Whole lines of all ranks, of each rank in the order in which they were written."""
        for file in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # empty, or cut short before its results were written
                    continue
