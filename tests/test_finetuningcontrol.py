"""The attack on the fine-tuning beside held-out captions: memory of captions is found, obedience to captions is not taken for it."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import extrapolation, finetuningcontrol
from eval.attackwords import finetuning_evidence, finetuning_sentences
from eval.cliques import largest_clique
from eval.config import GenerateConfig
from eval.extrapolation import Pair
from eval.finetuning import FinetuningConfig, run
from tests import ideal
from tests.reference import brute_force
from tests.test_finetuning import scene
from tests.test_inpainting import dataset
from train.dryrun import finetuning_outlook

QUICK = {"per_prompt": 24, "max_prompts": 8, "guidance": 1.0, "clusters": 8, "permutations": 199}


def caption_model(pictures: dict[str, np.ndarray], mass: float) -> ideal.Denoiser:
    """A model that draws of each of these captions its picture, uint8 [1, C, H, W], with probability ``mass``, and else noise."""
    plain, known = ideal.denoiser(None), list(pictures)
    clean = [ideal.partial_memoriser(pictures[text], mass, 0.3) for text in known] + [ideal.isotropic(0.3)]

    def predict(x, t, told):
        found, signal = torch.empty_like(x), plain.alphas_cumprod[t].double()[:, None]
        for place in told["place"].unique().tolist():
            rows = told["place"] == place
            found[rows] = clean[place](x[rows].flatten(1).double(), signal[rows]).reshape(x[rows].shape).float()
        return found

    def condition(values):
        return {"place": torch.tensor([known.index(each) if each in pictures else len(known) for each in values])}

    return replace(
        plain, kind="caption", predict=predict, condition=condition, null=lambda count: condition([""] * count)
    )


def captioned(training: int = 8, heldout: int = 8):
    data = dataset(training, heldout)
    for row, record in enumerate(data.records):
        record.caption = f"picture {row}"
    return data


def attacked(path, monkeypatch, known, mass=0.1, data=None, control_prompts=None, **settings):
    """The report where the fine-tuned model knows the captions of these rows, and the base none."""
    data = data or captioned()
    tuned = caption_model({data.records[row].caption: data.images[row : row + 1] for row in known}, mass)
    place = scene(path, data, Pair(tuned, caption_model({}, 0.1), (1, 16, 16)), monkeypatch, **QUICK | settings)
    place.config.generate = SimpleNamespace(control_prompts=control_prompts)
    return run(place).report


def copies(folder, picture) -> int:
    """Images of one caption that show its picture, by brute force."""
    images = [np.asarray(Image.open(file))[None] for file in sorted(folder.glob("*.png"))]
    assert len(images) == 24
    return sum(brute_force.l2(image, picture) < 0.05 for image in images)


def test_remembered_captions_are_found_and_their_number_is_that_of_the_images(tmp_path, monkeypatch):
    """Eight of eight training captions, one image in ten; at w = 3 it is more."""
    data = captioned()
    report = attacked(tmp_path, monkeypatch, range(8), data=data)
    for weight, entry in zip(("w-1", "w-3"), report["weights"], strict=True):
        own = []
        for where, rows in (("finetuning", range(8)), ("finetuning_control", range(8, 16))):
            folder = tmp_path / "out" / where / weight
            asked = [int(text.split()[1]) for text in json.loads((folder / "settings.json").read_text())["prompts"]]
            assert sorted(asked) == list(rows)
            own.append(sum(copies(folder / f"{n:05d}", data.images[row]) >= 2 for n, row in enumerate(asked)))
        found = entry["captions"]
        assert [found["training"]["own"], found["own"]] == own
        assert (found["prompts"], found["tested"], found["training"]["tested"], found["unit"]) == (8, 8, 8, "picture")
        pool = np.arange(16) < sum(own)
        ways = [pool[list(chosen)].sum() >= own[0] for chosen in itertools.combinations(range(16), 8)]
        assert found["p_value"] == pytest.approx(np.mean(ways)) == found["stratified"]["p_value"]
    one, three = (entry["captions"] for entry in report["weights"])
    assert three["training"]["own"] >= 7 and three["own"] == 0
    assert three["p_value_holm"] == pytest.approx(min(1.0, 2 * min(one["p_value"], three["p_value"]))) or (
        three["p_value_holm"] >= three["p_value"]
    )
    assert report["captions_reason"] is None and finetuning_evidence({"finetuning": report})
    assert "Control of the captions: of 8 training pictures" in " ".join(finetuning_sentences({"finetuning": report}))


def test_a_model_that_draws_what_any_caption_says_is_not_accused(tmp_path, monkeypatch):
    """Held-out captions bring their pictures back as well; against held-out pictures alone it looked like memory."""
    report = attacked(tmp_path, monkeypatch, range(16), mass=0.3)
    three = report["weights"][1]
    assert three["verified"] >= 7 and three["p_value_holm"] < 0.05
    assert (three["captions"]["training"]["own"], three["captions"]["own"]) == (8, 8)
    assert three["captions"]["p_value"] == three["captions"]["p_value_holm"] == 1.0
    assert not finetuning_evidence({"finetuning": report})


def test_how_many_held_out_captions_and_why_none(tmp_path, monkeypatch):
    drawn = []
    sample = extrapolation.sample

    def counted(pair, guidance, conditions, indices, **options):
        drawn.extend(conditions)
        return sample(pair, guidance, conditions, indices, **options)

    monkeypatch.setattr(extrapolation, "sample", counted)
    small = {"steps": 2, "per_prompt": 2, "permutations": 9}
    report = attacked(tmp_path / "a", monkeypatch, [0], control_prompts=3, **small)
    assert {entry["captions"]["prompts"] for entry in report["weights"]} == {3}
    assert len(drawn) == 2 * 2 * (8 + 3) and len({f"picture {row}" for row in range(8, 16)} & set(drawn)) == 3
    again = attacked(tmp_path / "a", monkeypatch, [0], control_prompts=3, **small)
    assert len(drawn) == 44 and again == report
    reasons = (
        ({"control_prompts": 0}, "switched off"),
        ({"per_prompt": 1}, "fewer images"),
        ({"prompts": "file"}, "from a file"),
    )
    for number, (changes, reason) in enumerate(reasons):
        if "prompts" in changes:
            (tmp_path / "prompts.txt").write_text("picture 0\n")
            changes = {"prompts": str(tmp_path / "prompts.txt")}
        report = attacked(tmp_path / str(number), monkeypatch, [0], **small | changes)
        assert reason in report["captions_reason"] and all(entry["captions"] is None for entry in report["weights"])
        assert not (tmp_path / str(number) / "out" / "finetuning_control").exists()


def test_every_caption_is_searched_as_long_on_either_side(tmp_path, monkeypatch):
    """Three held-out captions do not get more time each than eight training captions, nor the other way round."""
    limits = []

    def noted(adjacency, *, seconds):
        limits.append(seconds)
        return largest_clique(adjacency, seconds=seconds)

    monkeypatch.setattr(finetuningcontrol, "largest_clique", noted)
    small = {"steps": 2, "per_prompt": 2, "permutations": 9, "clique_seconds": 6.0}
    attacked(tmp_path, monkeypatch, [0], control_prompts=3, **small)
    assert limits == [6.0 / 8] * (2 * (8 + 3))


def test_the_dry_run_says_what_the_control_costs():
    config = SimpleNamespace(
        generate=GenerateConfig(),
        attack=SimpleNamespace(
            finetuning=FinetuningConfig(weights=[1.0, 3.0, 5.0], per_prompt=10, max_prompts=4, steps=7)
        ),
    )
    line = "attack on the fine-tuning up to 4 prompts x 10 images x 3 weights x 7 steps: 120 images"
    assert finetuning_outlook(config, 9, 9) == f"{line}; control of up to 4 held-out captions: 120 images more"
    assert finetuning_outlook(config, 9, 2) == f"{line}; control of up to 2 held-out captions: 60 images more"
    config.generate.control_prompts = 0
    assert finetuning_outlook(config, 9, 9) == line
