"""Pipelines from the hub: one commit, the files that are needed, and no others. The hub is one of the test's own."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from defenses.errors import UserError
from tests.pipelines import STEM, change, contents, plant, stable_diffusion, stable_diffusion_3
from train import hub
from train.pipelines import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    torch.manual_seed(0)
    stable_diffusion(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the small Stable Diffusion, to be spoilt."""
    return shutil.copytree(original, tmp_path / "spoilt")


@pytest.fixture
def marker(tmp_path):
    """What planted code would create; nothing may."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT.upper()])
def test_a_hub_id_needs_a_full_commit_hash(revision):
    with pytest.raises(UserError, match="model.revision: .* does not pin some-one/model_1.5, .*full commit hash"):
        load("some-one/model_1.5", revision)


@pytest.mark.parametrize("source", ["runs/none/model", "./model", "/nowhere", "model", "a/b/"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(UserError, match=f"model.pretrained: {source} is no folder"):
        load(source, COMMIT)


def test_a_folder_has_no_revision(folder):
    with pytest.raises(UserError, match="model.revision: is for hub ids"):
        load(folder, COMMIT)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.pretrained: some/model at 01234567 cannot be fetched: ") as caught:
        load("some/model", COMMIT)
    assert "\n" not in str(caught.value)


@pytest.fixture
def fetched(monkeypatch, folder, tmp_path):
    """A hub whose one commit is ``folder``: the list of files that were asked for."""
    asked, cache = [], tmp_path / "cache"

    def snapshot_download(source, revision, allow_patterns):
        assert (source, revision) == ("some/model", COMMIT)
        names = filter_repo_objects(contents(folder), allow_patterns=allow_patterns)
        for name in names:
            asked.append(name)
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, cache / name)
        return str(cache)

    class Api:
        def list_repo_files(self, source, revision):
            return list(contents(folder))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "HfApi", Api)
    return asked


def test_only_what_is_needed_is_fetched(folder, fetched, marker):
    shutil.copytree(folder / "unet", folder / "safety_checker")
    for name in ("unet/my_module.py", "pipeline.py", "model.ckpt", f"unet/{STEM}.bin"):
        plant(folder / name, marker)
    for name in (f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.non_ema.safetensors", "v1.safetensors"):
        shutil.copy(folder / "unet" / f"{STEM}.safetensors", folder / name)
    parts = load("some/model", COMMIT)
    assert parts.source == "some/model"
    weights = {f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors", "text_encoder/model.safetensors"}
    assert {name for name in fetched if not name.endswith(".json")} == weights
    assert {name for name in fetched if name.startswith("safety")} <= {"safety_checker/config.json"}


def test_stable_diffusion_3_is_fetched_with_t5_and_no_more(folder, fetched, marker):
    shutil.rmtree(folder)
    stable_diffusion_3(folder)
    for name in ("sd3_medium.safetensors", "tokenizer_3/spiece.model", "text_encoder_3/pytorch_model.bin"):
        plant(folder / name, marker)
    assert load("some/model", COMMIT).kind == "sd3"
    weights = {f"{part}/{STEM}.safetensors" for part in ("transformer", "vae")}
    weights |= {f"text_encoder{number}/model.safetensors" for number in ("", "_2", "_3")}
    assert {name for name in fetched if not name.endswith(".json")} == weights


def test_shards_of_half_precision_alone_are_fetched(folder, fetched):
    """As the libraries name them: the variant before the number."""
    shutil.rmtree(folder)
    stable_diffusion_3(folder).save_pretrained(folder / "half", variant="fp16", max_shard_size="20KB")
    for path in (folder / "half").rglob("*.fp16*"):
        shutil.move(path, folder / path.relative_to(folder / "half"))
    shutil.rmtree(folder / "half")
    for part in ("transformer", "text_encoder_3"):
        assert len(list((folder / part).glob("*.fp16-0*-of-0*.safetensors"))) > 1
    for path in folder.rglob("*.safetensors"):
        if "fp16" not in path.name:
            path.unlink()
    assert load("some/model", COMMIT).kind == "sd3"


def test_what_is_refused_by_its_configuration_is_not_fetched(folder, fetched):
    change(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="some/model: its unet takes 9 channels"):
        load("some/model", COMMIT)
    assert all(name.endswith(".json") for name in fetched)


def test_pickles_on_the_hub_are_not_fetched(folder, fetched, marker):
    (folder / "vae" / f"{STEM}.safetensors").unlink()
    plant(folder / "vae" / f"{STEM}.bin", marker)
    with pytest.raises(UserError, match="some/model: vae holds its weights as a pickle alone"):
        load("some/model", COMMIT)
    assert all(name.endswith(".json") for name in fetched)


def test_a_commit_in_the_cache_needs_no_network(monkeypatch, original, tmp_path):
    """The layout of the hub's own cache, read by its own code while it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(original, tmp_path / "models--some--model" / "snapshots" / COMMIT)
    assert load("some/model", COMMIT).latent_shape == (4, 8, 8)
