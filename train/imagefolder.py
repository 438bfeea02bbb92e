"""A folder of pictures, with or without ``metadata.jsonl`` or ``metadata.csv`` (the Hugging Face imagefolder layout).

Every file below the folder is an item, also one that is no picture, so that it is rejected with a reason instead of
overlooked. Not items, but counted as ignored, unless the metadata name them: hidden files, the metadata, licence and
read-me files, and text side files (`SIDE_SUFFIXES`).
"""

import csv
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from defenses.errors import UserError
from train.images import Rejected
from train.listing import Listing, Row

METADATA = ("metadata.jsonl", "metadata.csv")
SIDE_SUFFIXES = {".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".html", ".pdf", ".cff"}
PAPERS = re.compile(
    r"(licen[cs]e|readme|attribution|notice|copying|citation)(\.(?!png|jpe?g|gif|tiff?|bmp|webp).*)?", re.I
)


def list_folder(root: Path, max_bytes: int) -> Listing:
    """All pictures of a folder with the columns of its metadata, in the order of their paths.

    Without metadata there are two columns: ``folder`` (path of the sub-folder) and ``label`` (its last part).

    Raises:
        UserError: unreadable metadata, a path in them that leaves the folder, a file named twice.
    """
    root = root.resolve()
    metadata = [root / name for name in METADATA if (root / name).is_file()]
    if len(metadata) > 1:
        raise UserError("data.source", f"both {METADATA[0]} and {METADATA[1]} are there", "keep one of them")
    listed = _read_metadata(metadata[0], root) if metadata else {}
    rows, ignored = [], 0
    for path, source, problem in _files(root):
        values = listed.pop(source, None)
        if values is None and _is_side_file(PurePosixPath(source)):
            ignored += 1
            continue
        if metadata and values is None:
            values, problem = {}, problem or "not in metadata"
        elif values is None:
            values = _folder_columns(source)
        rows.append(_row(path, source, values, problem, max_bytes))
    for source, values in listed.items():  # not met on the walk: behind a link inside the folder, hidden, or missing
        problem = "" if (root / source).is_file() else "missing file: named in the metadata"
        rows.append(_row(root / source, source, values, problem, max_bytes))
    rows.sort(key=lambda row: row.source)
    columns = sorted({key for row in rows for key in row.values})
    return Listing("folder", rows, columns, ignored)


def _row(path: Path, source: str, values: dict[str, Any], problem: str, max_bytes: int) -> Row:
    stamp = str(path.stat().st_size) if not problem else ""
    return Row(source, partial(read_file, path, max_bytes), values, problem, stamp)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file, unless it is larger than any picture that would be accepted."""
    if not path.is_file():
        raise Rejected("not a regular file")
    size = path.stat().st_size
    if size > max_bytes:
        raise Rejected(f"too large: {size} bytes")
    return path.read_bytes()


def _files(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Every file, its path relative to ``root`` as text, and the reason why it cannot be read or ""."""
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and not name.startswith(".")]
        for path in (here / name for name in linked):
            yield path, _text(path, root), "link to a folder: not followed"
        for path in (here / name for name in files):
            yield path, _text(path, root), _problem(path, root)
    for error in unreadable:
        path = Path(error.filename)
        yield path, _text(path, root), f"unreadable folder: {error.strerror}"


def _problem(path: Path, root: Path) -> str:
    try:
        if not path.resolve().is_relative_to(root):
            return "link out of the folder"
    except (OSError, RuntimeError):
        return "not a regular file"
    return "" if path.is_file() else "not a regular file"


def _text(path: Path, root: Path) -> str:
    """Relative path in POSIX form as text that UTF-8 can hold: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _is_side_file(path: PurePosixPath) -> bool:
    return path.name.startswith(".") or path.suffix.lower() in SIDE_SUFFIXES or bool(PAPERS.fullmatch(path.name))


def _folder_columns(source: str) -> dict[str, str | None]:
    parent = PurePosixPath(source).parent
    return {"folder": str(parent), "label": parent.name or None}


def _read_metadata(path: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Columns of every file named in the metadata, by its path relative to ``root``."""
    listed: dict[str, dict[str, Any]] = {}
    reader = _jsonl if path.suffix == ".jsonl" else _csv
    try:
        for line, values in reader(path):
            where = f"{path.name} line {line}"
            source = _checked_name(values.pop("file_name", None), root, where)
            if source in listed:
                raise UserError("data.source", f"{where}: {source!r} is named twice", "keep one line per file")
            listed[source] = values
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # ValueError: also JSON and UTF-8 errors
        raise UserError("data.source", f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None
    return listed


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError("data.source", f"{path.name} line {line} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise UserError("data.source", f"{path.name} line {line} is not a JSON object")
            yield line, values


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for values in reader:
            if None in values:
                raise UserError("data.source", f"{path.name} line {reader.line_num} has more cells than the header")
            yield reader.line_num, values


def _checked_name(name: Any, root: Path, where: str) -> str:
    """A ``file_name`` that stays inside the folder, in normal form (CWE-22)."""
    if not isinstance(name, str) or not name.strip():
        raise UserError("data.source", f"{where}: no file_name", "every line needs one")
    path = PurePosixPath(name)
    unsafe = "\\" in name or "\0" in name or "://" in name or name.lower().startswith("file:") or ".." in path.parts
    if not unsafe and not path.is_absolute() and not PureWindowsPath(name).drive:
        try:
            name.encode()
            if (root / path).resolve().is_relative_to(root):
                return str(path)
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
            pass
    raise UserError(
        "data.source",
        f"{where}: file_name {name!r} leads out of the folder",
        "use a path relative to the folder, with /",
    )
