"""Attention on CPUs in training: torch's bf16 backward pass of it is several times slower than its float32 one there."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class Float32Attention(TorchFunctionMode):
    """Within it, attention that gets a gradient is computed in float32, whatever autocast says; its result has the type that it would
    have had.

    A mode and not a processor of diffusers, so that text encoders and every kind of network have it. Figures: docs/performance.md.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        if not query.requires_grad:
            return func(*args, **kwargs)
        lower = torch.is_autocast_enabled("cpu")  # queries that were normalised are float32 within it, too
        kind = torch.get_autocast_dtype("cpu") if lower else query.dtype
        args, kwargs = tree_map_only(torch.Tensor, _float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).to(kind)


def _float(value: torch.Tensor) -> torch.Tensor:
    """A mask of truth values stays what it is; one that is added must have the type of the query."""
    return value.float() if value.is_floating_point() else value


def training_attention(device: torch.device, precision: str) -> AbstractContextManager:
    """What the forward pass of a step runs in; the backward pass follows its types."""
    return Float32Attention() if device.type == "cpu" and precision == "bf16" else nullcontext()


def plain_attention(device: torch.device, precision: str) -> AbstractContextManager:
    """The same where activations are computed again on the way back: no mode reaches there, and types would differ."""
    return nullcontext()
