"""Imports point one way: defenses <- train <- eval; only train/run.py calls evaluation."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"defenses": {"defenses"}, "train": {"defenses", "train"}, "eval": {"defenses", "train", "eval"}}
EXCEPTIONS = {"train/run.py": {"eval.stage", "eval.config"}}
ROOTS = {"train.run", "eval.run"}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).glob("*.py"))


def violations(source: str, file: str) -> list[str]:
    """Import statements in ``source`` that ``file`` must not have."""
    package, found = file.split("/")[0], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.append("relative import")
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
            modules = {name for name in names if name in ROOTS} or {node.module or ""}
        elif isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        else:
            continue
        for module in modules:
            top = module.split(".")[0]
            ours = top in ALLOWED
            if module in ROOTS or (ours and top not in ALLOWED[package] and module not in EXCEPTIONS.get(file, set())):
                found.append(f"imports {module}")
            if isinstance(node, ast.Import) and top == "eval":
                found.append("`import eval` hides the builtin")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path):
    assert violations(path.read_text(), f"{path.parent.name}/{path.name}") == []


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("from train.loop import Trainer", "defenses/dedup.py"),
        ("import train.loop", "defenses/dedup.py"),
        ("from eval.stage import run_evaluation", "train/loop.py"),
        ("from eval import stage", "train/run.py"),
        ("from eval.report import render", "train/run.py"),
        ("from . import loop", "train/stage.py"),
        ("from train import run", "eval/stage.py"),
        ("def f():\n    from train.run import main", "eval/stage.py"),
        ("import eval", "eval/stage.py"),
    ],
)
def test_planted_violations_are_caught(source, file):
    assert violations(source, file)


def test_the_loop_names_no_defense():
    import defenses.registry

    text = (ROOT / "train" / "loop.py").read_text() + (ROOT / "train" / "stage.py").read_text()
    for name, kind in defenses.registry.CLASSES.items():
        assert f'"{name}"' not in text and kind.__name__ not in text


def test_file_names_shadow_nothing():
    installed = set(metadata.packages_distributions()) - {"train", "defenses", "eval"}
    stems = {path.stem for path in FILES} - {"__init__"}
    assert not stems & set(sys.stdlib_module_names) and not stems & installed


def test_init_files_hold_a_docstring_only():
    for package in ALLOWED:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree)
