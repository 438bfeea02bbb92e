"""What the prompted attack knows of its prompts, and of a streamed one on disk: a record of each, the nearest generation of every picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defenses.neighbours import SearchResult
from eval.generations import file_of, withheld
from train.files import atomic, write_json


@dataclass
class PromptFinding:
    """What one prompt gave; plain data, sent between ranks.

    Attributes:
        index: place of the prompt.
        row: of cliques.csv.
        matches: rows of matches.csv; of an unflagged prompt they need not be complete.
        medoid: place in ``matches`` of the candidate; -1 where there is no image.
        image: the candidate, uint8 [C, H, W]; None unless flagged.
    """

    index: int
    row: dict[str, Any]
    matches: list[dict[str, Any]]
    medoid: int
    image: np.ndarray | None


@dataclass
class NearestGenerations:
    """Of each distinct picture the nearest generation so far, of the lowest prompt and place where they are equal.

    Attributes:
        distance: l2, float64 [P]; inf without generations.
        prompt, place: of that generation, int64 [P]; -1 without generations.
    """

    distance: np.ndarray
    prompt: np.ndarray
    place: np.ndarray

    @classmethod
    def none(cls, pictures: int) -> "NearestGenerations":
        return cls(np.full(pictures, np.inf), np.full(pictures, -1), np.full(pictures, -1))

    def add(self, prompt: int, near: SearchResult, places: Sequence[int] | None = None) -> None:
        """Takes in the generations of one prompt, each prompt once or several times, in any order.

        Args:
            places: of the generations that were searched; null: 0, 1, 2, ...
        """
        equal = (near.best_distance == self.distance) & (prompt < self.prompt)
        closer = (near.best_distance < self.distance) | equal
        place = near.best_query if places is None else np.asarray(places)[near.best_query]
        self.distance[closer], self.prompt[closer], self.place[closer] = (
            near.best_distance[closer],
            prompt,
            place[closer],
        )

    @classmethod
    def merged(cls, parts: "Sequence[NearestGenerations]") -> "NearestGenerations":
        """The nearest of all parts, whose prompts may overlap."""
        prompt = np.stack([part.prompt for part in parts])
        distance, place = (np.stack([getattr(part, name) for part in parts]) for name in ("distance", "place"))
        first, column = np.lexsort((prompt, distance), axis=0)[0], np.arange(prompt.shape[1])
        return cls(distance[first, column], prompt[first, column], place[first, column])


def blank_row(prompt: str) -> dict[str, Any]:
    """Row of cliques.csv of a prompt that no image is left of."""
    numbers = {"prompt": prompt, "generations": 0, "edges": 0, "clique_size": 0, "flagged": False, "exact": True}
    return numbers | dict.fromkeys(("mean_distance", "medoid", "record_id", "l2")) | {"verified": False}


@dataclass(frozen=True)
class PromptRecords:
    """A folder of records, which all ranks share.

    A record is one file, and so is what a rank knows of the pictures: the nearest generations, and the prompts that they
    cover. Ranks write their own files alone, and no count of processes is written down, so that another number of them may
    go on.

    Attributes:
        folder: of the records.
        images: folder of the images that are kept.
        digest: of everything that decides the result; what carries another one counts as not there.
    """

    folder: Path
    images: Path
    digest: str

    def name(self, prompt: int, index: int) -> str:
        """Of an image, as in matches.csv."""
        return str(file_of(self.images, prompt, index).relative_to(self.images))

    def file(self, prompt: int) -> Path:
        return self.folder / f"{prompt // 1000:03d}" / f"{prompt:06d}.json"

    def write(self, prompt: int, record: dict[str, Any]) -> None:
        """``record`` must count the images that were ``kept``."""
        file = self.file(prompt)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"digest": self.digest, **record})

    def read(self, prompt: int) -> dict[str, Any] | None:
        """The record of a prompt; None if there is none of this attack, or images that it counts are gone."""
        try:
            record = json.loads(self.file(prompt).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if record["digest"] != self.digest:
            return None
        files = (file_of(self.images, prompt, index) for index in range(record["kept"]))
        return record if all(file.exists() or withheld(file).exists() for file in files) else None

    def nearest(self) -> list[tuple[NearestGenerations, set[int]]]:
        """Of every rank of this and earlier starts: nearest generations, and the prompts that they cover."""
        found = [self.nearest_of(file) for file in sorted(self.folder.glob("nearest-*.npz"))]
        return [each for each in found if each is not None]

    def nearest_of(self, file: Path) -> tuple[NearestGenerations, set[int]] | None:
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["digest"]) != self.digest:
                return None
            columns = (stored[name] for name in ("distance", "prompt", "place"))
            return NearestGenerations(*columns), set(stored["covered"].tolist())

    def nearest_file(self, rank: int) -> Path:
        return self.folder / f"nearest-{rank}.npz"

    def write_nearest(self, rank: int, nearest: NearestGenerations, covered: set[int]) -> None:
        columns = {name: getattr(nearest, name) for name in ("distance", "prompt", "place")}
        covers = np.array(sorted(covered), dtype=np.int64)
        with atomic(self.nearest_file(rank), "wb") as handle:
            np.savez(handle, digest=np.array(self.digest), covered=covers, **columns)
