"""A network turned into code for one batch size: worth its half minute or more where thousands of images are drawn."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from defenses.errors import UserError

COMPILERS = (os.environ.get("CXX") or "g++", "clang++")  # one of them turns a compiled network into code for a CPU


def refuse_without_compiler(key: str, device: torch.device) -> None:
    """
    Raises:
        UserError: ``key`` asks for code for a CPU and nothing here makes any.
    """
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise UserError(key, "needs a C++ compiler on a machine without a GPU", "install g++, or set it to false")


class FixedBatch:
    """``network`` for inference, compiled for ``batch`` rows: fewer are filled up by repeating the last, since another size would be
    compiled anew. Networks of one class that differ in their weights alone share the code.

    Args:
        network: its tensors, by position or name, begin with the batch; returns a tensor or a tuple of them.
    """

    def __init__(self, network: nn.Module, batch: int):
        self.batch, self.code = batch, torch.compile(network, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = len(args[0])
        if count > self.batch:
            raise ValueError(f"{count} rows, compiled for {self.batch}")
        args, kwargs = self._each(lambda rows: _filled(rows, self.batch), (args, kwargs))
        return self._each(lambda rows: rows[:count], self.code(*args, **kwargs))

    @staticmethod
    def _each(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
        return tree_map_only(torch.Tensor, change, values)


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[n, ...] to [count, ...]."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])]).contiguous()
