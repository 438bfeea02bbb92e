"""Membership inference as a whole: a model that knows its pictures by heart, one that knows nothing, and settings."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from defenses.augment import AugmentConfig
from defenses.errors import UserError
from eval import membership
from eval.denoiser import load, of_network
from eval.membership import ATTACKS, CAPTIONED, MembershipConfig
from eval.suite import Scene
from tests.pipelines import stable_diffusion
from tests.small import opened
from tests.test_denoiser import CPU, denoiser_config, unet
from tests.test_scores import ALPHAS, formula
from train.data import Dataset, Record
from train.stage import train_model


def dataset_of(images, members, groups=None, captions=None):
    records = [
        Record(
            f"{row:04d}", f"{row}.png", split="train" if row < members else "heldout", kept=True, cluster=row, copies=1,
            block=row if groups is None else groups[row], group=None if groups is None else str(groups[row]),
            caption=None if captions is None else captions[row],
        )
        for row in range(len(images))
    ]  # fmt: skip
    return Dataset(records, images)


def scene_of(denoiser, dataset, augment=None, run=None, exchangeable=True, **settings):
    config = SimpleNamespace(
        attack=SimpleNamespace(membership=MembershipConfig(**settings)),
        run=SimpleNamespace(seed=3),
        data=SimpleNamespace(exchangeable=lambda: exchangeable),
        defenses=SimpleNamespace(augment=augment),
        model=SimpleNamespace(family="pixel"),
    )
    return Scene(SimpleNamespace(dataset=dataset, run=run), config, Accelerator(cpu=True), denoiser, None, None)


class Memory(torch.nn.Module):
    """The best denoiser of a finite set of pictures: the mean of the set under the posterior given x_t."""

    def __init__(self, pictures):
        super().__init__()
        self.pictures = torch.nn.Parameter(pictures, requires_grad=False)

    def forward(self, x, timesteps):
        alpha = ALPHAS[timesteps].reshape(-1, 1, 1, 1)
        distance = (x[:, None] - alpha[:, None].sqrt() * self.pictures).square().sum((2, 3, 4))
        weight = torch.softmax(-distance / (2 * (1 - alpha.flatten(1))), 1)
        clean = torch.einsum("bn,nchw->bchw", weight, self.pictures)
        return (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()


def remembering(images):
    network = Memory(torch.from_numpy(images) / 127.5 - 1)
    denoiser = formula(lambda x, t, condition: network(x, t))
    denoiser.network, denoiser.kind, denoiser.condition = network, "none", lambda values: {}
    return denoiser


def noise(count, seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, side, side), dtype=np.uint8)


def test_a_model_that_knows_its_pictures_by_heart_is_recognised_by_every_attack():
    """64 trained, 1,000 not: the planted truth of the issue, with the denoiser that training strives for."""
    images = noise(1064)
    found = membership.run(scene_of(remembering(images[:64]), dataset_of(images, 64), batch_size=256, draws=1))
    assert [entry["attack"] for entry in found.report] == [name for name in ATTACKS if name not in CAPTIONED]
    for entry in found.report:
        assert (entry["members"], entry["nonmembers"], entry["unit"]) == (64, 1000, "record")
        assert entry["auc"] > 0.95 and entry["tpr_at_fpr"]["0.01"] >= 0.5, entry["attack"]
        assert entry["tpr_at_fpr"]["0.001"] is None and entry["settings"]["condition"] == "none"
    assert found.beside["membership_check"]["passed"] and found.beside["set_test"]["p_value"] < 0.01
    json.dumps([found.report, found.beside], allow_nan=False)
    columns, rows = found.tables["membership.csv"]
    assert len(rows) == 1064 and {"record_id", "loss-strong", "loss-strong_fpr"} <= set(columns)
    assert np.mean([row["loss-strong_fpr"] <= 0.01 for row in rows[:64]]) >= 0.5
    assert {row["attack"] for row in found.tables["roc.csv"][1]} == {entry["attack"] for entry in found.report}


def test_an_untrained_model_gives_half():
    """An interval misses 1/2 in 5 % of cases, so one of eight may; the standard deviation of the AUC is known exactly."""
    torch.manual_seed(0)
    denoiser = of_network(unet(), denoiser_config("v_prediction"), (1, 8, 8), CPU)
    found = membership.run(scene_of(denoiser, dataset_of(noise(160), 80), draws=1, gradient_timesteps=1))
    deviation = np.sqrt((80 + 80 + 1) / (12 * 80 * 80))  # of Mann and Whitney's statistic, 0.046
    assert all(abs(entry["auc"] - 0.5) < 3.3 * deviation for entry in found.report)
    assert sum(not entry["auc_ci95"][0] < 0.5 < entry["auc_ci95"][1] for entry in found.report) <= 1
    assert found.beside["membership_check"]["passed"] and found.beside["set_test"]["p_value"] > 0.01


def test_patients_are_units_of_their_own():
    images, groups = noise(120), np.arange(120) // 3
    dataset = dataset_of(images, 60, groups)
    settings = {"attacks": ["loss", "loss-grid"], "grid": [0.1, 0.5]}
    found = membership.run(scene_of(remembering(images[:60]), dataset, **settings))
    assert [(entry["attack"], entry["unit"], entry["members"]) for entry in found.report] == [
        ("loss", "record", 60), ("loss", "group", 20), ("loss-grid", "record", 60), ("loss-grid", "group", 20),
    ]  # fmt: skip
    assert found.beside["set_test"]["unit"] == "group" and found.beside["set_test"]["features"] == 3


def test_captioned_models_have_attacks_of_their_own(tmp_path):
    stable_diffusion(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8)
    dataset = dataset_of(images, 6, captions=["a chest x ray", "left lung clear", None] * 4)
    denoiser = load(tmp_path, (3, 16, 16), CPU)
    found = membership.run(scene_of(denoiser, dataset, draws=1, gradient_timesteps=1, grid=[0.5], set_test=False))
    assert [entry["attack"] for entry in found.report] == list(ATTACKS)
    conditions = {entry["attack"]: entry["settings"]["condition"] for entry in found.report}
    assert conditions["loss-strong-null"] == "null" and set(conditions.values()) == {"own", "null"}
    values = {name: [row[name] for row in found.tables["membership.csv"][1]] for name in ATTACKS}
    assert values["loss-strong-null"][2] == pytest.approx(values["loss-strong"][2], rel=1e-4)  # it has no caption
    assert values["loss-strong-null"][0] != pytest.approx(values["loss-strong"][0], rel=1e-6)
    assert found.beside["set_test"] is None and found.beside["membership_check"]["passed"] is None


def test_members_and_others_of_different_sources_are_no_evidence():
    images = noise(80)
    found = membership.run(
        scene_of(remembering(images[:40]), dataset_of(images, 40), exchangeable=False, attacks=["loss"])
    )
    assert found.beside["membership_check"]["passed"] is False and found.report[0]["auc"] > 0.9


def test_without_weights_or_without_one_side_there_is_no_figure():
    images = noise(10)
    assert membership.run(scene_of(None, dataset_of(images, 5))) is None
    found = membership.run(scene_of(remembering(images), dataset_of(images, 10)))
    assert found.report is None and found.beside["membership_check"]["note"] == "there are no held-out pictures"


def test_mirror_images_are_asked_about_where_they_were_trained_on():
    images = noise(12)
    for augment, run, flips, views in [
        (None, "run", None, 1), (AugmentConfig(), "run", None, 2), (AugmentConfig(flip_probability=0), "run", None, 1),
        (AugmentConfig(), None, None, 1), (None, None, True, 2), (AugmentConfig(), "run", False, 1),
    ]:  # fmt: skip
        scene = scene_of(
            remembering(images[:6]),
            dataset_of(images, 6),
            augment,
            run,
            attacks=["loss-strong"],
            draws=3,
            flips=flips,
            set_test=False,
        )
        (entry,) = membership.run(scene).report
        assert entry["settings"]["views"] == views and entry["queries"] == 3 * views


def test_members_are_as_many_as_asked_for_and_the_same_again():
    images = noise(60)
    scene = scene_of(remembering(images[:30]), dataset_of(images, 30), attacks=["sima"], records=20, set_test=False)
    first, again = membership.run(scene), membership.run(scene)
    assert first.report == again.report and first.tables == again.tables
    assert (first.report[0]["members"], first.report[0]["nonmembers"]) == (20, 20)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"attacks": ["los"]}, "attacks"), ({"attacks": []}, "attacks"), ({"records": 0}, "records"),
        ({"draws": 0}, "draws"), ({"grid": []}, "grid"), ({"grid": [1.0]}, "grid"),
        ({"gradient_timesteps": 0}, "gradient_timesteps"), ({"batch_size": 0}, "batch_size"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, key):
    with pytest.raises(UserError) as error:
        MembershipConfig(**settings)
    assert error.value.key == f"attack.membership.{key}"


def test_no_held_out_pictures_are_refused_beforehand():
    def data(**options):
        common = {"source": "folder", "heldout_source": None, "split_key": None, "heldout_fraction": 0.0}
        return SimpleNamespace(data=SimpleNamespace(**common | options))

    for refused in (data(), data(source="phantom", phantom=SimpleNamespace(heldout=0))):
        with pytest.raises(UserError, match="never saw"):
            membership.check(refused)
    for fine in (data(heldout_fraction=0.2), data(heldout_source="other"), data(split_key="split")):
        membership.check(fine)


OVERFITTED = [
    "data.phantom.pictures=16", "data.phantom.copied=0", "data.phantom.outliers=0", "data.phantom.heldout=100",
    "data.phantom.calibration=0", "data.group_key=null", "model.size=nano", "train.steps=300", "train.batch_size=32",
    "train.learning_rate=2e-3", "train.ema_decay=0.95", "train.heldout_every=0", "train.checkpoint_every=0",
]  # fmt: skip


@pytest.mark.slow
def test_a_model_that_was_trained_too_long_is_recognised(tmp_path):
    config, dataset, directory, defenses, accelerator = opened(tmp_path, *OVERFITTED)
    train_model(config, dataset, directory, defenses, accelerator)
    denoiser = load(directory.model, (1, 16, 16), CPU)
    scene = scene_of(denoiser, dataset, attacks=["loss-strong", "loss-grid", "sima"], set_test=False)
    assert min(entry["auc"] for entry in membership.run(scene).report) >= 0.95
