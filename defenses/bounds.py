"""Lower bounds of distances between float32 vectors by matrix products, whatever the format that they are computed in.

With c a centre, q' = q - c and r' = r - c, |q - r|^2 = |q'|^2 + 2 (|r'|^2 / 2 - q'.r'), and the bracket is one matrix product.
Rounding changes it by at most e(q, r) = a |q'||r'| + b (|q'|^2 + |r'|^2), where a and b follow from the length of the sums and the
format of the numbers (Higham 2002, section 3.1: whatever the order of summation). The last columns of the product subtract e, so that
what it gives is never above the truth, in float32, TF32 or bfloat16.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_REFERENCES = 2048  # most rows in one block
_ROW_BYTES = 2**27  # of one block
_EXTRA = 4  # columns beside the vectors: the squared length in three parts, the length
_LONGEST = 1e17  # squares and sums of what is shorter stay finite in float32 and bfloat16


class Products:
    """Lower bounds of (|q - r|^2 - |q'|^2) / 2 by matrix products, for blocks of queries and of references.

    Attributes:
        row_limit: most rows that either side of a product should have.
        step: references in one block.
        of_product, of_lengths: a and b of the error; ``tiny``: what products that underflow may add to it.
    """

    def __init__(self, references: Any, device: torch.device, dtype: torch.dtype | None = None):
        self.references, self.device, self.size = references, device, references.shape[1]
        self.dtype = dtype or _quickest_format(device)
        sample = references[:: max(1, len(references) // _REFERENCES)][:_REFERENCES]
        self.centre = torch.from_numpy(sample.mean(axis=0, dtype=np.float64).astype(np.float32)).to(device)
        self.row_limit = max(1, _ROW_BYTES // (4 * (self.size + _EXTRA)))
        self.step = min(_REFERENCES, self.row_limit)
        self.of_product, self.of_lengths = _error(self.size, self.dtype, device)
        self.tiny = (self.size + _EXTRA) * 2.0**-120
        self._rows = torch.empty((self.step, self.size + _EXTRA), device=device)
        self._out: torch.Tensor | None = None
        self._multiply = quickest_product(self.size, self.dtype, device)

    def left(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [q, D] as the left side of products [q, D + 4], and |q'|, float64 [q]."""
        rows = torch.empty((len(queries), self.size + _EXTRA), device=self.device)
        self._centred(queries, rows)
        length = torch.linalg.vector_norm(rows[:, : self.size], dim=1, dtype=torch.float64)
        rows[:, : self.size].neg_()
        rows[:, self.size : -1] = 1.0
        rows[:, -1] = -1.02 * self.of_product * length  # 1.02: the format rounds this column, too
        return rows.to(self.dtype), length

    def right(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """References from ``start`` on as the right side [r, D + 4] (a buffer: until the next call), and |r'|, float64 [r]."""
        block = self.references[start : start + self.step]
        rows = self._rows[: len(block)]
        length = self._centred(block, rows)
        rest = length.square() * (0.5 - self.of_lengths)
        for part in range(3):  # three parts of 8 bits: exact in every format
            rows[:, self.size + part] = rest
            rows[:, self.size + part] = rows[:, self.size + part].bfloat16()
            rest -= rows[:, self.size + part]
        rows[:, -1] = length
        return rows.to(self.dtype), length

    def bounds(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Lower bounds, each less ``of_lengths`` |q'|^2, [q, r] (a buffer: until the next call)."""
        if self._out is None or len(self._out) < len(left):
            self._out = torch.empty((len(left), self.step), dtype=self.dtype, device=self.device)
        out = self._out.flatten()[: len(left) * len(right)].view(len(left), len(right))
        self._multiply(left, right, out)
        return out

    def gap(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Upper minus lower bound for lengths |q'| and |r'|, float64."""
        squares = left.square() + right.square()
        return 2 * (1.03 * self.of_product * left * right + self.of_lengths * squares + self.tiny)

    def _centred(self, block: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
        block = torch.from_numpy(np.require(block, requirements=["C", "W"]))  # a copy only where torch cannot take it
        torch.sub(block.to(self.device), self.centre, out=rows[:, : self.size])
        length = torch.linalg.vector_norm(rows[:, : self.size], dim=1).double()
        if not bool((length < _LONGEST).all()):
            raise ValueError(f"vectors must be finite and shorter than {_LONGEST:g}")
        return length


def rounded_up(value: torch.Tensor) -> torch.Tensor:
    """The next float32: no bound is lost by rounding to it."""
    value = value.float()
    return torch.nextafter(value, torch.full_like(value, torch.inf))


def _error(size: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """a and b of the error a |q'||r'| + b (|q'|^2 + |r'|^2) of a product of D + 4 columns."""
    exact = dtype == torch.float32 and device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    unit = 2.0**-24 if exact else 2.0**-23  # reduced formats may add up by truncation
    rounded = 0.0 if exact else 2.0**-8  # of each factor: bfloat16, or TF32, which errs less
    stored = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # of the result
    total = 1.1 * unit * (size + 16)  # sums of D + 4 terms, norms, and the few roundings of the limits
    # the result is at most |q'||r'| + |r'|^2 / 2; centring moves the difference by 2^-24 (|q'| + |r'|)
    return total + 2 * rounded + rounded**2 + 1.1 * stored, total + 0.55 * stored


def _quickest_format(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        return torch.float32  # TF32 where the process allows it
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32


def _by_torch(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(left, right.T, out=out)


def _by_numpy(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    np.matmul(left.numpy(), right.numpy().T, out=out.numpy())


@functools.cache
def quickest_product(
    size: int, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """What writes left [q, D] times right [r, D] transposed into a buffer [q, r].

    On the CPU torch and numpy bring different libraries, of which now one, now the other is up to 1.7 times faster: a trial
    of a few milliseconds decides.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return _by_torch
    left, right, out = torch.ones(256, size), torch.ones(512, size), torch.empty(256, 512)
    seconds = {_by_torch: [], _by_numpy: []}
    for way, times in (*seconds.items(), *seconds.items(), *seconds.items()):
        start = time.perf_counter()
        way(left, right, out)
        times.append(time.perf_counter() - start)
    return min(seconds, key=lambda way: min(seconds[way]))
