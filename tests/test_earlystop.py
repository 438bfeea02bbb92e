"""Early stopping on views with a planted truth: copies appear at a known step, of known pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from defenses.base import FIRST_PRIVATE_INDEX, CheckpointView, Pool, RunContext
from defenses.earlystop import Choice, EarlyStop, EarlyStopConfig, choose
from defenses.errors import UserError
from tests.reference import brute_force as brute
from tests.small import opened
from tests.smalldp import quick
from tests.test_distributed import launch
from train import stage
from train.loop import Trainer
from train.stage import train_model

STEPS = [10, 20, 30, 40, 50, 60]
SIDE = 8


def planted(copies: int = 1, training: int = 60, control: int = 20, seed: int = 0) -> tuple[Pool, np.ndarray]:
    """Pictures of noise, two per person on either side; picture 0 has ``copies`` records that differ by one grey level.

    Returns:
        The pool, and the rows of the control. Rows: training pictures 0.., control pictures, further copies of picture 0.
    """
    random = np.random.default_rng(seed)
    images = random.integers(0, 255, (training + control + copies - 1, 1, SIDE, SIDE), dtype=np.uint8)
    further = np.arange(training + control, len(images))
    images[further] = images[0] + random.integers(0, 2, (len(further), 1, SIDE, SIDE), dtype=np.uint8)
    picture = [*range(training + control), *[0] * len(further)]
    group = [f"{'t' if row < training else 'c'}{row // 2}" for row in range(training + control)] + ["t0"] * len(further)
    rows = np.array([*range(training), *further])
    return Pool(images, rows, [""] * len(images), group, picture=picture), np.arange(training, training + control)


def begun(pool: Pool, control: np.ndarray, folder=Path(), *, every: int = 10, **settings) -> EarlyStop:
    context = RunContext(
        pool=pool,
        control=control,
        steps=60,
        batch_size=4,
        accumulation=1,
        precision="fp32",
        seed=0,
        checkpoint_every=every,
        nonprivate_metrics=False,
        folder=folder,
        accelerator=Accelerator(cpu=True),
    )
    defense = EarlyStop(EarlyStopConfig(**settings))
    defense.begin(context)
    return defense


def strangers(count: int, step: int = 0) -> np.ndarray:
    """Fresh noise: as far from every picture as pictures are from each other, uint8 [count, 1, S, S]."""
    return np.random.default_rng([step, 99]).integers(0, 256, (count, 1, SIDE, SIDE), dtype=np.uint8)


def view(step: int, drawn: np.ndarray, pool: Pool, control: np.ndarray) -> CheckpointView:
    """A checkpoint whose model draws these images, uint8 [n, 1, S, S]."""

    def sample(indices):
        assert list(indices) == list(range(FIRST_PRIVATE_INDEX, FIRST_PRIVATE_INDEX + len(drawn)))
        return torch.from_numpy(drawn).float() / 255

    return CheckpointView(step, sample, pool, control, images_seen=4 * step)


def with_copies(source: np.ndarray, count: int, total: int, step: int = 0) -> np.ndarray:
    """``count`` near copies of the first pictures of ``source`` among ``total`` images."""
    near = np.clip(
        source[:count].astype(int) + np.random.default_rng(step).integers(-4, 5, (count, 1, SIDE, SIDE)), 0, 255
    )
    return np.concatenate([near.astype(np.uint8), strangers(total - count, step)])


def replay(defense: EarlyStop, pool: Pool, control: np.ndarray, images: dict[int, np.ndarray]):
    return [defense.after_checkpoint(view(step, drawn, pool, control)) for step, drawn in images.items()]


@pytest.mark.parametrize(("copying", "onset"), [(1, None), (2, 40), (5, 40)])
def test_the_onset_is_found_and_the_step_before_is_released(copying, onset):
    """128 images, copies from step 40 on: one is 0.8 % and tolerated, two are 1.6 % and are not."""
    pool, control = planted()
    defense = begun(pool, control, images=128)
    images = {
        step: with_copies(pool.images[:60], copying, 128, step) if step >= 40 else strangers(128, step)
        for step in STEPS
    }
    verdicts = replay(defense, pool, control, images)
    found = defense.findings()
    assert [point["copies"] for point in found["curve"]] == [0, 0, 0] + [copying / 128] * 3
    assert [point["images_seen"] for point in found["curve"]] == [40, 80, 120, 160, 200, 240]
    assert found["onset_step"] == onset and found["released_is_clean"]
    assert [verdict.stop for verdict in verdicts] == [False] * 3 + [onset is not None] * 3
    assert [verdict.release_step for verdict in verdicts] == [10, 20, 30, *([30] * 3 if onset else [40, 50, 60])]
    assert found["released_step"] == verdicts[-1].release_step
    assert "128 generations" in found["rule"] and "1.00%" in found["rule"] and found["pictures"] == 20


def test_copies_of_calibration_pictures_do_not_stop():
    """A rule that also fires on pictures that the model never saw tells nothing."""
    pool, control = planted()
    defense = begun(pool, control, images=16)
    near = with_copies(pool.images[control], 8, 16)
    both = np.concatenate([with_copies(pool.images[:60], 8, 8), with_copies(pool.images[control], 8, 8)])
    for step, drawn, shares in ((10, near, (0, 0.5)), (20, both, (0.5, 0.5))):
        verdict = defense.after_checkpoint(view(step, drawn, pool, control))
        point = defense.findings()["curve"][-1]
        assert (point["copies"], point["copies_control"]) == shares
        assert not verdict.stop and verdict.release_step == step
    assert defense.findings()["curve"][0]["share_nearer_training"] < 0.5


def brute_distances(generations: np.ndarray, pool: Pool, rows: np.ndarray) -> list[list[float]]:
    """Ascending distances of each generation to the distinct pictures among rows, over all views."""
    shown = {row: np.stack(brute.views(pool.images[row])).astype(np.float64) / 255 for row in rows}
    result = []
    for generation in generations.astype(np.float64) / 255:
        best: dict[int, float] = {}
        for row, several in shown.items():
            distance = min(np.sqrt(np.mean((generation - one) ** 2)) for one in several)
            best[pool.picture[row]] = min(best.get(pool.picture[row], np.inf), distance)
        result.append(sorted(best.values()))
    return result


def test_every_number_equals_brute_force():
    """Blends of pictures and noise in all proportions, so that score and ratio fall on both sides of their limits."""
    pool, control = planted(copies=5)
    random = np.random.default_rng(3)
    weight = random.uniform(0, 1, (60, 1, 1, 1))
    source = pool.images[random.choice(len(pool.images), 60)]
    generations = np.round(weight * source + (1 - weight) * strangers(60)).astype(np.uint8)
    defense = begun(pool, control, images=60)
    defense.after_checkpoint(view(10, generations, pool, control))
    (point,) = defense.findings()["curve"]
    expected, first = {"step": 10, "images_seen": 40}, {}
    for side, rows in (("", pool.rows), ("_drawn", defense._drawn), ("_control", control)):
        distances = brute_distances(generations, pool, rows)
        expected[f"copies{side}"] = np.mean([brute.score(row, 0.5, 20) <= 1 for row in distances])
        expected[f"ratio{side}"] = np.mean([row[0] / row[1] < 1 / 3 for row in distances])
        first[side] = np.array([row[0] for row in distances])
        expected[f"nearest{side}"] = first[side].mean()
        assert all(brute.score(row, 0.5, 20) < 1 for row in distances if row[0] / row[1] < 1 / 3)  # as the module says
    expected["share_nearer_training"] = np.mean(first["_drawn"] < first["_control"])
    assert point == pytest.approx(expected, rel=1e-6)
    assert 0.1 < point["ratio"] < point["copies"] < 0.9  # the limits are tried from both sides
    assert 0.02 < point["ratio_drawn"] < point["copies_drawn"] < point["copies"]


def test_a_tie_is_half_of_either_side():
    pool, control = planted()
    pool.images[control] = pool.images[:20]
    defense = begun(pool, control, images=16)
    pool.images[defense._drawn] = pool.images[control]
    defense.after_checkpoint(view(10, strangers(16), pool, control))
    assert defense.findings()["curve"][0]["share_nearer_training"] == 0.5


def test_without_memorisation_either_side_is_as_near():
    """400 images against 20 and 20 pictures: the share is 0.5 up to the luck of the draw of the pictures."""
    shares = []
    for seed in range(12):
        pool, control = planted(seed=seed)
        defense = begun(pool, control, images=100)
        defense.after_checkpoint(view(10, strangers(100, seed), pool, control))
        shares.append(defense.findings()["curve"][0]["share_nearer_training"])
    assert np.mean(shares) == pytest.approx(0.5, abs=3 * 0.5 / np.sqrt(1200) + 0.02)


def test_forty_copies_are_one_neighbour():
    """The most repeated picture is found: counted singly, its own copies would be its neighbours and hide it."""
    pool, control = planted(copies=40)
    defense = begun(pool, control, images=4)
    generations = np.repeat(pool.images[:1], 4, axis=0)
    generations[:, 0, 0, :4] = 9  # near, not equal
    verdict = defense.after_checkpoint(view(10, generations, pool, control))
    assert defense.findings()["curve"][0]["copies"] == 1.0 and verdict.stop
    singly = [distance for distance, _ in brute.records(generations[0], pool.images[pool.rows], True)]
    assert brute.score(singly, 0.5, 20) > 1.5


def test_a_picture_outside_the_draw_is_found():
    """All training pictures are looked at, not only as many as the control has."""
    pool, control = planted()
    defense = begun(pool, control, images=4)
    left = np.setdiff1d(np.arange(60), defense._drawn)
    assert defense.after_checkpoint(view(10, pool.images[left[:4]], pool, control)).stop
    (point,) = defense.findings()["curve"]
    assert (point["copies"], point["copies_drawn"], point["copies_control"]) == (1.0, 0.0, 0.0)


def test_the_draw_is_of_distinct_pictures_and_whole_groups():
    pool, control = planted(copies=40)
    drawn = begun(pool, control)._drawn
    assert len(drawn) == 20 and len({pool.picture[row] for row in drawn}) == 20 and set(drawn) <= set(pool.rows)
    assert len({pool.group[row] for row in drawn}) == 10  # two pictures each
    assert begun(pool, control)._drawn.tolist() == drawn.tolist()
    few, many = planted(training=10, control=30)
    defense = begun(few, many)
    assert (len(defense._drawn), len(defense._control)) == (10, 10) and set(defense._control) <= set(many)


@pytest.mark.parametrize(
    ("shares", "patience", "expected"),
    [
        ([0, 0, 3, 3], 1, Choice(2, 3, True)),
        ([0, 0, 3, 3], 2, Choice(2, 3, True)),
        ([0, 0, 3, 0, 3, 3], 2, Choice(4, 5, True)),  # one alone is forgiven
        ([0, 3], 2, Choice(1, None, True)),  # not yet an onset, and not released either
        ([3, 3, 0], 1, Choice(1, 1, False)),  # none before it
        ([3, 0, 0], 2, Choice(3, None, True)),
        ([3], 2, Choice(1, None, False)),
        ([0, 1, 0], 1, Choice(3, None, True)),  # equal to the tolerance is within it
        ([0, 1.2, 0], 1, Choice(1, 2, True)),  # a little more is not
    ],
)
def test_choice(shares, patience, expected):
    """Shares in per cent above a control of 6 %, tolerance 1 %."""
    curve = [
        {"step": step, "copies": 0.06 + share / 100, "copies_control": 0.06} for step, share in enumerate(shares, 1)
    ]
    assert choose(curve, 0.01, patience) == expected


def test_no_clean_checkpoint_is_said():
    pool, control = planted()
    defense = begun(pool, control, images=16)
    assert defense.findings() is None and "No checkpoint" not in defense.claim()["statement"]
    verdict = defense.after_checkpoint(view(10, pool.images[:16], pool, control))
    assert (verdict.stop, verdict.release_step) == (True, 10)
    found = defense.findings()
    assert (found["onset_step"], found["released_step"], found["released_is_clean"]) == (10, 10, False)
    assert "No checkpoint without copies was seen" in defense.claim()["statement"]


def test_the_claim_is_heuristic_and_says_what_it_does_not_cover():
    claim = EarlyStop(EarlyStopConfig()).claim()
    assert claim["kind"] == "heuristic"
    for words in (
        "1.00%",
        "256 images",
        "No guarantee",
        "Bonnaire",
        "membership",
        "too rare",
        "trained on the records",
    ):
        assert words in claim["statement"], words


def test_state_survives_a_stop():
    """Stopped after any checkpoint and resumed from JSON, it ends with the same findings and verdicts."""
    pool, control = planted()
    images = {step: with_copies(pool.images[:60], max(0, step - 35), 64, step) for step in STEPS}
    straight = begun(pool, control, images=64, patience=2)
    verdicts = replay(straight, pool, control, images)
    assert straight.findings()["onset_step"] == 40
    for stop in range(1, len(STEPS)):
        before, after = (begun(pool, control, images=64, patience=2) for _ in range(2))
        replay(before, pool, control, {step: images[step] for step in STEPS[:stop]})
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert replay(after, pool, control, {step: images[step] for step in STEPS[stop:]}) == verdicts[stop:]
        assert after.findings() == straight.findings()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"images": 0}, "images"),
        ({"patience": 0}, "patience"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
    ],
)
def test_bad_settings_name_their_key(settings, key):
    with pytest.raises(UserError, match=f"defenses.early_stop.{key}"):
        EarlyStopConfig(**settings)


def test_a_run_without_control_or_choice_is_refused():
    pool, control = planted()
    for rows in (control[:0], control[:1]):
        with pytest.raises(UserError, match=r"data\.calibration_fraction.*early_stop") as caught:
            begun(pool, rows)
        assert "\n" not in str(caught.value)
    for every in (0, 60, 100):
        with pytest.raises(UserError, match=r"train\.checkpoint_every.*one checkpoint in 60 steps"):
            begun(pool, control, every=every)
    begun(pool, control, every=59)


def test_a_private_run_refuses_it(tmp_path):
    dpsgd = "defenses.dpsgd={noise_multiplier: 1.0, clip_norm: 1.0, delta: 1e-3}"
    refusal = r"defenses\.early_stop: stops or chooses by looking at private records"
    with quick(), pytest.raises(UserError, match=refusal):
        train_model(*opened(tmp_path, dpsgd, "defenses.early_stop={}"))


OVERRIDES = ["defenses.early_stop.images=8", "train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=1"]


def memorising(monkeypatch, dataset, since: int) -> None:
    """From step ``since`` on the sampler draws training pictures."""
    original, made = stage.sample_on_all_ranks, {}

    def sample(config, model, schedule, frequency, indices, accelerator, prompts):
        if made["trainer"].state.step < since:
            return original(config, model, schedule, frequency, indices, accelerator, prompts)
        return torch.from_numpy(dataset.images[dataset.rows("train")[: len(indices)]]).float() / 255

    def build(*arguments):
        made["trainer"] = stage_build(*arguments)
        return made["trainer"]

    stage_build = stage.build_trainer
    monkeypatch.setattr(stage, "sample_on_all_ranks", sample)
    monkeypatch.setattr(stage, "build_trainer", build)


class Killed(Exception):
    pass


def dying(trainer: Trainer, step=Trainer.step):
    if trainer.state.step == 5:
        raise Killed
    return step(trainer)


def finish(folder: Path, name: str, monkeypatch, killed: bool = False):
    """Trains with copies from step 5 on: (run directory, contents of the sidecar)."""
    with quick(), monkeypatch.context() as patch:
        arguments = opened(folder, *OVERRIDES, f"run.name={name}")
        memorising(patch, arguments[1], 5)
        if killed:
            patch.setattr(Trainer, "step", dying)
        return arguments[2], train_model(*arguments)


def test_training_stops_and_releases_the_checkpoint_before(tmp_path, monkeypatch):
    """Copies are seen at checkpoint 6; step 4 is released although a single checkpoint is kept. Killed at step 5 and resumed, a
    run ends with the same findings."""
    directory, told = finish(tmp_path, "straight", monkeypatch)
    assert (told["steps"], told["released_step"], told["stopped_by"]) == (6, 4, "early_stop")
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["step-4", "step-6"]
    released = load_file(directory.model / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(directory.checkpoints / "step-4" / "ema.safetensors")
    assert all(torch.equal(released[key], average[key]) for key in average)
    (described,) = told["defenses"]
    assert [point["step"] for point in described["findings"]["curve"]] == [2, 4, 6]
    assert [point["images_seen"] for point in described["findings"]["curve"]] == [12, 24, 36]
    assert described["findings"]["onset_step"] == 6 and described["settings"]["images"] == 8
    with pytest.raises(Killed):
        finish(tmp_path, "resumed", monkeypatch, killed=True)
    assert finish(tmp_path, "resumed", monkeypatch)[1]["defenses"] == told["defenses"]


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    """Each rank searches half of the images; both have the curve of one process, to the bit."""
    for world in (1, 2):
        launch(world, "tests/distributed_earlystop.py", str(tmp_path))
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert one["findings"]["onset_step"] == 20 and one["verdicts"] == [[False, 10], [True, 10]]
    assert first == one and second == one
