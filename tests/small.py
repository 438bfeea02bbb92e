"""A complete configuration small enough to train in a second."""

from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator

from defenses import registry
from defenses.base import Defense
from eval.config import SECTIONS as EVAL_SECTIONS
from train import config as configuration
from train.data import Dataset, prepare
from train.records import select_records
from train.runlog import RunDirectory

OVERRIDES = [
    "data.image_size=16",
    "data.group_key=patient",
    "data.phantom.pictures=24",
    "data.phantom.copied=2",
    "data.phantom.copies=3",
    "data.phantom.outliers=2",
    "data.phantom.heldout=12",
    "data.phantom.calibration=6",
    "train.steps=7",
    "train.batch_size=6",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.preview_every=0",
    "train.heldout_every=3",
    "train.heldout_records=8",
    "train.precision=fp32",
    "train.trackers=[]",
    "train.optimizer.warmup_steps=3",
    "generate.count=16",
    "generate.steps=2",
    "attack.membership=null",  # the quickstart has them on, and they take seconds
    "attack.inpainting=null",
    "attack.copy_metrics=null",
    "run.cpu_threads=1",
]


def small_config(output_dir: Path, *overrides: str):
    """(tree, typed sections)."""
    sections = {**configuration.SECTIONS, **EVAL_SECTIONS}
    tree = configuration.load(sections, None, [*OVERRIDES, f"run.output_dir={output_dir}", *overrides])
    return tree, configuration.objects(tree)


def opened(
    output_dir: Path, *overrides: str
) -> tuple[SimpleNamespace, Dataset, RunDirectory, list[Defense], Accelerator]:
    """All arguments of `train_model`, with the records selected."""
    tree, config = small_config(output_dir, *overrides)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    directory = RunDirectory(config.run)
    directory.open(tree, "test")
    dataset = prepare(config.data, directory.prepared, accelerator)
    defenses = registry.build(config.defenses)
    select_records(config, dataset, defenses, accelerator)
    return config, dataset, directory, defenses, accelerator
