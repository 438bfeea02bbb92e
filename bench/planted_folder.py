"""A folder of pictures in which some occur several times: what an archive with re-exported studies looks like, with a known answer.

python bench/planted_folder.py SOURCE TARGET [--group patient_id] [--count N] [--heldout 0.25] [--copied 8] [--copies 24]
    [--seed 0]

SOURCE has metadata.jsonl with file_name and the column ``group``. Groups that share a picture (a copy, a mirrored one) count as one. They
are divided at random (15 % calibration, ``heldout``, the rest train), all of them or, with ``count``, so many that they hold about that
number of pictures; ``copied`` pictures of different training groups then occur ``copies`` times under their own caption, half of them as
the same file, half saved anew as JPEG. TARGET gets metadata.jsonl with a column ``split``; the division is random by group, so set
data.heldout_exchangeable=true. SOURCE is only read.

The control compares equally many distinct training and held-out pictures: with fewer held-out than training pictures it sees a part
of the repeated ones only. Ten repeated pictures that are all found and as many of both kinds give a p-value of about 0.5^10.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from train.data import prepare
from train.dataconfig import DataConfig

CALIBRATION = 0.15  # share of the groups
JPEG_QUALITY = 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--group", default="patient_id")
    parser.add_argument("--count", type=int)
    parser.add_argument("--heldout", type=float, default=0.25)
    for name, default in (("copied", 8), ("copies", 24), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = [json.loads(line) for line in (given.source / "metadata.jsonl").read_text().splitlines()]
    random = np.random.default_rng(given.seed)
    unit = units(rows, given.source, given.group)
    rows = [row for row in rows if row["file_name"] in unit]
    members = Counter(unit[row["file_name"]] for row in rows)
    names = sorted(members)
    if given.count is not None:
        names = random.permutation(names).tolist()
        names = sorted(names[: 1 + np.searchsorted(np.cumsum([members[name] for name in names]), given.count)])
    side = sides(names, given.heldout, random)
    rows = [{**row, "split": side[unit[row["file_name"]]]} for row in rows if unit[row["file_name"]] in side]
    for row in rows:
        (given.target / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(given.source / row["file_name"], given.target / row["file_name"])
    extra = []
    for row in chosen([row for row in rows if row["split"] == "train"], unit, given.copied, random):
        for number in range(1, given.copies):
            extra.append({**row, "file_name": copy(given.target, row["file_name"], number)})
    with (given.target / "metadata.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows + extra)
    print(
        {name: sum(row["split"] == name for row in rows) for name in ("train", "calibration", "heldout")},
        f"and {len(extra)} planted copies",
    )


def units(rows: list[dict], source: Path, group: str) -> dict[str, str]:
    """For every picture, the first group (by name) of those that must stay on one side with its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(source=str(source), image_size=64, channels=3, group_key=group)
        records = prepare(config, Path(folder) / "prepared", Accelerator(cpu=True)).records
    block = {record.source: record.block for record in records if not record.reason}
    groups = defaultdict(set)
    for row in rows:
        if row["file_name"] in block:
            groups[block[row["file_name"]]].add(row[group])
    return {name: min(groups[number]) for name, number in block.items()}


def sides(groups: list[str], heldout: float, random: np.random.Generator) -> dict[str, str]:
    """Split of every group."""
    shares = {"train": 1 - CALIBRATION - heldout, "calibration": CALIBRATION, "heldout": heldout}
    ends = np.round(np.cumsum(list(shares.values())) * len(groups)).astype(int)
    place = np.searchsorted(ends, random.permutation(len(groups)), side="right")
    return dict(zip(groups, np.array(list(shares))[place].tolist(), strict=True))


def chosen(rows: list[dict], unit: dict[str, str], count: int, random: np.random.Generator) -> list[dict]:
    """One picture of each of ``count`` groups."""
    groups = random.permutation(sorted({unit[row["file_name"]] for row in rows}))[:count]
    return [next(row for row in rows if unit[row["file_name"]] == group) for group in groups]


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
