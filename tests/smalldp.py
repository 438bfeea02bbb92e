"""The small run under DP-SGD: a narrower network; pictures are drawn, and accountants asked the same, once per session."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from defenses import dpclaim, dpsgd
from defenses.base import Pool, RunContext
from defenses.dpsgd import DPSGD, DPSGDConfig
from defenses.errors import UserError
from tests import small
from tests.small import opened
from train import models
from train.data import Dataset, prepare
from train.runlog import RunDirectory
from train.stage import train_model

RECORDS = 28  # in the training split of the small run
_KNOWN: dict[Any, Any] = {}


@contextmanager
def quick() -> Iterator[None]:
    """Within it the network has 8 channels on two levels; data sets and results of the accountants are remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SIZES, "tiny", ((8, 8), 1, ()))
        for module, name in ((dpclaim, "bill"), (dpclaim, "group_epsilon"), (dpsgd, "noise_for")):
            patch.setattr(module, name, _once(getattr(module, name)))
        patch.setattr(small, "prepare", _prepared)
        yield


def _prepared(config: Any, folder: Path, accelerator: Accelerator) -> Dataset:
    """`prepare`, with pictures in memory and records that the caller may change."""
    key = (prepare, repr(config))
    if key not in _KNOWN:
        found = prepare(config, folder, accelerator)
        _KNOWN[key] = Dataset(found.records, np.array(found.images))
    return Dataset(copy.deepcopy(_KNOWN[key].records), _KNOWN[key].images)


def _once(function: Callable) -> Callable:
    def known(*args: Any, **kwargs: Any) -> Any:
        key = (function, repr(args), repr(kwargs))
        if key not in _KNOWN:
            _KNOWN[key] = function(*args, **kwargs)
        return _KNOWN[key]

    return known


def finish(path: Path, *overrides: str) -> tuple[RunDirectory, dict[str, Any]]:
    """Trains the small run to its end, or goes on with it: (directory, contents of the sidecar)."""
    arguments = opened(path, *overrides)
    return arguments[2], train_model(*arguments)


def begun(folder: Path, groups: list[str | None] | int = 40, steps: int = 7, batch_size: int = 10, **settings: Any):
    """The defense alone after `begin`, on a pool of records with the given groups (a number: so many without)."""
    groups = [None] * groups if isinstance(groups, int) else groups
    pool = Pool(np.zeros((len(groups), 1, 2, 2), np.uint8), np.arange(len(groups)), [""] * len(groups), groups)
    context = RunContext(
        pool=pool,
        control=np.arange(0),
        steps=steps,
        batch_size=batch_size,
        accumulation=settings.pop("accumulation", 1),
        precision="fp32",
        seed=0,
        checkpoint_every=steps,
        nonprivate_metrics=settings.pop("nonprivate_metrics", False),
        folder=folder,
        accelerator=Accelerator(cpu=True),
    )
    defense = DPSGD(DPSGDConfig(batch_size=settings.pop("expected", None), **settings))
    defense.begin(context)
    return defense


def refused(key: str, work: Callable[[], Any], *words: str) -> None:
    """``work`` ends in one line that names ``key`` and holds all ``words``."""
    with pytest.raises(UserError) as caught:
        work()
    text = str(caught.value)
    assert caught.value.key == key and "\n" not in text and all(word in text for word in words), text
