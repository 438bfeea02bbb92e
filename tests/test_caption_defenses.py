"""The defenses on captions, text and loss in whole runs of a tiny text-to-image pipeline: what reaches the model, resume, DP-SGD."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from defenses import registry
from defenses.errors import UserError
from tests.pipelines import stable_diffusion
from tests.small import opened
from tests.test_latent import SD
from train.loop import Trainer
from train.stage import build_trainer, train_model

ALL = [
    "defenses.scrub.patterns=[phantom]",
    "defenses.captions={replace_probability: 0.3, replace_by: captions, insert_probability: 0.5, noise_probability: 0.5}",
    "defenses.anti_gradient={decay: 0.5, scale: 1.05, bins: 1}",
    "defenses.text_filter.threshold=0.5",
]
DPSGD = (
    "defenses.dpsgd={noise_multiplier: 1.0, clip_norm: 0.3, sample_rate: 0.5, batch_size: 6, delta: 1e-3, test_seed: 3}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    torch.manual_seed(0)
    stable_diffusion(folder)
    return folder


def trainer_of(folder, base, *overrides):
    config, dataset, directory, defenses, accelerator = opened(folder, *SD, f"model.pretrained={base}", *overrides)
    return build_trainer(config, dataset, directory, accelerator, defenses, []), dataset


def test_what_the_model_is_told_was_scrubbed_and_varied(base, tmp_path):
    """phantom occurs in every caption; other records' captions stand in as they are trained on, not as they were."""
    trainer, dataset = trainer_of(tmp_path, base, *ALL[:2], "defenses.captions.replace_probability=1.0")
    assert all("phantom" in record.caption for record in dataset.records)
    batches = [batch for step in range(4) for batch in trainer.microbatches(trainer.plan.batch(step))]
    told = [caption for batch in batches for caption in batch.captions]
    assert len(told) == 24 and not any("phantom" in caption for caption in told)
    assert len(set(told)) > 12 and any(batch.text_noise.any() for batch in batches)


def weights_and_states(folder, base, monkeypatch, stop_at=None):
    arguments = opened(folder, *SD, f"model.pretrained={base}", *ALL)
    config, dataset, directory, _, accelerator = arguments
    if stop_at is not None:
        with monkeypatch.context() as patched:
            step = Trainer.step

            def interrupted(trainer):
                if trainer.state.step == stop_at:
                    raise KeyboardInterrupt
                return step(trainer)

            patched.setattr(Trainer, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_model(*arguments)
    facts = train_model(config, dataset, directory, registry.build(config.defenses), accelerator)
    return load_file(directory.checkpoints / "step-7" / "model.safetensors"), facts


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(base, tmp_path, monkeypatch):
    straight, facts = weights_and_states(tmp_path / "straight", base, monkeypatch)
    resumed, resumed_facts = weights_and_states(tmp_path / "resumed", base, monkeypatch, stop_at=5)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert facts["defense_states"] == resumed_facts["defense_states"]
    found = {each["name"]: each["findings"] for each in facts["defenses"]}
    assert found == {each["name"]: each["findings"] for each in resumed_facts["defenses"]}
    assert found["anti_gradient"]["seen"] == found["text_filter"]["seen"] == 7 * 6
    assert 0 < found["anti_gradient"]["dropped"] < 42 and 0 < found["text_filter"]["dropped"] < 42
    assert found["scrub"]["rules"]["patterns"] == found["scrub"]["captions"] == found["scrub"]["changed"]


@pytest.mark.slow
def test_a_private_run_takes_those_that_treat_records_alone_and_counts_nothing(base, tmp_path):
    private = [ALL[0], ALL[3], "defenses.captions={insert_probability: 0.5, noise_probability: 0.5}", DPSGD]
    arguments = opened(tmp_path, *SD, f"model.pretrained={base}", "model.adapter.rank=2", *private)
    facts = train_model(*arguments)
    assert all(each["findings"] is None for each in facts["defenses"] if each["name"] != "dpsgd")
    assert facts["defense_states"]["scrub"] == {} and not any(facts["defense_states"]["text_filter"]["counts"])


@pytest.mark.parametrize("setting", [ALL[1], ALL[2]])
def test_a_private_run_refuses_those_that_remember(base, tmp_path, setting):
    with pytest.raises(UserError, match="depends on others"):
        trainer_of(tmp_path, base, "model.adapter.rank=2", DPSGD, setting)


@pytest.mark.parametrize("name", ["scrub", "captions", "text_filter"])
def test_a_model_without_text_is_refused(tmp_path, name):
    config, dataset, directory, defenses, accelerator = opened(tmp_path, f"defenses.{name}={{}}")
    with pytest.raises(UserError, match=rf"defenses\.{name}"):
        build_trainer(config, dataset, directory, accelerator, defenses, [])
