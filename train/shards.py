"""Decoding a list of items on all ranks into one file, ``pixels.npy``.

Every rank writes a file of its own and the main process joins them, because several machines that write neighbouring
rows of one memory map over a network file system would overwrite each other's pages.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from defenses.errors import UserError
from train.dataconfig import DataConfig
from train.images import Decoded, Rejected, decode, from_array
from train.sources import Item

CHUNK = 256  # pictures between two updates of the progress bar
MAX_THREADS = 8  # per rank; each may hold one picture of data.max_pixels


def make_folder(folder: Path, config: DataConfig, items: list[Item], accelerator) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    need = len(items) * config.channels * config.image_size**2 * (1 if accelerator.num_processes == 1 else 2)
    free = shutil.disk_usage(folder).free
    if need > free:  # a memory map on a full disk would end in a bus error
        raise UserError("run.output_dir", f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free", "make room")


@dataclass(frozen=True)
class Outcome:
    """What became of one item: a hash of its pixels, or a reason why there are none."""

    index: int
    sha256: str = ""
    pixel_hash: str = ""
    note: str = ""
    reason: str = ""


def decode_shard(items: list[Item], config: DataConfig, folder: Path, accelerator) -> list[Outcome]:
    """Decodes items[rank::ranks] into this rank's file."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = range(rank, len(items), ranks)
    shape = (len(mine), config.channels, config.image_size, config.image_size)
    pixels = np.lib.format.open_memmap(_shard(folder, rank), mode="w+", dtype=np.uint8, shape=shape)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def work(position: int) -> Outcome:
        outcome, decoded = _decode_item(mine[position], items[mine[position]], config)
        if decoded is not None:
            pixels[position] = decoded.pixels
        return outcome

    done: list[Outcome] = []
    progress = tqdm(total=len(mine), desc="decode", unit="img", leave=False, disable=rank != 0)
    with ThreadPoolExecutor(min(cores, MAX_THREADS)) as pool, progress:
        for start in range(0, len(mine), CHUNK):
            stop = min(start + CHUNK, len(mine))
            done += pool.map(work, range(start, stop))
            progress.update(stop - start)
    pixels.flush()
    return done


def _decode_item(index: int, item: Item, config: DataConfig) -> tuple[Outcome, Decoded | None]:
    outcome = Outcome(index)
    size = {"image_size": config.image_size, "channels": config.channels}
    try:
        if item.problem:
            raise Rejected(item.problem)
        data = item.read()
        if isinstance(data, np.ndarray):
            outcome = replace(outcome, sha256=hashlib.sha256(data.tobytes()).hexdigest())
            decoded = from_array(data, **size)
        else:
            outcome = replace(outcome, sha256=hashlib.sha256(data).hexdigest())
            limits = {"max_pixels": config.max_pixels, "bit_depth": config.bit_depth}
            decoded = decode(data, name=item.source, **size, **limits)
    except Rejected as error:
        return replace(outcome, reason=str(error)), None
    except OSError as error:
        return replace(outcome, reason=f"unreadable: {error.strerror}"), None
    return replace(outcome, pixel_hash=decoded.pixel_hash, note=decoded.note), decoded


def _shard(folder: Path, rank: int) -> Path:
    return folder / f".pixels.{rank}.npy"


def merge_shards(folder: Path, count: int, ranks: int) -> None:
    """One file from those of all ranks."""
    if ranks == 1:
        os.replace(_shard(folder, 0), folder / "pixels.npy")
        return
    shards = [np.load(_shard(folder, rank), mmap_mode="r") for rank in range(ranks)]
    temporary = folder / ".pixels.npy"
    merged = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, *shards[0].shape[1:]))
    for rank, shard in enumerate(shards):
        merged[rank::ranks] = shard
    merged.flush()
    os.replace(temporary, folder / "pixels.npy")
    for rank in range(ranks):
        _shard(folder, rank).unlink()
