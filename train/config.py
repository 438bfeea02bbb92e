"""Configuration: typed defaults < YAML file < dotted overrides on the command line."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from defenses.errors import UserError
from defenses.registry import DefensesConfig
from train.data import DataConfig
from train.models import ModelConfig
from train.runlog import RunConfig
from train.state import TrainConfig

SECTIONS: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "defenses": DefensesConfig,
}


def load(
    sections: dict[str, Any], file: Path | None, overrides: Sequence[str], defaults: Sequence[str] = ()
) -> DictConfig:
    """Merges defaults, file and overrides; interpolations stay unresolved.

    Args:
        sections: dataclass (or plain default value) of each top-level key.
        defaults: ``key=value`` that an entry point sets differently from the dataclasses, below the file.

    Raises:
        UserError: an unknown key (with the nearest known one), a wrong type, an unreadable file.
    """
    root = OmegaConf.create(
        {name: OmegaConf.structured(value) if isinstance(value, type) else value for name, value in sections.items()}
    )
    OmegaConf.set_struct(root, True)
    for default in defaults:
        root = _merge(root, _parse(default), "defaults")
    return merge(root, file, overrides)


def merge(root: DictConfig, file: Path | None, overrides: Sequence[str]) -> DictConfig:
    """A file and then overrides over typed defaults.

    Raises:
        UserError: as `load`.
    """
    if file is not None:
        root = _merge(root, _read(file), str(file))
    for override in overrides:
        root = _merge(root, _parse(override), "command line")
    return root


def objects(config: DictConfig) -> SimpleNamespace:
    """Resolved, validated dataclasses, one attribute per section.

    Raises:
        UserError: a mandatory key is missing, a value is out of its range, an interpolation fails.
    """
    built = {}
    for name in config:
        try:
            node = config[name]
            missing = sorted(OmegaConf.missing_keys(node)) if OmegaConf.is_config(node) else []
            if missing:
                raise UserError(missing[0], "has no value", f"give {missing[0]}=… on the command line")
            built[name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from error
            raise UserError(getattr(error, "full_key", None) or str(name), _first_line(error)) from error
    return SimpleNamespace(**built)


def _read(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError as error:
        raise UserError("--config", f"{file} does not exist", "the shipped ones are in configs/") from error
    except Exception as error:  # the YAML parser has several kinds of its own
        raise UserError(str(file), _first_line(error), "mend the YAML") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(str(file), "is not a mapping of sections", "see configs/quickstart.yaml")
    return loaded


def _parse(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(override, "is not of the form key=value", "e.g. train.steps=1000")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise UserError(key, _first_line(error)) from error


def _merge(root: DictConfig, addition: DictConfig, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(root, addition)
        for key in OmegaConf.missing_keys(addition):
            OmegaConf.update(merged, key, "???")  # a plain merge would keep the default
        return merged
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or where
        problem, known = _first_line(error), _siblings(root, key)
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1)
        remedy = f"did you mean {near[0]}?" if near and "did you mean" not in problem.lower() else f"from the {where}"
        raise UserError(key, problem, remedy) from error


def _siblings(root: DictConfig, key: str) -> list[str]:
    parent = OmegaConf.select(root, key.rpartition(".")[0], default=None) if "." in key else root
    return [str(name) for name in parent] if isinstance(parent, DictConfig) else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
