"""Cuts a MedMNIST-like .npz file into a public part and a private part with planted copies, for the private runs.

python bench/fashion_parts.py FILE.npz FOLDER

Writes FOLDER/public.npz (half of the training pictures of every class), FOLDER/private.npz (the other half, with 20 of them
32-fold) and FOLDER/planted.json (their rows). Both keep the file's test part.
"""

import json
import sys
from pathlib import Path

import numpy as np

PLANTED, COPIES, SEED = 20, 32, 0


def main(source: Path, folder: Path) -> None:
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    images, labels = arrays["train_images"], arrays["train_labels"]
    random = np.random.default_rng(SEED)
    order = random.permutation(len(images))
    rank = np.empty(len(images), dtype=int)  # of a picture within its class, in random order
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        rank[of_class] = np.arange(len(of_class))
    half = len(images) // len(np.unique(labels)) // 2
    public, private = np.flatnonzero(rank < half), np.flatnonzero(rank >= half)
    planted = np.sort(random.choice(private, PLANTED, replace=False))
    private = np.concatenate([private, np.repeat(planted, COPIES - 1)])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("public", public), ("private", private)):
        np.savez_compressed(
            folder / f"{name}.npz", **arrays | {"train_images": images[rows], "train_labels": labels[rows]}
        )
    rows = [int(np.flatnonzero(private == row)[0]) for row in planted]
    (folder / "planted.json").write_text(json.dumps({"rows": rows, "copies": COPIES}) + "\n")
    print(f"public {len(public)}, private {len(private)} ({PLANTED} pictures {COPIES}-fold)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
