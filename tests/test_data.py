"""From sources to records on disk: counts that add up, splits that leak nothing, resumption, the manifest."""

import csv
import json
import shutil
import stat

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from defenses.errors import UserError
from train.data import Dataset, prepare
from train.dataconfig import DataConfig
from train.manifest import summary, write_manifest


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def noise(seed: int) -> np.ndarray:
    """A picture of its own: coarse blocks, so that no two are alike."""
    return np.kron(np.random.default_rng(seed).integers(0, 256, (8, 8)), np.ones((2, 2))).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """24 pictures of 12 patients; 20 and 21 repeat picture 0 under other patients; 3 files are unusable."""
    root = tmp_path / "source"
    root.mkdir()
    lines = []
    for index in range(24):
        Image.fromarray(noise(0 if index in (20, 21) else index)).save(root / f"{index:02d}.png")
        lines.append({"file_name": f"{index:02d}.png", "who": f"patient-{index // 2}", "text": "=1+1"})
    (root / "broken.png").write_bytes(b"nonsense")
    (root / "unlisted.png").write_bytes((root / "05.png").read_bytes())
    lines += [{"file_name": "broken.png", "who": "patient-0"}, {"file_name": "gone.png", "who": "patient-0"}]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def config(source, **settings) -> DataConfig:
    return DataConfig(source=str(source), image_size=16, **settings)


def failure(*arguments, **settings) -> UserError:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return caught.value


