"""Started by test_filter_processes.py under torchrun: what W processes let through, count and find.

Usage: distributed_filter.py FOLDER. Each rank draws its blocks of two images; the main process writes FOLDER/result.json.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from defenses.outputfilter import OutputFilter, OutputFilterConfig, load_filter
from eval.correlation import by_correlation
from tests.test_correlation import pictures
from tests.test_outputfilter import Model, context_of, random_images
from train.sampling import blocks

COUNT = 14


def measure(folder: Path) -> None:
    accelerator, data = Accelerator(cpu=True), random_images(70, 1)
    defense = OutputFilter(OutputFilterConfig(attempts=2))
    guarded = defense.wrap_sampler(Model(data, 6, stubborn=3), context_of(folder, data, 30))
    mine = blocks(COUNT, 2, accelerator.process_index, accelerator.num_processes)
    drawn = gather_object(
        [(i, image.tolist()) for block in mine for i, image in zip(block, guarded(block), strict=True)]
    )
    images = np.array([image for _, image in sorted(drawn)])
    sides = [pictures(data[part]) for part in (slice(0, 30), slice(30, 50), slice(50, 70))]
    found = by_correlation(data[25:45], *sides, accelerator)  # 5 training and 15 held-out pictures
    if accelerator.is_main_process:
        findings = {key: value for key, value in defense.findings().items() if "seconds" not in key}
        facts = {
            "world": accelerator.num_processes,
            "findings": findings,
            "images": np.nan_to_num(images, nan=-1).tolist(),
        }
        threshold = load_filter(folder / "output_filter").threshold
        (folder / "result.json").write_text(json.dumps(facts | {"correlation": found, "threshold": threshold}))
    accelerator.end_training()


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
