"""Evaluation alone: of a finished run, of any diffusers pipeline, or of images that somebody else generated.

accelerate launch eval/run.py run_dir=RUN_DIR [key=value ...]
accelerate launch eval/run.py pipeline=PIPELINE_DIR data.source=... [data.heldout_source=...] [key=value ...]
accelerate launch eval/run.py generations=DIR data.source=... [data.heldout_source=...] [key=value ...]
"""

import os
import sys

if not __package__:  # `accelerate launch eval/run.py` puts eval/ first on the path, not the repository
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    __import__("train.cli").cli.die_with_parent()  # before the imports, which take seconds
    __import__("train.cli").cli.check_libraries()  # before diffusers is imported, which fails unclearly

from pathlib import Path
from types import SimpleNamespace

from omegaconf import DictConfig, OmegaConf

from defenses import registry
from defenses.base import Defense
from defenses.errors import UserError
from defenses.registry import CLASSES
from eval.config import SECTIONS as EVAL_SECTIONS
from eval.config import check
from eval.replay import replayed
from eval.stage import evaluate
from eval.target import Target
from eval.textsource import kind_of
from train import cli
from train import config as configuration
from train.data import prepare
from train.loop import Interrupted
from train.manifest import write_manifest
from train.release import SIDECAR
from train.runlog import RunConfig, RunDirectory

TARGETS = ("run_dir", "pipeline", "generations")


def main(arguments: cli.Arguments) -> int:
    """Evaluates one target; returns the exit status."""
    if arguments.dry_run:
        raise UserError("--dry-run", "is for train/run.py", "leave it out")
    given = [text.partition("=")[0] for text in arguments.overrides]
    chosen = [name for name in TARGETS if name in given]
    if len(chosen) != 1:
        raise UserError("run_dir", f"{len(chosen)} of {', '.join(TARGETS)} are given", "give exactly one of them")
    sections = {**configuration.SECTIONS, **EVAL_SECTIONS, **{name: None for name in TARGETS}}
    check_fixed(arguments, chosen[0])
    if chosen[0] == "run_dir":  # the run's own file has the run's name
        # earlier checkpoints were measured with the run: they do not change
        defaults, overrides = [], ["run.name=again", "report.along=[]", *arguments.overrides]
    else:
        defaults, overrides = [f"run.name=eval-{chosen[0]}", "data.source=???"], arguments.overrides
    tree = configuration.load(sections, base_file(arguments, chosen[0]), overrides, defaults)
    config = configuration.objects(tree)
    check(config)
    check_defenses(config, chosen[0])
    accelerator = cli.start(config)
    if chosen[0] == "run_dir":
        return evaluate_run(tree, config, accelerator)
    return evaluate_foreign(tree, config, accelerator)


def base_file(arguments: cli.Arguments, target: str) -> Path | None:
    """The run's own configuration, or the file given."""
    if target != "run_dir":
        return arguments.config
    if arguments.config is not None:
        raise UserError("--config", "is not used with run_dir", "the run's own config.yaml is; override single keys")
    folder = Path(next(text.partition("=")[2] for text in arguments.overrides if text.startswith("run_dir=")))
    if not (folder / "config.yaml").is_file():
        raise UserError("run_dir", f"{folder} holds no config.yaml", "give the directory of a run")
    restricted = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "data.restricted", default=False)
    if restricted and any(text.startswith("data.restricted=") for text in arguments.overrides):
        raise UserError("data.restricted", "cannot be lifted from a run on restricted data", "leave it out")
    return folder / "config.yaml"


def check_fixed(arguments: cli.Arguments, target: str) -> None:
    """What was trained cannot be changed by evaluating it."""
    keys = [text.partition("=")[0] for text in arguments.overrides] if target == "run_dir" else []
    later = [name for name, kind in CLASSES.items() if kind.after_training]
    fixed = [key for key in keys if not changeable(key, later)]
    if fixed:
        allowed = ", ".join(f"defenses.{name}" for name in later)
        raise UserError(
            ", ".join(fixed),
            "cannot be changed after training",
            f"only run.*, generate.*, attack.*, utility.*, report.*, data.restricted, {allowed}",
        )


