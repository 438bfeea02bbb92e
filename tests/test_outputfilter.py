"""Output filter: score and threshold against brute force, what is drawn anew, counts over stops, a hostile index."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from defenses import outputfilter
from defenses.base import FIRST_PRIVATE_INDEX, Pool, SamplingContext
from defenses.errors import UserError
from defenses.guard import Guard, conformal_threshold, fitted, is_near, save_filter
from defenses.outputfilter import OutputFilter, OutputFilterConfig, load_filter
from tests.reference import brute_force
from train.models import save_pipeline

SIDE = 8


def random_images(count: int, seed: int, side: int = SIDE, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255)


def context_of(folder: Path, images: np.ndarray, training: int, **changes) -> SamplingContext:
    """The first ``training`` rows are the training split, the rest calibration."""
    count = len(images)
    facts = {"pixel_hash": [""] * count, "group": [None] * count, "picture": list(range(count))} | changes
    return SamplingContext(
        Pool(images, np.arange(training), **facts), np.arange(training, count), folder, Accelerator(cpu=True)
    )


class Model:
    """A sampler whose image i is training picture i for i < ``copies``, else noise of its own; it notes every call."""

    def __init__(self, images: np.ndarray, copies: int, stubborn: int = 0):
        self.images, self.copies, self.stubborn, self.calls = images, copies, stubborn, []

    def __call__(self, indices, conditions=None):
        self.calls.append((list(map(int, indices)), None if conditions is None else list(conditions)))
        return torch.stack([self.one(int(index)) for index in indices])

    def one(self, index: int) -> torch.Tensor:
        own = index % FIRST_PRIVATE_INDEX
        if own < self.stubborn or index < self.copies:
            return floats(self.images[own])
        return floats(random_images(1, index)[0])


@pytest.fixture(scope="module")
def data():
    """30 training and 40 calibration pictures without any structure."""
    return random_images(70, 1)


def wrapped(tmp_path, data, model, **settings):
    """With as few false alarms as 40 calibration pictures allow."""
    defense = OutputFilter(OutputFilterConfig(**{"false_alarm_rate": 1 / 41} | settings))
    return defense, defense.wrap_sampler(model, context_of(tmp_path, data, 30))


def test_the_samplers_of_one_pool_share_an_index(tmp_path, data, monkeypatch):
    """The images of the attack, and those of held-out captions: one search, each with records of its own."""
    built, build = [], outputfilter.build_guard
    monkeypatch.setattr(outputfilter, "build_guard", lambda *given: built.append(1) or build(*given))
    defense, context = OutputFilter(OutputFilterConfig(false_alarm_rate=1 / 41)), context_of(tmp_path, data, 30)
    control = defense.wrap_sampler(Model(data, 1), replace(context, records=tmp_path / "control"))
    attack = defense.wrap_sampler(Model(data, 2), context)
    assert len(built) == 1 and len(control([0, 1, 2])) == 3 and len(attack([0, 1])) == 2
    assert defense.findings()["generations"] == 2 and defense.findings()["flagged"] == 2
    assert len(list((tmp_path / "control").rglob("draws*"))) == 1
    defense.wrap_sampler(Model(data, 2), context_of(tmp_path, data, 29))
    assert len(built) == 2 and defense.findings()["index_pictures"] == 29  # other pictures: another index


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate"),
        ({"false_alarm_rate": float("nan")}, "false_alarm_rate"),
        ({"attempts": -1}, "attempts"),
        ({"side": 4}, "side"),
    ],
)
def test_bad_settings_name_their_key(bad, key):
    with pytest.raises(UserError, match=f"defenses.output_filter.{key}"):
        OutputFilterConfig(**bad)


def test_score_is_the_brute_force_one():
    """All views, distinct pictures (references 0..2 are one), fewer than 50 neighbours, a query near a shifted mirror image."""
    references, picture = random_images(12, 2), np.array([5, 5, 5, 1, 2, 3, 4, 6, 7, 8, 9, 10])
    near = brute_force.shifted(references[4][..., ::-1], 0, 1) // 2 + 64
    queries = np.concatenate([random_images(3, 3), references[1:2], near[None]])
    expected = [
        brute_force.score([each[0] for each in brute_force.distinct(query, references, picture)], 0.5, 50)
        for query in queries
    ]
    found = Guard(references, picture, 1.0, 0).scores(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[3] == 0 and found[4] < 1.5 < found[:3].min()


@pytest.mark.parametrize(("n", "rate", "k"), [(99, 0.05, 5), (19, 0.05, 1), (38, 0.05, 1), (80, 0.1, 8), (99, 0.07, 7)])
def test_threshold_is_the_kth_smallest_score(n, rate, k):
    """k = floor(rate * (n + 1))."""
    scores = np.random.default_rng(0).permutation(np.arange(1, n + 1) / 100)
    assert conformal_threshold(scores, range(n), rate) == pytest.approx(k / 100)


@pytest.mark.parametrize(("rate", "threshold"), [(0.25, 0.1), (0.3, 0.2), (0.35, 0.2), (0.45, 0.3), (0.6, 0.4)])
def test_threshold_of_four_people_by_hand(rate, threshold):
    """One with two pictures, which count a half each: p-values 1.5, 2, 3, 4 and 5 fifths."""
    scores = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    assert conformal_threshold(scores, ["b", "a", "d", "a", "c"], rate) == threshold


@pytest.mark.parametrize("levels", [None, 12])
def test_false_alarms_on_exchangeable_scores(levels):
    """39 calibration scores, rate 0.05: 2 in 40 new scores lie below; with ties (12 levels) fewer."""
    random, rates = np.random.default_rng(0), []
    for _ in range(4000):
        scores = random.normal(size=59)
        scores = scores if levels is None else np.round(scores * levels / 6)
        rates.append((scores[39:] < conformal_threshold(scores[:39], range(39), 0.05)).mean())
    assert 0.01 < np.mean(rates) <= 0.05 + 0.003
    if levels is None:
        assert np.mean(rates) == pytest.approx(0.05, abs=0.003)


def test_false_alarms_where_people_have_many_pictures():
    """One of 20 people has half of all pictures and all of them alike: a picture of a new person is still flagged in at most,
    and nearly, 2 of 21 cases. Counted by pictures, the rule would flag about one in six."""
    random, by_person, by_picture = np.random.default_rng(0), [], []
    person = np.repeat(np.arange(20), [20] + [1] * 19)
    for _ in range(4000):
        level = random.normal(size=21)
        scores = level[person] + 1e-3 * random.normal(size=len(person))
        by_person.append(level[20] < conformal_threshold(scores, person, 0.1))
        by_picture.append(level[20] < conformal_threshold(scores, np.arange(len(person)), 0.1))
    assert 0.06 < np.mean(by_person) <= 2 / 21 + 0.012
    assert np.mean(by_picture) > 0.12


def test_too_few_calibration_pictures(tmp_path, data):
    defense = OutputFilter(OutputFilterConfig(false_alarm_rate=0.02))
    with pytest.raises(UserError, match="49 different people, there are 40.*data.calibration_fraction"):
        defense.wrap_sampler(Model(data, 0), context_of(tmp_path, data, 30))
    with pytest.raises(UserError, match="there are 0"):
        defense.wrap_sampler(Model(data, 0), context_of(tmp_path, data, 70))
    with pytest.raises(UserError, match="two different training pictures"):
        defense.wrap_sampler(Model(data, 0), context_of(tmp_path, data, 30, picture=[0] * 30 + list(range(40))))
    assert not (tmp_path / "output_filter").exists() and defense.findings() is None


def test_copies_in_the_calibration_split_count_once(tmp_path, data):
    """20 of 40 records are copies of one picture, so 21 different ones are left; groups make them 7 people."""
    picture = [*range(30), *[30] * 20, *range(31, 51)]
    defense = OutputFilter(OutputFilterConfig())
    defense.wrap_sampler(Model(data, 0), context_of(tmp_path, data, 30, picture=picture))
    assert defense.findings()["calibration_pictures"] == defense.findings()["calibration_units"] == 21
    group = [None] * 30 + [f"p{row % 7}" for row in range(40)]
    with pytest.raises(UserError, match="there are 7"):
        defense.wrap_sampler(Model(data, 0), context_of(tmp_path, data, 30, group=group))


def test_the_attack_s_own_rule_is_the_floor():
    scores = np.array([0.2, 0.99, 1.0, 1.01, 1.5])
    assert is_near(scores, 0.5).tolist() == [True, True, True, False, False]
    assert is_near(scores, 1.5).tolist() == [True, True, True, True, False]


def test_flagged_images_are_drawn_anew_under_their_label(tmp_path, data):
    """Images 0..2 copy at first; 0 always. The others are the model's own, untouched."""
    model = Model(data, 3, stubborn=1)
    defense, guarded = wrapped(tmp_path, data, model, attempts=2)
    labels = [7, 8, 9, 7, 8]
    images = guarded(range(5), labels)
    assert images[0].isnan().all() and not images[1:].isnan().any()
    for index in (1, 2):
        torch.testing.assert_close(images[index], model.one(index + 2 * FIRST_PRIVATE_INDEX))
    for index in (3, 4):
        torch.testing.assert_close(images[index], model.one(index))
    calls = [([0, 1, 2, 3, 4], labels), ([i + 2 * FIRST_PRIVATE_INDEX for i in (0, 1, 2)], [7, 8, 9])]
    assert model.calls == [*calls, ([3 * FIRST_PRIVATE_INDEX], [7])]
    counts = {"generations": 5, "flagged": 3, "redrawn": 4, "withheld": 1}
    findings = defense.findings()
    assert {name: findings[name] for name in counts} == counts
    assert 0 < findings["filter_seconds_per_image"] < 1
    json.dumps(findings, allow_nan=False)


