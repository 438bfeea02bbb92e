"""Listing of sources: what is an item, what its columns mean, and what is refused."""

import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from defenses.errors import UserError
from train.dataconfig import DataConfig
from train.images import Rejected
from train.sources import Item, open_source


def picture(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 9), level).save(path)


def listing(spec, key="data.source", **settings) -> list[Item]:
    return open_source(str(spec), DataConfig(source=str(spec), **settings), key).items


def failure(spec, **settings) -> UserError:
    with pytest.raises(UserError) as caught:
        listing(spec, **settings)
    assert "\n" not in str(caught.value)
    return caught.value


def with_metadata(folder, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def test_every_file_is_an_item_or_counted_as_ignored(tmp_path):
    for name in ("a.png", "sub/b.PNG", "sub/.hidden.png", ".git/c.png"):
        picture(tmp_path / name)
    for name in ("LICENSE", "license.txt", "README.md", "notes.txt", "labels.csv", "film", "film.dcm", "readme.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    picture(tmp_path / "license.png")
    source = open_source(str(tmp_path), DataConfig())
    assert [item.source for item in source.items] == ["a.png", "film", "film.dcm", "license.png", "sub/b.PNG"]
    assert source.ignored == 7  # hidden.png and seven texts or papers, without the hidden folder


def test_sub_folders_are_labels_where_asked_for(tmp_path):
    picture(tmp_path / "images/x.png")
    picture(tmp_path / "train/cat/x.png")
    assert [item.label for item in listing(tmp_path)] == [None, None]
    assert [item.label for item in listing(tmp_path, label_key="label")] == ["images", "cat"]
    assert [item.group for item in listing(tmp_path, group_key="folder")] == ["images", "train/cat"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_columns(tmp_path, kind):
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / f"{name}.png")
    cells = [("./a.png", "one", "p1"), ("b.png", "two", ""), ("c.png", "", "nan"), ("gone.png", "four", "p1")]
    if kind == "jsonl":
        with_metadata(tmp_path, *({"file_name": f, "text": t, "who": w} for f, t, w in cells))
    else:
        rows = ["file_name,text,who", *(",".join(row) for row in cells)]
        (tmp_path / "metadata.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    items = {item.source: item for item in listing(tmp_path, caption_key="text", group_key="who")}
    assert [items[f"{name}.png"].caption for name in "abc"] == ["one", "two", None]
    assert [items[f"{name}.png"].group for name in "abc"] == ["p1", None, None]  # an empty id is not one patient
    assert items["d.png"].problem == "not in metadata"
    assert items["gone.png"].problem.startswith("missing file")
    assert items["a.png"].read() == (tmp_path / "a.png").read_bytes()


def test_numbers_and_nothing_as_cells(tmp_path):
    cells = [7, 7.0, "7", float("nan"), None, " ", True]
    for index in range(len(cells)):
        picture(tmp_path / f"{index}.png")
    with_metadata(tmp_path, *({"file_name": f"{index}.png", "who": cell} for index, cell in enumerate(cells)))
    assert [item.group for item in listing(tmp_path, group_key="who")] == ["7", "7", "7", None, None, None, "True"]


@pytest.mark.parametrize(
    "name",
    ["../out.png", "a/../../out.png", "/etc/passwd", "link.png", "file:///etc/passwd", "..\\out.png", "C:/out.png",
     "loop/x.png", "a\0b", "https://host/x.png", "\ud800.png"],
)  # fmt: skip
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    picture(tmp_path / "out.png")
    root = tmp_path / "root"
    picture(root / "in.png")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "loop").symlink_to(root / "loop")
    error = failure(with_metadata(root, {"file_name": "in.png"}, {"file_name": name}))
    assert error.key == "data.source" and "metadata.jsonl line 2" in error.problem


def test_links_are_listed_not_followed(tmp_path):
    picture(tmp_path / "out/x.png")
    root = tmp_path / "root"
    picture(root / "in.png")
    (root / "file.png").symlink_to(tmp_path / "out/x.png")
    (root / "folder").symlink_to(tmp_path / "out")
    (root / "inside.png").symlink_to(root / "in.png")
    (root / "self.png").symlink_to(root / "self.png")
    os.mkfifo(root / "pipe.png")
    problems = {item.source: item.problem for item in listing(root)}
    assert problems == {
        "in.png": "",
        "inside.png": "",
        "file.png": "link out of the folder",
        "folder": "link to a folder: not followed",
        "self.png": "not a regular file",
        "pipe.png": "not a regular file",
    }


def test_metadata_may_name_hidden_files_and_links_inside_the_folder(tmp_path):
    picture(tmp_path / ".data/a.png")
    (tmp_path / "link").symlink_to(tmp_path / ".data")
    with_metadata(tmp_path, {"file_name": ".data/a.png"}, {"file_name": "link/a.png"}, {"file_name": ".data/b.png"})
    assert [(item.source, item.problem[:12]) for item in listing(tmp_path)] == [
        (".data/a.png", ""), (".data/b.png", "missing file"), ("link", "link to a fo"), ("link/a.png", "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        (["", {"text": "x"}], "line 2: no file_name"),
        ([{"file_name": 3}], "line 1: no file_name"),
        ([{"file_name": "a.png"}, {"file_name": "./a.png"}], "line 2: 'a.png' is named twice"),
        (["[" * 100_000], "line 1 is not JSON"),
    ],
)
def test_broken_metadata(tmp_path, lines, text):
    picture(tmp_path / "a.png")
    assert text in failure(with_metadata(tmp_path, *lines)).problem


def test_broken_encodings_and_tables(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x,y\n")
    assert "line 2 has more cells" in failure(tmp_path).problem
    (tmp_path / "metadata.csv").write_bytes(b"file_name\n\xff\xfe.png\n")
    assert "cannot be read" in failure(tmp_path).problem
    (tmp_path / "metadata.jsonl").write_text("")
    assert "both metadata.jsonl and metadata.csv" in failure(tmp_path).problem


@pytest.mark.parametrize("key", ["caption_key", "label_key", "group_key", "split_key"])
def test_unknown_columns_name_those_that_exist(tmp_path, key):
    picture(tmp_path / "a.png")
    error = failure(with_metadata(tmp_path, {"file_name": "a.png", "text": "x", "who": 1}), **{key: "nope"})
    assert error.key == f"data.{key}" and "text, who" in error.remedy


def test_heldout_sources_need_no_columns(tmp_path):
    picture(tmp_path / "a.png")
    assert (
        listing(tmp_path, key="data.heldout_source", caption_key="text", group_key="who", split_key="s")[0].split
        is None
    )
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "none"), DataConfig(), "data.heldout_source")
    assert caught.value.key == "data.heldout_source"


def test_split_words(tmp_path):
    words = ["train", "valid", "Validation", "val", "calibration", "test", "heldout"]
    for index in range(len(words)):
        picture(tmp_path / f"{index}.png")
    with_metadata(tmp_path, *({"file_name": f"{i}.png", "fold": word} for i, word in enumerate(words)))
    assert [item.split for item in listing(tmp_path, split_key="fold")] == ["train"] + ["calibration"] * 4 + [
        "heldout"
    ] * 2
    with_metadata(tmp_path, *({"file_name": f"{i}.png", "fold": i} for i in range(len(words))))
    assert failure(tmp_path, split_key="fold").key == "data.split_key"


def test_lists_are_no_labels(tmp_path):
    picture(tmp_path / "a.png")
    assert failure(with_metadata(tmp_path, {"file_name": "a.png", "who": [1]}), group_key="who").key == "data.group_key"


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"f\xfflm.png")).write_bytes(b"x")
    (item,) = listing(tmp_path)
    assert item.source == "f\\xfflm.png" and item.read() == b"x"


