"""The script that repeats some pictures of a folder."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "planted_folder.py"


def test_copies_carry_their_caption_and_groups_with_a_common_picture_stay_together(tmp_path):
    source, target, random = tmp_path / "source", tmp_path / "target", np.random.default_rng(0)
    (source / "images").mkdir(parents=True)
    rows = []
    for number in range(30):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        for name in (f"{number}a", f"{number}b")[: 2 if number < 10 else 1]:  # ten pictures in two groups each
            Image.fromarray(pixels).save(source / "images" / f"{name}.png")
            rows.append({"file_name": f"images/{name}.png", "text": f"caption {name}", "who": name})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    options = "--group who --count 24 --heldout 0.4 --copied 3 --copies 5".split()
    subprocess.run([sys.executable, SCRIPT, source, target, *options], check=True, capture_output=True)
    written = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
    times = Counter(row["text"] for row in written)
    assert sorted(times.values())[-4:] == [1, 5, 5, 5] and 24 <= len(times) <= 25
    assert {row["split"] for row in written if times[row["text"]] == 5} == {"train"}
    sides = defaultdict(set)
    for row in written:
        sides[row["text"].rstrip("ab")].add(row["split"])
        with Image.open(target / row["file_name"]) as image:
            assert image.size == (64, 64)
    assert all(len(side) == 1 for side in sides.values())
    assert Counter(next(iter(side)) for side in sides.values())["heldout"] in (6, 7, 8)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
