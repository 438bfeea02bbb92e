"""The streamed attack gives what the attack on files gives, however often it is stopped, and keeps few files."""

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.base import Defense
from defenses.errors import UserError
from defenses.seeding import derive
from eval import drawing, samples, stage, stream
from eval.config import check
from eval.generations import find
from eval.measure import attack, quality_of
from eval.samples import passes, units
from eval.source import UNKNOWN, Source
from eval.stream import first_images
from eval.target import Target
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from tests.reference import fabricated
from tests.small import small_config
from tests.test_entry_points import evaluate, folders, pictures  # noqa: F401
from train.data import Dataset
from train.dryrun import prompted_outlook
from train.record import Record
from train.runlog import RunDirectory

TRAIN, HELDOUT = fabricated.blobs(1, 20), fabricated.blobs(2, 12)
# two prompts bring back a picture, one agrees on a stranger, one holds a few copies that are no clique large enough
PROMPTS = ["fresh 0", "copy 4", "fresh 1", "agreed 3", "few 9", "fresh 2", "copy 7"]

FACTS = {"family": "planted", "parameters": 1, **dict.fromkeys(UNKNOWN)}


class Killed(BaseException):
    """A kill that no handler of errors sees."""


class Planted:
    """A text-to-image model that remembers. The corner of every image depends on all that is in its forward pass."""

    def __init__(self, withhold=(), die_after: int | None = None):
        self.withhold, self.die_after, self.passes = set(withhold), die_after, []
        self.source = Source("prompted", self.draw, np.zeros(0, dtype=np.int64), FACTS)

    def draw(self, indices, prompts):
        if len(self.passes) == self.die_after:
            raise Killed
        block = list(zip(prompts, indices, strict=True))
        self.passes.append(block)
        images = np.concatenate([self.image(*each) for each in block]).astype(np.float32) / 255
        images[:, 0, 0, 0] = derive(0, *[str(each) for each in block]) % 9 / 255
        for row, each in enumerate(block):
            if each in self.withhold:
                images[row] = np.nan
        return torch.from_numpy(images)

    @staticmethod
    @functools.cache
    def image(prompt, index) -> np.ndarray:
        kind, number = prompt.split()
        if kind == "copy" or (kind == "few" and index < 3):
            base = TRAIN[[int(number)]]
        elif kind == "agreed":
            base = HELDOUT[[int(number)]]
        else:
            return fabricated.blobs(derive(0, prompt, index) % 2**32, 1)
        return fabricated.noisy(base, 0.02, seed=derive(0, prompt, index) % 2**32)


def dataset() -> Dataset:
    records = [
        Record(
            f"{split}{row}", f"{split}{row}.png", "", f"{split}{row}", split=split, cluster=place, block=place, copies=1
        )
        for place, (split, row) in enumerate([("train", r) for r in range(20)] + [("heldout", r) for r in range(12)])
    ]
    return Dataset(records, np.concatenate([TRAIN, HELDOUT]))


@functools.cache
def base() -> SimpleNamespace:
    return small_config(Path("unused"), "attack.extraction.permutations=99", "utility.kid_subsets=2")[1]


def settings(**generate) -> SimpleNamespace:
    config = copy.deepcopy(base())
    changes = {"per_prompt": 10, "batch_size": 32, "count": 12, "keep": "flagged"} | generate
    config.generate = replace(config.generate, **changes)
    return config


def streamed(folder, config, planted, accelerator=None, prompts=PROMPTS):
    accelerator = accelerator or Accelerator(cpu=True)
    return stream.stream(
        planted.source, folder / "generations", folder / "prompts", prompts, dataset(), config, accelerator
    )


def on_files(folder, config, planted):
    """The attack of `keep=all` on the same source."""
    accelerator = Accelerator(cpu=True)
    samples.generate(planted.source, folder / "all", config.generate, PROMPTS, config.run.seed, accelerator)
    images = find(folder / "all", 16, 1)
    return images, attack(images, dataset(), config, accelerator)


