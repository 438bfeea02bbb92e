"""Downstream use: a small classifier trained on generations and tested on real pictures, beside one trained on real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F

from defenses.errors import UserError
from defenses.ranks import together
from defenses.seeding import derive, generator
from eval.evidence import read_table
from eval.intervals import rate_interval
from train.data import Dataset

SIDE = 64  # pixels; larger pictures are averaged down to it, which bounds the cost
TEST_BATCH = 256  # pictures per forward pass of the test; changes results by rounding only


@dataclass(kw_only=True)
class DownstreamConfig:
    """Section ``utility.downstream``; null: not measured. The budget is fixed: nothing is chosen by looking at results."""

    steps: int = 500  # optimizer steps of each of the two classifiers; the last weights are tested
    batch_size: int = 64  # pictures per step, drawn with replacement
    learning_rate: float = 1e-3  # of Adam at the first step; falls to 0 along a cosine
    seed: int = 0  # of weights, batches and the pictures drawn; apart from run.seed, so that all arms train alike

    def __post_init__(self):
        for key, least in (("steps", 1), ("batch_size", 2)):
            if getattr(self, key) < least:
                problem, remedy = f"{getattr(self, key)} is less than {least}", f"take {least} or more"
                raise UserError(f"utility.downstream.{key}", problem, remedy)
        if not 0 < self.learning_rate <= 1:
            raise UserError("utility.downstream.learning_rate", f"is {self.learning_rate}", "take 0 < rate <= 1")


@dataclass
class Labelled:
    """Pictures with their classes.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], class indices.
    """

    images: np.ndarray
    labels: np.ndarray


class Classifier(nn.Module):
    """Three 3x3 convolutions with batch norm and pooling, a 2x2 mean, a linear layer: 26 thousand parameters for 10 classes."""

    WIDTHS = (16, 32, 64)

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *self.WIDTHS), self.WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * self.WIDTHS[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] -> logits, float32 [B, classes]."""
        x = images.float() / 127.5 - 1
        if max(x.shape[2:]) > SIDE:
            x = F.adaptive_avg_pool2d(x, SIDE)
        return self.head(self.features(x))


def measure_downstream(
    generated: Labelled,
    dataset: Dataset,
    classes: list[str],
    config: DownstreamConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The report's ``utility.downstream``, on every rank: rank 0 trains on generations, rank 1 (or 0) on real pictures.

    Both classifiers see equal numbers of pictures, the same settings, initial weights and draws, and are tested on the
    held-out records that have one of the classes. Real pictures are distinct ones of the training split, before any
    defense, so that every arm of a comparison has the same yardstick.

    Args:
        generated: generations; label -1 (no class) is left out.
        classes: labels of the model's classes, in the order of their indices.

    Returns:
        ``{"downstream": ..., "downstream_reason": ...}``; one of them is None.
    """
    test, block, grouped = _heldout(dataset, classes)
    real_rows = _distinct_training_rows(dataset, classes, config.seed)
    known = np.flatnonzero(generated.labels >= 0)
    n = min(len(known), len(real_rows))
    if len(np.unique(test.labels)) < 2:
        return not_measured("fewer than 2 of the model's classes have held-out pictures")
    if n == 0:
        return not_measured("there is no labelled generation, or no labelled training picture")
    chosen = np.sort(_shuffled(known, config.seed, "generated")[:n])
    real_rows = np.sort(real_rows[:n])
    jobs = {
        "generations": Labelled(generated.images[chosen], generated.labels[chosen]),
        "real": Labelled(dataset.images[real_rows], _class_indices(dataset, real_rows, classes)),
    }
    mine = list(jobs)[accelerator.process_index :: accelerator.num_processes]

    def work() -> list[tuple[str, np.ndarray]]:
        return [(name, scores_of(jobs[name], test.images, len(classes), config, accelerator.device)) for name in mine]

    scores = dict(gather_object(together(accelerator, work)))
    if not all(np.isfinite(values).all() for values in scores.values()):
        return not_measured("the classifier diverged: utility.downstream.learning_rate is too high")
    return {
        "downstream": {
            "task": "classification",
            "classes": len(classes),
            "n": len(test.labels),
            "n_unlabelled": len(dataset.rows("heldout")) - len(test.labels),
            "most_frequent": float(np.bincount(test.labels).max() / len(test.labels)),
            **figures(scores["generations"], test.labels, block, grouped),
            "n_train": n,
            "train_on_real": {**figures(scores["real"], test.labels, block, grouped), "n_train": n},
            "settings": {
                "steps": config.steps,
                "batch_size": config.batch_size,
                "learning_rate": config.learning_rate,
                "seed": config.seed,
                "largest_side": SIDE,
                "weights": "last",
            },
        },
        "downstream_reason": None,
    }


def not_measured(reason: str) -> dict[str, None | str]:
    """The report's fields where downstream use was not measured."""
    return {"downstream": None, "downstream_reason": reason}


def labels_of_generations(folder: Path, names: list[str], classes: int) -> np.ndarray:
    """Class of each generated file from ``folder/index.csv``, int64 [n]; -1 where none is known."""
    known = {row["file"]: row.get("condition") or "" for row in read_table(folder / "index.csv")}
    texts = [known.get(name, "") for name in names]
    labels = np.array([int(text) if text.isdecimal() else -1 for text in texts], dtype=np.int64)
    return np.where(labels < classes, labels, -1)


def scores_of(
    train: Labelled, images: np.ndarray, classes: int, config: DownstreamConfig, device: torch.device
) -> np.ndarray:
    """Log-probabilities of a classifier trained on ``train`` for ``images``, float64 [N, classes]."""
    model = train_classifier(train, classes, config, device).eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), TEST_BATCH):
            batch = torch.from_numpy(np.array(images[start : start + TEST_BATCH])).to(device)
            parts.append(model(batch).double().log_softmax(1).cpu().numpy())
    return np.concatenate(parts)


