"""Checkpoints: a folder of safetensors and JSON files that appears whole or not at all.

No pickle is written or read. What is a pure function of (seed, step) is not stored: batches, noise, timesteps, learning rate.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from defenses.errors import UserError
from train.files import sync_directory, write_json


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: list[torch.Tensor], state: dict
) -> None:
    """Writes ``folder`` (``checkpoints/step-N``) atomically.

    Args:
        model: its parameters that are not trained are left out: they are those of the pretrained model.
        ema: averaged weights, in the order of the trained parameters.
        state: counters and the defenses' states, JSON values.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names, frozen = _names(model)
    save_file(
        {name: each.detach().cpu().contiguous() for name, each in model.state_dict().items() if name not in frozen},
        temporary / "model.safetensors",
    )
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in zip(names, ema, strict=True)},
        temporary / "ema.safetensors",
    )
    tensors, rest = _flatten(optimizer.state_dict())
    save_file(tensors, temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {**state, "optimizer": rest})
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_directory(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], dict]:
    """Restores model and optimizer in place.

    Returns:
        The averaged weights in the order of the trained parameters, and the state.

    Raises:
        UserError: a file is missing or does not fit the model.
    """
    try:
        names, frozen = _names(model)
        fit = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        if fit.unexpected_keys or set(fit.missing_keys) - frozen:
            raise ValueError(f"it has other weights ({', '.join([*fit.unexpected_keys, *fit.missing_keys][:3])} …)")
        averaged = load_file(folder / "ema.safetensors")
        ema = [averaged[name] for name in names]
        state = json.loads((folder / "state.json").read_text())
        optimizer.load_state_dict(_unflatten(load_file(folder / "optimizer.safetensors"), state.pop("optimizer")))
        _lay_out(optimizer)
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(
            str(folder), f"cannot be resumed from: {reason}", "remove this folder to resume from the one before"
        ) from error
    return ema, state


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Moments in the memory layout of their parameters, which files do not keep: a fused step goes through all of them in the order
    of memory, and on a CPU does not look whether it is the same."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _names(model: nn.Module) -> tuple[list[str], set[str]]:
    """Of the trained parameters, in order, and of those that are not trained."""
    named = list(model.named_parameters())
    return [name for name, each in named if each.requires_grad], {
        name for name, each in named if not each.requires_grad
    }


def latest(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = all_steps(checkpoints)
    return checkpoints / f"step-{found[-1]}" if found else None


def all_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*")]
    return sorted(int(match[1]) for match in matches if match)


def prune(checkpoints: Path, keep: int | None, chosen: int | None = None) -> None:
    """Removes all but the last ``keep`` checkpoints and the ``chosen`` step; None keeps all."""
    if keep is not None:
        for step in all_steps(checkpoints)[:-keep]:
            if step != chosen:
                shutil.rmtree(checkpoints / f"step-{step}")


def _flatten(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Splits an optimizer's state into named tensors and JSON values; names of nested values are joined by "/"."""
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for key, value in _leaves(values):
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars[f"{index}.{key}"] = value
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """8-bit optimizers keep a dictionary within the state of a parameter."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _unflatten(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    state: dict[int, dict] = {}
    for name, value in {**tensors, **rest["scalars"]}.items():
        index, key = name.split(".", 1)
        *above, last = key.split("/")
        place = state.setdefault(int(index), {})
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return {"state": state, "param_groups": rest["param_groups"]}
