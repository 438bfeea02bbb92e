"""Defaults < file < command line, and errors that name the key."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from defenses.errors import UserError
from eval.config import SECTIONS as EVAL_SECTIONS
from eval.config import check
from train import config as configuration

SECTIONS = {**configuration.SECTIONS, **EVAL_SECTIONS}
CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


def load(*overrides: str, file: Path | None = None):
    return configuration.objects(configuration.load(SECTIONS, file, list(overrides)))


def test_command_line_beats_file_beats_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {steps: 7, batch_size: 5}\n")
    config = load("train.steps=9", file=file)
    assert (config.train.steps, config.train.batch_size, config.train.log_every) == (9, 5, 50)


@pytest.mark.parametrize("text", ["defenses.dedup={}", "defenses.dedup.flips=true"])
def test_a_defense_is_on_once_it_is_named(text):
    assert load().defenses.dedup is None
    assert load(text).defenses.dedup is not None
    assert load(text, "defenses.dedup=null").defenses.dedup is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=5", ["train.step", "steps"]),
        ("trian.steps=5", ["trian", "train"]),
        ("train.steps=many", ["train.steps"]),
        ("train.steps=2.5", ["train.steps"]),
        ("train.precision=fp16", ["train.precision"]),
        ("train.steps=0", ["train.steps"]),
        ("train.diffusion.snr_gamma=-1", ["train.diffusion.snr_gamma"]),
        ("defenses.dedup.treshold=1", ["defenses.dedup.treshold"]),
        ("generate.sampler=ddpm", ["generate.sampler"]),
        ("run.name=../x", ["run.name"]),
        ("run.seed=${nowhere}", ["nowhere"]),
        ("steps", ["steps", "key=value"]),
        ("data.source=???", ["data.source"]),
    ],
)
def test_mistakes_name_the_key_in_one_line(override, words):
    with pytest.raises(UserError) as caught:
        load(override)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "content", ["train: [", "- a\n- b\n", "train: {steps: !!python/object:os.system {}}", "train: {stepz: 3}"]
)
def test_bad_files(tmp_path, content):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load(file=file)
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match="--config: nowhere.yaml does not exist"):
        load(file=Path("nowhere.yaml"))


def test_interpolations_stay_unresolved_in_the_tree(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    tree = configuration.load(SECTIONS, None, ["run.name=${oc.env:SOME_TOKEN}"])
    assert "secret" not in OmegaConf.to_yaml(tree) and configuration.objects(tree).run.name == "secret"


@pytest.mark.parametrize(
    ("override", "key"),
    [("train.trackers=[wandb]", "train.trackers"), ("report.push_to_hub=a/b", "report.push_to_hub")],
)
def test_restricted_data_stay_here(override, key):
    config = load("data.restricted=true", override)
    with pytest.raises(UserError, match=key):
        check(config)
    check(load(override))
    check(load("data.restricted=true"))


def test_a_file_can_demand_a_value(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  source: ???\n")
    with pytest.raises(UserError, match=r"data\.source: has no value"):
        load(file=file)
    assert load("data.source=here", file=file).data.source == "here"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_load(file):
    """Every shipped file is valid, says in its first line what it is for, and names only what it changes."""
    asked = [key for key in ("data.source", "model.pretrained") if f"{key.split('.')[1]}: ???" in file.read_text()]
    overrides = [f"{key}=somewhere" for key in asked]
    config = load(*overrides, file=file)
    check(config)
    assert file.read_text().startswith("# ") and config.run.name == file.stem
