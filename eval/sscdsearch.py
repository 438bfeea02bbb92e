"""SSCD over all training pictures: the protocol of Pizzi et al. (2022) and Somepalli et al. (2023a), which l2 does not steer.

Each generation is held against the distinct training picture (its first record) with the largest cosine of descriptors,
found exactly by `defenses.knn`: of vectors of length 1 the squared distance is 2 - 2 cosine. No views are tried, since the
descriptor itself is made to withstand mirroring, cropping and turning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from defenses.knn import nearest_sharded
from defenses.references import Rows
from eval.pictures import Pictures
from eval.sscd import Descriptors

COLUMNS = ["sscd_nearest", "sscd_best"]
QUANTILES = (0.5, 0.75, 0.9, 0.95)


@dataclass
class SscdSearch:
    """Searches distinct pictures by SSCD."""

    sscd: Descriptors
    accelerator: Any

    def largest(self, images: Any, pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
        """Largest cosine of each image over all pictures, float64 [Q] in [-1, 1], and that picture's first record, int64 [Q].

        Args:
            images: uint8 [Q, C, H, W], array-like, Q > 0.
        """
        queries, references = self.sscd.of(images), self._described(pictures)
        place = nearest_sharded(queries, references, 1, accelerator=self.accelerator).row[:, 0]
        return _cosine(queries, references[place]), pictures.first[place]

    def among(self, pictures: Pictures) -> np.ndarray | None:
        """Largest cosine of each picture to another one, float64 [P]; None where there is no other."""
        references = self._described(pictures)
        if len(references) < 2:
            return None
        row = nearest_sharded(references, references, 2, accelerator=self.accelerator).row
        # where more than two pictures are equal, the two of them that are found need not include the picture itself
        other = np.where(row[:, 0] == np.arange(len(row)), row[:, 1], row[:, 0])
        return _cosine(references, references[other])

    def report(
        self,
        generations: Any,
        rows: np.ndarray,
        training: Pictures,
        heldout: Pictures | None,
        threshold: float | None,
        rule: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """``privacy.copy_metrics.sscd_search``, and `COLUMNS` of copy_metrics.csv for each generation.

        Args:
            generations: uint8 [G, C, H, W], array-like.
            rows: training record that is nearest to each by l2, int64 [G].
            heldout: pictures that the model never saw, the queries of ``background``.
            threshold: cosine above which a generation is a copy; null: counts are null.
            rule: what set it.
        """
        best, row = self.largest(generations, training)
        passed = None if threshold is None else best > threshold
        background = None
        if heldout is not None and threshold is not None:
            strangers, _ = self.largest(Rows(heldout.images, heldout.first), training)
            background = float((strangers > threshold).mean())
        report = {
            "threshold": threshold,
            "threshold_rule": rule,
            "copies": None if passed is None else int(passed.sum()),
            "pictures": None if passed is None else len(np.unique(training.picture[row[passed]])),
            "background": background,
            "same_as_l2": float((training.picture[row] == training.picture[rows]).mean()),
            "generation_train": _quantiles(best),
            "train_train": _quantiles(self.among(training)),
        }
        found = zip(row.tolist(), best.tolist(), strict=True)
        return report, [dict(zip(COLUMNS, (training.record_id[at], value), strict=True)) for at, value in found]

    def _described(self, pictures: Pictures) -> np.ndarray:
        """Descriptors of the first record of each picture, float32 [P, D]."""
        return self.sscd.of(Rows(pictures.images, pictures.first))


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each pair of vectors of length 1; not above 1 by their rounding."""
    return np.einsum("nd,nd->n", left.astype(np.float64), right).clip(-1, 1)


def _quantiles(values: np.ndarray | None) -> dict[str, float] | None:
    """Quantiles by their percentage, linear between order statistics."""
    if values is None:
        return None
    return {f"{100 * level:.0f}": float(np.quantile(values, level)) for level in QUANTILES}