def train_classifier(train: Labelled, classes: int, config: DownstreamConfig, device: torch.device) -> Classifier:
    """A classifier after ``config.steps`` of Adam; no augmentation, which could turn one class into another."""
    torch.manual_seed(derive(config.seed, "downstream", "weights"))
    model = Classifier(train.images.shape[1], classes).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    images, labels = torch.from_numpy(np.array(train.images)), torch.from_numpy(train.labels)
    random = generator(config.seed, "downstream", "batches")
    for _ in range(config.steps):
        chosen = torch.randint(len(labels), (config.batch_size,), generator=random)
        loss = F.cross_entropy(model(images[chosen].to(device)), labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def figures(scores: np.ndarray, labels: np.ndarray, block: np.ndarray, grouped: bool) -> dict[str, Any]:
    """Accuracy with its interval, and macro AUC.

    Args:
        scores: float64 [N, classes], larger is likelier.
        labels: int64 [N].
        block: int64 [N]; the interval counts a block (patient) as one trial where ``grouped``.
    """
    correct = scores.argmax(1) == labels
    low, high, method = rate_interval(correct, block, grouped)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": [low, high],
        "accuracy_ci95_method": method,
        "macro_auc": macro_auc(scores, labels),
    }


def macro_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Unweighted mean over classes of the one-vs-rest AUC; over those that some, but not all, of the pictures have.

    The AUC of a class is the share of (in class, not in class) pairs whose scores are in the right order, ties counting
    half: the Mann-Whitney statistic (Hanley and McNeil 1982).

    Args:
        scores: float64 [N, classes]; column c ranks the pictures by class c.
        labels: int64 [N].
    """
    areas = []
    for column in range(scores.shape[1]):
        inside = labels == column
        positives, negatives = int(inside.sum()), int((~inside).sum())
        if positives and negatives:
            ranks = rankdata(scores[:, column])[inside].sum()
            areas.append((ranks - positives * (positives + 1) / 2) / (positives * negatives))
    return float(np.mean(areas)) if areas else None


def _heldout(dataset: Dataset, classes: list[str]) -> tuple[Labelled, np.ndarray, bool]:
    """Held-out records of the classes, their blocks, and whether blocks hold groups."""
    rows = dataset.rows("heldout")
    labels = _class_indices(dataset, rows, classes)
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    block = np.array([dataset.records[row].block for row in rows], dtype=np.int64)
    grouped = any(dataset.records[row].group is not None for row in rows)
    return Labelled(dataset.images[rows], labels), block, grouped


def _distinct_training_rows(dataset: Dataset, classes: list[str], seed: int) -> np.ndarray:
    """Labelled training rows in random order, one per picture: copies teach a classifier nothing new."""
    rows = dataset.rows("train")
    rows = _shuffled(rows[_class_indices(dataset, rows, classes) >= 0], seed, "real")
    clusters = np.array([dataset.records[row].cluster for row in rows], dtype=np.int64)
    return rows[np.sort(np.unique(clusters, return_index=True)[1])]


def _class_indices(dataset: Dataset, rows: np.ndarray, classes: list[str]) -> np.ndarray:
    """int64 [n]; -1 for records without a label, or with one that the model was not trained on."""
    index = {name: position for position, name in enumerate(classes)}
    return np.array([index.get(dataset.records[row].label, -1) for row in rows], dtype=np.int64)


def _shuffled(values: np.ndarray, seed: int, part: str) -> np.ndarray:
    return np.random.Generator(np.random.Philox(derive(seed, "downstream", part))).permutation(values)