def test_no_attempts_withholds_at_once(tmp_path, data):
    model = Model(data, 2)
    defense, guarded = wrapped(tmp_path, data, model, attempts=0)
    assert guarded([0, 1, 2]).isnan().flatten(1).all(1).tolist() == [True, True, False]
    assert len(model.calls) == 1
    findings = defense.findings()
    assert (findings["flagged"], findings["redrawn"], findings["withheld"]) == (2, 0, 2)


def test_images_do_not_depend_on_the_blocks(tmp_path, data):
    _, guarded = wrapped(tmp_path, data, Model(data, 6, stubborn=2))
    whole = guarded(range(12))
    parts = torch.cat([guarded([i]) for i in range(12)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=0, equal_nan=True)


def test_what_another_filter_withheld_stays_withheld(tmp_path, data):
    model = Model(data, 1)
    _, guarded = wrapped(
        tmp_path, data, lambda i, c=None: torch.where(torch.tensor(i)[:, None, None, None] == 5, torch.nan, model(i, c))
    )
    images = guarded([0, 5, 6])
    assert images.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_decided_on_the_pixels_that_are_saved(tmp_path, data):
    """A copy moved by less than half a grey level is that copy."""
    guard = Guard(data[:30], np.arange(30), 1.2, 0)
    defense, guarded = wrapped(tmp_path, data, lambda i, c=None: floats(data[list(i)]) * 0.996 + 0.001, attempts=0)
    seen = (floats(data[:1]) * 0.996 + 0.001).mul(255).round().to(torch.uint8).numpy()
    assert guarded([0]).isnan().all() and guard.flagged(seen).all()


def test_counts_survive_a_stop_and_know_all_ranks(tmp_path, data):
    """Two ranks; rank 1 is killed while it writes a line and redraws that block after the restart; rank 0 repeats a block."""
    for rank, block, torn in (
        (0, range(0, 4), False),
        (1, range(4, 8), True),
        (0, range(0, 4), False),
        (1, range(4, 8), False),
    ):
        defense, guarded = wrapped(tmp_path, data, Model(data, 5))
        defense._log._log._file = tmp_path / "output_filter" / f"draws-{rank}.jsonl"
        guarded(block)
        if torn:
            text = defense._log._log._file.read_text()
            defense._log._log._file.write_text(text[: len(text) // 2])
    whole, guarded = wrapped(tmp_path / "whole", data, Model(data, 5))
    guarded(range(8))
    counts = [
        {name: defense.findings()[name] for name in ("generations", "flagged", "redrawn", "withheld")}
        for defense in (whole, wrapped(tmp_path, data, Model(data, 5))[0])
    ]
    assert counts[0] == counts[1] and counts[0]["generations"] == 8 and 5 <= counts[0]["flagged"] < 8


def test_prompts_are_counted_apart_and_not_written_down(tmp_path, data):
    defense, guarded = wrapped(tmp_path, data, Model(data, 0))
    guarded([0, 1], ["a secret finding"] * 2)
    guarded([0, 1], ["another"] * 2)
    assert defense.findings()["generations"] == 4
    assert b"secret" not in b"".join(file.read_bytes() for file in (tmp_path / "output_filter").iterdir())


def test_records_go_to_the_evaluation_s_folder(tmp_path, data):
    context = context_of(tmp_path / "model", data, 30)
    context = SamplingContext(context.pool, context.control, context.folder, context.accelerator, tmp_path / "again")
    OutputFilter(OutputFilterConfig()).wrap_sampler(Model(data, 0), context)([0])
    assert [file.name for file in (tmp_path / "again" / "output_filter").iterdir()] == ["draws-0.jsonl"]
    assert sorted(file.name for file in (tmp_path / "model" / "output_filter").iterdir()) == [
        "filter.json",
        "index.safetensors",
    ]


def test_index_is_reduced_and_read_back(tmp_path):
    """Every training picture, at most ``side`` pixels; the folder is for its owner only."""
    images = random_images(60, 4, side=32, channels=3)
    defense = OutputFilter(OutputFilterConfig(side=16))
    defense.wrap_sampler(Model(images, 0), context_of(tmp_path, images, 30))
    guard = load_filter(tmp_path / "output_filter")
    assert guard.pixels.shape == (30, 3, 16, 16) and guard.picture.tolist() == list(range(30))
    assert (tmp_path / "output_filter").stat().st_mode & 0o777 == 0o700
    assert guard.scores(images[:30]).max() == 0 < 1 < guard.scores(images[30:]).min()
    mean = images[:30].reshape(30, 3, 16, 2, 16, 2).mean((3, 5))
    assert np.corrcoef(mean.ravel(), guard.pixels.ravel())[0, 1] > 0.9  # a nearest-pixel reduction: 0.5
    assert guard.facts["index_side"] == 16 and guard.facts["calibration_pictures"] == 30


def test_other_channels_and_sizes_are_fitted():
    grey = np.kron(random_images(2, 5, side=4), np.ones((1, 1, 4, 4), dtype=np.uint8))
    assert np.abs(fitted(grey.repeat(3, 1), (1, 16, 16)).astype(int) - grey).max() <= 1
    assert (fitted(grey, (3, 16, 16)) == grey).all()
    assert fitted(grey[:0], (1, 8, 8)).shape == (0, 1, 8, 8)


def damaged(folder: Path, kind: str) -> None:
    settings = json.loads((folder / "filter.json").read_text())
    if kind == "missing":
        (folder / "index.safetensors").unlink()
    elif kind == "pickle":
        (folder / "index.safetensors").write_bytes(pickle.dumps({"pixels": np.zeros(3)}))
    elif kind == "json":
        (folder / "filter.json").write_text("{")
    elif kind == "deep":
        (folder / "filter.json").write_text("[" * 100_000)
    elif kind == "key":
        (folder / "filter.json").write_text(json.dumps({"schema": 1}))
    else:
        settings["threshold"] = float(kind) if kind != "text" else "1"
        (folder / "filter.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["missing", "pickle", "json", "deep", "key", "nan", "-1", "text"])
def test_a_damaged_index_is_refused_in_a_line(tmp_path, data, kind):
    save_filter(tmp_path / "output_filter", Guard(data[:30], np.arange(30), 1.2, 8))
    damaged(tmp_path / "output_filter", kind)
    with pytest.raises(UserError, match="output_filter") as error:
        load_filter(tmp_path / "output_filter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "guard",
    [
        Guard(np.zeros((3, 8, 8), np.uint8), np.arange(3), 1.2, 8),
        Guard(np.zeros((3, 2, 8, 8), np.uint8), np.arange(3), 1.2, 8),
        Guard(np.zeros((3, 1, 8, 8), np.float32), np.arange(3), 1.2, 8),
        Guard(np.zeros((3, 1, 8, 8), np.uint8), np.arange(4), 1.2, 8),
        Guard(np.zeros((0, 1, 8, 8), np.uint8), np.arange(0), 1.2, 8),
        Guard(np.zeros((3, 1, 8, 8), np.uint8), np.arange(3), 1.2, -1),
    ],
)
def test_an_index_of_wrong_shape_is_refused(tmp_path, guard):
    save_filter(tmp_path, guard)
    with pytest.raises(UserError, match="is no output filter"):
        load_filter(tmp_path)


def test_a_pickle_under_a_right_digest_is_not_run(tmp_path, data):
    import hashlib

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    save_filter(tmp_path, Guard(data[:30], np.arange(30), 1.2, 8))
    content = pickle.dumps(Bomb())
    (tmp_path / "index.safetensors").write_bytes(content)
    settings = json.loads((tmp_path / "filter.json").read_text())
    (tmp_path / "filter.json").write_text(json.dumps(settings | {"sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(UserError, match="is no output filter"):
        load_filter(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random 16 px pipeline on disk, and the four images that it draws from seed 0 as uint8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    save_pipeline(folder, unet, DDPMScheduler(num_train_timesteps=50))
    images = drawn(folder, DDIMPipeline, 0)
    return folder, (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)


def drawn(folder: Path, kind: type, seed: int) -> np.ndarray:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(batch_size=4, num_inference_steps=2, generator=generator, output_type="np").images


def test_three_lines_of_plain_diffusers(saved):
    folder, images = saved
    save_filter(folder / "output_filter", Guard(random_images(30, 6, 16), np.arange(30), 1.2, 8))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    guard = load_filter(folder / "output_filter")
    images = guard(pipeline, batch_size=4, num_inference_steps=2).images
    assert len(images) == 4 and all(image.size == (16, 16) and image.mode == "L" for image in images)


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_the_guard_draws_anew_what_is_near_and_keeps_the_rest(saved, kind, output_type):
    """Pictures 1 and 3 of the four are in the index. The generator is the user's: the same twice."""
    folder = saved[0]
    first = (drawn(folder, kind, 0) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    guard = Guard(np.concatenate([first[[1, 3]], random_images(30, 6, 16)]), np.arange(32), 0.5, 8)
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 4, "num_inference_steps": 2, "output_type": output_type}
    runs = [
        [np.asarray(i) for i in guard(pipeline, generator=torch.Generator().manual_seed(0), **options).images]
        for _ in range(2)
    ]
    for one, two in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, two)
    plain = pipeline(generator=torch.Generator().manual_seed(0), **options).images
    changed = [not np.array_equal(np.asarray(a), b) for a, b in zip(plain, runs[0], strict=True)]
    assert changed == [False, True, False, True]


def test_a_list_of_generators_is_kept_by_image(saved):
    folder, _ = saved
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    plain = pipeline(batch_size=3, generator=seeds(), **options).images
    level = (plain * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    guard = Guard(np.concatenate([level[1:2], random_images(30, 6, 16)]), np.arange(31), 0.5, 8)
    images = guard(pipeline, batch_size=3, generator=seeds(), **options).images
    second = torch.Generator().manual_seed(6)
    pipeline(generator=[second], **options)
    np.testing.assert_allclose(images[1], pipeline(generator=[second], **options).images[0], atol=1e-5)
    np.testing.assert_array_equal(images[0], plain[0])


def test_the_guard_withholds_in_the_end(saved):
    """A threshold of 2 flags everything that is not equally far from all pictures."""
    pipeline = DDIMPipeline.from_pretrained(saved[0])
    pipeline.set_progress_bar_config(disable=True)
    guard = Guard(random_images(30, 6, 8), np.arange(30), 2.0, 1)
    assert guard(pipeline, batch_size=2, num_inference_steps=1).images == [None, None]


def test_the_claim_says_what_is_not_protected():
    claim = OutputFilter(OutputFilterConfig()).claim()
    assert claim["kind"] == "heuristic" and claim["protects"] == "outputs"
    for words in ("not the weights", "must not be published", "No guarantee", "DP guarantee"):
        assert words in claim["statement"]
