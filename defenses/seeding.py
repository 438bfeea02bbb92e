"""Randomness as a function of (seed, purpose, record, step), so that no random state needs to be stored.

A run that was stopped and resumed, and a run on 1 or on N processes, draw the same numbers. Draws are made on the CPU,
so they do not depend on the kind of accelerator either.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive(seed: int, *parts: str | int) -> int:
    """Seed in [0, 2^63) for one purpose; different parts give unrelated seeds."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_wide(secret: int, *parts: str | int) -> int:
    """A 126-bit seed for one purpose: two of `derive`, so that a secret is not narrowed to what can be searched."""
    return (derive(secret, *parts, "high") << 63) | derive(secret, *parts, "low")


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *parts))


class RecordRandom:
    """Independent random numbers for every record of one batch.

    Args:
        seed: ``run.seed``.
        step: optimizer step, counted from 0.
        rows: row of each record in the data set, so that a record draws the same whatever else is in the batch.
        repeats: how often the same row occurred earlier in the same global batch (0 for the first).
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int], repeats: Sequence[int]):
        self._keys = [(seed, step, int(row), int(repeat)) for row, repeat in zip(rows, repeats, strict=True)]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, part: slice) -> "RecordRandom":
        """The streams of some of the records."""
        some = RecordRandom(0, 0, [], [])
        some._keys = self._keys[part]
        return some

    def _generators(self, purpose: str):
        return [generator(seed, purpose, step, row, repeat) for seed, step, row, repeat in self._keys]

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), float32 [B, *shape]."""
        return _stack([torch.rand(shape, generator=g) for g in self._generators(purpose)], shape)

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32 [B, *shape]."""
        return _stack([torch.randn(shape, generator=g) for g in self._generators(purpose)], shape)

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Integers in [0, high), int64 [B]."""
        draws = [torch.randint(high, (), generator=g) for g in self._generators(purpose)]
        return torch.stack(draws) if draws else torch.zeros(0, dtype=torch.int64)


def _stack(rows: list[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return torch.stack(rows) if rows else torch.zeros((0, *shape))