def test_large_files_are_not_read(tmp_path):
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate(3 * 2**20)
    (item,) = listing(tmp_path, max_pixels=100)
    with pytest.raises(Rejected, match="too large"):
        item.read()


def test_npz(tmp_path):
    images = np.arange(2 * 9 * 9, dtype=np.uint8).reshape(2, 9, 9)
    path = tmp_path / "x.npz"
    np.savez(path, train_images=images, train_labels=[[1], [0]], test_images=images[:1], classes=["cat", "dog"])
    first, second = listing(path, label_key="label")
    assert (first.source, first.label, second.label) == ("row/0", "dog", "cat")
    assert np.array_equal(second.read(), images[1])
    (test,) = listing(f"{path}#test")
    assert test.label is None and test.stamp != first.stamp
    assert "train_images, train_labels" in failure(f"{path}#nope").remedy
    np.savez(path, images=images.astype(float))
    assert "float64" in failure(path).problem
    np.savez(path, images=np.array([object()]))
    assert "not a readable .npz file" in failure(path).problem  # pickles stay closed
    path.write_bytes(b"PK\3\4")
    assert "not a readable .npz file" in failure(path).problem


@pytest.fixture
def saved(tmp_path):
    """A data set as `datasets` saves it: three pictures, one of them missing, with class labels."""
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for level, file in enumerate(files):
        picture(file, level)
    features = datasets.Features(
        image=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]), who=datasets.Value("int64")
    )
    cells = {"image": [str(files[0]), {"bytes": files[1].read_bytes(), "path": None}, None], "kind": [1, 0, None]}
    return tmp_path, datasets.Dataset.from_dict({**cells, "who": [5, None, 5]}, features)


