"""Inpainting reconstruction: planted memory is found, the original is never asked, nothing is lost."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from defenses.errors import UserError
from eval import inpainting
from eval.denoiser import load
from eval.inpainting import InpaintingConfig, reconstruct, run
from eval.reconstructions import distances, mirrored
from eval.shadows import train_shadows
from eval.suite import Scene
from eval.target import Target, target_of
from tests import ideal
from tests.reference import fabricated
from tests.small import opened
from train.data import Dataset, Record
from train.manifest import write_manifest
from train.runlog import RunConfig, RunDirectory
from train.stage import train_model

SIDE = 16
QUICK = {"fills": 16, "keep": 4, "steps": 10, "draws": 2, "permutations": 999}


def dataset(training: int = 24, heldout: int = 24, seed: int = 0) -> Dataset:
    """Smooth random pictures, each a block of its own."""
    images = fabricated.blobs(seed, training + heldout, SIDE)
    records = [
        Record(
            f"id{row}", f"{row}.png", split="train" if row < training else "heldout", cluster=row, block=row, copies=1, kept=True
        )
        for row in range(len(images))
    ]  # fmt: skip
    return Dataset(records, images)


def scene(path, data: Dataset, denoiser, restricted: bool = False, exchangeable: bool = True, **settings) -> Scene:
    output = RunDirectory(RunConfig(name="out", output_dir=str(path)))
    output.path.mkdir(parents=True, exist_ok=True)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(restricted=restricted, exchangeable=lambda: exchangeable),
        attack=SimpleNamespace(inpainting=InpaintingConfig(**(QUICK | settings))),
    )
    target = Target(output, data, None, output.generations)
    return Scene(target, config, Accelerator(cpu=True), denoiser, None, None)


def memoriser(data: Dataset):
    return ideal.denoiser(ideal.memoriser(np.asarray(data.images[data.rows("train")])))


def stored(path) -> list[dict[str, np.ndarray]]:
    files = sorted((path / "out" / "inpainting").glob("*.npz"))
    return [dict(np.load(file)) for file in files]


def test_a_memoriser_gives_members_back_and_nobody_else(tmp_path):
    data = dataset()
    found = run(scene(tmp_path, data, memoriser(data)))
    report, rows = found.report, found.tables["inpainting.csv"][1]
    assert (report["members"], report["nonmembers"], report["unit"]) == (24, 24, "picture")
    assert report["p_value"] < 0.01 and report["auc"] > 0.95 and report["auc_ci95"][0] > 0.85
    assert report["member_l2_mean"] < 0.02 < 0.15 < report["nonmember_l2_mean"]
    assert report["difference"] == pytest.approx(report["nonmember_l2_mean"] - report["member_l2_mean"])
    assert report["reference"] == "none" and report["ranking"] == "L_target"
    for name in ("mirror", "mean"):  # the members were not easier in themselves
        low, high = report["baseline"][name]["auc_ci95"]
        assert low < 0.5 < high and report["baseline"][name]["p_value"] > 0.01
    assert report["member_l2_mean"] == pytest.approx(np.mean([row["l2"] for row in rows if row["member"]]))
    assert [example["member"] for example in report["examples"]] == [True] * 4 + [False] * 4
    for example in report["examples"]:
        row = next(row for row in rows if row["record_id"] == example["record_id"])
        original = data.images[int(row["record_id"][2:])][0]
        with Image.open(tmp_path / "out" / example["fill"]) as image:
            fill = np.asarray(image)
        assert (fill[:, SIDE // 2 :] == original[:, SIDE // 2 :]).all()
        assert np.sqrt(np.mean((fill / 255.0 - original / 255.0) ** 2)) == pytest.approx(row["l2_first"])
    assert report["note"] is None
    json.dumps(report, allow_nan=False)


def test_a_model_that_knows_no_picture_gives_back_members_and_others_alike(tmp_path):
    flat = ideal.denoiser(lambda x, signal: 0.3 * signal.sqrt() * x / (0.3 * signal + 1 - signal))  # of x_0 ~ N(0, 0.3)
    report = run(scene(tmp_path, dataset(), flat)).report
    assert report["auc_ci95"][0] < 0.5 < report["auc_ci95"][1] and report["p_value"] > 0.05


def test_ranking_never_sees_the_original(tmp_path):
    data = dataset(6, 6)
    other = replace(data, images=data.images.copy())
    other.images[..., : SIDE // 2] = np.random.default_rng(1).integers(0, 256, (12, 1, SIDE, SIDE // 2))
    model = memoriser(data)
    reports = [run(scene(tmp_path / name, each, model)).report for name, each in (("a", data), ("b", other))]
    for one, two in zip(stored(tmp_path / "a"), stored(tmp_path / "b"), strict=True):
        assert np.array_equal(one["images"], two["images"]) and np.array_equal(one["score"], two["score"])
    assert reports[0]["member_l2_mean"] < 0.5 * reports[1]["member_l2_mean"]


def test_kept_are_the_fills_with_the_lowest_ratio_of_losses():
    data = dataset(8, 8)
    model, reference = memoriser(data), memoriser(dataset(8, 8, seed=9))
    blind, record = mirrored(data.images[2]), data.records[2]
    settings = InpaintingConfig(**QUICK | {"keep": 16, "batch_size": 5})
    everything = reconstruct(model, reference, blind, record, 2, settings, seed=3)
    few = reconstruct(model, reference, blind, record, 2, replace(settings, keep=3, batch_size=64), seed=3)
    assert (np.diff(everything.score) >= 0).all() and len(everything.score) == 16
    assert np.array_equal(few.images, everything.images[:3]) and np.allclose(few.score, everything.score[:3], rtol=1e-4)

    def loss(denoiser, image):
        """Mean squared error at t = 100 of 1000, the same noise as the attack's."""
        chunk = inpainting.Chunk(denoiser, image[None], {}, np.array([2]), 3)
        x, t = denoiser.encode(image[None]), torch.tensor([100])
        errors = []
        for draw in range(2):
            noise = chunk.noise(x, 100, draw, 0)
            errors.append((denoiser.epsilon(denoiser.noised(x, noise, t), t, {}) - noise).square().mean().item())
        return np.mean(errors)

    for image, score in zip(everything.images, everything.score, strict=True):
        assert score == pytest.approx(loss(model, image) / loss(reference, image), rel=1e-3)


