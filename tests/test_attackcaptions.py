"""Captions that defenses rewrote: each attack asks under those that it should, and a planted memory shows the difference."""

import csv
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.base import Defense
from defenses.errors import UserError
from eval import captions, inpainting, lira, membership, parts, prefilter, samples
from eval.config import check
from eval.detectors import PrefilterConfig
from eval.finetuning import FinetuningConfig
from eval.finetuning import prompts_of as finetuning_prompts
from eval.inpainting import InpaintingConfig
from eval.lira import LiraConfig, shadow_attacks
from eval.members import candidates
from eval.membership import MembershipConfig
from eval.stage import run_evaluation
from eval.suite import Scene
from eval.target import Target
from tests import ideal
from tests.pipelines import stable_diffusion
from tests.small import opened, small_config
from tests.test_config import load
from tests.test_latent import SD
from train.manifest import write_manifest
from train.stage import train_model


class Numbering(Defense):
    """Rewrites each caption into one of its own, which differs from what it was."""

    name = "numbering"

    def rewrite(self, texts):
        return [f"{text} no. {number}" for number, text in enumerate(texts)]

    def claim(self):
        return {"kind": "heuristic", "statement": "for a test"}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A run whose captions were rewritten, with its original captions."""
    folder = tmp_path_factory.mktemp("run")
    config, dataset, directory, _, _ = opened(folder, *SD, "model.pretrained=somewhere")
    target = Target(directory, dataset, None, directory.generations, defenses=[Numbering()], run=directory)
    return target, config, [record.caption for record in dataset.records]


def asking(config, which, **attack):
    return SimpleNamespace(**{**vars(config), "attack": replace(config.attack, captions=which, **attack)})


def remembering(target):
    """A model that knows each training picture by the caption it was trained under, and nothing under any other."""
    dataset = target.dataset
    rows = dataset.rows("train", kept=True)
    trained = Numbering().rewrite([record.caption for record in dataset.records])
    place = {trained[row]: number for number, row in enumerate(rows)}
    pictures = torch.from_numpy(dataset.images[rows]).float() / 127.5 - 1
    bank = torch.cat([pictures, torch.zeros_like(pictures[:1])])
    found = ideal.denoiser(None)

    def condition(values):
        return {"place": torch.tensor([place.get(value, len(rows)) for value in values])}

    return replace(
        found, kind="caption", condition=condition, shape=tuple(pictures.shape[1:]),
        predict=lambda x, t, told: bank[told["place"]], null=lambda count: condition([""] * count),
    )  # fmt: skip


def scene_of(target, config, denoiser):
    return Scene(target, config, Accelerator(cpu=True), denoiser, None, None)


@pytest.mark.parametrize(("which", "known"), [(None, True), ("trained", True), ("original", False)])
def test_members_are_recognised_under_the_captions_that_they_were_trained_on(numbered, which, known):
    target, config, _ = numbered
    told = asking(config, which, membership=MembershipConfig(attacks=["loss"], draws=1, set_test=False))
    entry = membership.run(scene_of(target, told, remembering(target))).report[0]
    assert entry["auc"] == 1.0 if known else entry["auc"] < 0.9


def test_half_a_picture_is_filled_under_the_caption_that_was_trained_on(numbered, tmp_path):
    """The model draws the remembered half exactly, and fills kept under other captions are not taken for these."""
    target, config, _ = numbered
    target = replace(target, output=SimpleNamespace(path=tmp_path))
    settings = InpaintingConfig(pictures=2, fills=2, keep=1, steps=2, jump_length=1, draws=1, permutations=9)
    found = {}
    for which in ("original", None):
        rows = inpainting.run(scene_of(target, asking(config, which, inpainting=settings), remembering(target))).tables
        found[which] = [row["l2"] for row in rows["inpainting.csv"][1] if row["member"]]
    assert max(found[None]) < 0.01 < min(found["original"])


def test_canaries_and_the_audit_are_asked_under_trained_captions(numbered, monkeypatch):
    target, config, original = numbered
    seen = []
    monkeypatch.setattr(parts.exposure, "measure", lambda run, config, dataset, *rest, **more: seen.append(dataset))
    for which in (None, "original"):
        parts._canaries(scene_of(target, asking(config, which), None))
    assert [record.caption for record in seen[0].records] == Numbering().rewrite(original)
    assert [record.caption for record in seen[1].records] == original
    assert seen[0].images is target.dataset.images


def test_losses_of_shadows_are_kept_by_caption(numbered, monkeypatch):
    target, config, _ = numbered
    keys = []

    class Kept:
        trained, seconds = np.zeros((4, len(target.dataset.records)), bool), 0.0

        def values(self, name, key, compute, shape, accelerator):
            keys.append(json.dumps([name, key], sort_keys=True))
            found = compute(remembering(target))
            return np.stack([found + 1, found + 2, found, found])

    Kept.trained[:2] = True
    monkeypatch.setattr(lira, "train_shadows", lambda *_: Kept())
    monkeypatch.setattr(lira, "gradient_features", lambda *_, rows, **__: np.zeros((len(rows), 2)))
    for which in (None, "original", "trained"):
        told = asking(config, which)
        scene = scene_of(target, told, remembering(target))
        who = candidates(captions.for_losses(target, told), 4, 0)
        shadow_attacks(scene, scene.denoiser, who, LiraConfig(shadows=4), draws=1, flips=False, batch=8)
    assert keys[:2] == keys[4:] and not set(keys[:2]) & set(keys[2:4])


def test_prompts_are_the_originals_unless_trained_ones_are_asked_for(numbered):
    target, config, original = numbered
    rewritten = Numbering().rewrite(original)
    for which, expected in ((None, original), ("original", original), ("trained", rewritten)):
        told = asking(config, which)
        dataset = captions.for_prompts(target, told)
        for found in (
            samples.prompts_of(told.generate, dataset),
            finetuning_prompts(FinetuningConfig(max_prompts=2), remembering(target), dataset),
        ):
            assert len(found) == 2 and set(found) <= set(expected)
        facts = captions.report(target, told, ["b", "a"])
        assert facts["prompts"] == (which or "original") and facts["losses"] == (which or "trained")
        assert facts["rewritten_by"] == ["numbering"]
    assert [record.caption for record in target.dataset.records] == original


def test_further_captions_are_told_as_they_were_trained_on(numbered):
    """Also those of a picture whose first caption no defense changed."""

    class Striking(Numbering):
        def rewrite(self, texts):
            return [text.replace(" 1234567", "") for text in texts]

    target, config, original = numbered
    records = [replace(record) for record in target.dataset.records]
    records[0] = replace(records[0], more_captions=["left lung 1234567", "of one 1234567"])
    records[1] = replace(records[1], more_captions=["as it was"])
    target = replace(target, dataset=replace(target.dataset, records=records), defenses=[Striking()])
    found = captions.for_prompts(target, asking(config, "trained")).records
    assert found[0].more_captions == ["left lung", "of one"] and found[1].more_captions == ["as it was"]
    assert [record.caption for record in found] == original
    assert records[0].more_captions == ["left lung 1234567", "of one 1234567"]  # the data's stay
    assert captions.for_prompts(target, asking(config, None)).records[0].more_captions == records[0].more_captions


def test_scores_of_prompts_are_joined_with_records_by_trained_captions(numbered, tmp_path, monkeypatch):
    target, config, original = numbered
    target = replace(target, output=SimpleNamespace(attack=tmp_path))
    monkeypatch.setattr(prefilter, "score", lambda model, prompts, *rest: np.arange(float(len(prompts))))
    told = asking(config, "trained", prefilter=PrefilterConfig())
    rows = prefilter.run(scene_of(target, told, None)).tables["prompt_scores.csv"][1]
    assert {row["prompt"] for row in rows} <= set(Numbering().rewrite(original)) and all(row["copies"] for row in rows)


def test_a_model_of_others_has_the_captions_of_the_data_alone(numbered):
    target, config, _ = numbered
    foreign = replace(target, run=None, defenses=[])
    told = asking(config, None)
    assert captions.for_losses(foreign, told) is foreign.dataset is captions.for_prompts(foreign, told)
    assert captions.report(foreign, told, ["b", "a"]) == {
        "losses": "original", "prompts": "original", "rewritten_by": None,
        "asked_sha256": hashlib.sha256(b'["a", "b"]').hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize("of", ["pipeline", "generations"])
def test_trained_captions_of_others_are_refused(of):
    with pytest.raises(UserError, match=r"attack\.captions: is trained, and nobody knows"):
        config = load("data.source=phantom", "attack.captions=trained")
        check(SimpleNamespace(**{**vars(config), of: "somewhere"}))


def test_trained_captions_of_a_model_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"attack\.captions: is trained, .* family pixel has no captions"):
        check(small_config(tmp_path, "attack.captions=trained")[1])


@pytest.mark.slow
@pytest.mark.parametrize("which", [None, "trained"])
def test_a_whole_run_says_and_uses_them(tmp_path, which):
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "base")
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path / "runs", *SD, f"model.pretrained={tmp_path / 'base'}", "defenses.scrub.patterns=[phantom]", "train.steps=1",
        "attack.membership={attacks: [loss], draws: 1, records: 4, set_test: false}", f"attack.captions={which or 'null'}",
    )  # fmt: skip
    write_manifest(dataset, directory.manifest)
    train_model(config, dataset, directory, defenses, accelerator)
    report = run_evaluation(directory, config, accelerator)
    with (directory.generations / "index.csv").open(newline="") as file:
        told = [row["condition"] for row in csv.DictReader(file)]
    digest = hashlib.sha256(json.dumps(sorted(set(told))).encode()).hexdigest()
    assert report["privacy"]["captions"] == {
        "losses": "trained", "prompts": which or "original", "rewritten_by": ["scrub"], "asked_sha256": digest,
    }  # fmt: skip
    assert told and all(("phantom" in prompt) == (which is None) for prompt in told)
    assert "privacy.captions.losses" in (directory.path / "report.html").read_text()