def test_saved_data_set(saved):
    folder, data = saved
    data.save_to_disk(str(folder / "one"))
    items = listing(folder / "one", label_key="kind", group_key="who")
    assert [(item.source, item.label, item.group) for item in items] == [
        ("row/0", "dog", "5"), ("row/1", "cat", None), ("row/2", None, "5")
    ]  # fmt: skip
    assert items[0].read() == (folder / "0.png").read_bytes() and items[1].read() == (folder / "1.png").read_bytes()
    with pytest.raises(Rejected, match="missing picture"):
        items[2].read()
    assert "kind, who" in failure(folder / "one", label_key="nope").remedy
    assert failure(f"{folder / 'one'}#test").key == "data.source"


def test_saved_data_set_with_parts(saved):
    folder, data = saved
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(folder / "many"))
    assert "train, test" in failure(folder / "many").problem
    assert "train, test" in failure(f"{folder / 'many'}#nope").problem
    assert len(listing(f"{folder / 'many'}#test")) == 1


def test_rows_cannot_point_outside_of_the_data_set(saved, monkeypatch):
    folder, data = saved
    (folder / "one").mkdir()
    (folder / "one/state.json").write_text("{}")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: data)  # keeps the path of 0.png instead of its bytes
    items = listing(folder / "one")
    with pytest.raises(Rejected, match="link out of the data set"):
        items[0].read()


def test_parquet_folder(saved, monkeypatch, tmp_path):
    folder, data = saved
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "pq").mkdir()
    data.select([1, 1]).to_parquet(str(folder / "pq/train.parquet"))
    items = listing(folder / "pq", label_key="kind")
    assert [item.label for item in items] == ["cat", "cat"] and items[0].read() == (folder / "1.png").read_bytes()


def test_hub_names_and_masked_tokens(saved, monkeypatch):
    calls = []

    def load(name, revision=None):
        calls.append((name, revision))
        if name == "private/x":
            raise ConnectionError("401 for token hf_abcDEF123\nsecond line")
        return datasets.DatasetDict(train=saved[1], test=saved[1].select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(listing("hub:owner/name@v1#test")) == 1
    assert len(listing("hub:owner/name#train")) == 3
    assert calls == [("owner/name", "v1"), ("owner/name", None)]
    error = failure("hub:private/x")
    assert "hf_***" in str(error) and "abcDEF" not in str(error)


def test_unreadable_or_unsuitable_sources(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    assert "cannot be opened" in failure(tmp_path).problem
    assert "does not exist" in failure(tmp_path / "none").problem
    assert "neither a folder nor" in failure(tmp_path / "dataset_info.json").problem
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(str(tmp_path / "plain"))
    assert "0 picture columns" in failure(tmp_path / "plain").problem
    picture(tmp_path / "folder/a.png")
    assert "no part" in failure(f"{tmp_path / 'folder'}#train").problem


def test_phantom_carries_its_split():
    items = listing("phantom", group_key="patient", caption_key="caption", label_key="label")
    assert {item.split for item in items} == {"train", "calibration", "heldout"}
    assert all(item.group and item.caption and item.label for item in items)
    assert items[0].read().shape == (32, 32) and items[0].read().dtype == np.uint8
    assert listing("phantom", channels=3)[0].read().shape == (32, 32, 3)