def test_distances_are_those_of_loops():
    random = np.random.default_rng(0)
    original = random.integers(0, 256, (1, 4, 6), dtype=np.uint8)
    images = np.repeat(original[None], 3, axis=0)
    images[..., :3] = random.integers(0, 256, (3, 1, 4, 3))
    mean = random.random((1, 4, 6))
    found = distances(inpainting.Fills(images, np.arange(3.0)), original, mean)
    hidden, mirror, middle = [0.0] * 3, 0.0, 0.0
    for y in range(4):
        for x in range(3):
            truth = original[0, y, x] / 255
            mirror += (original[0, y, 5 - x] / 255 - truth) ** 2
            middle += (mean[0, y, x] - truth) ** 2
            for k in range(3):
                hidden[k] += (images[k, 0, y, x] / 255 - truth) ** 2
    assert found["l2_hidden"] == pytest.approx(np.mean([(h / 12) ** 0.5 for h in hidden]))
    assert found["l2"] == pytest.approx(np.mean([(h / 24) ** 0.5 for h in hidden]))
    assert found["l2_first"] == pytest.approx((hidden[0] / 24) ** 0.5) and found["score_first"] == 0
    assert found["l2_mirror"] == pytest.approx((mirror / 24) ** 0.5)
    assert found["l2_mean"] == pytest.approx((middle / 24) ** 0.5)


