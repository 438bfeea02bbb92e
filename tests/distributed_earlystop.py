"""Started by test_earlystop.py on one and on two processes: every rank writes what it found to FOLDER/<processes>-<rank>.json."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not tests/, is first on the path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from accelerate import Accelerator

from tests.test_earlystop import begun, planted, replay, strangers, with_copies


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    pool, control = planted(copies=5)
    defense = begun(pool, control, images=33)  # an odd number: the ranks' shares differ
    images = {10: strangers(33), 20: with_copies(pool.images[:60], 7, 33)}
    verdicts = [[verdict.stop, verdict.release_step] for verdict in replay(defense, pool, control, images)]
    name = f"{accelerator.num_processes}-{accelerator.process_index}.json"
    (folder / name).write_text(json.dumps({"verdicts": verdicts, "findings": defense.findings()}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
