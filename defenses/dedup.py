"""Deduplication before training (seam 1): of every group of copies one picture stays.

Repetition is the strongest known cause of extraction (Carlini et al. 2023, section 5; Kandpal et al. 2022), and this
is the cheapest remedy. The rule for copies lives in `defenses.copies`; the settings here change what is removed, never
what the report counts as a copy.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from defenses.base import Defense, Pool, Removal
from defenses.copies import CopyRule, copy_groups
from defenses.errors import UserError


@dataclass(kw_only=True)
class DedupConfig:
    """Settings of `Dedup`."""

    near: bool = True  # also near copies: re-encoded, resized, brighter or darker; false: equal pixels only
    flips: bool = False  # true: a mirrored picture is a near copy, too
    threshold: float | None = (
        None  # largest residual of a near copy, share of its standard deviation; null: fixed rule's
    )

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError("defenses.dedup.threshold", f"{self.threshold} is not between 0 and 1", "null: the default")
        if not self.near and (self.flips or self.threshold is not None):
            key = "flips" if self.flips else "threshold"
            raise UserError(f"defenses.dedup.{key}", "has no effect on exact copies", "set defenses.dedup.near=true")


class Dedup(Defense):
    """Keeps the first of every group of copies in the training split.

    A picture is removed only if it is a copy of the picture that stays in its place, not through a chain of others, so
    the number that stays may exceed the number of connected groups.
    """

    name = "dedup"

    def __init__(self, config: DedupConfig):
        self.config = config
        self._removed: Counter[str] = Counter()

    def select(self, pool: Pool) -> list[Removal]:
        """Copies to remove; the distance of near copies is the residual of `defenses.copies`, 0 for exact ones."""
        removals = []
        self._removed.clear()
        for copy in copy_groups(pool.images, pool.pixel_hash, self._rule(), pool.rows):
            removals.append(Removal(copy.row, f"{copy.kind} copy", copy.kept, copy.distance))
            self._removed[copy.kind] += 1
            # two records without a group are two people as far as anyone knows
            same = pool.group[copy.row] is not None and pool.group[copy.row] == pool.group[copy.kept]
            self._removed["within" if same else "across"] += 1
        return removals

    def _rule(self) -> CopyRule:
        default = CopyRule(near=self.config.near, flips=self.config.flips)
        if self.config.threshold is None:
            return default
        return CopyRule(near=True, flips=self.config.flips, threshold=self.config.threshold)

    def claim(self) -> dict[str, Any]:
        """Heuristic: what is lowered, what is not, and what was removed."""
        removed = self._removed
        return {
            "kind": "heuristic",
            "statement": "Lowers memorisation that comes from repeated pictures. No guarantee: a picture that occurs "
            "once can still be memorised, and copies that are cropped, turned, annotated or otherwise edited are not "
            "found.",
            "removed": {
                "exact": removed["exact"],
                "near": removed["near"],
                "within_groups": removed["within"],
                "across_groups": removed["across"],
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {"removed": dict(self._removed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._removed = Counter(state["removed"])