def agree(images, found, other, every=True):
    """A streamed attack against the one on files, to the bit."""
    found.report.pop("streamed")
    assert found.report == other.report
    assert found.cliques == other.cliques
    np.testing.assert_array_equal(found.pictures.l2, other.pictures.l2)
    assert found.pictures.generation == other.pictures.generation
    np.testing.assert_array_equal(found.pictures.verified, other.pictures.verified)
    kept = {name for _, files in images.groups for name in files}
    assert found.matches == [match for match in other.matches if match["generation"] in kept]
    assert len(found.matches) == len(kept) or not every


@pytest.mark.parametrize(("per_prompt", "batch_size"), [(10, 32), (10, 4), (10, 10)])
def test_streamed_equals_the_attack_on_files(per_prompt, batch_size, tmp_path):
    config = settings(per_prompt=per_prompt, batch_size=batch_size)
    one, other = Planted(), Planted()
    images = streamed(tmp_path, config, one)
    found = attack(images, dataset(), config, Accelerator(cpu=True))
    whole, expected = on_files(tmp_path, config, other)
    assert one.passes == other.passes
    assert (expected.report["candidates"], expected.report["verified"]) == (
        3,
        2,
    )  # the stranger is agreed on, not found
    assert {row["prompt"] for row in expected.cliques if row["verified"]} == {"00001", "00006"}
    assert found.report["streamed"]["images_kept"] == 3 * 10 + 4 * 2
    agree(images, found, expected)
    for _, files in images.groups:
        for name in files:
            assert (images.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    rows = (images.folder / "index.csv").read_text().splitlines()
    theirs = (whole.folder / "index.csv").read_text().splitlines()
    assert len(rows) == 1 + 38 and set(rows) < set(theirs)


def test_withheld_images_are_left_out_alike(tmp_path):
    """Of a flagged prompt some images, of another one all, of a third the first."""
    gone = [("copy 4", 0), ("copy 4", 5), ("fresh 2", 0)] + [("fresh 1", index) for index in range(10)]
    config = settings()
    images = streamed(tmp_path, config, Planted(gone))
    found = attack(images, dataset(), config, Accelerator(cpu=True))
    _, expected = on_files(tmp_path, config, Planted(gone))
    assert expected.report["prompts"] == 7 and expected.report["generations"] == 57
    assert expected.report["withheld"] == {"images": 13, "prompts": 1, "reason": None}
    assert {row["prompt"]: row["withheld"] for row in expected.cliques if row["withheld"]} == {
        "00001": 2, "00002": 10, "00005": 1,
    }  # fmt: skip
    agree(images, found, expected)
    assert images.measured == [
        f"{p:05d}/{i:06d}.png" for p in (0, 1, 3, 4, 5, 6) for i in (0, 1) if (p, i) not in ((1, 0), (5, 0))
    ]
    assert (images.folder / "00001" / "000000.withheld").exists()


@pytest.mark.parametrize("left", [0, 1, 3, 4])
def test_a_guard_that_leaves_too_few_images_of_every_prompt_leaves_no_candidates(left, tmp_path):
    """A clique of 4 cannot exist among 3 images: that is an answer of the attack, not a mistake of the user."""
    config = settings()
    config.attack.extraction.tier = None
    gone = [(prompt, index) for prompt in PROMPTS for index in range(left, 10)]
    images = streamed(tmp_path, config, Planted(gone))
    found = attack(images, dataset(), config, Accelerator(cpu=True))
    _, expected = on_files(tmp_path, config, Planted(gone))
    agree(images, found, expected)
    report, flagged = expected.report, 3 if left == 4 else 0
    assert (report["candidates"], report["verified"]) == (flagged, 2 * (left == 4))
    assert (report["prompts"], report["generations"]) == (7, 7 * left)
    assert report["withheld"]["images"] == 7 * (10 - left) and report["withheld"]["prompts"] == (0 if left == 4 else 7)
    if left < 4:
        assert "too few for a clique" in report["withheld"]["reason"] and report["control"]["p_value"] == 1.0
        assert report["rate_ci95"] == [0.0, 0.15]  # none of 20
    assert [row["generations"] for row in expected.cliques] == [left] * 7 and (
        expected.pictures.l2.max() == np.inf
    ) == (left == 0)


def test_the_size_of_the_attack_is_what_was_asked_for(tmp_path):
    """One image that a guard withholds of 8 x 16 must not end an attack of tier smoke after it was drawn."""
    prompts = [f"fresh {number}" for number in range(7)] + ["copy 4"]
    for keep in ("all", "flagged"):
        config = settings(keep=keep, per_prompt=16)
        config.attack.extraction.tier = "smoke"
        source, accelerator = Planted([("fresh 3", 7)]).source, Accelerator(cpu=True)
        source.prompts = prompts
        target = SimpleNamespace(
            dataset=dataset(), generations=tmp_path / keep, output=SimpleNamespace(attack=tmp_path / f"attack-{keep}")
        )
        images = drawing.draw(source, "", target, config, accelerator)
        report = attack(images, target.dataset, config, accelerator).report
        assert (report["tier"], report["generations"], report["verified"]) == ("smoke", 127, 1)
        config.generate.per_prompt = 3
        with pytest.raises(UserError, match=r"smoke needs"):
            drawing.draw(source, "", target, config, accelerator)
        config.attack.extraction.tier = None
        with pytest.raises(UserError, match="a clique of 4 cannot exist among 3 images"):
            drawing.draw(source, "", target, config, accelerator)  # before anything is drawn


@pytest.mark.parametrize("save_seconds", [-1.0, 1e9])
@pytest.mark.parametrize(("per_prompt", "batch_size"), [(10, 32), (10, 4)])
def test_a_killed_attack_ends_as_if_it_had_not_been(per_prompt, batch_size, save_seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SAVE_SECONDS", save_seconds)
    config = settings(per_prompt=per_prompt, batch_size=batch_size)
    _, expected = on_files(tmp_path, config, Planted())
    total = math.ceil(7 / max(1, batch_size // per_prompt)) * math.ceil(per_prompt / min(batch_size, 10))
    for die_after in sorted({0, 1, 2, total - 1}):
        folder = tmp_path / str(die_after)
        with pytest.raises(Killed):
            streamed(folder, config, Planted(die_after=die_after))
        again = Planted()
        images = streamed(folder, config, again)
        agree(images, attack(images, dataset(), config, Accelerator(cpu=True)), expected)
        each = len(list(passes(range(3) if batch_size == 32 else range(1), per_prompt, batch_size)))
        finished = die_after // each * each if save_seconds < 0 else 0
        assert len(again.passes) == total - finished
        drawn = Planted()
        streamed(folder, config, drawn)
        assert drawn.passes == []


def test_a_stop_in_the_middle_of_a_record_and_lost_images(tmp_path, monkeypatch):
    """Killed after the images of a flagged prompt, before its record; later an image and a record are removed."""
    config = settings(batch_size=10)
    _, expected = on_files(tmp_path, config, Planted())
    write = stream.PromptRecords.write

    def killed(self, prompt, record):
        if prompt == 3:
            raise Killed
        write(self, prompt, record)

    monkeypatch.setattr(stream.PromptRecords, "write", killed)
    monkeypatch.setattr(stream, "SAVE_SECONDS", -1.0)
    with pytest.raises(Killed):
        streamed(tmp_path, config, Planted())
    assert len(list((tmp_path / "generations" / "00003").iterdir())) == 10
    monkeypatch.setattr(stream.PromptRecords, "write", write)
    again = Planted()
    streamed(tmp_path, config, again)
    assert [block[0][0] for block in again.passes] == PROMPTS[3:]
    (tmp_path / "generations" / "00006" / "000009.png").unlink()
    (tmp_path / "prompts" / "000" / "000002.json").unlink()
    again = Planted()
    images = streamed(tmp_path, config, again)
    assert [block[0][0] for block in again.passes] == [PROMPTS[2], PROMPTS[6]]
    agree(images, attack(images, dataset(), config, Accelerator(cpu=True)), expected)


def test_another_number_of_processes_may_go_on(tmp_path, monkeypatch):
    """Three processes, one of them killed, then two: nothing twice that was saved, the nearest generations of all."""
    monkeypatch.setattr(stream, "SAVE_SECONDS", -1.0)
    config = settings(batch_size=10)
    _, expected = on_files(tmp_path, config, Planted())

    def rank(index, world, **options):
        alone = SimpleNamespace(process_index=index, num_processes=world, device="cpu", is_main_process=index == 0)
        planted, images = Planted(**options), None
        try:
            images = streamed(tmp_path, config, planted, alone)
        except UserError as error:  # the records of the ranks that have not run yet
            assert error.key == "run.output_dir"
        except Killed:
            pass
        return [block[0][0] for block in planted.passes], images

    assert rank(2, 3)[0] == ["fresh 1", "fresh 2"]
    assert rank(1, 3, die_after=1)[0] == ["copy 4"]
    assert rank(1, 2)[0] == ["agreed 3"]  # of 1, 3, 5
    drawn, images = rank(0, 2)
    assert drawn == ["fresh 0", "few 9", "copy 7"] and len(list((tmp_path / "prompts").glob("nearest-*.npz"))) == 3
    agree(images, attack(images, dataset(), config, Accelerator(cpu=True)), expected)


@pytest.mark.parametrize(
    "change",
    [{"steps": 3}, {"count": 7}, {"edge_threshold": 0.14}, {"seed": 1}, {"prompts": PROMPTS[::-1]}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_result_is_done_again(change, tmp_path):
    """A record of another sampler, seed, threshold or order of prompts counts for nothing, and neither do its images."""
    before = settings()
    streamed(tmp_path, before, Planted())
    config = settings(**{key: value for key, value in change.items() if key in ("steps", "count")})
    config.attack.extraction.edge_threshold = change.get("edge_threshold", 0.15)
    config.run.seed = change.get("seed", 0)
    prompts, again, fresh = change.get("prompts", PROMPTS), Planted(), Planted()
    images = streamed(tmp_path, config, again, prompts=prompts)
    other = streamed(tmp_path / "new", config, fresh, prompts=prompts)
    assert again.passes == fresh.passes and images.groups == other.groups
    found, expected = (attack(each, dataset(), config, Accelerator(cpu=True)) for each in (images, other))
    expected.report.pop("streamed")
    agree(images, found, expected)
    there = {path.relative_to(images.folder) for path in images.folder.glob("*/*.png")}
    assert there == {path.relative_to(other.folder) for path in other.folder.glob("*/*.png")}


def test_quality_is_measured_on_the_first_images_of_every_prompt(tmp_path):
    """All of the flagged prompts would count memorised images ten times as often as the model makes them."""
    config, accelerator = settings(count=20), Accelerator(cpu=True)
    images = streamed(tmp_path, config, Planted())
    assert images.measured == [f"{prompt:05d}/{index:06d}.png" for prompt in range(7) for index in range(3)]
    report = quality_of(images, dataset(), config, accelerator)
    folder = tmp_path / "first"
    for name in images.measured:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((images.folder / name).read_bytes())
    assert report == quality_of(find(folder, 16, 1), dataset(), config, accelerator)
    assert report["n_generated"] == 21


@pytest.mark.parametrize(
    ("prompts", "per_prompt", "count"), [(7, 10, 12), (7, 2, 100), (1000, 5, 300), (5, 5, 5), (3, 9, 1)]
)
def test_first_images(prompts, per_prompt, count):
    first = first_images(prompts, per_prompt, count)
    assert len(first) == prompts and len(set(first[first > 0])) == 1
    assert first.max() == min(per_prompt, -(-count // prompts))
    if count >= prompts:
        assert first.min() == first.max()
    else:  # one of `count` prompts, no two gaps between them differ by more than one
        gaps = np.diff(np.flatnonzero(first))
        assert first.sum() == count and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)


def test_few_files_stay_however_many_images_are_drawn(tmp_path):
    prompts = [f"fresh {number}" for number in range(40)]
    config = settings(per_prompt=16, count=8, batch_size=64)
    planted = Planted()
    images = streamed(tmp_path, config, planted, prompts=prompts)
    assert sum(map(len, planted.passes)) == 640 and len(planted.passes) == 10
    assert len(list(images.folder.glob("*/*"))) == 8 == len(images.measured)
    assert len(list((tmp_path / "prompts").rglob("*.json"))) == 40
    assert all(path.stat().st_size < 2000 for path in (tmp_path / "prompts").rglob("*.json"))
    assert len(attack(images, dataset(), config, Accelerator(cpu=True)).matches) == 8


@pytest.mark.parametrize(
    ("groups", "count", "batch"), [(8, 16, 64), (7, 10, 32), (3, 500, 64), (5, 64, 64), (4, 33, 64), (1, 5, 64)]
)
def test_passes_hold_every_image_once(groups, count, batch):
    found = [block for unit in units(groups, count, batch) for block in passes(unit, count, batch)]
    assert [each for block in found for each in block] == [(g, i) for g in range(groups) for i in range(count)]
    assert max(map(len, found)) <= batch
    assert len(found) == (math.ceil(groups / (batch // count)) if count <= batch else groups * math.ceil(count / batch))


@pytest.mark.parametrize(("prompts", "count", "batch"), [(7, 10, 32), (3, 70, 64), (5, 64, 64)])
def test_the_dry_run_counts_the_passes(prompts, count, batch):
    config = SimpleNamespace(
        generate=replace(settings().generate, max_prompts=7, per_prompt=count, batch_size=batch, steps=5)
    )
    plan = [block for unit in units(prompts, count, batch) for block in passes(unit, count, batch)]
    line = f"{prompts} prompts x {count} images x 5 steps: {prompts * count} images, {5 * len(plan)} passes"
    assert line in prompted_outlook(config, prompts) and "7 prompts" in prompted_outlook(config, 99)
    config.generate.compile = True
    assert f"passes of up to {batch} images, compiled first" in prompted_outlook(config, prompts)


def test_half_written_passes_on_disk_are_drawn_whole(tmp_path):
    """keep=all, stopped in a pass that holds three prompts: the same files as if it had not been."""
    config, accelerator = settings(keep="all"), Accelerator(cpu=True)
    with pytest.raises(Killed):
        samples.generate(Planted(die_after=1).source, tmp_path / "all", config.generate, PROMPTS, 0, accelerator)
    (tmp_path / "all" / "00001" / "000004.png").unlink()
    again, whole = Planted(), Planted()
    samples.generate(again.source, tmp_path / "all", config.generate, PROMPTS, 0, accelerator)
    samples.generate(whole.source, tmp_path / "whole", config.generate, PROMPTS, 0, accelerator)
    assert again.passes == whole.passes and [len(block) for block in again.passes] == [30, 30, 10]
    files = [sorted((tmp_path / name).glob("*/*.png")) for name in ("all", "whole")]
    assert len(files[0]) == 70 and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_what_cannot_be_streamed_is_refused(tmp_path):
    def untargeted(config):
        config.attack.extraction.protocol = "untargeted"

    for change, said in (
        (lambda config: setattr(config.attack, "extraction", None), "is off"),
        (untargeted, "flags no prompt"),
        (lambda config: setattr(config.report, "along", [3]), "report.along"),
        (lambda config: None, "family pixel has no prompts"),
    ):
        config = settings()
        change(config)
        with pytest.raises(UserError, match=said) as caught:
            check(config)
        assert caught.value.key == "generate.keep" and "keep=all" in caught.value.remedy
    with pytest.raises(UserError, match="clique"):
        streamed(tmp_path, settings(per_prompt=3), Planted())
    config = settings()
    config.attack.extraction.tier = "smoke"
    with pytest.raises(UserError, match="smoke needs 8 prompts, 16 images of each"):
        streamed(tmp_path, config, Planted())
    with pytest.raises(UserError, match="text-to-image"):
        streamed(tmp_path, settings(), Planted(), prompts=[])


def test_a_record_is_one_small_file(tmp_path):
    streamed(tmp_path, settings(), Planted())
    record = json.loads((tmp_path / "prompts" / "000" / "000001.json").read_text())
    assert record["row"]["clique_size"] == 10 and record["row"]["record_id"] == "train4" and record["kept"] == 10
    record = json.loads((tmp_path / "prompts" / "000" / "000004.json").read_text())
    assert record["row"]["clique_size"] == 3 and not record["row"]["flagged"] and len(record["matches"]) == 2


class Withholder(Defense):
    """Stands between the model and its user: lets no image of one prompt out, and half of the others' of another."""

    name = "withholder"

    def claim(self):
        return {"kind": "heuristic", "statement": "Withholds some."}

    def wrap_sampler(self, sampler, context):
        def guarded(indices, conditions=None):
            images = sampler(indices, conditions).clone()
            for row, (index, prompt) in enumerate(zip(indices, conditions, strict=True)):
                if prompt == "copy 4" or (prompt == "copy 7" and index % 2):
                    images[row] = torch.nan
            return images

        return guarded


@pytest.mark.filterwarnings("ignore")  # of the libraries, on the first use
def test_the_whole_evaluation_with_a_guard(tmp_path, monkeypatch):
    """Stage, tables and page, guard on and off, for both ways to keep images: the same figures of the attack."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    reports = []
    for keep in ("all", "flagged"):
        monkeypatch.setattr(drawing, "load", lambda *arguments: Planted().source)
        tree, config = small_config(
            tmp_path, f"run.name={keep}", f"generate.keep={keep}", "generate.per_prompt=10", "generate.batch_size=32",
            "generate.count=12", f"generate.prompts={tmp_path / 'prompts.txt'}", "attack.copy_metrics={}",
            "attack.extraction.permutations=99", "utility.kid_subsets=2",
        )  # fmt: skip
        output = RunDirectory(config.run)
        output.open(tree, "test")
        target = Target(output, dataset(), tmp_path, output.generations, defenses=[Withholder()])
        stage.evaluate(target, config, Accelerator(cpu=True))
        reports.append(json.loads(output.report.read_text()))
    whole, streamed = (
        [report["privacy"][part] for part in ("extraction", "extraction_guard_off")] for report in reports
    )
    assert [part["verified"] for part in whole] == [1, 2] and [part["prompts"] for part in whole] == [7, 7]
    assert whole[0]["withheld"] == {"images": 15, "prompts": 1, "reason": None} and whole[1]["withheld"] is None
    for one, other in zip(whole, streamed, strict=True):
        assert other.pop("streamed")["images_measured"] in (11, 14)
        assert {**other, "seconds": 0} == {**one, "seconds": 0} if "seconds" in one else other == one
    assert [report["utility"]["n_generated"] for report in reports] == [55, 11]
    assert reports[0]["privacy"]["risk"]["by_copies"] == reports[1]["privacy"]["risk"]["by_copies"]
    folder = tmp_path / "flagged"
    lines = (folder / "attack" / "matches.csv").read_text().splitlines()
    assert len(lines) == len((folder / "attack" / "copy_metrics.csv").read_text().splitlines())
    assert (folder / "attack" / "cliques.csv").read_text() == (tmp_path / "all" / "attack" / "cliques.csv").read_text()
    page = (folder / "report.html").read_text()
    assert "A defense withheld 15 images; of 1 of 7 prompts it left too few for a clique" in page
    assert "copy 7" in page and "agreed 3" in page and "were\n    kept" in page
    names = {path.parent.name for path in (folder / "generations_guard_off").glob("*/*.png")}
    assert len(names) == 7 and len(list((folder / "generations_guard_off" / "00001").iterdir())) == 10


class Wall(Withholder):
    """Lets nothing out at all."""

    def wrap_sampler(self, sampler, context):
        return lambda indices, conditions=None: torch.full((len(indices), 1, 16, 16), torch.nan)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", ["all", "flagged"])
def test_the_whole_evaluation_behind_a_wall(keep, tmp_path, monkeypatch):
    """Nothing leaves: no candidates, with the reason, and the bare model's figures beside."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(drawing, "load", lambda *arguments: Planted().source)
    tree, config = small_config(
        tmp_path, "run.name=wall", f"generate.keep={keep}", "generate.per_prompt=10", "generate.batch_size=32",
        "generate.count=12", f"generate.prompts={tmp_path / 'prompts.txt'}", "attack.copy_metrics={}",
        "attack.extraction.permutations=99", "utility.kid_subsets=2",
    )  # fmt: skip
    output = RunDirectory(config.run)
    output.open(tree, "test")
    stage.evaluate(
        Target(output, dataset(), tmp_path, output.generations, defenses=[Wall()]), config, Accelerator(cpu=True)
    )
    report = json.loads(output.report.read_text())
    extraction, bare = (report["privacy"][part] for part in ("extraction", "extraction_guard_off"))
    assert (extraction["candidates"], extraction["verified"], extraction["generations"]) == (0, 0, 0)
    assert extraction["withheld"]["prompts"] == 7 and bare["verified"] == 2 and report["utility"] is None
    page = (output.path / "report.html").read_text()
    assert (
        "No candidates: a defense withheld so many images that too few for a clique are left of every prompt." in page
    )
    assert "with the guard off" in page
    rows = (output.attack / "cliques.csv").read_text().splitlines()
    assert len(rows) == 8 and all(row.split(",")[1::10] == ["0", "10"] for row in rows[1:])


@pytest.mark.filterwarnings("ignore")
def test_an_untargeted_attack_behind_a_wall(tmp_path, monkeypatch):
    source = Source("untargeted", lambda indices, _: torch.rand(len(indices), 1, 16, 16), np.zeros(0), FACTS)
    monkeypatch.setattr(drawing, "load", lambda *arguments: source)
    tree, config = small_config(tmp_path, "run.name=wall", "attack.extraction.permutations=99", "utility.kid_subsets=2")
    output = RunDirectory(config.run)
    output.open(tree, "test")
    target = Target(output, dataset(), tmp_path, output.generations, defenses=[Wall()])
    stage.evaluate(target, config, Accelerator(cpu=True))
    report = json.loads(output.report.read_text())
    extraction, bare = (report["privacy"][part] for part in ("extraction", "extraction_guard_off"))
    assert (extraction["generations"], extraction["candidates"], extraction["verified"]) == (0, 0, 0)
    assert extraction["control"]["p_value"] == 1.0 and bare["generations"] == 16 and report["utility"] is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "threshold", "flagged"), [(stable_diffusion, 1.0, 3), (stable_diffusion_xl, 0.01, 0)]
)
def test_a_real_pipeline(build, threshold, flagged, folders, tmp_path):  # noqa: F811
    """Stable Diffusion with random weights: the same attack and images whether they are streamed or not."""
    build(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a chest\nleft lung\nx ray of patient\n")
    reports = []
    for keep in ("all", "flagged"):
        reports.append(
            evaluate(
                f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}",
                f"generate.prompts={tmp_path / 'prompts.txt'}", "generate.per_prompt=4", "generate.batch_size=8",
                "generate.count=3", f"generate.keep={keep}", "attack.extraction.clique_size=4",
                f"attack.extraction.edge_threshold={threshold}", "attack.extraction.permutations=99", "data.channels=3",
                f"run.output_dir={tmp_path}", f"run.name={keep}",
            )
        )  # fmt: skip
    whole, streamed = (report["privacy"]["extraction"] for report in reports)
    assert streamed.pop("streamed")["images_measured"] == 3
    assert {**streamed, "seconds": 0} == {**whole, "seconds": 0} and whole["candidates"] == flagged
    cliques = [(tmp_path / keep / "attack" / "cliques.csv").read_text() for keep in ("all", "flagged")]
    assert cliques[0] == cliques[1] and cliques[0].count("\n") == 4
    for file in (tmp_path / "flagged" / "generations").glob("*/*.png"):
        assert file.read_bytes() == (tmp_path / "all" / file.relative_to(tmp_path / "flagged")).read_bytes()
