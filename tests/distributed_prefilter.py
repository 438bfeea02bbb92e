"""Started by test_prefilter_processes.py under torchrun: scores of prompts, and of those that a stopped run had not scored.

Usage: distributed_prefilter.py FOLDER. The main process writes FOLDER/result.json.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from accelerate import Accelerator

from eval import prefilter
from tests.test_detectors import planted
from tests.test_prefilter import config_of


def measure(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prompts = [f"prompt {number}" for number in range(11)] + ["a memorised prompt"]
    target, config = (
        SimpleNamespace(output=SimpleNamespace(attack=folder / "attack")),
        config_of("prefilter", batch_size=2),
    )
    first = prefilter.prompt_scores(target, planted(), config, accelerator, prompts[:5])
    scores = prefilter.prompt_scores(target, planted(), config, accelerator, prompts)
    assert scores[:5] == first
    webster = prefilter.score(planted(), prompts, config_of(detector="webster").attack.prefilter, 0, accelerator)
    if accelerator.is_main_process:
        result = {"world": accelerator.num_processes, "wen": scores, "webster": webster.tolist()}
        (folder / "result.json").write_text(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
