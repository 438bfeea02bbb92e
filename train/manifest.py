"""What became of every record: manifest.csv, and the counts of report.json."""

from collections import Counter
from pathlib import Path
from typing import Any

from train.data import Dataset
from train.files import write_csv

MANIFEST_COLUMNS = [
    "record_id", "source", "sha256", "group", "split", "copies", "cluster", "kept", "reason",
    "duplicate_of", "distance",
]  # fmt: skip


def write_manifest(dataset: Dataset, path: Path) -> None:
    """Writes ``manifest.csv``: one row per record, rejected ones too."""
    rows = ({column: getattr(record, column) for column in MANIFEST_COLUMNS} for record in dataset.records)
    write_csv(path, MANIFEST_COLUMNS, rows)


def summary(dataset: Dataset) -> dict[str, Any]:
    """Counts for the report: records per split (before any defense), distinct pictures and units of the training split.

    found = rejected + train + calibration + heldout, and with canaries + their ``set_aside``: held-out pictures that left for
    them. Nothing else here counts a canary. ``reasons`` counts rejections by their kind, the part before the
    colon; ``notes`` counts pictures where something had to be decided, such as the bit depth.
    """
    found = [record for record in dataset.records if record.canary in ("", "origin")]
    splits = Counter(record.split for record in found)
    train = [record for record in found if record.split == "train"]
    groups = {record.group for record in train if record.group is not None}
    has_groups = any(record.group is not None for record in found)
    return {
        "found": len(found),
        "rejected": splits[""],
        **{split: splits[split] for split in ("train", "calibration", "heldout")},
        "clusters": len({record.cluster for record in train}),
        "units": len(groups) + sum(record.group is None for record in train),
        "unit": "group" if has_groups else "record",
        "reasons": dict(Counter(record.reason.split(":")[0] for record in dataset.records if record.split == "")),
        "ignored_files": dataset.ignored,
        "notes": dataset.notes,
        "canaries": _canaries(dataset),
    }


def _canaries(dataset: Dataset) -> dict[str, int] | None:
    """What the trainer planted: pictures and their records in training, those left to a coin, those of the pool, and the
    held-out pictures set aside."""
    records = [record for record in dataset.records if record.canary]
    parts = Counter(record.canary for record in records)
    if not parts:
        return None
    return {
        "pictures": len({record.cluster for record in records if record.canary == "planted"}),
        "records": parts["planted"],
        "coins": parts["coin"],
        "pool": parts["pool"],
        "set_aside": parts["origin"],
    }
