"""Squared differences of uint8 images in whole numbers, by matrix products.

Grey levels minus 128 are at most 128 in size, so a float32 product over at most 1024 of them never leaves the integers
that float32 holds exactly (2^24), in whatever order it sums. The result is the brute-force one on any device and for any
block size, also where TF32 or bfloat16 products are allowed: both hold such inputs exactly.
"""

import numpy as np
import torch

from defenses.bounds import quickest_product

_EXACT = 1024  # longest exact product: 1024 * 128^2 = 2^24


def centred(images: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Grey levels minus 128 of uint8 [N, ...], float32 [N, D]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    return images.to(device).flatten(1).float() - 128.0


def integer_type(size: int) -> torch.dtype:
    """The integers that hold sums of ``size`` squared differences and their intermediate results (up to 2^16 each)."""
    return torch.int32 if size < 2**15 else torch.int64


def squares(rows: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of each centred row [N, D], exact integers [N]."""
    integer = integer_type(rows.shape[1])
    return sum(part.square().sum(dim=1).to(integer) for part in rows.split(_EXACT, dim=1))


def reduced_differences(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor | None = None,
    product: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared differences less ``squares(left)``, |r|^2 - 2 l.r, of centred rows [q, D] and [r, D], exact integers [q, r].

    ``out`` (of `integer_type`) and ``product`` (float32), both contiguous [q, r], are buffers; null: new ones.
    """
    shape = (len(left), len(right))
    out = left.new_empty(shape, dtype=integer_type(left.shape[1])) if out is None else out
    product = left.new_empty(shape) if product is None else product
    out[:] = squares(right)
    multiply = quickest_product(min(left.shape[1], _EXACT), torch.float32, left.device)
    for part, other in zip(left.split(_EXACT, dim=1), right.split(_EXACT, dim=1), strict=True):
        multiply(part, other, product)
        out.sub_(product.to(out.dtype), alpha=2)
    return out


def squared_differences(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum((l - r)^2) in grey levels of centred rows [q, D] and [r, D], exact integers [q, r]."""
    return reduced_differences(left, right) + squares(left)[:, None]


def l2_of(squared: np.ndarray, size: int) -> np.ndarray:
    """l2 in pixels of [0, 1] from the squared differences in grey levels of ``size`` dimensions, float64."""
    return np.sqrt(squared / (size * 255.0**2))
