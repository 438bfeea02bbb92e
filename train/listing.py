"""What a source offers, before the configuration says which column means what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One picture that a source lists.

    Attributes:
        source: its path or number inside the source; unique there.
        read: the file's bytes, or the picture as uint8 [H, W] or [H, W, 3]; may raise `Rejected` or OSError.
        values: its cells by column; a missing column means no value.
        problem: why it cannot be read, known without reading; else "".
        stamp: changes when the picture changes (a size or checksum), as far as that is known without reading it.
    """

    source: str
    read: Callable[[], bytes | np.ndarray]
    values: dict[str, Any]
    problem: str = ""
    stamp: str = ""


@dataclass(frozen=True)
class Listing:
    """All pictures of one source.

    Attributes:
        kind: ``phantom``, ``folder``, ``huggingface`` or ``npz``.
        columns: names that ``data.*_key`` may have.
        ignored: files that are no items, such as licences.
        has_split: whether the column ``split`` is the known truth and always used.
    """

    kind: str
    rows: list[Row]
    columns: list[str]
    ignored: int = 0
    has_split: bool = field(default=False, kw_only=True)
