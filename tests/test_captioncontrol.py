"""The control with held-out captions: fair to a model that draws what captions say, and strict with one that remembers."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.base import Defense
from defenses.errors import UserError
from eval import drawing, stage
from eval.captioncontrol import CaptionControl, compare, heldout_candidates, plan
from eval.captionunits import distances, exact_p_value, outcomes, owners
from eval.control import Rule, control
from eval.generations import Generations, file_of, write
from eval.promptrecords import PromptFinding
from eval.report import ReportConfig, render
from eval.stratified import Stratum, strata
from eval.target import Target, pictures_of
from eval.verdict import verdict
from tests.fabricate import Fabricated, fabricate_report
from tests.reference import brute_force, fabricated
from tests.small import small_config
from tests.test_stream import Planted, settings
from train.data import Dataset
from train.record import Record
from train.runlog import RunDirectory


def record(number: int, split: str, caption: str, block: int | None = None, **fields) -> Record:
    block = number if block is None else block
    fields = {"copies": 1, "cluster": number} | fields
    return Record(
        f"r{number}", f"{number:03d}.png", "", f"h{number}", split=split, block=block, caption=caption, **fields
    )


def findings(images: dict[int, np.ndarray]) -> list[PromptFinding]:
    rows = {place: {"prompt": f"{place:05d}", "flagged": True, "mean_distance": 0.01} for place in images}
    return [PromptFinding(place, rows[place], [], 0, image) for place, image in images.items()]


def against(dataset: Dataset, training: dict, heldout: dict) -> dict:
    """`compare` for candidates by the row of the picture whose caption they were drawn with; all captions are prompts."""
    rows = {split: dataset.rows(split).tolist() for split in ("train", "heldout")}
    texts = {split: [dataset.records[row].caption for row in rows[split]] for split in rows}
    place = {split: {row: number for number, row in enumerate(rows[split])} for split in rows}
    found = findings({place["heldout"][row]: image for row, image in heldout.items()})
    images = SimpleNamespace(streamed=SimpleNamespace(findings=found))
    given = {f"{place['train'][row]:05d}": image for row, image in training.items()}
    sides = pictures_of(dataset, "train"), pictures_of(dataset, "heldout")
    control = CaptionControl(texts["train"], texts["heldout"], None, images, owners(dataset))
    return compare(control, given, *sides, dataset, settings())


@pytest.mark.parametrize(("training", "heldout"), [("1110", "1000"), ("11110", "000"), ("00", "00111"), ("10", "0")])
def test_the_p_value_counts_all_permutations(training, heldout):
    sides = [np.array([each == "1" for each in side]) for side in (training, heldout)]
    pool, observed = np.concatenate(sides), sides[0].sum()
    ways = [pool[list(chosen)].sum() >= observed for chosen in itertools.combinations(range(len(pool)), len(training))]
    assert exact_p_value(*sides) == pytest.approx(np.mean(ways), rel=1e-12)


def artist_run(seed: int, remembered: int = 0, fitted: int = 0) -> tuple[Dataset, dict, dict]:
    """20 training and 8 held-out pictures of plain colour with what the caption leaves open, and what a model draws for each caption
    that renders the captions and, but for ``remembered`` training pictures, knows nothing else."""
    random = np.random.default_rng(seed)
    level = random.integers(60, 196, 28)
    rest = random.choice(
        [0.05, 0.1, 0.2, 0.3], 28
    )  # how much of the picture a caption leaves open: half are within reach
    told = np.repeat(level, 64).reshape(28, 1, 8, 8).astype(np.uint8)
    truth = np.concatenate([fabricated.noisy(told[[i]], rest[i], seed=seed * 100 + i) for i in range(28)])
    records = [record(i, "train" if i < 20 else "heldout", f"level {level[i]}, picture {i}") for i in range(28)]
    drawn = {i: truth[i] if i < remembered else fabricated.noisy(told[[i]], 0.02, seed=seed + i)[0] for i in range(28)}
    training, heldout = {i: drawn[i] for i in range(20)}, {i: drawn[i] for i in range(20, 28)}
    return Dataset(records, truth), training, heldout


def test_a_faithful_artist_is_not_accused():
    """It never saw a picture, and still brings half of both sides back."""
    rule, found = Rule(1, lambda distance: distance[:, 0] / 0.15), []
    for seed in range(200):
        dataset, *drawn = artist_run(seed)
        known = owners(dataset)
        for split, first, images in (("train", 0, drawn[0]), ("heldout", 20, drawn[1])):
            texts = [each.caption for each in dataset.records if each.split == split]
            given = {row - first: image for row, image in images.items()}
            found.append(outcomes(split, texts, given, known, dataset, rule, "cpu").own)
    training, heldout = np.array(found[::2]), np.array(found[1::2])
    assert training.shape == (200, 20) and heldout.shape == (200, 8)
    p_values = np.array([exact_p_value(*each) for each in zip(training, heldout, strict=True)])
    assert (p_values <= 0.05).mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert (p_values <= 0.5).mean() <= 0.5 + 2 * np.sqrt(0.25 / 200)
    assert 0.3 < training.mean() < 0.7 and 0.3 < heldout.mean() < 0.7


def test_distances_are_those_of_the_rule():
    candidates, pictures = fabricated.blobs(1, 6, side=12, channels=3), fabricated.blobs(2, 6, side=12, channels=3)
    pictures[0], pictures[1] = candidates[0, :, :, ::-1], 0
    candidates[1] = 255
    expected = [
        min(brute_force.l2(c, v) for v in brute_force.views(p)) for c, p in zip(candidates, pictures, strict=True)
    ]
    np.testing.assert_allclose(distances(candidates, pictures), expected, rtol=1e-6)
    assert expected[:2] == [0.0, 1.0]


def test_held_out_pictures_alone_accuse_the_artist():
    """What this control is there for: the candidates of training captions come nearer to training pictures by what was asked."""
    rule, p_values = Rule(1, lambda distance: distance[:, 0].astype(np.float64) / 0.015), []
    for seed in range(5):
        dataset = artist_run(seed)[0]
        colours = np.random.default_rng(seed).permutation(28) * 9  # plain, and none like another
        dataset.images[:] = colours[:, None, None, None].astype(np.uint8)
        candidates = np.stack([fabricated.noisy(dataset.images[[i]], 0.01, seed=i)[0] for i in range(20)])
        sides = pictures_of(dataset, "train"), pictures_of(dataset, "heldout")
        p_values.append(control(candidates, *sides, rule, exchangeable=True, permutations=199, seed=seed)["p_value"])
    assert max(p_values) <= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_what_is_remembered_is_found(seed):
    """Captions that say next to nothing, all training pictures remembered."""
    dataset, training, heldout = artist_run(seed)
    dataset.images[:] = fabricated.blobs(seed, 28, side=8)
    found = against(dataset, {row: dataset.images[row] for row in training}, heldout)
    assert (found["training"]["own"], found["own"]) == (20, 0) and found["p_value"] < 0.01
    alike = against(
        dataset, {row: dataset.images[row] for row in training}, {row: dataset.images[row] for row in heldout}
    )
    assert (alike["training"]["own"], alike["own"], alike["verified"], alike["p_value"]) == (20, 8, 8, 1.0)


def test_a_unit_counts_once_and_shared_captions_not_at_all():
    images = fabricated.blobs(1, 8, side=8)
    records = [
        record(0, "train", "a", block=0), record(1, "train", "b", block=0), record(2, "train", "shared"),
        record(3, "train", "c", more_captions=["further"]), record(4, "heldout", "shared"), record(5, "heldout", "d"),
        record(6, "heldout", "further"), record(7, "train", "twice", block=9),
    ]  # fmt: skip
    dataset = Dataset(records, images)
    assert {text: (owner.split, owner.rows.tolist()) for text, owner in owners(dataset).items()} == {
        "a": ("train", [0]), "b": ("train", [1]), "c": ("train", [3]), "twice": ("train", [7]), "d": ("heldout", [5]),
    }  # fmt: skip
    # "b" brings its picture back, but "a" of the same unit came first; row 7 comes back under another caption
    found = against(dataset, {1: images[1], 2: images[7], 3: images[3]}, {4: images[4]})
    assert found["training"] | {"prompts": 5} == {"prompts": 5, "candidates": 3, "tested": 3, "own": 1}
    assert found["stratified"]["strata"] == [
        {"copies": 1, "tested": 1, "own": 0, "training": {"tested": 3, "own": 1}}
    ] and found["stratified"]["p_value"] == pytest.approx(3 / 4)
    assert (found["prompts"], found["candidates"], found["tested"], found["own"]) == (3, 1, 1, 0)
    assert found["p_value"] == pytest.approx(3 / 4)  # one of four units, three of them trained on


def test_a_unit_belongs_to_the_stratum_of_its_most_copied_picture():
    """Row 1 and 2 are pictures of a person; the caption of the more copied one is asked first."""
    images = fabricated.blobs(1, 5, side=8)
    records = [
        record(0, "train", "once"), record(1, "train", "five", block=1, copies=5), record(2, "train", "two", block=1, copies=2),
        record(3, "heldout", "apart", copies=5), record(4, "heldout", "single"),
    ]  # fmt: skip
    dataset = Dataset(records, images)
    known, rule = owners(dataset), Rule(1, lambda distance: distance[:, 0] / 0.15)
    found = outcomes("train", ["five", "two", "once"], {0: images[1]}, known, dataset, rule, "cpu")
    assert (found.own.tolist(), found.kind.tolist()) == ([True, False], [5, 1])
    other = outcomes("heldout", ["apart", "single"], {}, known, dataset, rule, "cpu")
    assert strata(found, other) == [Stratum(5, 1, 1, 1, 0), Stratum(1, 1, 0, 1, 0)]


def test_held_out_captions_are_chosen_as_training_captions_are():
    records = [record(i, "train", f"t{i}") for i in range(2)]
    records += [
        record(2, "heldout", "once"),
        record(4, "heldout", "thrice", copies=3),
        record(3, "heldout", "also once"),
    ]
    dataset, config = Dataset(records, fabricated.blobs(1, 5, side=8)), settings()
    assert plan(config, dataset, ["t0", "t1"]).prompts == ["thrice", "once"]

    def planned(**changes):
        config.generate = replace(settings().generate, **changes)
        return plan(config, dataset, ["t0", "t1"])

    assert planned(control_prompts=9).prompts == ["thrice", "once", "also once"]
    assert planned(control_prompts=1).prompts == ["thrice"]
    for changes, reason in (
        ({"control_prompts": 0}, "switched off"), ({"prompts": "file.txt"}, "from a file"), ({"order": "prefilter"}, "score"),
    ):  # fmt: skip
        assert planned(**changes).prompts == [] and reason in planned(**changes).reason
    for each in records[2:]:
        each.caption = "t0"
    assert "shared" in planned().reason
    for each in records[2:]:
        each.caption = None
    assert "no held-out picture" in planned().reason
    with pytest.raises(UserError, match="control_prompts"):
        planned(control_prompts=-1)


class Guard(Defense):
    """Lets nothing of one training and one held-out caption out."""

    name = "guard"

    def claim(self):
        return {"kind": "heuristic", "statement": "Withholds some."}

    def wrap_sampler(self, sampler, context):
        def guarded(indices, prompts):
            images = sampler(indices, prompts).clone()
            images[[prompt in ("copy 4", "agreed 3") for prompt in prompts]] = torch.nan
            return images

        return guarded


def captioned() -> Dataset:
    """Of 20 training pictures the model remembers those of captions "copy", of 12 held-out ones it happens to draw one."""
    images = np.concatenate([fabricated.blobs(1, 20), fabricated.blobs(2, 12)])
    texts = [f"copy {i}" if i < 6 else f"fresh {i}" for i in range(20)]
    texts += [f"agreed {i}" if i == 3 else f"fresh {20 + i}" for i in range(12)]
    records = [record(i, "train" if i < 20 else "heldout", text) for i, text in enumerate(texts)]
    return Dataset(records, images)


@pytest.mark.parametrize("guarded", [False, True])
def test_the_control_is_drawn_beside_the_attack(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "load", lambda *arguments: Planted().source)
    reports = []
    for keep in ("all", "flagged"):
        tree, config = small_config(
            tmp_path, f"run.name={keep}", f"generate.keep={keep}", "generate.per_prompt=10", "generate.batch_size=32",
            "generate.count=8", "generate.max_prompts=8", "attack.extraction.permutations=99", "utility.kid_subsets=2",
            "attack.risk=false", "report.pairs=0", "report.grid=0",
        )  # fmt: skip
        output = RunDirectory(config.run)
        output.open(tree, "test")
        defenses = [Guard()] if guarded else []
        target = Target(output, captioned(), tmp_path, output.generations, defenses=defenses)
        stage.evaluate(target, config, Accelerator(cpu=True))
        reports.append(json.loads(output.report.read_text())["privacy"])
    whole, streamed = (each["extraction"]["control"] for each in reports)
    assert whole == streamed
    found = whole["captions"]
    assert found["training"] == {
        "prompts": 8, "candidates": 6 - guarded, "tested": 8, "own": 6 - guarded, "verified": whole["verified_train_m"],
    }  # fmt: skip
    own = {"prompts": 8, "candidates": 1 - guarded, "verified": 1 - guarded, "tested": 8, "own": 1 - guarded}
    assert {key: found[key] for key in own} == own and found["pictures"] == 12
    sides = np.arange(8) < 6 - guarded, np.arange(8) < 1 - guarded
    assert found["p_value"] == exact_p_value(*sides) < 0.05
    folders = [
        sorted(path.name for path in (tmp_path / keep / "generations_control").iterdir()) for keep in ("all", "flagged")
    ]
    assert len([name for name in folders[0] if name.isdigit()]) == 8
    assert [name for name in folders[1] if name != "index.csv"] == ([] if guarded else ["00003"])
    if guarded:
        bare = [each["extraction_guard_off"]["control"]["captions"] for each in reports]
        assert bare[0] == bare[1] and (bare[0]["training"]["own"], bare[0]["own"]) == (6, 1)
    page = (tmp_path / "flagged" / "report.html").read_text()
    assert "held-out pictures, never trained on" in page and "Beyond the caption: p = " in page


@pytest.mark.parametrize(
    ("p_value", "beyond", "level", "words"),
    [
        (0.001, 0.01, "leak", "beyond what captions tell"),
        (0.001, 0.2, "unclear", "not beyond the caption"),
        (0.001, None, "leak", "gives training pictures away"),
        (0.2, 0.01, "unclear", "does not tell them from chance"),
    ],
)
def test_a_leak_must_be_beyond_the_caption_too(p_value, beyond, level, words):
    report = fabricate_report()
    extraction = report["privacy"]["extraction"]
    report["privacy"] = dict.fromkeys(report["privacy"]) | {"extraction": extraction}
    extraction |= {"protocol": "prompted"}
    captions = {
        "prompts": 8, "pictures": 12, "candidates": 1, "verified": 1, "tested": 8, "own": 1, "p_value": beyond, "reason": "so",
        "unit": "picture", "training": {"prompts": 8, "candidates": 6, "tested": 8, "own": 6, "verified": 5},
    }  # fmt: skip
    extraction["control"] |= {"p_value": p_value, "captions": captions}
    found = verdict(report)
    assert found["level"] == level and words in found["title"]
    text = " ".join(found["sentences"])
    assert "of 8 training pictures with a caption of their own, 6 came" in text
    assert ("is not known: captions" in text) == (beyond is None)
    assert ("never saw gave no p-value, because so." in text) == (beyond is None)


@pytest.mark.parametrize(
    ("training", "part", "level", "title"),
    [
        (
            (6, 8),
            (1.0, 5),
            "leak",
            "away, beyond what captions tell, if the copied ones are no easier to draw by caption",
        ),
        (
            (6, 8),
            (None, 6),
            "leak",
            "away, beyond what captions tell, if the copied ones are no easier to draw by caption",
        ),
        ((6, 8), (0.03, 5), "leak", "away, beyond what captions tell"),
        ((6, 8), (0.03, 0), "leak", "away, beyond what captions tell"),
        ((0, 8), (1.0, 0), "unclear", "but none by a caption of its own, so not known to be beyond the caption"),
    ],
)
def test_the_title_claims_what_the_deciding_test_can_say(training, part, level, title):
    """Fisher's test alone decides where pictures that came back have no counterpart: that rests on how they came to be copied."""
    report = fabricate_report()
    extraction = report["privacy"]["extraction"]
    report["privacy"] = dict.fromkeys(report["privacy"]) | {"extraction": extraction | {"protocol": "prompted"}}
    own, tested = training
    told = {"p_value": part[0], "reason": None, "strata": [], "without_counterpart": {"tested": 8, "own": part[1]}}
    captions = {
        "tested": 8,
        "own": 0,
        "p_value": 0.01 if own else 1.0,
        "reason": None,
        "unit": "picture",
        "stratified": told,
    }
    captions |= {"training": {"prompts": 8, "candidates": 6, "tested": tested, "own": own, "verified": 5}}
    report["privacy"]["extraction"]["control"] |= {"p_value": 0.001, "captions": captions}
    found = verdict(report)
    assert found["level"] == level and found["title"].endswith(title)


