"""Several captions of one picture: from metadata and data sets to records and pool; folders that were prepared before there were any."""

import hashlib
import json
from dataclasses import asdict

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from defenses.errors import UserError
from train.data import Dataset, prepare
from train.dataconfig import DataConfig
from train.records import pool_of
from train.sources import open_source

CAPTIONS = [["one", " ", "zwei", "three "], "a single one", [], None, [7, None], ["", "last"]]
FIRST, MORE = ["one", "a single one", None, None, "7", "last"], [["zwei", "three"], [], [], [], [], []]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    lines = []
    for index, cell in enumerate(CAPTIONS):
        levels = np.random.default_rng(index).integers(0, 256, (16, 16))
        Image.fromarray(levels.astype(np.uint8)).save(root / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": cell, "split": "train"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def config(source, **settings):
    settings = {"caption_key": "text", "split_key": "split"} | settings
    return DataConfig(source=str(source), image_size=16, **settings)


def test_a_list_of_captions(folder):
    items = open_source(str(folder), config(folder)).items
    assert [item.caption for item in items] == FIRST
    assert [list(item.more_captions) for item in items] == MORE


def test_a_column_of_lists_in_a_data_set(folder, tmp_path):
    cells = {"image": [str(folder / "0.png"), str(folder / "1.png")], "text": [["one", "two"], ["three"]]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Sequence(datasets.Value("string")))
    datasets.Dataset.from_dict(cells, features).save_to_disk(str(tmp_path / "saved"))
    items = open_source(str(tmp_path / "saved"), config(tmp_path / "saved", split_key=None)).items
    assert [(item.caption, item.more_captions) for item in items] == [("one", ("two",)), ("three", ())]


def test_only_captions_may_be_lists(folder):
    with pytest.raises(UserError, match=r"data\.label_key.*list"):
        open_source(str(folder), config(folder, caption_key=None, label_key="text"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": [["nested"]]}) + "\n")
    with pytest.raises(UserError, match=r"data\.caption_key.*list"):
        open_source(str(folder), config(folder, split_key=None))


def test_records_and_pool_have_them(folder, tmp_path):
    data = prepare(config(folder), tmp_path / "data", Accelerator(cpu=True))
    assert [record.caption for record in data.records] == FIRST
    assert [record.more_captions for record in data.records] == MORE
    pool = pool_of(data, 0)
    assert pool.caption == FIRST and pool.more_captions == MORE


def test_another_list_is_another_data_set(folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    prepare(config(folder), tmp_path / "data", accelerator)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("zwei", "two"))
    with pytest.raises(UserError, match="prepared from other files"):
        prepare(config(folder), tmp_path / "data", accelerator)


def test_folders_prepared_without_several_captions_load(folder, tmp_path):
    """The digest of single captions is what it was, and so are the lines of the records."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    single = [line | {"text": first} for line, first in zip(lines, FIRST, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in single))
    data = prepare(config(folder), tmp_path / "data", Accelerator(cpu=True))
    settings = {
        key: value
        for key, value in asdict(config(folder)).items()
        if key not in ("source", "heldout_source", "heldout_exchangeable", "restricted", "phantom", "canaries")
    }
    digest = hashlib.sha256(json.dumps([settings, False], sort_keys=True).encode())
    for item in open_source(str(folder), config(folder)).items:
        parts = (item.source, item.stamp, item.problem, item.caption, item.label, item.group, item.split)
        digest.update(json.dumps(parts).encode())
    assert json.loads((tmp_path / "data/prepared.json").read_text())["digest"] == digest.hexdigest()
    before = [asdict(record) for record in data.records]
    for record in before:
        del record["more_captions"]
    (tmp_path / "data/records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in before))
    assert Dataset.load(tmp_path / "data").records == data.records
