"""What each copy metric says of images and the pictures that are nearest to them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from defenses.neighbours import VIEWS, search_sharded
from eval.pairs import in_view, nearest_view, paired_tiled_l2, ssim
from eval.pictures import Pictures
from eval.sscd import Descriptors

_CELLS = 2**20  # pixels of the references of one block, each in one view


@dataclass
class CopyValues:
    """Measures images against the pictures that are nearest to them; ``sscd`` null: without SSCD."""

    sscd: Descriptors | None
    accelerator: Any

    def of(self, images: Any, pictures: Pictures, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The value of each metric for each image with one picture, float64 [Q]; nan where it is undefined.

        Args:
            images: uint8 [Q, C, H, W], array-like.
            rows: the record that each image is held against, int64 [Q]; null: the nearest.
        """
        found = search_sharded(images, pictures.images, pictures.picture, 2, accelerator=self.accelerator).distinct
        rows = found.row[:, 0] if rows is None else rows
        view, tiled, similar = self._pairs(images, pictures.images, rows)
        values = {"nn_ratio": nn_ratio(found.distance), "tiled_l2": tiled, "ssim": similar}
        if self.sscd is not None:
            values["sscd"] = self._cosine(images, pictures.images, rows, view)
        return values

    def _pairs(self, images: Any, references: Any, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """View of each reference (place in `VIEWS`), tiled l2 and SSIM in it, in blocks shared among the ranks."""
        rank, world, device = 0, 1, torch.device("cpu")
        if self.accelerator is not None:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            device = self.accelerator.device
        length = max(1, _CELLS // int(np.prod(references.shape[1:])))
        parts = []
        for start in range(0, len(rows), length)[rank::world]:
            stop = min(start + length, len(rows))
            left, right = (
                torch.from_numpy(np.array(block)).to(device)  # a copy: memory maps are read-only
                for block in (images[start:stop], references[rows[start:stop]])
            )
            view = nearest_view(left, right)
            right = in_view(right, view)
            parts.append(
                (start, [part.cpu().numpy() for part in (view, paired_tiled_l2(left, right), ssim(left, right))])
            )
        parts = gather_object(parts) if world > 1 else parts
        columns = zip(*(part for _, part in sorted(parts, key=lambda part: part[0])), strict=True)
        return tuple(np.concatenate(column) for column in columns)

    def _cosine(self, images: Any, references: Any, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Cosine of SSCD's descriptors of each image and its reference in its view."""
        left = self.sscd.of(images)
        right = self.sscd.of(_Shown(references, rows * len(VIEWS) + view))
        return np.einsum("nd,nd->n", left.astype(np.float64), right)


class _Shown:
    """Some references in some views, made when they are indexed; ``key`` = row * number of views + place of the view."""

    def __init__(self, references: Any, key: np.ndarray):
        self.references, self.key = references, key
        self.dtype, self.shape = references.dtype, (len(key), *references.shape[1:])

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, some: Any) -> np.ndarray:
        row, view = np.divmod(self.key[some], len(VIEWS))
        block = torch.from_numpy(np.array(self.references[row]))
        return in_view(block, torch.from_numpy(view)).numpy()


def nn_ratio(distance: np.ndarray) -> np.ndarray:
    """l2 to the nearest over l2 to the second nearest distinct picture, in [0, 1], float64 [Q] (Yoon et al. 2023).

    ``distance`` [Q, 2] is ascending; with a single picture ([Q, 1]) the ratio is undefined (nan). Where both are 0 the
    nearest does not stand out: 1.
    """
    near = np.asarray(distance, dtype=np.float64)
    if near.shape[1] < 2:
        return np.full(len(near), np.nan)
    return np.divide(near[:, 0], near[:, 1], out=np.ones(len(near)), where=near[:, 1] > 0)
