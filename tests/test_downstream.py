import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import UserError
from eval import wording
from eval.card import model_card
from eval.config import check
from eval.downstream import (
    Classifier,
    DownstreamConfig,
    Labelled,
    labels_of_generations,
    macro_auc,
    measure_downstream,
    scores_of,
)
from eval.report import ReportConfig, render
from tests.fabricate import Fabricated, fabricate_downstream, fabricate_report
from tests.small import small_config
from train.data import Dataset, Record

CPU = torch.device("cpu")
NAMES = ["dark", "middle", "striped"]
QUICK = DownstreamConfig(steps=50, batch_size=16)
TOUCHED = DownstreamConfig(steps=1, batch_size=4)  # where only the counts matter


def pictures(labels: np.ndarray, size: int = 16, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise around a level of grey (classes 0 and 1) or around stripes of the same mean as class 1 (class 2)."""
    rng = np.random.default_rng(seed)
    stripes = np.where(np.arange(size) // 2 % 2, 40, -40)[:, None] * np.ones(size)
    patterns = np.stack([np.full((size, size), 60), np.full((size, size), 128), 128 + stripes])
    noise = rng.normal(0, 25, (len(labels), channels, size, size))
    return np.clip(patterns[labels][:, None] + noise, 0, 255).astype(np.uint8)


def balanced(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % 3)


def dataset_of(
    train: np.ndarray, heldout: np.ndarray, *, copies: int = 1, shuffled: bool = False, groups: bool = False
):
    """Records of these classes; every training picture ``copies`` times; ``shuffled`` training labels mean nothing."""
    told = np.random.default_rng(7).permutation(train) if shuffled else train
    records, images = [], []
    for cluster, label in enumerate(told):
        for copy in range(copies):
            name = f"t{cluster}.{copy}"
            record = Record(
                name, name, label=NAMES[label], split="train", cluster=cluster, block=cluster, kept=copy == 0
            )
            records.append(record)
    images.append(np.repeat(pictures(train, seed=1), copies, axis=0))
    for place, label in enumerate(heldout):
        number = len(train) + (place // 2 if groups else place)
        record = Record(f"h{place}", f"h{place}", label=NAMES[label], split="heldout", cluster=number, block=number)
        record.group = f"g{place // 2}" if groups else None
        records.append(record)
    images.append(pictures(heldout, seed=2))
    return Dataset(records, np.concatenate(images))


def measured(generated: Labelled, dataset: Dataset, config: DownstreamConfig = QUICK):
    return measure_downstream(generated, dataset, NAMES, config, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def heldout() -> np.ndarray:
    return balanced(90, seed=3)


def test_separable_classes_are_learned_and_wrong_labels_are_not(heldout):
    """Right generations and meaningless real labels, then the other way round: each figure belongs to its own pictures."""
    labels = balanced(60, seed=4)
    right, wrong = pictures(labels, seed=5), np.random.default_rng(6).permutation(labels)
    good = measured(Labelled(right, labels), dataset_of(balanced(60), heldout, shuffled=True))["downstream"]
    bad = measured(Labelled(right, wrong), dataset_of(balanced(60), heldout))["downstream"]
    for learned, guessed in ((good, good["train_on_real"]), (bad["train_on_real"], bad)):
        assert learned["accuracy"] > 0.95 and learned["macro_auc"] > 0.98
        assert guessed["accuracy"] < 0.6 and 0.25 < guessed["macro_auc"] < 0.75
        assert learned["accuracy_ci95"][0] < learned["accuracy"] <= learned["accuracy_ci95"][1]
    assert good["n"] == 90 and good["classes"] == 3 and good["most_frequent"] == pytest.approx(1 / 3)
    assert good["settings"]["weights"] == "last"


def test_equal_numbers_of_distinct_pictures(heldout):
    """20 pictures, 5 copies each, some removed by a defense, against 60 generations: 20 of each are trained on."""
    labels = balanced(60)
    found = measured(Labelled(pictures(labels), labels), dataset_of(balanced(20), heldout, copies=5), TOUCHED)[
        "downstream"
    ]
    assert found["n_train"] == found["train_on_real"]["n_train"] == 20
    labels[:45] = -1  # generations whose class is not known
    found = measured(Labelled(pictures(np.abs(labels)), labels), dataset_of(balanced(20), heldout), TOUCHED)[
        "downstream"
    ]
    assert found["n_train"] == found["train_on_real"]["n_train"] == 15


def test_the_same_twice_and_another_seed_differs(heldout):
    labels = balanced(30)
    train = Labelled(pictures(labels), labels)
    config = DownstreamConfig(steps=5, batch_size=8)
    first = scores_of(train, pictures(heldout), 3, config, CPU)
    torch.rand(3)  # whatever was drawn in between
    assert np.array_equal(first, scores_of(train, pictures(heldout), 3, config, CPU))
    other = scores_of(train, pictures(heldout), 3, DownstreamConfig(steps=5, batch_size=8, seed=1), CPU)
    assert not np.allclose(first, other)
    assert np.exp(first).sum(1) == pytest.approx(np.ones(len(heldout)))


def test_unknown_classes_are_left_out_and_counted(heldout):
    dataset = dataset_of(balanced(30), heldout)
    for record, label in zip(dataset.records[-10:], [None, "unseen"] * 5, strict=True):
        record.label = label
    labels = balanced(30)
    found = measured(Labelled(pictures(labels), labels), dataset)["downstream"]
    assert (found["n"], found["n_unlabelled"]) == (80, 10) and found["accuracy"] > 0.9


def test_patients_widen_the_interval(heldout):
    labels = balanced(30)
    generated = Labelled(pictures(labels), np.random.default_rng(0).permutation(labels))
    alone, pairs = (
        measured(generated, dataset_of(balanced(30), heldout, groups=groups), TOUCHED)["downstream"]
        for groups in (False, True)
    )
    assert alone["accuracy"] == pairs["accuracy"]
    assert alone["accuracy_ci95_method"] == "Wilson" and "45 groups" in pairs["accuracy_ci95_method"]


@pytest.mark.parametrize("case", ["one class held out", "no labelled generation", "diverged"])
@pytest.mark.filterwarnings("ignore:overflow|invalid")
def test_null_with_a_reason(heldout, case, monkeypatch):
    labels = balanced(12)
    generated, dataset = Labelled(pictures(labels), labels), dataset_of(balanced(12), heldout)
    if case == "one class held out":
        dataset = dataset_of(balanced(12), np.zeros(20, dtype=np.int64))
    elif case == "no labelled generation":
        generated.labels = np.full(12, -1)
    else:
        monkeypatch.setattr("eval.downstream.scores_of", lambda *_: np.full((len(heldout), 3), np.nan))
    found = measured(generated, dataset, TOUCHED)
    assert found["downstream"] is None and found["downstream_reason"]
    report = fabricate_report()
    report["utility"] |= found
    assert any(line.endswith(f"The reason: {found['downstream_reason']}.") for line in wording.not_measured(report))


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (17, 3), (28, 4), (150, 3)])
def test_any_size_and_channels(size, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, channels, size, size), dtype=np.uint8)
    model = Classifier(channels, 5).eval()
    assert model(torch.from_numpy(images)).shape == (3, 5)
    assert sum(p.numel() for p in model.parameters()) < 30_000


def test_labels_come_from_the_index(tmp_path):
    rows = [
        ("000000.png", "2"),
        ("000001.png", "0"),
        ("000002.png", ""),
        ("000003.png", "a prompt"),
        ("000004.png", "3"),
    ]
    with (tmp_path / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("file", "index", "seed", "condition"), *((name, i, 0, c) for i, (name, c) in enumerate(rows))]
        )
    names = ["000001.png", "000000.png", "000002.png", "000003.png", "000004.png", "other.png"]
    assert labels_of_generations(tmp_path, names, 3).tolist() == [0, 2, -1, -1, -1, -1]
    assert labels_of_generations(tmp_path / "nowhere", names[:2], 3).tolist() == [-1, -1]


@given(st.integers(0, 10_000))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_macro_auc_by_counting_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, (25, 4)).astype(float), rng.integers(0, 3, 25)  # ties; class 3 has no picture
    areas = []
    for column in range(4):
        inside, outside = scores[labels == column, column], scores[labels != column, column]
        if len(inside) and len(outside):
            pairs = inside[:, None] - outside[None]
            areas.append(((pairs > 0) + (pairs == 0) / 2).mean())
    assert macro_auc(scores, labels) == pytest.approx(np.mean(areas))
    assert macro_auc(scores, np.zeros(25, dtype=np.int64)) is None


def test_both_pages_show_it(tmp_path):
    run = Fabricated(tmp_path / "run")
    run.report["utility"] |= {"downstream": fabricate_downstream(), "downstream_reason": None}
    render(run.folder, run.report, images=run.image, restricted=False, config=ReportConfig())
    page = (run.folder / "report.html").read_text()
    page = page[: page.index("Every field of report.json")]
    narrow = "\N{NARROW NO-BREAK SPACE}"
    for text in (
        f"72.9{narrow}%",
        f"60.4{narrow}% to 82.5{narrow}%",
        f"90.2{narrow}%",
        "0.853",
        "0.971",
        f"40.7{narrow}%",
    ):
        assert text in page
    assert "nothing was chosen by looking at the held-out pictures" in page and "private pictures" in page
    card = model_card(run.report)
    assert f"72.9{narrow}%" in card and f"trained on as many real pictures on 90.2{narrow}%" in card


@pytest.mark.parametrize(
    ("change", "key"),
    [({"steps": 0}, "steps"), ({"batch_size": 1}, "batch_size"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_bad_settings_are_named(change, key):
    with pytest.raises(UserError) as error:
        DownstreamConfig(**change)
    assert error.value.key == f"utility.downstream.{key}"


def test_switched_on_by_braces_and_refused_without_classes(tmp_path):
    _, config = small_config(tmp_path, "utility.downstream={}", "data.label_key=finding")
    assert config.utility.downstream == DownstreamConfig()
    check(config)
    config.data.label_key = None
    with pytest.raises(UserError, match="utility.downstream"):
        check(config)
    check(SimpleNamespace(**vars(config), pipeline="folder"))
