"""``--dry-run``: everything that can be known before hours of work, and nothing written that stays."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from defenses import registry
from defenses.base import Defense
from defenses.ranks import on_main
from train import families, textstage
from train.data import Dataset, prepare
from train.diffusion import autocast
from train.loop import Trainer
from train.manifest import summary
from train.models import parameter_count
from train.records import class_names, select_records, trained_rows
from train.runlog import RunDirectory
from train.stage import build_trainer

SECRET_WORDS = ("token", "secret", "password", "api_key")


def dry_run(tree: DictConfig, config: SimpleNamespace, accelerator: Accelerator) -> int:
    """Prints resolved configuration, data, model, one batch, defenses, disk and memory; returns exit status 0."""
    say: Callable[..., None] = accelerator.print
    say(OmegaConf.to_yaml(OmegaConf.create(masked(OmegaConf.to_container(tree, resolve=True)))))
    folder = on_main(accelerator, lambda: tempfile.mkdtemp(prefix="deffuse-dry-run-"))
    try:
        directory = RunDirectory(replace(config.run, output_dir=folder))
        directory.path.mkdir(parents=True, exist_ok=True)
        dataset = prepare(config.data, directory.prepared, accelerator)
        defenses = registry.build(config.defenses)
        select_records(config, dataset, defenses, accelerator)
        describe_data(say, dataset)
        names = class_names(dataset, config.data.label_key)
        trainer = build_trainer(config, dataset, directory, accelerator, defenses, names, rehearsal=True)
        describe_training(say, config, trainer, dataset, len(names), accelerator)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def masked(tree):
    """The configuration with secrets hidden."""
    if not isinstance(tree, dict):
        return tree
    return {k: "***" if any(word in k.lower() for word in SECRET_WORDS) and v else masked(v) for k, v in tree.items()}


def describe_data(say: Callable[..., None], dataset: Dataset) -> None:
    facts = summary(dataset)
    say(f"records {facts['found']} found, {facts['rejected']} rejected")
    for reason, count in facts["reasons"].items():
        say(f"  rejected {count}: {reason}")
    say(f"split train {facts['train']}, calibration {facts['calibration']}, heldout {facts['heldout']}")
    say(f"distinct pictures in train {facts['clusters']}, units {facts['units']} ({facts['unit']}s)")
    say(f"kept for training {len(dataset.rows('train', kept=True))}")
    if facts["canaries"] is not None:
        say("canaries " + ", ".join(f"{name} {count}" for name, count in facts["canaries"].items()))
        say(f"trained on, with canaries {len(trained_rows(dataset))}")


def describe_training(
    say: Callable[..., None],
    config: SimpleNamespace,
    trainer: Trainer,
    dataset: Dataset,
    classes: int,
    accelerator: Accelerator,
) -> None:
    model = trainer.state.model
    parameters, trainable = parameter_count(model), parameter_count(model, trainable=True)
    say(f"parameters {parameters} ({trainable} trained), {type(model).__name__}, device {accelerator.device}")
    if families.of(config.model).captioned:
        say(prompted_outlook(config, *prompt_counts(config, dataset)))
        if config.attack.finetuning is not None:
            say(finetuning_outlook(config, *(len(captions_in(dataset, split)) for split in ("train", "heldout"))))
    for line in (*families.of(config.model).notes, *textstage.notes(config, model)):
        say(line)
    batches = trainer.microbatches(trainer.plan.batch(0))
    batch = next(iter(batches), None)
    if batch is None:  # a batch drawn at random may be empty
        rows = dataset.rows("train", kept=True)[:1]
        batch = trainer.batch(rows, rows * 0)
    images = batch.images
    say(
        f"micro-batch {tuple(images.shape)} {images.dtype}, values {images.min():.3f} to {images.max():.3f}, x {len(batches)} per process"
    )
    if batch.latents is not None:
        say(
            f"latents {tuple(batch.latents.shape)}, values {batch.latents.min():.3f} to {batch.latents.max():.3f}, "
            + (f"tokens {tuple(batch.tokens.shape)}" if batch.text is None else f"text {tuple(batch.text.shape)}")
        )
    if batch.labels is not None:
        say(f"labels {tuple(batch.labels.shape)}, classes {classes}")
    for defense in trainer.defenses:
        for line in defense.outlook():
            say(line)
    with autocast(images.device, config.train.precision):
        saved = activation_bytes(lambda: trainer.loss(model, batch).sum())
    # weights, gradient, two moments, EMA; the EMA is stored once more while it is evaluated
    memory = 4 * (parameters + 5 * trainable) + saved + trainer.rule.memory(trainable)
    say(f"memory about {gib(memory)} per process (activations {gib(saved)}), beside the libraries")
    cached = textstage.cache_bytes(config, dataset, trainer.defenses, model)
    disk = disk_bytes(config, dataset, trainer.defenses, model) + cached
    where = Path(config.run.output_dir) / config.run.name
    say(f"disk about {gib(disk)} in {where}" + (f", of which caches {gib(cached)}" if cached else ""))


def prompt_counts(config: SimpleNamespace, dataset: Dataset) -> tuple[int, int]:
    """Different prompts that the attack may ask, and captions of held-out pictures for its control."""
    known = captions_in(dataset, "train")
    if config.generate.prompts is not None:
        lines = Path(config.generate.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        known = {line.strip() for line in lines} - {""}
    return len(known), len(captions_in(dataset, "heldout"))


def prompted_outlook(config: SimpleNamespace, captions: int, heldout: int = 0) -> str:
    """What the prompted attack will draw.

    Args:
        captions: distinct prompts that there are (captions, or lines of ``prompts``).
        heldout: distinct captions of held-out pictures.
    """
    settings = config.generate
    prompts, control = settings.planned(captions, heldout)
    each = max(1, settings.batch_size // settings.per_prompt)  # prompts in a pass
    passes, again = (-(-count // each) * -(-settings.per_prompt // settings.batch_size) for count in (prompts, control))
    text = (
        f"prompted attack {prompts} prompts x {settings.per_prompt} images x {settings.steps} steps: "
        f"{prompts * settings.per_prompt} images, {passes * settings.steps} passes of up to {settings.batch_size} images"
    )
    text += ", compiled first, each at the cost of a full one" if settings.compile else ""
    more = f"{control * settings.per_prompt} images, {again * settings.steps} passes more"
    return f"{text}; control of up to {control} held-out captions: {more}" if control else text


def finetuning_outlook(config: SimpleNamespace, captions: int, heldout: int) -> str:
    """What the attack on the fine-tuning of a text-to-image model will draw, for so many distinct captions of either split."""
    settings, most = config.attack.finetuning, config.generate.control_prompts
    prompts = max(1, min(captions, settings.max_prompts)) if settings.prompts is None else settings.max_prompts
    control = 0 if settings.prompts or not captions else min(heldout, prompts if most is None else most)
    each, weights = settings.per_prompt * len(settings.weights), len(settings.weights)
    text = f"attack on the fine-tuning up to {prompts} prompts x {settings.per_prompt} images x {weights} weights x {settings.steps} steps"
    more = f"; control of up to {control} held-out captions: {control * each} images more" if control else ""
    return f"{text}: {prompts * each} images{more}"


def captions_in(dataset: Dataset, split: str) -> set[str]:
    """Different captions of one split."""
    return {dataset.records[row].caption for row in dataset.rows(split)} - {None, ""}


def images_written(config: SimpleNamespace, dataset: Dataset, defenses: Sequence[Defense]) -> int:
    """Generations that an evaluation leaves on disk."""
    written = config.generate.count
    if families.of(config.model).captioned and config.generate.keep == "all":
        written = sum(config.generate.planned(*prompt_counts(config, dataset))) * config.generate.per_prompt
    wrapped = any(type(defense).wrap_sampler is not Defense.wrap_sampler for defense in defenses)
    return written * 2 if wrapped else written  # those of the bare model too


def disk_bytes(config: SimpleNamespace, dataset: Dataset, defenses: Sequence[Defense], model: nn.Module) -> int:
    """What a run will leave: decoded pictures, checkpoints (weights, average, two moments), the model, generations."""
    parameters, trained = parameter_count(model), parameter_count(model, trainable=True)
    kept = config.train.keep_checkpoints or max(1, config.train.steps // max(config.train.checkpoint_every, 1))
    pictures = images_written(config, dataset, defenses) * dataset.images[0].size
    return dataset.images.nbytes + kept * 16 * trained + 4 * parameters + pictures


def activation_bytes(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes that one forward pass keeps for its backward pass, counted by storage."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()
    del kept
    return sum(storages.values())


def gib(count: float) -> str:
    """Bytes as GiB with two figures after the point."""
    return f"{count / 2**30:.2f} GiB"