def test_counts_add_up_and_nothing_leaks(folder, tmp_path, accelerator):
    data = prepare(config(folder, group_key="who", heldout_fraction=0.3), tmp_path / "data", accelerator)
    counts = summary(data)
    assert counts["found"] == 27 and counts["rejected"] == 3 and counts["ignored_files"] == 1
    assert counts["train"] + counts["calibration"] + counts["heldout"] == 24
    assert counts["reasons"] == {"not a readable image": 1, "missing file": 1, "not in metadata": 1}
    by_source = {record.source: record for record in data.records}
    copies = [by_source[f"{index:02d}.png"] for index in (0, 20, 21)]
    assert len({record.cluster for record in copies}) == 1 and {record.copies for record in copies} == {3}
    assert len({record.block for record in [*copies, by_source["01.png"]]}) == 1  # joined by picture and by patient
    usable = [record for record in data.records if record.split]
    assert all(record.kept for record in usable)
    for key in ("group", "cluster", "block"):
        for value in {getattr(record, key) for record in usable}:
            assert len({record.split for record in usable if getattr(record, key) == value}) == 1
    train = [record for record in usable if record.split == "train"]
    assert counts["clusters"] == len({record.pixel_hash for record in train})
    assert counts["units"] == len({int(record.source[:2]) // 2 for record in train}) and counts["unit"] == "group"


def test_pixels_are_those_of_the_files_and_zero_if_rejected(folder, tmp_path, accelerator):
    data = prepare(config(folder), tmp_path / "data", accelerator)
    assert data.images.shape == (27, 1, 16, 16) and data.images.dtype == np.uint8
    for row, record in enumerate(data.records):
        if record.split:
            assert np.array_equal(data.images[row, 0], np.asarray(Image.open(folder / record.source)))
        else:
            assert not data.images[row].any() and (record.cluster, record.copies, record.block) == (-1, 0, -1)
            assert record.pixel_hash == "" and record.reason
    rows = np.concatenate([data.rows(split) for split in ("train", "calibration", "heldout", "")])
    assert sorted(rows.tolist()) == list(range(27))
    assert data.rows("train", kept=False).tolist() == []


def test_files_are_private_and_hold_no_patient_id(folder, tmp_path, accelerator):
    data = prepare(config(folder, group_key="who"), tmp_path / "data", accelerator)
    write_manifest(data, tmp_path / "manifest.csv")
    texts = [(tmp_path / "manifest.csv").read_text(), (tmp_path / "data/records.jsonl").read_text()]
    assert all("patient-" not in text for text in texts)
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    other = prepare(config(folder, group_key="who"), tmp_path / "other", accelerator)
    assert {r.group for r in data.records}.isdisjoint({r.group for r in other.records} - {None})  # salted per folder


def test_manifest(folder, tmp_path, accelerator):
    Image.fromarray(noise(99)).save(folder / "=cmd.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "=cmd.png"}\n')
    data = prepare(config(folder, group_key="who"), tmp_path / "data", accelerator)
    data.records[3].distance, data.records[3].duplicate_of = 0.25, data.records[0].record_id
    write_manifest(data, tmp_path / "manifest.csv")
    with (tmp_path / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "record_id", "source", "sha256", "group", "split", "copies", "cluster", "kept", "reason", "duplicate_of", "distance"
    ]  # fmt: skip
    assert len(rows) == 28 and {row["kept"] for row in rows} == {"true", "false"}
    assert "'=cmd.png" in [row["source"] for row in rows]
    assert (rows[3]["distance"], rows[3]["duplicate_of"]) == ("0.25", data.records[0].record_id)


def test_second_time_loads_and_other_data_are_refused(folder, tmp_path, accelerator, monkeypatch):
    first = prepare(config(folder, group_key="who"), tmp_path / "data", accelerator)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    monkeypatch.setattr("train.data.decode_shard", None)  # would fail if anything were decoded again
    again = prepare(config(moved, group_key="who", restricted=True), tmp_path / "data", accelerator)
    assert again.records == first.records == Dataset.load(tmp_path / "data").records
    assert failure(config(folder, group_key="who", split_seed=1), tmp_path / "data", accelerator).key == "data"
    (moved / "05.png").write_bytes(b"changed")
    assert failure(config(moved, group_key="who"), tmp_path / "data", accelerator).key == "data"


def test_an_interrupted_preparation_starts_again(folder, tmp_path, accelerator):
    first = prepare(config(folder), tmp_path / "data", accelerator)
    (tmp_path / "data/prepared.json").unlink()
    (tmp_path / "data/records.jsonl").write_text("{")
    assert prepare(config(folder), tmp_path / "data", accelerator).records == first.records


def test_bad_images_can_stop_the_run(folder, tmp_path, accelerator):
    error = failure(config(folder, on_bad_image="fail"), tmp_path / "data", accelerator)
    assert error.key == "data.on_bad_image" and "3 of 27" in error.problem and "'broken.png'" in error.problem


def test_nothing_usable_or_too_little(tmp_path, accelerator):
    root = tmp_path / "source"
    root.mkdir()
    assert "holds no pictures" in failure(config(root), tmp_path / "data", accelerator).problem
    (root / "a.png").write_bytes(b"")
    assert "none of 1 files" in failure(config(root), tmp_path / "data", accelerator).problem
    Image.fromarray(noise(1)).save(root / "a.png")
    assert "leaves 1 training pictures" in failure(config(root), tmp_path / "data", accelerator).problem


def test_heldout_source_without_known_pictures_and_groups(folder, tmp_path, accelerator):
    other = tmp_path / "other"
    other.mkdir()
    lines = []
    for index, (seed, who) in enumerate([(2, "x"), (101, "patient-3"), (102, "y"), (103, None), (104, "x")]):
        Image.fromarray(noise(seed)).save(other / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "who": who}) + "\n")
    (other / "metadata.jsonl").write_text("".join(lines))
    settings = config(folder, group_key="who", heldout_source=str(other), heldout_fraction=0.5)
    data = prepare(settings, tmp_path / "data", accelerator)
    held = {record.source: (record.split, record.reason) for record in data.records[-5:]}
    assert held == {
        "heldout:0.png": ("", "copy of a training picture"),
        "heldout:1.png": ("", "group of data.source"),
        "heldout:2.png": ("heldout", ""),
        "heldout:3.png": ("heldout", ""),
        "heldout:4.png": ("heldout", ""),
    }
    assert not data.images[-5:-3].any() and data.images[-3:].any()
    assert {record.split for record in data.records[:-5]} == {"train", "calibration", ""}
    assert summary(data)["heldout"] == 3 and summary(data)["found"] == 32
    shutil.rmtree(tmp_path / "data")
    same = config(folder, heldout_source=str(folder))
    assert failure(same, tmp_path / "data", accelerator).key == "data.heldout_source"


def test_all_train(folder, tmp_path, accelerator):
    data = prepare(config(folder, split_key="text"), tmp_path / "data", accelerator, all_train=True)
    assert len(data.rows("train")) == 24 and summary(data)["clusters"] == 22


def test_a_split_that_cuts_patients_is_refused(shared, tmp_path, accelerator):
    settings = DataConfig(source=str(shared / "cxr_nih1000"), image_size=16, group_key="patient_id", split_key="split")
    error = failure(settings, tmp_path / "data", accelerator)
    assert error.key == "data.split_key" and "30 groups" in error.problem
    assert not (tmp_path / "data").exists()  # known before anything is decoded


def test_known_exact_copies_share_a_cluster(shared, tmp_path, accelerator):
    settings = DataConfig(source=str(shared / "emoji"), image_size=16, channels=3, group_key="group_id")
    data = prepare(settings, tmp_path / "data", accelerator)
    truth = json.loads((shared / "emoji/duplicates.json").read_text())["exact_clusters"]
    by_source = {record.source: record for record in data.records}
    assert len(truth) == 15
    for names in truth:
        assert len({by_source[name].pixel_hash for name in names}) == 1
        assert len({(by_source[name].cluster, by_source[name].split) for name in names}) == 1
    hashes = [record.pixel_hash for record in data.records]
    assert len(hashes) - len(set(hashes)) == 17


def test_phantom_keeps_its_own_split(tmp_path, accelerator):
    from train.phantom import PhantomConfig

    small = PhantomConfig(pictures=30, copied=2, copies=5, outliers=1, heldout=10, calibration=6)
    data = prepare(DataConfig(phantom=small, group_key="patient", image_size=16), tmp_path / "data", accelerator)
    counts = summary(data)
    assert [counts[name] for name in ("train", "calibration", "heldout", "clusters")] == [38, 6, 10, 30]
    assert sorted(record.copies for record in data.records if record.copies > 1) == [5] * 10


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("data.image_size", {"image_size": 4}),
        ("data.image_size", {"image_size": 8}),  # phantom needs 16
        ("data.channels", {"channels": 2}),
        ("data.heldout_fraction", {"heldout_fraction": 1.0}),
        ("data.heldout_fraction", {"heldout_fraction": 0.6, "calibration_fraction": 0.4}),
        ("data.calibration_fraction", {"calibration_fraction": -0.1}),
        ("data.bit_depth", {"bit_depth": 7}),
        ("data.max_pixels", {"max_pixels": 0}),
        ("data.group_key", {"group_key": ""}),
        ("data.split_key", {"split_key": "s", "heldout_source": "x"}),
    ],
)
def test_settings_out_of_range(key, settings):
    with pytest.raises(UserError) as caught:
        DataConfig(**settings)
    assert caught.value.key == key


def test_exchangeable_unless_the_split_is_somebodys():
    assert DataConfig().exchangeable()
    assert DataConfig(source="folder").exchangeable()
    assert not DataConfig(source="folder", split_key="split").exchangeable()
    assert not DataConfig(source="folder", heldout_source="other").exchangeable()
    assert DataConfig(source="folder", heldout_source="other", heldout_exchangeable=True).exchangeable()
