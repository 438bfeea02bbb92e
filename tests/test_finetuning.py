"""FineXtract: planted memory of fine-tuning pictures is found by its control, nothing else is, nothing is lost or drawn twice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from defenses.errors import UserError
from eval import extrapolation, finetuning, finetuningfigures
from eval.denoiser import load
from eval.extrapolation import Pair, sample
from eval.finetuning import FinetuningConfig, run
from eval.finetuningfigures import Chance, Near, versus
from eval.suite import Scene
from eval.target import Target
from tests import ideal
from tests.pipelines import stable_diffusion, stable_diffusion_xl
from tests.reference import brute_force, fabricated
from tests.test_extrapolation import two_pipelines
from tests.test_inpainting import dataset, finished_run
from train.runlog import RunConfig, RunDirectory

CPU = torch.device("cpu")


def test_versus_baseline_counts_units_and_asks_the_heldout_pictures():
    training = fabricated.pictures(fabricated.blobs(0, 8), block=[0, 0, 1, 2, 3, 4, 5, 6])
    heldout = fabricated.pictures(fabricated.blobs(1, 7), offset=100)
    base = np.array([0.3, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2])
    other = base - np.array([0.1, -0.02, 0.1, 0.1, 0.1, 0.1, 0.1, -0.01])  # unit 0 nearer on the whole, unit 6 farther
    chance = Chance(True, 9999, 0)
    ids = [np.array([], int), np.array([1, 2, 3])]
    found = versus(Near(base, np.full(7, 0.2), ids[0]), Near(other, np.full(7, 0.2), ids[1]), training, heldout, chance)
    assert (found["nearer"], found["farther"]) == (6, 1)
    assert found["sign_p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert found["decrease"] == pytest.approx(np.mean(base - other)) and found["gain"] == pytest.approx(
        found["decrease"]
    )
    assert found["gain_p_value"] < 0.01
    assert (found["verified_only_here"], found["verified_only_baseline"]) == (3, 0)
    assert found["verified_p_value"] == pytest.approx(2 / 2**3)  # pictures 1, 2, 3 are of three units
    blurred = versus(Near(base, np.full(7, 0.2), ids[0]), Near(base - 0.05, np.full(7, 0.15), ids[0]), training, heldout, chance)  # fmt: skip
    assert blurred["nearer"] == 7 and blurred["sign_p_value"] == pytest.approx(2 / 2**7)
    assert blurred["gain"] == pytest.approx(0) and blurred["gain_p_value"] > 0.3  # nearer to any picture: no memory
    unknown = versus(Near(base, None, ids[0]), Near(other, None, ids[1]), training, None, chance)
    assert unknown["gain"] is None and unknown["gain_p_value"] is None and unknown["nearer"] == 6


MASS = 0.05  # share of the training pictures in what the fine-tuned model generates
QUICK = {"count": 160, "steps": 50, "permutations": 999, "clique_seconds": 5.0}


def memory(data) -> Pair:
    """A base that generates noise, fine-tuned so that one of 20 images is a training picture."""
    private = np.asarray(data.images[data.rows("train")])
    tuned = ideal.denoiser(ideal.partial_memoriser(private, MASS, 0.3))
    return Pair(tuned, ideal.denoiser(ideal.isotropic(0.3)), (1, 16, 16))


def scene(path, data, models, monkeypatch, exchangeable=True, **settings) -> Scene:
    output = RunDirectory(RunConfig(name="out", output_dir=str(path)))
    output.path.mkdir(parents=True, exist_ok=True)
    (path / "base").mkdir(exist_ok=True)
    (path / "base" / "model_index.json").touch()
    config = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(exchangeable=lambda: exchangeable, image_size=16, channels=1, restricted=False),
        model=SimpleNamespace(pretrained=None, revision=None),
        attack=SimpleNamespace(
            finetuning=FinetuningConfig(base=str(path / "base"), **(QUICK | settings)), copy_metrics=None
        ),
    )
    monkeypatch.setattr(finetuning, "load_base", lambda *_: models)
    target = Target(output, data, None, output.generations)
    return Scene(target, config, Accelerator(cpu=True), models.tuned, None, None)


def test_the_difference_gives_away_what_the_model_mostly_hides(tmp_path, monkeypatch):
    """The fine-tuned model draws a training picture in one of 20 cases, as it must; at w = 3 it is some three times as many."""
    data = dataset(8, 24)
    found = run(scene(tmp_path, data, memory(data), monkeypatch))
    one, three = found.report["weights"]
    assert (one["weight"], three["weight"], one["generations"]) == (1.0, 3.0, 160)
    share, best = [], []
    for weight in ("w-1", "w-3"):
        files = sorted((tmp_path / "out" / "finetuning" / weight).glob("*.png"))
        images = [np.asarray(Image.open(file))[None] for file in files]
        distance = np.array([[brute_force.l2(image, picture) for picture in data.images[:8]] for image in images])
        share.append(np.mean(distance.min(axis=1) < 0.05))
        best.append(np.minimum(distance, 0.1).min(axis=0))
    assert 0 < share[0] < MASS + 3 * (MASS * (1 - MASS) / 160) ** 0.5 and share[1] > 2 * share[0]
    assert [one["at_l2"]["0.05"], three["at_l2"]["0.05"]] == [int((each < 0.05).sum()) for each in best]
    assert three["verified"] >= 6 > one["verified"] and three["rate"] == three["verified"] / 8
    assert three["control"]["p_value"] < 0.01 and three["control"]["verified"] == 0 and three["p_value_holm"] < 0.02
    assert three["nearer_p_value"] < 0.01
    versus = three["versus_baseline"]
    assert one["versus_baseline"] is None and versus["nearer"] > versus["farther"] and versus["gain_p_value"] < 0.05
    assert versus["verified_only_here"] - versus["verified_only_baseline"] == three["verified"] - one["verified"]
    rows = found.tables["finetuning.csv"][1]
    assert len({row["record_id"] for row in rows if row["verified"] and row["weight"] == 3}) == three["verified"]
    assert all((tmp_path / "out" / "finetuning" / row["generation"]).is_file() for row in rows)
    for example in found.report["examples"]:
        assert (tmp_path / "out" / "finetuning" / example["generation"]).is_file() and example["l2"] < 0.15
    distances = found.tables["finetuning_pictures.csv"][1]
    assert len(distances) == 2 * 32 and np.mean(
        [row["l2"] for row in distances if row["member"] and row["weight"] == 3]
    ) == pytest.approx(three["mean_l2"])
    json.dumps(found.report, allow_nan=False)


def test_average_similarity_is_that_of_the_most_similar_candidate(tmp_path, monkeypatch):
    """With centred pixels in place of SSCD, by loops."""

    def describe(images) -> np.ndarray:
        flat = np.asarray(images, np.float64).reshape(len(images), -1)
        flat -= flat.mean(axis=1, keepdims=True)
        return (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(finetuningfigures, "load_sscd", lambda *_: describe)
    data = dataset(6, 5)
    place = scene(tmp_path, data, memory(data), monkeypatch, count=60)
    place.config.attack.copy_metrics = SimpleNamespace(sscd_weights="file", sscd_weights_sha256=None)
    found = run(place)
    rows = [row for row in found.tables["finetuning.csv"][1] if row["weight"] == 3]
    folder = tmp_path / "out" / "finetuning"
    candidates = describe([np.asarray(Image.open(folder / row["generation"])) for row in rows])
    best = [[max(float(a @ b) for b in candidates) for a in describe(part)] for part in np.split(data.images, [6])]
    sscd = found.report["weights"][1]["sscd"]
    assert sscd["average_similarity"] == pytest.approx(np.mean(best[0]), abs=1e-5)
    assert sscd["average_similarity_heldout"] == pytest.approx(np.mean(best[1]), abs=1e-5)
    assert sscd["success_rate_0.7"] == np.mean(np.array(best[0]) > 0.7) > 0


def test_pictures_that_were_not_trained_on_are_not_found(tmp_path, monkeypatch):
    """The same models, asked about other pictures: chance on either side of the control."""
    models = memory(dataset(8, 24))
    found = run(scene(tmp_path, dataset(8, 24, seed=5), models, monkeypatch)).report["weights"][1]
    assert found["control"]["p_value"] > 0.05 and found["verified"] <= 1
    assert found["nearer_p_value"] > 0.01 and found["versus_baseline"]["gain_p_value"] > 0.01


def test_a_second_call_draws_nothing_and_ends_the_same(tmp_path, monkeypatch):
    data = dataset(6, 6)
    models = memory(data)
    drawn = []

    def counted(pair, guidance, conditions, indices, **options):
        drawn.append((guidance.weight, tuple(indices)))
        return sample(pair, guidance, conditions, indices, **options)

    monkeypatch.setattr(extrapolation, "sample", counted)
    small = {"count": 10, "batch_size": 4, "steps": 4}
    first = run(scene(tmp_path, data, models, monkeypatch, **small))
    blocks = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert drawn == [(weight, block) for weight in (1.0, 3.0) for block in blocks]
    assert run(scene(tmp_path, data, models, monkeypatch, **small)).report == first.report and len(drawn) == 6
    (tmp_path / "out" / "finetuning" / "w-3" / "000005.png").unlink()
    assert run(scene(tmp_path, data, models, monkeypatch, **small)).report == first.report
    assert drawn[6:] == [(3.0, (4, 5, 6, 7))]
    run(scene(tmp_path, data, models, monkeypatch, **small | {"weights": [1.0, 3.0, 5.0]}))
    assert drawn[7:] == [(5.0, block) for block in blocks]
    run(scene(tmp_path, data, models, monkeypatch, **small | {"correction": 0.1, "weights": [3.0]}))
    assert {weight for weight, _ in drawn[10:]} == {1.0, 3.0}  # other settings: nothing old is taken over
    assert [entry["weight"] for entry in first.report["weights"]] == [1.0, 3.0]


def test_without_heldout_pictures_there_is_no_control(tmp_path, monkeypatch):
    data = dataset(4, 0)
    models = memory(data)
    entry = run(scene(tmp_path, data, models, monkeypatch, count=20, steps=4)).report["weights"][1]
    assert entry["control"] is None and entry["nearer_p_value"] is None and entry["p_value_holm"] is None
    strangers = dataset(4, 4)
    again = run(scene(tmp_path, strangers, models, monkeypatch, exchangeable=False, count=20, steps=4))
    assert again.report["weights"][1]["control"]["p_value"] is None
    assert again.report["weights"][1]["versus_baseline"]["gain_p_value"] is None


@pytest.mark.parametrize(("make", "prediction"), [(stable_diffusion, "v_prediction"), (stable_diffusion_xl, None)])
def test_text_to_image_pipelines_are_attacked_by_their_captions(make, prediction, tmp_path):
    two_pipelines(tmp_path, make, **({"prediction": prediction} if prediction else {}))
    data = dataset(5, 4)
    for row, record in enumerate(data.records):
        record.caption, record.copies = ("a chest x ray", "left lung clear")[row % 2], 3 if row == 1 else 1
    data.images = np.repeat(data.images, 3, axis=1)
    config = SimpleNamespace(
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(exchangeable=lambda: True, image_size=16, channels=3, restricted=False),
        model=SimpleNamespace(pretrained=str(tmp_path / "base"), revision=None),
        generate=SimpleNamespace(control_prompts=None),
        attack=SimpleNamespace(
            finetuning=FinetuningConfig(per_prompt=3, steps=2, permutations=9, batch_size=2), copy_metrics=None
        ),
    )
    output = RunDirectory(RunConfig(name="out", output_dir=str(tmp_path)))
    output.path.mkdir()
    tuned = load(tmp_path / "tuned", (3, 16, 16), CPU)
    report = run(
        Scene(
            Target(output, data, tmp_path / "tuned", output.generations),
            config,
            Accelerator(cpu=True),
            tuned,
            None,
            None,
        )
    ).report
    assert report["prompts"] == 2 and [entry["generations"] for entry in report["weights"]] == [6, 6]
    stored = json.loads((output.path / "finetuning" / "w-3" / "settings.json").read_text())
    assert stored["prompts"] == ["left lung clear", "a chest x ray"]  # that of the most copied picture first
    for weight in ("w-1", "w-3"):
        files = sorted((output.path / "finetuning" / weight).rglob("*.png"))
        assert [str(file.relative_to(output.path / "finetuning" / weight)) for file in files] == [
            f"0000{prompt}/00000{index}.png" for prompt in (0, 1) for index in range(3)
        ]
    assert report["settings"]["space"] == "latents" and report["base"] == str(tmp_path / "base")
    assert "shared" in report["captions_reason"] and not (output.path / "finetuning_control").exists()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"base": "nowhere"}, "base"),
        ({"weights": [1.0, -2.0]}, "weights"),
        ({"weights": [float("nan")]}, "weights"),
        ({"weights": [3.0, 3.0000001]}, "weights"),
        ({"count": 9000}, "count"),
        ({"per_prompt": 100, "max_prompts": 100}, "per_prompt"),
        ({"clique_size": 0}, "clique_size"),
        ({"clusters": 0}, "clusters"),
        ({"steps": 0}, "steps"),
        ({"verify_l2": 0.0}, "verify_l2"),
        ({"edge_threshold": -0.1}, "edge_threshold"),
        ({"clique_seconds": -1.0}, "clique_seconds"),
        ({"guidance": float("inf")}, "guidance"),
    ],
)
def test_impossible_settings_are_refused(settings, key):
    with pytest.raises(UserError, match=f"attack.finetuning.{key}"):
        FinetuningConfig(**settings)


def test_the_model_alone_is_always_among_the_weights():
    assert FinetuningConfig(weights=[3.0, 5.0, 3.0]).weights == [1.0, 3.0, 5.0]


def test_what_does_not_fit_the_model_is_refused(tmp_path, monkeypatch):
    data = dataset(3, 3)
    models = memory(data)
    with pytest.raises(UserError, match=r"attack\.finetuning\.steps"):
        run(scene(tmp_path, data, models, monkeypatch, steps=2000))
    models.tuned.alphas_cumprod[-1] = 0
    with pytest.raises(UserError, match=r"attack\.finetuning\.correction"):
        run(scene(tmp_path, data, models, monkeypatch, correction=-0.02))


def test_a_base_of_the_hub_is_fetched_by_its_revision(tmp_path, monkeypatch):
    asked = []

    def download(source, **options):
        asked.append((source, options))
        if source == "owner/gone":
            raise OSError("not there\nmore")
        return tmp_path

    monkeypatch.setattr(finetuning.DiffusionPipeline, "download", download)
    model = SimpleNamespace(pretrained="owner/model", revision="v1")
    config = SimpleNamespace(model=model, attack=SimpleNamespace(finetuning=FinetuningConfig()))
    place = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True))
    assert finetuning.base_folder(place) == tmp_path
    assert asked[0] == ("owner/model", {"revision": "v1", "use_safetensors": True})
    model.pretrained = "owner/gone"
    with pytest.raises(UserError, match="owner/gone: not there"):
        finetuning.base_folder(place)


PHANTOM = [
    "data.phantom.copied=0", "data.phantom.outliers=0", "data.phantom.calibration=4", "train.learning_rate=2e-3",
    "train.checkpoint_every=0",
]  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_pictures_come_nearer_than_others_by_the_difference(tmp_path):
    """A base of 200 public pictures, fine-tuned on 12 others: trained here, attacked with what is released."""
    base, _, _ = finished_run(
        tmp_path, *PHANTOM, "run.name=base", "data.phantom.seed=5", "data.phantom.pictures=200", "data.phantom.heldout=8",
        "train.steps=300", "train.batch_size=24", "train.ema_decay=0.98",
    )  # fmt: skip
    target, config, accelerator = finished_run(
        tmp_path, *PHANTOM, "run.name=tuned", "data.phantom.pictures=12", "data.phantom.heldout=16", "train.steps=150",
        "train.batch_size=12", "train.ema_decay=0.95", f"model.pretrained={base.pipeline}",
    )  # fmt: skip
    config.attack.finetuning = FinetuningConfig(weights=[1.0, 2.0], count=64, steps=25, permutations=999)
    model = load(target.pipeline, (1, 16, 16), accelerator.device)
    report = run(Scene(target, config, accelerator, model, None, None)).report
    alone, double = report["weights"]
    assert double["nearer_p_value"] < 0.05 and double["versus_baseline"]["gain"] > 0
    assert double["mean_l2"] < 0.8 * double["mean_l2_heldout"]
    assert double["verified"] >= max(alone["verified"], 1) and double["control"]["verified"] == 0