def check_defenses(config: SimpleNamespace, target: str) -> None:
    """Refuses defenses that nothing would apply: of a model of others those at seam 6 alone can be, of its images none.

    Raises:
        UserError: names every one of them.
    """
    given = [name for name in CLASSES if getattr(config.defenses, name) is not None]
    if target == "run_dir" or not given:
        return
    outer = {name: kind for name, kind in CLASSES.items() if kind.wrap_sampler is not Defense.wrap_sampler}
    able = {name for name, kind in outer.items() if kind.after_training and not kind.needs_calibration}
    useful = able if target == "pipeline" else set()
    refused = [f"defenses.{name}" for name in given if name not in useful]
    if refused:
        raise UserError(
            ", ".join(refused),
            "cannot be applied to images that are there already"
            if target == "generations"
            else "cannot be applied to a model of others: it works while a model is trained, or needs calibration pictures, "
            "which only a run of ours has",
            f"leave {'it' if len(refused) == 1 else 'them'} out; a pipeline takes {', '.join(sorted(useful)) or 'those at seam 6'}"
            ", a run (run_dir=...) any that needs no training",
        )
    captioned, folder = [name for name in given if CLASSES[name].needs_captions], Path(config.pipeline)
    if captioned and (folder / "model_index.json").is_file() and kind_of(folder) is None:
        raise UserError(f"defenses.{captioned[0]}", "needs a text-to-image model", "leave it out")


def changeable(key: str, later: list[str]) -> bool:
    """Whether a setting may differ from the run's: nothing that training depended on."""
    section, _, rest = key.partition(".")
    if section == "defenses":
        return rest.partition(".")[0] in later
    # what a private run may look at was decided before training, and is part of its claim
    return key == "data.restricted" or (
        section not in ("data", "model", "train") and key != "report.nonprivate_metrics"
    )


def evaluate_run(tree: DictConfig, config: SimpleNamespace, accelerator) -> int:
    """Into RUN_DIR/eval/<run.name>/, never over the run's own report."""
    folder = Path(config.run_dir).resolve()
    directory = RunDirectory(RunConfig(name=folder.name, output_dir=str(folder.parent)))
    if not (directory.model / SIDECAR).exists() or not (directory.prepared / "prepared.json").exists():
        raise UserError("run_dir", f"{folder} has no trained model yet", "finish the run first: give its command again")
    output = RunDirectory(RunConfig(name=config.run.name, output_dir=str(folder / "eval")))
    output.open(tree, cli.command_line())
    accelerator.wait_for_everyone()
    return finish(output, accelerator, lambda: replayed(directory, output, config, accelerator), config)


def evaluate_foreign(tree: DictConfig, config: SimpleNamespace, accelerator) -> int:
    """Into <run.output_dir>/<run.name>/. Every record of data.source counts as trained on."""
    output = RunDirectory(config.run)
    output.open(tree, cli.command_line())
    accelerator.wait_for_everyone()

    def target() -> Target:
        dataset = prepare(config.data, output.prepared, accelerator, all_train=True)
        if accelerator.is_main_process:
            write_manifest(dataset, output.manifest)
        pipeline = None if config.pipeline is None else Path(config.pipeline)
        images = output.generations if pipeline else Path(config.generations)
        return Target(output, dataset, pipeline, images, defenses=registry.build(config.defenses))

    return finish(output, accelerator, target, config)


def finish(output: RunDirectory, accelerator, target, config: SimpleNamespace) -> int:
    """Evaluates unless that is done already."""
    if output.report.exists():
        accelerator.print(f"all done: {output.path / 'report.html'}")
        return 0
    try:
        evaluate(target(), config, accelerator)
    except Interrupted as stop:
        accelerator.print(f"{stop}; the same command resumes")
        return 1
    accelerator.print(f"report: {output.path / 'report.html'}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    cli.run(main, cli.parse(__doc__))
