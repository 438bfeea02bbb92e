"""Files that appear whole or not at all."""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path, mode: str = "w"):
    """Opens a temporary file beside ``path`` that takes its place when the block ends without an error."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(path.parent)


@contextmanager
def whole_folder(folder: Path):
    """Gives a temporary folder beside ``folder`` that takes its place, with all that was written into it on disk, when the block ends
    without an error. What was there before, or was left by a kill, is removed. One process calls it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync_directory(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_directory(folder.parent)


def sync_directory(path: Path) -> None:
    """Makes renames inside ``path``, or the content of a file, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Writes JSON with sorted keys kept as given; NaN is refused, because it is not JSON."""
    with atomic(path) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """Writes a table; booleans as true/false, None as empty, cells that a spreadsheet would run as a formula quoted by '."""
    with atomic(path) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([csv_cell(row.get(column)) for column in columns])


def csv_cell(value) -> str:
    """One cell as text (CSV formula injection: OWASP)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    risky = isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r")
    return "'" + text if risky else text
