"""Started by test_stream_processes.py under torchrun: a streamed attack of W processes.

Usage: distributed_stream.py FOLDER [PASSES]. Every process writes FOLDER/result-RANK.json; with PASSES the second one dies when it
has drawn as many.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from accelerate import Accelerator

from eval import stream
from eval.measure import attack
from tests.test_stream import Killed, Planted, dataset, settings, streamed


def measure(folder: Path, passes: int | None) -> None:
    accelerator, config = Accelerator(cpu=True), settings(batch_size=10)
    stream.SAVE_SECONDS = -1.0
    planted = Planted(die_after=passes if accelerator.process_index == 1 else None)
    try:
        images = streamed(folder, config, planted, accelerator)
    except Killed:
        os._exit(9)
    found = attack(images, dataset(), config, accelerator)
    for name in ("draw_seconds", "attack_seconds", "attack_share"):
        found.report["streamed"].pop(name)
    facts = {
        "passes": len(planted.passes),
        "report": found.report,
        "cliques": found.cliques,
        "matches": found.matches,
        "l2": found.pictures.l2.tolist(),
        "nearest": found.pictures.generation,
    }
    (folder / f"result-{accelerator.process_index}.json").write_text(json.dumps(facts, allow_nan=False))
    accelerator.end_training()


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
