"""What defenses may not do together, or in a private run: mixing of records, comparisons under dropout."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from defenses.errors import UserError
from tests.pipelines import stable_diffusion
from tests.small import opened
from tests.test_latent import SD
from train.combinations import refuse_dropout, refuse_mixing
from train.stage import build_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    torch.manual_seed(0)
    stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def built_trainer(base, tmp_path_factory):
    arguments = opened(tmp_path_factory.mktemp("run"), *SD, f"model.pretrained={base}")
    config, dataset, directory, defenses, accelerator = arguments
    return build_trainer(config, dataset, directory, accelerator, defenses, [])


@pytest.fixture
def trainer(built_trainer, monkeypatch):
    monkeypatch.setattr(built_trainer, "accelerator", Accelerator(cpu=True))  # its state ends with each test
    return built_trainer


def others(values, chosen):
    """The value of the record before, for the records that are chosen."""
    return [
        values[place - 1] if here else value for place, (value, here) in enumerate(zip(values, chosen, strict=True))
    ]


def mixing_pictures(batch):
    chosen = batch.random.uniform("mix") < 0.1
    return replace(batch, images=torch.stack(others(batch.images, chosen)))


def mixing_captions(batch):
    chosen = batch.random.uniform("mix") < 0.1
    return replace(batch, captions=others(batch.captions, chosen))


def mixing_further_captions(batch):
    chosen = batch.random.uniform("mix") < 0.1
    return replace(batch, more_captions=others(batch.more_captions, chosen))


def mixing_noise(batch):
    """As strong as other records' captions are long, now and then."""
    chosen = batch.random.uniform("mix") < 0.1
    length = sum(len(caption) for caption in batch.captions)
    return replace(batch, text_noise=torch.where(chosen, torch.tensor(float(length)), torch.tensor(0.0)))


def own_changes(batch):
    """Each record by itself: negatives, other words, noise."""
    chosen = batch.random.uniform("own") < 0.5
    images = torch.where(chosen[:, None, None, None], -batch.images, batch.images)
    captions = [f"{text} more" if here else text for text, here in zip(batch.captions, chosen, strict=True)]
    return replace(batch, images=images, captions=captions, text_noise=chosen.float())


def tried(trainer, monkeypatch, change):
    monkeypatch.setattr(trainer, "defenses", [SimpleNamespace(change_batch=change)])
    refuse_mixing(trainer)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (mixing_pictures, "images"),
        (mixing_captions, "captions"),
        (mixing_further_captions, "more_captions"),
        (mixing_noise, "text_noise"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_defense_that_seldom_mixes_records_is_found(trainer, monkeypatch, change, what, seed):
    monkeypatch.setattr(trainer, "seed", seed)
    with pytest.raises(UserError, match=f"mixes the {what} of a batch"):
        tried(trainer, monkeypatch, change)


def test_a_defense_that_treats_records_alone_passes(trainer, monkeypatch):
    tried(trainer, monkeypatch, own_changes)


def test_pictures_are_encoded_for_one_try_alone(trainer, monkeypatch):
    calls, draw = [], trainer.objective.draw
    monkeypatch.setattr(
        trainer, "objective", replace(trainer.objective, draw=lambda batch: calls.append(1) or draw(batch))
    )
    tried(trainer, monkeypatch, own_changes)
    assert len(calls) == 2


def test_dropout_and_the_magnitude_of_a_caption_exclude_each_other(base, tmp_path):
    adapter = "model.adapter={rank: 2, dropout: 0.1}"

    def built(name, *overrides):
        config, dataset, directory, defenses, accelerator = opened(
            tmp_path / name, *SD, f"model.pretrained={base}", *overrides
        )
        return build_trainer(config, dataset, directory, accelerator, defenses, [])

    with pytest.raises(UserError, match=r"defenses\.text_filter: compares passes .* dropout"):
        built("both", adapter, "defenses.text_filter={}")
    built("dropout", adapter)
    built("filter", "model.adapter={rank: 2}", "defenses.text_filter={}")


def test_dropout_by_a_function_is_seen(trainer):
    comparing = [SimpleNamespace(name="text_filter", wants=("text_magnitude",))]
    encoder = trainer.state.model.parts.text_encoders[0]
    refuse_dropout(encoder, comparing)
    attention = next(module for module in encoder.modules() if type(module).__name__ == "CLIPAttention")
    attention.dropout = 0.1
    try:
        refuse_dropout(encoder, [])
        with pytest.raises(UserError, match="dropout"):
            refuse_dropout(encoder, comparing)
    finally:
        attention.dropout = 0.0