@pytest.mark.parametrize(
    ("within", "alone", "level"), [(0.0377, 0, "leak"), (0.4321, 0, "unclear"), (1.0, 5, "leak"), (None, 6, "leak")]
)
def test_the_page_tells_both_p_values_and_what_each_leaves_out(within, alone, level, tmp_path):
    """Fisher's 0.0123 in all cases; reports of before have no ``stratified``."""
    run = Fabricated(tmp_path / "run")
    extraction = run.report["privacy"]["extraction"]
    strata = [{"copies": 7, "tested": 0 if alone else 4, "own": 0, "training": {"tested": 9, "own": 6}}]
    strata += [{"copies": 1, "tested": 23, "own": 1, "training": {"tested": 21, "own": 2}}]
    counterpart = {"tested": 9 if alone else 0, "own": alone}
    part = {
        "p_value": within,
        "reason": None if within else "nobody is like them",
        "strata": strata,
        "without_counterpart": counterpart,
    }
    captions = {
        "prompts": 27, "pictures": 31, "candidates": 1, "verified": 1, "tested": 27, "own": 1, "p_value": 0.0123, "reason": None,
        "unit": "picture", "training": {"prompts": 30, "candidates": 8, "tested": 30, "own": 8, "verified": 5},
    }  # fmt: skip
    extraction |= {"protocol": "prompted", "prompts": 30, "withheld": {"images": 1357, "prompts": 13, "reason": None}}
    pages = []
    for more in ({}, {"stratified": part}):
        extraction["control"]["captions"] = captions | more
        render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
        pages.append(" ".join((run.folder / "report.html").read_text().split()))
    assert (
        "Beyond the caption: p = 0.012 (Fisher's test, one-sided)." in pages[0]
        and "equally many copies" not in pages[0]
    )
    assert "A defense withheld 1,357 images; of 13 of 30 prompts it left too few for a clique" in pages[0]
    said = (
        f"p = {within:.2g} (one-sided, exact whatever copies do)"
        if within
        else "no p-value, because nobody is like them"
    )
    assert f"Among pictures with equally many copies: {said}" in pages[1]
    assert '<tr><td class="n">7</td><td class="n">9</td><td class="n">6</td>' in pages[1]
    assert (
        f"9 training pictures, {alone} of them back, have a number of copies that no tested held-out one has"
        in pages[1]
    ) == (alone > 0)
    outcome = verdict(run.report)
    sentence = " ".join(outcome["sentences"])
    assert (f"{alone} of those that came back have a number of copies that no tested held-out one has" in sentence) == (
        alone > 0
    )
    assert outcome["level"] == level and "p = 0.012 (Fisher's test, one-sided)" in sentence


def test_prompts_of_which_a_guard_left_too_little_for_a_clique_are_no_candidates(tmp_path):
    """A clique of 4 cannot exist among 3 images; the attack itself is not refused for that."""
    dataset, config = captioned(), settings()
    for place, count in enumerate((3, 2)):
        for index in range(count):
            write(file_of(tmp_path, place, index), dataset.images[20])
    groups = [(f"{place:05d}", [f"{place:05d}/{index:06d}.png" for index in range(n)]) for place, n in ((0, 3), (1, 2))]
    control = CaptionControl(["copy 0"], ["fresh 20", "fresh 21"], None, Generations(tmp_path, groups, {}))
    shape = SimpleNamespace(image_size=dataset.images.shape[-1], channels=dataset.images.shape[1])
    told = SimpleNamespace(attack=config.attack, data=shape)
    assert heldout_candidates(control, pictures_of(dataset, "heldout"), told) == {}
