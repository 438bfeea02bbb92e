"""Started by test_inpainting_processes.py under torchrun: what W processes reconstruct and extrapolate, and what they
know of each picture.

Usage: distributed_inpainting.py FOLDER. Every process writes FOLDER/result-RANK.json.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from accelerate import Accelerator

from eval.extraction import ExtractionConfig
from eval.finetuning import run as run_finetuning
from eval.inpainting import run
from eval.prompted import prompted
from eval.risk import risk_table
from tests import test_finetuning
from tests.reference import fabricated
from tests.test_inpainting import dataset, memoriser, scene
from tests.test_prompted import prompt


def measure(folder: Path) -> None:
    accelerator, data = Accelerator(cpu=True), dataset(5, 4)
    found = run(scene(folder, data, memoriser(data)))
    training = fabricated.pictures(np.asarray(data.images[:5]))
    groups = [
        prompt(f"prompt {row}", fabricated.noisy(np.repeat(data.images[row : row + 1], 4, axis=0), 0.02, seed=row))
        for row in range(3)
    ]
    config = ExtractionConfig(permutations=9, clique_size=4)
    attack = prompted(groups, training, None, config, accelerator, exchangeable=True, seed=0)
    small = {"count": 10, "batch_size": 4, "steps": 6, "permutations": 19, "edge_threshold": 0.8}
    models, patch = test_finetuning.memory(data), SimpleNamespace(setattr=setattr)
    extrapolated = run_finetuning(test_finetuning.scene(folder, data, models, patch, **small))
    facts = {
        "world": accelerator.num_processes,
        "report": found.report,
        "table": found.tables["inpainting.csv"][1],
        "finetuning": extrapolated.report | {"base": None},
        "candidates": extrapolated.tables["finetuning.csv"][1],
        "risk": risk_table(training, attack, accelerator=accelerator),
    }
    (folder / f"result-{accelerator.process_index}.json").write_text(json.dumps(facts, allow_nan=False))
    accelerator.end_training()


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
