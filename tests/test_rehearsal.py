"""What a text-to-image run refuses or tells before its long stages, and what these stages do once."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from defenses import canaries
from defenses.base import Defense
from defenses.errors import UserError
from eval.config import check
from tests.pipelines import change, stable_diffusion
from tests.small import opened, small_config
from tests.test_latent import SD
from train import cache, dryrun, scratch, textstage
from train.cli import is_disk_full
from train.runlog import RunDirectory
from train.stage import build_trainer, train_model
from train.state import released_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    torch.manual_seed(0)
    stable_diffusion(folder)
    return folder


def test_a_rehearsal_encodes_what_it_looks_at_alone_and_knows_the_room_for_the_rest(base, tmp_path):
    config, dataset, directory, defenses, accelerator = opened(tmp_path, *SD, f"model.pretrained={base}")
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [], rehearsal=True)
    folder = directory.path / textstage.CACHE
    assert not folder.exists()
    looked = next(iter(trainer.microbatches(trainer.plan.batch(0))))
    foretold = textstage.cache_bytes(config, dataset, defenses, trainer.state.model)
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [])
    cached = next(iter(trainer.microbatches(trainer.plan.batch(0))))
    assert torch.allclose(looked.latents, cached.latents, atol=1e-5)
    assert torch.allclose(looked.text, cached.text, atol=1e-5)
    files = list(folder.iterdir())
    header = 128  # bytes of a .npy file
    assert len(files) == 2 and foretold == sum(file.stat().st_size - header for file in files)


@pytest.mark.parametrize(
    ("changes", "images"), [(["control_prompts=0"], 16), (["control_prompts=1"], 24), (["keep=flagged", "count=5"], 5)]
)
def test_a_dry_run_knows_the_room_for_the_images_of_all_prompts(changes, images, base, tmp_path, monkeypatch):
    chosen = [f"generate.{each}" for each in ("max_prompts=2", "per_prompt=8", *changes)]
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, *SD, f"model.pretrained={base}", "data.phantom.heldout=8", *chosen
    )
    trainer = build_trainer(config, dataset, directory, accelerator, defenses, [], rehearsal=True)
    assert dryrun.images_written(config, dataset, trainer.defenses) == images
    room = dryrun.disk_bytes(config, dataset, trainer.defenses, trainer.state.model)
    monkeypatch.setattr(dryrun, "images_written", lambda *arguments: 0)
    rest = dryrun.disk_bytes(config, dataset, trainer.defenses, trainer.state.model)
    assert room - rest == images * dataset.images[0].size


def test_a_full_disk_is_met_before_a_cache_is_mapped(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "table.npy"
    np.lib.format.open_memmap(file, "w+", np.float32, (1000, 1000)).flush()
    assert file.stat().st_blocks * 512 < 4_000_000  # sparse
    cache.reserve(file)
    assert file.stat().st_blocks * 512 >= 4_000_000
    assert np.load(file).shape == (1000, 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        cache.reserve(file)
    assert is_disk_full(caught.value) and not file.exists()


class Upper(Defense):
    name = "upper"
    calls = 0

    def claim(self):
        return {"kind": "none"}

    def rewrite(self, captions):
        self.calls += 1
        return [caption.upper() for caption in captions]


def test_captions_are_rewritten_once(base, tmp_path):
    config, dataset, directory, _, accelerator = opened(tmp_path, *SD, f"model.pretrained={base}", "model.cache=false")
    defense = Upper()
    trainer = build_trainer(config, dataset, directory, accelerator, [defense], [])
    assert defense.calls == 1
    assert all(caption.isupper() for caption in trainer.fetch(np.arange(3))["captions"])
    other = Upper()
    assert textstage.captions_of(config, dataset, [])[0][0] == dataset.records[0].caption
    assert textstage.captions_of(config, dataset, [other])[0][0].isupper() and other.calls == 1


@pytest.mark.parametrize("setting", [{"rescale_betas_zero_snr": True}, {"trained_betas": [0.01] * 1000}])
def test_a_schedule_that_training_would_not_follow_is_refused(tmp_path, setting):
    stable_diffusion(tmp_path / "sd")
    change(tmp_path / "sd" / "scheduler" / "scheduler_config.json", **setting)
    arguments = opened(tmp_path, *SD, f"model.pretrained={tmp_path / 'sd'}")
    with pytest.raises(UserError, match=next(iter(setting))) as caught:
        train_model(*arguments)
    assert caught.value.key == "model.pretrained"


def test_classes_are_refused_with_the_configuration(tmp_path):
    _, config = small_config(tmp_path, "model.family=latent", "data.caption_key=caption", "data.label_key=label")
    with pytest.raises(UserError) as caught:
        check(config)
    assert caught.value.key == "data.label_key"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.batch_size=1", "train.batch_size"),
        ("model.trainable=['nothing*']", "model.trainable"),
        ("train.optimizer.eight_bit=true", "train.optimizer.eight_bit"),
        ("defenses.early_stop={} train.checkpoint_every=7", "train.checkpoint_every"),
    ],
)
def test_mistakes_are_met_before_an_autoencoder_is_trained(tmp_path, monkeypatch, override, key):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setattr(scratch, "make", lambda *arguments, **options: pytest.fail("the autoencoder was trained"))
    arguments = opened(
        tmp_path, "model.family=latent", "model.size=nano", "data.caption_key=caption", "train.accumulation=2",
        *override.split(),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        train_model(*arguments)
    assert caught.value.key == key


def test_the_released_copy_shares_nothing_with_the_model(base, tmp_path):
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, *SD, f"model.pretrained={base}", "model.cache=false", "model.adapter.rank=2"
    )
    state = build_trainer(config, dataset, directory, accelerator, defenses, []).state
    copied = released_model(state)
    assert copied.parts.network is copied.unet and copied.vae is copied.beside[0]
    assert copied.conditioner.encoders[0] is copied.beside[1]
    theirs = {each.data_ptr() for module in (state.model, *state.model.beside) for each in module.parameters()}
    assert not theirs & {each.data_ptr() for module in (copied, *copied.beside) for each in module.parameters()}


def test_a_refused_command_can_be_corrected_under_the_same_name(base, tmp_path):
    """The refusal comes late, after data and configuration were stored; once there is a checkpoint settings are fixed."""
    with pytest.raises(UserError) as caught:
        train_model(*opened(tmp_path, *SD, f"model.pretrained={base}", "train.diffusion.prediction=v_prediction"))
    assert caught.value.key == "train.diffusion.prediction"
    short = [*SD, f"model.pretrained={base}", "train.steps=1", "train.preview_every=0", "train.heldout_every=0"]
    arguments = opened(tmp_path, *short)
    stored = OmegaConf.load(arguments[2].path / "config.yaml")
    assert (stored.train.diffusion.prediction, stored.train.steps) == ("epsilon", 1)
    with pytest.raises(UserError, match="prepared from other files or settings"):
        opened(tmp_path, *short, "data.split_seed=5")
    arguments = opened(tmp_path, *short)
    train_model(*arguments)
    with pytest.raises(UserError, match="was made with 1, now 2") as caught:
        opened(tmp_path, *short, "train.steps=2")
    assert caught.value.key == "train.steps"
    assert OmegaConf.load(arguments[2].path / "config.yaml").train.steps == 1


def test_canaries_of_a_refused_command_are_not_those_of_its_correction(tmp_path):
    """Their coins left no record out: an audit of the corrected run would report on them."""
    refused = ["defenses.dpsgd.epsilon=8", "defenses.dpsgd.unit=record", "defenses.dpsgd.canaries=4"]
    config, dataset, directory, defenses, accelerator = opened(tmp_path, *refused, "defenses.dpsgd.delta=0.5")
    with pytest.raises(UserError) as caught:
        build_trainer(config, dataset, directory, accelerator, defenses, [])
    table = directory.path / canaries.FILE
    assert caught.value.key == "defenses.dpsgd.delta" and table.exists()
    opened(tmp_path, *refused, "defenses.dpsgd.delta=0.5")  # the same again
    assert table.exists()
    opened(tmp_path)
    assert not table.exists()


@pytest.mark.parametrize(
    "name", ["base", "cache", "checkpoints", "model", "ledger.jsonl", "shadows", ".base.autoencoder"]
)
def test_settings_are_fixed_by_anything_that_they_decided(tmp_path, name):
    tree, config = small_config(tmp_path)
    directory = RunDirectory(config.run)
    directory.open(tree, "first")
    (directory.path / ".config.yaml.k1ll3d").touch()  # a temporary file that a kill left
    tree, config = small_config(tmp_path, "train.steps=8")
    directory.open(tree, "second")
    assert json.loads((directory.path / "environment.json").read_text())["command"] == "second"
    (directory.path / name).mkdir()
    tree, config = small_config(tmp_path, "train.steps=9")
    with pytest.raises(UserError) as caught:
        directory.open(tree, "third")
    assert caught.value.key == "train.steps"
