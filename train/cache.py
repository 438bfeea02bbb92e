"""Latents and text embeddings on disk, computed once by all ranks.

A file's name holds a digest of everything that changes its content, and it appears whole or not at all; what is there already is
used. Of each kind one file is kept. The folder holds what training pictures and captions can be read from: mode 0700, as the rest of the run directory.
"""

import errno
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from defenses.ranks import on_main, together
from train.conditioner import Condition
from train.diffusion import autocast
from train.files import atomic, sync_directory
from train.latent import LatentModel

NOTE_EVERY_SEC = 10.0  # what is computed meanwhile is lost when the process is killed


def digest(*values) -> str:
    """Twelve hex digits of JSON values, arrays and modules (their weights)."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                found.update(name.encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value))
        else:
            found.update(json.dumps(value, sort_keys=True).encode())
    return found.hexdigest()[:12]


def cached_moments(
    model: LatentModel,
    images: np.ndarray,
    rows: np.ndarray,
    stamps: Sequence[str],
    folder: Path,
    precision: str,
    accelerator: Accelerator,
    batch_size: int = 32,
) -> Callable[[np.ndarray], torch.Tensor]:
    """Mean and log variance of the latents of unchanged pictures, from disk.

    Args:
        images: uint8 [N, C, H, W].
        rows: those that are encoded, int64 [n], ascending.
        stamps: digest of each record's picture, length N; with the autoencoder's weights they name the file.
        precision: of the autoencoder's arithmetic.

    Returns:
        rows -> float32 [b, 2c, h, w].
    """
    config = {key: value for key, value in model.vae.config.items() if not key.startswith("_")}
    known = [stamps[row] for row in rows]
    name = digest(model.vae, json.loads(json.dumps(config, default=str)), known, list(images.shape[1:]), precision)
    path = folder / f"latents-{name}.npy"

    @torch.no_grad()
    def encode(part: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images[rows[part]]).to(accelerator.device).float() / 127.5 - 1
        with autocast(accelerator.device, precision):
            return model.moments(pixels).cpu()

    shape = tuple(encode(np.zeros(1, np.int64)).shape[1:])
    table = _filled(path, (len(rows), *shape), encode, batch_size, accelerator)

    def read(wanted: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(table[np.searchsorted(rows, wanted)])

    return read


def cached_conditions(
    model: LatentModel,
    captions: Sequence[str],
    folder: Path,
    precision: str,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> Callable[[Sequence[str]], Condition]:
    """Embeddings of captions from disk; a caption that is not among them is encoded when it is asked for.

    Returns:
        captions -> their condition, on the accelerator's device.
    """
    distinct = sorted(set(captions))
    device = accelerator.device
    tokens = model.conditioner.tokens(distinct).numpy()
    settings = [repr(tokenizer) for tokenizer in model.conditioner.tokenizers]
    settings += [encoder.config.to_dict() for encoder in model.conditioner.encoders]
    name = digest(*model.conditioner.encoders, tokens, json.loads(json.dumps(settings, default=str)), precision)

    def encode_now(texts: Sequence[str]) -> Condition:
        with autocast(device, precision):
            return model.conditioner.encode(texts)

    first = encode_now(distinct[:1])
    parts = {"text": first.text, **({} if first.pooled is None else {"pooled": first.pooled})}
    tables = {
        part: _filled(
            folder / f"{part}-{name}.npy",
            (len(distinct), *example.shape[1:]),
            lambda places, part=part: getattr(encode_now([distinct[place] for place in places]), part).cpu(),
            batch_size,
            accelerator,
        )
        for part, example in parts.items()
    }
    place = {caption: index for index, caption in enumerate(distinct)}

    def look_up(wanted: Sequence[str]) -> Condition:
        found: dict[str, torch.Tensor] = {}
        new = sorted({text for text in wanted if text not in place})
        fresh = encode_now(new) if new else None
        for part, table in tables.items():
            rows = [
                torch.from_numpy(table[place[text]]).to(device)
                if text in place
                else getattr(fresh, part)[new.index(text)]
                for text in wanted
            ]
            found[part] = torch.stack(rows)
        return Condition(found["text"], found.get("pooled"))

    return look_up


def momentary_moments(
    model: LatentModel, images: np.ndarray, precision: str, accelerator: Accelerator
) -> Callable[[np.ndarray], torch.Tensor]:
    """As `cached_moments`, of the pictures that are asked for alone, in memory: for a dry run, which looks at a few."""
    known: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def read(wanted: np.ndarray) -> torch.Tensor:
        new = [row for row in dict.fromkeys(wanted.tolist()) if row not in known]
        if new:
            pixels = torch.from_numpy(images[new]).to(accelerator.device).float() / 127.5 - 1
            with autocast(accelerator.device, precision):
                known.update(zip(new, model.moments(pixels).cpu(), strict=True))
        if not len(wanted):
            return read(np.zeros(1, np.int64))[:0]
        return torch.stack([known[row] for row in wanted.tolist()])

    return read


def momentary_conditions(
    model: LatentModel, precision: str, accelerator: Accelerator
) -> Callable[[Sequence[str]], Condition]:
    """As `cached_conditions`, likewise."""
    known: dict[str, Condition] = {}

    def look_up(wanted: Sequence[str]) -> Condition:
        new = sorted(set(wanted) - known.keys())
        if new:
            with autocast(accelerator.device, precision):
                found = model.conditioner.encode(new)
            for row, caption in enumerate(new):
                known[caption] = Condition(found.text[row], None if found.pooled is None else found.pooled[row])
        rows = [known[caption] for caption in wanted]
        pooled = None if rows[0].pooled is None else torch.stack([row.pooled for row in rows])
        return Condition(torch.stack([row.text for row in rows]), pooled)

    return look_up


def reserve(path: Path) -> None:
    """Takes the room of a sparse file now: where a disk is full, writing into a memory map would kill the process (SIGBUS).

    Raises:
        OSError: there is not enough room; the file is removed.
    """
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            path.unlink(missing_ok=True)
            raise
        # a file system that cannot reserve


def _filled(
    path: Path, shape: tuple[int, ...], compute: Callable[[np.ndarray], torch.Tensor], batch_size: int, accelerator
) -> np.ndarray:
    """The array in ``path``, computed in blocks by all ranks if it is not there; blocks are the same for any number of ranks. What a
    killed call had finished is not computed again. Then other versions of this array, which had other digests, are removed."""
    if not on_main(accelerator, path.exists):
        partial = path.with_name(f".{path.name}.tmp")
        finished = on_main(accelerator, lambda: _begun(partial, shape))
        starts = range(0, shape[0], batch_size)
        blocks = [(start, min(start + batch_size, shape[0])) for start in starts]
        missing = [block for block in blocks if block not in finished]
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        together(accelerator, lambda: _fill(partial, mine, compute, accelerator.process_index))

        def finish() -> None:
            partial.rename(path)
            sync_directory(path.parent)

        on_main(accelerator, finish)
    on_main(accelerator, lambda: _remove_others(path))
    return np.load(path, mmap_mode="c")


def _fill(partial: Path, blocks: list[tuple[int, int]], compute: Callable, rank: int) -> None:
    """Computes blocks, and every few seconds notes those that are on disk."""
    table, new, noted = np.lib.format.open_memmap(partial, "r+"), [], time.monotonic()
    with partial.with_name(f"{partial.name}.{rank}").open("w") as notes:
        for start, stop in blocks:
            table[start:stop] = compute(np.arange(start, stop)).numpy()
            new.append(f"{start} {stop}\n")
            if time.monotonic() - noted >= NOTE_EVERY_SEC:
                table.flush()  # before its blocks are noted
                notes.writelines(new)
                notes.flush()
                os.fsync(notes.fileno())
                new, noted = [], time.monotonic()
    table.flush()


def _begun(partial: Path, shape: tuple[int, ...]) -> set[tuple[int, int]]:
    """Blocks (start, stop) in the file of a killed call, whatever its number of ranks; without any a new file is made."""
    partial.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    joined = partial.with_name(f"{partial.name}.notes")
    files = [joined, *partial.parent.glob(f"{glob.escape(partial.name)}.[0-9]*")]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines(keepends=True)]
    found = [re.fullmatch(r"(\d+) (\d+)\n", line) for line in lines]  # none: the line that a kill cut short
    finished = {(int(match[1]), int(match[2])) for match in found if match}
    if finished and partial.exists():
        with atomic(joined) as file:  # before the ranks begin their notes anew
            file.writelines(f"{start} {stop}\n" for start, stop in sorted(finished))
    else:
        finished = set()
    for file in files if not finished else files[1:]:
        file.unlink(missing_ok=True)
    if not finished:  # after the notes are gone, which would count for the new file
        np.lib.format.open_memmap(partial, "w+", np.float32, shape).flush()
        reserve(partial)
    return finished


def _remove_others(path: Path) -> None:
    """Removes what is left of arrays of this kind with other digests, and the notes about this one."""
    kind = path.name.partition("-")[0]
    for file in path.parent.iterdir():
        ours = re.fullmatch(rf"{kind}-[0-9a-f]{{12}}\.npy|\.{kind}-[0-9a-f]{{12}}\.npy\.tmp(\.notes|\.\d+)?", file.name)
        if ours and file != path:
            file.unlink()
