"""The attacks beyond extraction: what each of them is given, and what it gives back."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator

from eval.denoiser import Denoiser
from eval.extraction import Extraction
from eval.generations import Generations
from eval.target import Target


@dataclass
class Scene:
    """All that an attack may look at. Every rank has the same.

    Attributes:
        denoiser: white-box access to the released model; None where only its generations are known.
        images: the generations.
        extraction: what the extraction attack found; None where it was switched off.
    """

    target: Target
    config: SimpleNamespace
    accelerator: Accelerator
    denoiser: Denoiser | None
    images: Generations
    extraction: Extraction | None


@dataclass
class Finding:
    """What an attack found.

    Attributes:
        report: its part of ``privacy`` in report.json.
        tables: file name in ``attack/`` -> (columns, rows).
        beside: further parts of ``privacy``, by name.
    """

    report: Any
    tables: dict[str, tuple[list[str], list[dict[str, Any]]]] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
