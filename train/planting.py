"""Canaries: pictures that the trainer plants at known numbers of copies, and others of the same draw that it never shows.

What a model knows of the planted ones beyond the others it has from their copies alone (Carlini et al. 2019, "The Secret Sharer",
section 4; for diffusion models Carlini et al. 2023, who plant uniform noise). They are chosen before any defense and shown to
none that selects records, so deduplication cannot thin them; everything else treats them like other training records: each
copy is a record of its own, or all copies of a canary are one group where ``data.group_key`` is set.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from defenses.errors import UserError
from defenses.seeding import derive
from train.canaryconfig import LEAST_POOL, CanariesConfig
from train.dataconfig import DataConfig
from train.record import Record

SPLIT, PREFIX = "canary", "canary:"


@dataclass(frozen=True)
class _Canary:
    """``name``: source of its first record."""

    name: str
    role: str
    copies: int


def plant(records: list[Record], config: DataConfig, pixels: Path) -> None:
    """Appends the canaries to ``records`` and to the pictures; held-out pictures that become canaries leave their split.

    Args:
        pixels: ``pixels.npy`` with one row per record; one process calls this.

    Raises:
        UserError: too few held-out pictures.
    """
    images = np.load(pixels, mmap_mode="r")
    append(pixels, images.dtype, _rows(records, config, images))


def _rows(records: list[Record], config: DataConfig, images: np.ndarray) -> Iterator[np.ndarray]:
    """The picture of every new record, which is added to ``records``."""
    for kind in config.canaries.kinds:
        planted = list(_planted(kind, config.canaries))
        if kind == "noise":
            sources = _noise(planted, records, config, images.shape[1:])
        else:
            sources = _heldout(planted, records, config, images)
        for canary, (picture, record) in zip(planted, sources, strict=True):
            for copy in range(canary.copies):
                records.append(replace(record, source=canary.name if copy == 0 else f"{canary.name}/{copy}"))
                yield picture


def _planted(kind: str, config: CanariesConfig) -> Iterator[_Canary]:
    """Canaries of one kind in the order of their rows."""
    counts = [count for count in config.copies for _ in range(config.per_copies)]
    for number, count in enumerate(counts):
        yield _Canary(f"{PREFIX}{kind}/{number:04d}", "planted", count)
    for number in range(config.coins):
        yield _Canary(f"{PREFIX}{kind}/coin-{number:04d}", "coin", 1)
    for number in range(config.pool if kind == "noise" else 0):  # the pool of held-out pictures stays in their split
        yield _Canary(f"{PREFIX}{kind}/pool-{number:04d}", "pool", 1)


def _noise(
    planted: list[_Canary], records: list[Record], config: DataConfig, shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, Record]]:
    """Uniform noise, with a label drawn from those of the training records where the model is class-conditional."""
    labels = sorted({record.label for record in records if record.split == "train" and record.label is not None})
    cluster = 1 + max(record.cluster for record in records)
    block = 1 + max(record.block for record in records)
    for number, canary in enumerate(planted):
        seed = derive(config.canaries.seed, "canary/noise", canary.name)
        random = np.random.Generator(np.random.Philox(seed))
        picture = random.integers(0, 256, shape, dtype=np.uint8)
        label = labels[random.integers(len(labels))] if labels else None
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        record = Record("", canary.name, digest, digest, label=label, cluster=cluster + number, block=block + number)
        yield picture, _as_canary(record, canary, config)


def _heldout(
    planted: list[_Canary], records: list[Record], config: DataConfig, images: np.ndarray
) -> Iterator[tuple[np.ndarray, Record]]:
    """The first picture of held-out blocks drawn at random; the whole block leaves the split, so that what stays in it is unseen."""
    order = heldout_blocks(records, config.canaries.seed)
    if len(order) < len(planted) + LEAST_POOL:
        raise UserError(
            "data.canaries.kinds",
            f"heldout takes {len(planted)} of {len(order)} held-out patients or single pictures and leaves fewer than {LEAST_POOL} to compare with",
            "lower data.canaries.per_copies or data.canaries.coins, or hold out more",
        )
    for canary, block in zip(planted, order, strict=False):
        origin = replace(records[block[0]])
        for row in block:
            left, copied = records[row], row == block[0]
            left.split, left.canary, left.kept = SPLIT, "origin", False
            left.reason = f"canary: {'planted as' if copied else 'of one block with'} {canary.name}"
        yield images[block[0]], _as_canary(origin, canary, config)


def _as_canary(record: Record, canary: _Canary, config: DataConfig) -> Record:
    """The first record of a canary, made from ``record``. Its group is its own."""
    kept = canary.role != "pool"
    return replace(
        record,
        group=canary.name if config.group_key is not None else None,
        split=SPLIT,
        copies=canary.copies,
        kept=kept,
        reason="" if kept else "canary: never planted",
        canary=canary.role,
    )


def heldout_blocks(records: list[Record], seed: int) -> list[list[int]]:
    """Rows of every block of the held-out split, the blocks in a random order of which those that became canaries came first.

    The place of a block depends on the source of its first record alone.
    """
    blocks: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        if record.split == "heldout":
            blocks.setdefault(record.block, []).append(row)
    return sorted(blocks.values(), key=lambda rows: derive(seed, "canary/heldout", records[rows[0]].source))


def drawn(records: list[Record], kind: str, config: CanariesConfig) -> np.ndarray:
    """Rows of all pictures of one kind, planted or not: the first of each canary, then the pool, int64.

    Args:
        records: as they were prepared.
    """
    first: dict[int, int] = {}
    for row, record in enumerate(records):
        if record.canary in ("planted", "coin", "pool") and record.source.startswith(f"{PREFIX}{kind}/"):
            first.setdefault(record.cluster, row)
    rows = list(first.values())
    if kind == "heldout":
        rows += [block[0] for block in heldout_blocks(records, config.seed)[: config.pool]]
    return np.array(rows, dtype=np.int64)


def append(file: Path, dtype: np.dtype, rows: Iterator[np.ndarray]) -> None:
    """Adds rows to a .npy file in place; numpy leaves room in the header for a larger first axis."""
    with file.open("r+b") as stream:
        np.lib.format.read_magic(stream)
        shape, fortran, _ = np.lib.format.read_array_header_1_0(stream)
        begin, count = stream.tell(), shape[0]
        stream.seek(0, 2)
        for row in rows:
            stream.write(np.ascontiguousarray(row, dtype).tobytes())
            count += 1
        stream.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran, "shape": (count, *shape[1:])}
        np.lib.format.write_array_header_1_0(stream, header)
        assert stream.tell() == begin
