"""A folder of pictures in which some occur several times: what an archive with re-exported studies looks like, with a known answer.

python bench/planted_folder.py SOURCE TARGET [--copied 8] [--copies 24] [--seed 0]

SOURCE has metadata.jsonl with file_name and patient_id. Patients are divided at random (60 % train, 15 % calibration, 25 % heldout);
``copied`` pictures of different training patients then occur ``copies`` times, half of them as the same file, half saved anew as
JPEG. TARGET gets metadata.jsonl with a column ``split``; the division is random by patient, so set data.heldout_exchangeable=true.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

SHARES = {"train": 0.60, "calibration": 0.15, "heldout": 0.25}
JPEG_QUALITY = 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    for name, default in (("copied", 8), ("copies", 24), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = [json.loads(line) for line in (given.source / "metadata.jsonl").read_text().splitlines()]
    random = np.random.default_rng(given.seed)
    side = sides(sorted({row["patient_id"] for row in rows}), random)
    rows = [{**row, "split": side[row["patient_id"]]} for row in rows]
    (given.target / "images").mkdir(parents=True)
    for row in rows:
        shutil.copy2(given.source / row["file_name"], given.target / row["file_name"])
    extra = []
    for row in chosen([row for row in rows if row["split"] == "train"], given.copied, random):
        for number in range(1, given.copies):
            extra.append({**row, "file_name": copy(given.target, row["file_name"], number)})
    with (given.target / "metadata.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows + extra)
    print({name: sum(row["split"] == name for row in rows) for name in SHARES}, f"and {len(extra)} planted copies")


def sides(patients: list[str], random: np.random.Generator) -> dict[str, str]:
    """Split of every patient."""
    ends = np.round(np.cumsum(list(SHARES.values())) * len(patients)).astype(int)
    place = np.searchsorted(ends, random.permutation(len(patients)), side="right")
    return dict(zip(patients, np.array(list(SHARES))[place].tolist(), strict=True))


def chosen(rows: list[dict], count: int, random: np.random.Generator) -> list[dict]:
    """One picture of each of ``count`` patients."""
    patients = random.permutation(sorted({row["patient_id"] for row in rows}))[:count]
    return [next(row for row in rows if row["patient_id"] == patient) for patient in patients]


def copy(folder: Path, name: str, number: int) -> str:
    """Even numbers the same file, odd ones saved anew; returns the new name."""
    path = folder / name
    if number % 2 == 0:
        target = path.with_name(f"{path.stem}-copy{number:02d}{path.suffix}")
        shutil.copy2(path, target)
    else:
        target = path.with_name(f"{path.stem}-copy{number:02d}.jpg")
        with Image.open(path) as image:
            image.save(target, quality=JPEG_QUALITY)
    return str(target.relative_to(folder))


if __name__ == "__main__":
    main()