def test_the_mean_picture_leaves_a_member_out(tmp_path):
    data = dataset(4, 4)
    found = {
        row["record_id"]: row["l2_mean"]
        for row in run(scene(tmp_path, data, memoriser(data))).tables["inpainting.csv"][1]
    }
    pixels = data.images / 255.0
    for row, others in ((1, [0, 2, 3]), (6, [0, 1, 2, 3])):
        error = (pixels[others].mean(0) - pixels[row])[..., : SIDE // 2]
        assert found[f"id{row}"] == pytest.approx(np.sqrt(np.mean(error**2) / 2))


def test_a_stopped_attack_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    data = dataset(4, 4)
    whole = run(scene(tmp_path / "whole", data, memoriser(data))).report
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return reconstruct(*arguments, **options)

    monkeypatch.setattr(inpainting, "reconstruct", counted)
    with pytest.raises(KeyboardInterrupt):
        run(scene(tmp_path / "cut", data, memoriser(data)))
    assert len(stored(tmp_path / "cut")) == 3
    again = run(scene(tmp_path / "cut", data, memoriser(data))).report
    assert len(calls) == 4 + 5
    assert again == whole
    run(scene(tmp_path / "cut", data, memoriser(data), fills=17))  # other settings: nothing old is taken over
    assert len(calls) == 4 + 5 + 8


def test_restricted_data_leave_no_pictures_for_the_report(tmp_path):
    data = dataset(3, 3)
    found = run(scene(tmp_path, data, memoriser(data), restricted=True))
    assert not list(tmp_path.rglob("*.png"))
    assert {example["fill"] for example in found.report["examples"]} == {None}


def test_what_needs_heldout_pictures_is_null_without_them(tmp_path):
    data = dataset(4, 0)
    report = run(scene(tmp_path, data, memoriser(data))).report
    assert report["member_l2_mean"] < 0.1 and report["nonmember_l2_mean"] is None
    assert (
        report["p_value"] is None
        and report["auc"] is None
        and report["note"] == "4 and 0 pictures: no p-value below 1 is possible"
    )


def test_there_is_no_p_value_where_heldout_pictures_are_of_another_kind(tmp_path):
    data = dataset(4, 4)
    report = run(scene(tmp_path, data, memoriser(data), exchangeable=False)).report
    assert report["p_value"] is None and report["test"] is None and report["auc"] is not None
    assert report["note"] == "4 and 4 pictures: no p-value below 0.014 is possible"  # 1 of 70 ways to choose 4 of 8


def test_generations_alone_cannot_be_asked(tmp_path):
    assert run(scene(tmp_path, dataset(3, 3), None)) is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"keep": 20, "fills": 10}, "keep"),
        ({"steps": 0}, "steps"),
        ({"steps": 4, "jump_length": 4, "resamples": 2}, "jump_length"),
        ({"reference": "nowhere"}, "reference"),
    ],
)
def test_impossible_settings_are_refused(settings, key):
    with pytest.raises(UserError, match=f"attack.inpainting.{key}"):
        InpaintingConfig(**settings)


def test_more_steps_than_timesteps_are_refused(tmp_path):
    short = ideal.denoiser(ideal.memoriser(dataset(3, 3).images), timesteps=8)
    with pytest.raises(UserError, match="attack.inpainting.steps"):
        run(scene(tmp_path, dataset(3, 3), short))


def finished_run(path, *overrides):
    """A run of ours: its target, its configuration with inpainting, its accelerator."""
    config, data, directory, defenses, accelerator = opened(
        path, "model.size=nano", "train.heldout_every=0", *overrides
    )
    write_manifest(data, directory.manifest)
    train_model(config, data, directory, defenses, accelerator)
    return target_of(directory, directory, config), config, accelerator


def test_the_reference_of_a_run_is_its_shadow_without_the_picture(tmp_path):
    target, config, accelerator = finished_run(tmp_path, "train.steps=2")
    config.attack.inpainting = InpaintingConfig(pictures=4, fills=2, keep=1, steps=2, draws=1, permutations=9)
    shadows = train_shadows(2, target, config, accelerator)
    model = load(target.pipeline, (1, 16, 16), accelerator.device)
    found = run(Scene(target, config, accelerator, model, None, None))
    assert found.report["reference"] == "shadow" and found.report["ranking"] == "L_target / L_reference"
    row_of = {record.record_id: row for row, record in enumerate(target.dataset.records)}
    used = {row["record_id"]: int(row["reference"]) for row in found.tables["inpainting.csv"][1]}
    assert len(used) == 8 and not any(shadows.trained[number, row_of[name]] for name, number in used.items())
    config.attack.inpainting.reference = str(target.pipeline)  # against itself every ratio is 1
    rows = run(Scene(target, config, accelerator, model, None, None)).tables["inpainting.csv"][1]
    assert {row["score_first"] for row in rows} == {1.0}


@pytest.mark.slow
def test_members_of_an_overfitted_run_are_reconstructed_nearer_than_heldout_pictures(tmp_path):
    target, config, accelerator = finished_run(
        tmp_path, "data.phantom.pictures=12", "data.phantom.copied=0", "data.phantom.outliers=0", "data.phantom.heldout=16",
        "train.steps=200", "train.batch_size=24", "train.learning_rate=2e-3", "train.checkpoint_every=0", "train.ema_decay=0.98",
    )  # fmt: skip
    config.attack.inpainting = InpaintingConfig(pictures=12, fills=8, keep=2)
    model = load(target.pipeline, (1, 16, 16), accelerator.device)
    report = run(Scene(target, config, accelerator, model, None, None)).report
    print({key: report[key] for key in ("member_l2_mean", "nonmember_l2_mean", "p_value", "auc")})
    assert report["p_value"] < 0.01 and report["auc"] > 0.85
    assert report["member_l2_mean"] < 0.75 * report["nonmember_l2_mean"]
    assert report["baseline"]["mirror"]["auc_ci95"][0] < 0.5 < report["baseline"]["mirror"]["auc_ci95"][1]
