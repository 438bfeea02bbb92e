"""The main job: prepare, train, generate, attack, utility, report.

accelerate launch train/run.py [--config FILE] [--dry-run] [key=value ...]
"""

import os
import sys

if not __package__:  # `accelerate launch train/run.py` puts train/ first on the path, not the repository
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    __import__("train.cli").cli.die_with_parent()  # before the imports, which take seconds
    __import__("train.cli").cli.check_libraries()  # before diffusers is imported, which fails unclearly

from defenses import registry
from eval.config import SECTIONS as EVAL_SECTIONS
from eval.config import check
from eval.stage import run_evaluation
from train import cli
from train import config as configuration
from train.data import prepare
from train.dryrun import dry_run
from train.loop import Interrupted
from train.manifest import write_manifest
from train.records import select_records
from train.runlog import RunDirectory
from train.stage import train_model


def main(arguments: cli.Arguments) -> int:
    """Runs or resumes one configuration; returns the exit status."""
    file = arguments.config or cli.ROOT / "configs" / "quickstart.yaml"
    tree = configuration.load({**configuration.SECTIONS, **EVAL_SECTIONS}, file, arguments.overrides)
    config = configuration.objects(tree)
    check(config)
    directory = RunDirectory(config.run)
    if arguments.dry_run:
        return dry_run(tree, config, cli.start(config))
    accelerator = cli.start(config, directory.path, config.train.trackers)
    directory.open(tree, cli.command_line())
    accelerator.wait_for_everyone()
    if directory.report.exists():
        accelerator.print(f"all done: {directory.path / 'report.html'}")
        return 0
    dataset = prepare(config.data, directory.prepared, accelerator)
    defenses = registry.build(config.defenses)
    select_records(config, dataset, defenses, accelerator)
    if accelerator.is_main_process:
        write_manifest(dataset, directory.manifest)
    try:
        train_model(config, dataset, directory, defenses, accelerator)
        run_evaluation(directory, config, accelerator)
    except Interrupted as stop:
        accelerator.print(f"{stop}; the same command resumes")
        return 1
    accelerator.print(f"report: {directory.path / 'report.html'}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    cli.run(main, cli.parse(__doc__))
