"""Gradients of every privacy unit by itself, as DP-SGD needs them, on unwrapped modules (Abadi et al. 2016, algorithm 1).

Three backends with one contract: `torch.func` over the whole model, Opacus' hooks with one defect mended, and one unit after
the other by ordinary autograd. `gradcheck.check` compares any of them with the last on the very model that is trained.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from defenses.base import Batch, LossFunction

Precision = Literal["fp32", "bf16"]
Chunk = tuple[list[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Units:
    """Privacy units of one micro-batch, padded to equal length.

    Attributes:
        tensors: each [U, V, ...], V views (a patient's images x noise draws), by field name of `Batch`.
        weights: float32 [U, V], weight of every view in its unit's loss; 0 where a view is padding.
    """

    tensors: dict[str, torch.Tensor]
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, part: slice) -> "Units":
        return Units({name: value[part] for name, value in self.tensors.items()}, self.weights[part])


def group_views(batch: Batch, unit: np.ndarray) -> Units:
    """Collects the views of every unit; a unit's loss is the mean over its views.

    Args:
        batch: its fields that are tensors [B, ...] are kept, whatever their names; the others are dropped.
        unit: int64 [B]; each run of equal values is one unit. Padding repeats the unit's own first view.

    Raises:
        ValueError: the views of a unit are not together; they would be clipped as two units.
    """
    starts = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]]) if len(unit) else np.empty(0, np.int64)
    if len(np.unique(unit)) != len(starts):
        raise ValueError("the views of one privacy unit must be contiguous")
    views = np.diff(np.r_[starts, len(unit)])  # [U]
    place = np.arange(views.max(initial=1))  # [V]
    real = place < views[:, None]  # [U, V]
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value for name, value in tensors.items() if torch.is_tensor(value)}
    device = batch.images.device
    if real.all() and real.shape[1] == 1:
        tensors = {name: value.unsqueeze(1) for name, value in tensors.items()}
    else:
        index = torch.from_numpy(starts[:, None] + place * real).to(device)
        tensors = {name: value[index] for name, value in tensors.items()}
    weights = np.where(real, 1 / views[:, None], 0).astype(np.float32)
    return Units(tensors, torch.from_numpy(weights).to(device))


class Backend(Protocol):
    """Computes the gradients of all units; leaves the module, its buffers and every ``p.grad`` as they were."""

    name: str

    def __call__(self, model: nn.Module, loss: LossFunction, units: Units) -> Iterator[Chunk]:
        """Consecutive chunks of u units each, so that no more than one chunk of gradients is in memory.

        Args:
            model: the bare module.
            loss: per-example losses float32 [B] from anything callable like ``model``; gets a batch without ``rows`` and
                ``random`` (None).

        Yields:
            Gradients of sum_v weights[u, v] * loss[u, v] for every trainable tensor, in the order of
            ``named_parameters``, float32 [u, *shape], zero where a tensor has no part in the loss; and that loss,
            detached, float32 [u].
        """
        ...


def backend(name: Literal["vmap", "hooks", "loop"], precision: Precision, chunk: int | None = None) -> Backend:
    """The backend of that name.

    Args:
        precision: "bf16" computes forward and backward in bfloat16; gradients are float32 in any case.
        chunk: units computed together; None: all of a micro-batch. "loop" always takes one.
    """
    if name == "loop":
        return Loop(precision)
    return {"vmap": Vmap, "hooks": Hooks}[name](precision, chunk)


def reference(name: str, precision: Precision) -> "Loop":
    """The loop in the same arithmetic as the backend ``name``, to compare it with."""
    return Loop("autocast" if (name, precision) == ("hooks", "bf16") else precision)


class Vmap:
    """`torch.func`: vmap over the gradient of one unit. Examples cannot mix, whatever the model does.

    bf16 is a cast of weights and inputs inside the differentiated function (autocast fails under vmap on CPUs), so the
    gradients reach the float32 weights in float32.
    """

    name = "vmap"

    def __init__(self, precision: Precision, chunk: int | None = None):
        self.precision, self.chunk = precision, chunk

    def __call__(self, model: nn.Module, loss: LossFunction, units: Units) -> Iterator[Chunk]:
        values = tuple(value.detach() for value in trainable(model).values())
        one = grad_and_value(_unit_loss(model, loss, self.precision))
        every = vmap(one, in_dims=(None, 0, 0), randomness="different")
        for part in _parts(units, self.chunk):
            with _without_warning(
                "There is a performance drop"
            ):  # CPU attention has no batching rule: slower, not wrong
                gradients, losses = every(values, part.tensors, part.weights)
            yield [gradient.float() for gradient in gradients], losses.float()


class Loop:
    """One unit after the other by ordinary autograd: always right, the reference.

    Args:
        precision: "bf16" casts like `Vmap`, "autocast" computes like `Hooks` in bf16.
    """

    name = "loop"

    def __init__(self, precision: Literal["fp32", "bf16", "autocast"]):
        self.precision = precision

    def __call__(self, model: nn.Module, loss: LossFunction, units: Units) -> Iterator[Chunk]:
        values = list(trainable(model).values())
        cast = _unit_loss(model, loss, "bf16") if self.precision == "bf16" else None
        for place, count in enumerate(_real(units).sum(1).tolist()):
            weights = units.weights[place, :count]
            tensors = {name: value[place, :count] for name, value in units.tensors.items()}
            if cast is not None:
                total = cast(values, tensors, weights)
            else:
                with _autocast(weights.device, self.precision == "autocast"):
                    total = (loss(model, _batch(tensors)) * weights).sum()
            gradients = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
            yield [gradient.float().unsqueeze(0) for gradient in gradients], total.detach().float().unsqueeze(0)


class Hooks:
    """Opacus' `GradSampleHooks`: per-layer formulas in one ordinary backward pass; bf16 by autocast.

    Needs the model in training mode. Padding is left out of the forward pass.
    """

    name = "hooks"

    def __init__(self, precision: Precision, chunk: int | None = None):
        self.precision, self.chunk = precision, chunk

    def __call__(self, model: nn.Module, loss: LossFunction, units: Units) -> Iterator[Chunk]:
        full = {module: module._is_full_backward_hook for module in model.modules()}
        hooks = _mended_hooks()(model, loss_reduction="sum", strict=False)
        try:
            for part in _parts(units, self.chunk):
                with _without_warning("Full backward hook is firing"):  # of the first layer, as it should
                    chunk = self._chunk(model, loss, part)
                yield chunk
        finally:
            hooks.cleanup()
            for module, was in full.items():
                module._is_full_backward_hook = was
                for left in {"activations", "max_batch_len"} & vars(module).keys():
                    delattr(module, left)

    def _chunk(self, model: nn.Module, loss: LossFunction, units: Units) -> Chunk:
        values = trainable(model)
        owner, view = _real(units).nonzero(as_tuple=True)  # [n] each
        with _autocast(owner.device, self.precision == "bf16"):
            losses = loss(model, _batch({name: value[owner, view] for name, value in units.tensors.items()}))
        losses = losses * units.weights[owner, view]
        # the sum over the batch comes with it; autograd.grad keeps it out of p.grad
        sums = torch.autograd.grad(losses.sum(), list(values.values()), allow_unused=True)
        gradients = []
        for (name, value), total in zip(values.items(), sums, strict=True):
            found, value.grad_sample = value.grad_sample, None
            if not torch.is_tensor(found) and total is not None:
                raise RuntimeError(f"Opacus' hooks missed {name}")
            found = value.new_zeros(len(owner), *value.shape) if total is None else found.float()
            gradients.append(_sum_views(found, owner, len(units)))
        return gradients, _sum_views(losses.detach().float(), owner, len(units))


@cache
def _mended_hooks() -> type:
    """Opacus' hooks (imported late: slow), with the sampler of `nn.Conv2d` mended.

    Opacus 1.6 unfolds the input with strides that hold only for contiguous NCHW memory: behind an attention layer or in
    channels-last format the gradients are silently wrong.
    """
    from opacus.grad_sample import GradSampleHooks

    unmended = GradSampleHooks.GRAD_SAMPLERS[nn.Conv2d]

    def conv2d(layer: nn.Conv2d, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[Any, torch.Tensor]:
        return unmended(layer, [activations[0].contiguous()], backprops)

    class MendedHooks(GradSampleHooks):
        GRAD_SAMPLERS = {**GradSampleHooks.GRAD_SAMPLERS, nn.Conv2d: conv2d}  # a copy: Opacus itself stays as it is

    return MendedHooks


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name; a tied one once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _unit_loss(model: nn.Module, loss: LossFunction, precision: Precision) -> Callable[..., torch.Tensor]:
    """The loss of one unit as a pure function (values of the trainable tensors, tensors [V, ...], weights [V])."""
    names = list(trainable(model))
    lower = _lower if precision == "bf16" else lambda value: value
    fixed = [*model.named_parameters(), *model.named_buffers()] if precision == "bf16" else []
    fixed = {name: lower(value) for name, value in fixed if not value.requires_grad}

    def unit_loss(values, tensors: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        state = fixed | {name: lower(value) for name, value in zip(names, values, strict=True)}

        def network(*args, **kwargs):
            if precision == "bf16":
                args, kwargs = tree_map(_lower_input, (args, kwargs))
            return functional_call(model, state, args, kwargs)

        return (loss(network, _batch(tensors)) * weights).sum()

    return unit_loss


def _lower(value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def _lower_input(value: Any) -> Any:
    """Images and embeddings in bfloat16, those inside a `Batch` or condition too; timesteps [B] stay: 999 and 1000 would become one.
    So do the sizes that Stable Diffusion XL is told."""
    if is_dataclass(value):
        told = {name: getattr(value, name, None) for name in ("text", "pooled")}
        return replace(value, **{name: _lower(each) for name, each in told.items() if each is not None})
    return _lower(value) if torch.is_tensor(value) and value.ndim > 1 else value


def _batch(tensors: dict[str, torch.Tensor]) -> Batch:
    return Batch(**{field.name: tensors.get(field.name) for field in fields(Batch)})


def _parts(units: Units, chunk: int | None) -> Iterator[Units]:
    size = chunk or max(len(units), 1)
    return (units[start : start + size] for start in range(0, len(units), size))


def _real(units: Units) -> torch.Tensor:
    """Which views count, bool [U, V]; a unit that has none keeps its first, with weight 0."""
    real = units.weights != 0
    real[:, :1] = True
    return real


def _sum_views(values: torch.Tensor, owner: torch.Tensor, units: int) -> torch.Tensor:
    """[n, ...] -> [units, ...]: the sum over the views of each unit."""
    if len(owner) == units:  # one view each, in order
        return values
    return values.new_zeros(units, *values.shape[1:]).index_add_(0, owner, values)


@contextmanager
def _without_warning(start: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=start, category=UserWarning)
        yield


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
