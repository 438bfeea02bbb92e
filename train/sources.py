"""Where records come from: the embedded data set, folders of pictures, Hugging Face data sets, arrays.

All kinds are listed without reading a picture, and give the same items.
"""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from defenses.errors import UserError
from train.dataconfig import DataConfig
from train.imagefolder import list_folder, read_file
from train.images import Rejected
from train.listing import Listing, Row
from train.phantom import PhantomItem, phantom_items

SPLITS = {
    "train": "train", "training": "train",
    "valid": "calibration", "validation": "calibration", "val": "calibration", "calibration": "calibration",
    "test": "heldout", "heldout": "heldout", "held-out": "heldout",
}  # fmt: skip
BYTES_PER_PIXEL = 8  # largest size of an uncompressed picture (four channels of 16 bits)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture with what is known of it; `Row` explains source, read, problem and stamp."""

    source: str
    read: Callable[[], bytes | np.ndarray]
    caption: str | None = None
    more_captions: tuple[str, ...] = ()  # where the caption's column holds a list: all but the first
    label: str | None = None
    group: str | None = None
    split: str | None = None  # train, calibration or heldout, where the data say so
    problem: str = ""
    stamp: str = ""
    known_heldout: bool = False  # comes from data.heldout_source


@dataclass(frozen=True)
class Source:
    """The items of one source and the number of files that are no items (licences, hidden files ...)."""

    items: list[Item]
    ignored: int


def open_source(spec: str, config: DataConfig, key: str = "data.source") -> Source:
    """Lists a source.

    Args:
        spec: as in ``data.source``.
        key: the configuration key that ``spec`` comes from. For ``data.heldout_source``, columns that are not there
            count as empty and a split is not looked for.

    Raises:
        UserError: the source or a column is not there, or its metadata are unusable.
    """
    try:
        listing = _listing(spec, config)
    except UserError as error:
        raise UserError(key if error.key == "data.source" else error.key, error.problem, error.remedy) from error
    main = key == "data.source"
    split_key = "split" if listing.has_split else config.split_key
    columns = {
        "caption": _column(listing, "caption_key", config.caption_key, main),
        "label": _column(listing, "label_key", config.label_key, main),
        "group": _column(listing, "group_key", config.group_key, main),
        "split": _column(listing, "split_key", split_key, main) if main else None,
    }
    return Source([_item(row, columns) for row in listing.rows], listing.ignored)


def _listing(spec: str, config: DataConfig) -> Listing:
    if spec == "phantom":
        return _list_phantom(config)
    if spec.startswith("hub:"):
        name, _, part = spec.removeprefix("hub:").partition("#")
        return _list_huggingface(partial(_load_hub, name), None, part, config)
    path, part = Path(spec).expanduser(), ""
    if not path.exists() and "#" in spec:
        path, part = Path(spec.rpartition("#")[0]).expanduser(), spec.rpartition("#")[2]
    if not path.exists():
        raise UserError(
            "data.source", f"{path} does not exist", "give a folder, a .npz file, hub:owner/name or phantom"
        )
    if path.suffix == ".npz" and path.is_file():
        return _list_npz(path, part)
    if not path.is_dir():
        raise UserError("data.source", f"{path} is neither a folder nor a .npz file")
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return _list_huggingface(partial(_load_disk, path), path, part, config)
    if next(path.glob("*.parquet"), None) or next(path.glob("data/*.parquet"), None):
        return _list_huggingface(partial(_load_folder, path), path, part, config)
    if part:
        raise UserError("data.source", f"an image folder has no part {part!r}", "leave out what follows #")
    return list_folder(path, _max_bytes(config))


def _max_bytes(config: DataConfig) -> int:
    """No accepted picture is larger than this, headers included."""
    return config.max_pixels * BYTES_PER_PIXEL + 2**20


def _column(listing: Listing, name: str, key: str | None, required: bool) -> str | None:
    if key is None or key in listing.columns:
        return key
    if not required:
        return None
    there = ", ".join(listing.columns) or "none"
    raise UserError(f"data.{name}", f"there is no column {key!r}", f"columns: {there}; null: none")


def _item(row: Row, columns: Mapping[str, str | None]) -> Item:
    values = {role: row.values.get(column) if column else None for role, column in columns.items()}
    captions = _captions(values["caption"])
    values["caption"] = next(iter(captions), None)
    cells = {role: _text(value, f"data.{role}_key") for role, value in values.items()}
    if columns["split"] and not row.problem:
        split = SPLITS.get((cells["split"] or "").lower())
        if split is None:
            raise UserError(
                "data.split_key",
                f"{row.source!r} has the value {cells['split']!r}",
                f"known values: {', '.join(SPLITS)}",
            )
        cells["split"] = split
    more = tuple(captions[1:])
    return Item(source=row.source, read=row.read, problem=row.problem, stamp=row.stamp, more_captions=more, **cells)


def _captions(value: Any) -> list[str]:
    """One caption, or the list of several of one picture, without the blanks among them."""
    cells = value if isinstance(value, list | tuple) else [value]
    return [text for cell in cells if (text := _text(cell, "data.caption_key")) is not None]


def _text(value: Any, key: str) -> str | None:
    """A cell as text. Nothing, NaN and blanks are no value: an empty patient id does not mean one patient."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or isinstance(value, str | int | float):
        text = "" if value is None else str(value).encode("utf-8", "replace").decode().strip()
        return None if text.lower() in ("", "nan", "none", "null", "<na>") else text
    raise UserError(key, f"its column holds a {type(value).__name__}", "name a column of texts or numbers")


def _list_phantom(config: DataConfig) -> Listing:
    rows = [
        Row(
            item.source,
            partial(_draw, item, config.image_size, config.channels),
            {"caption": item.caption, "label": item.label, "patient": item.patient, "split": item.split},
        )
        for item in phantom_items(config.phantom)
    ]
    return Listing("phantom", rows, ["caption", "label", "patient", "split"], has_split=True)


def _draw(item: PhantomItem, image_size: int, channels: int) -> np.ndarray:
    levels = item.draw(image_size, channels)  # [C, S, S]
    return levels[0] if channels == 1 else levels.transpose(1, 2, 0)


def _list_npz(path: Path, part: str) -> Listing:
    """Arrays as MedMNIST stores them: ``train_images`` [N, H, W (, 3)] and ``train_labels``, or without prefix."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = [f"{part or 'train'}_images", *([] if part else ["images"])]
            name = next((name for name in names if name in file), None)
            if name is None:
                raise UserError("data.source", f"{path.name} has no array {names[0]}", f"arrays: {', '.join(file)}")
            images = file[name]
            labels_name = name.replace("images", "labels")
            labels = file[labels_name] if labels_name in file else None
            classes = file["classes"] if "classes" in file else None
        with zipfile.ZipFile(path) as archive:
            stamp = str(archive.getinfo(f"{name}.npy").CRC)
    except UserError:
        raise
    except Exception as error:  # of zip, zlib, numpy and the operating system
        raise UserError("data.source", f"{path.name} is not a readable .npz file: {_masked(error)}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise UserError(
            "data.source", f"{name} is {images.dtype} {list(images.shape)}", "uint8 [N, H, W] or [N, H, W, 3]"
        )
    cells = _npz_labels(labels, classes, len(images))
    rows = [
        Row(
            f"row/{index}",
            partial(images.__getitem__, index),
            {} if cells is None else {"label": cells[index]},
            "",
            stamp,
        )
        for index in range(len(images))
    ]
    return Listing("npz", rows, [] if cells is None else ["label"])


def _npz_labels(labels: np.ndarray | None, classes: np.ndarray | None, count: int) -> list | None:
    """One label per picture, by name where the file names the classes; None: there are none, or several per picture."""
    if labels is None or labels.size != count:
        return None
    cells = labels.reshape(-1).tolist()
    if (
        classes is None
        or not np.issubdtype(labels.dtype, np.integer)
        or not 0 <= min(cells) <= max(cells) < len(classes)
    ):
        return cells
    return [str(classes[cell]) for cell in cells]


def _load_hub(name: str):
    import datasets

    name, _, revision = name.partition("@")
    return datasets.load_dataset(name, revision=revision or None)


def _load_disk(path: Path):
    import datasets

    return datasets.load_from_disk(str(path))


def _load_folder(path: Path):
    import datasets

    return datasets.load_dataset(str(path))


def _list_huggingface(load: Callable, root: Path | None, part: str, config: DataConfig) -> Listing:
    """A data set of the `datasets` library; pictures stay encoded until they are decoded here."""
    import datasets

    try:
        data = load()
    except Exception as error:  # of the library, of the network, of Arrow
        raise UserError(
            "data.source", f"cannot be opened: {_masked(error)}", "check name, part and access rights"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if not part and len(data) > 1 or part and part not in data:
            raise UserError("data.source", f"has the parts {', '.join(data)}", "choose one with #part at the end")
        data = data[part or next(iter(data))]
    elif part and str(data.split) != part:
        raise UserError("data.source", f"has no part {part!r}", "leave out what follows #")
    pictures = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    picture = "image" if "image" in pictures else pictures[0] if len(pictures) == 1 else None
    if picture is None:
        raise UserError("data.source", f"has {len(pictures)} picture columns", "it needs one, or one named image")
    encoded = data.select_columns([picture]).cast_column(picture, datasets.Image(decode=False))
    columns = [name for name in data.column_names if name != picture]
    keys = (config.caption_key, config.label_key, config.group_key, config.split_key)
    cells = {column: _cells(data, column) for column in columns if column in keys}
    read = partial(_read_cell, encoded, picture, root or Path(datasets.config.HF_CACHE_HOME), _max_bytes(config))
    rows = [
        Row(f"row/{index}", partial(read, index), {column: values[index] for column, values in cells.items()})
        for index in range(len(data))
    ]
    return Listing("huggingface", rows, columns)


def _cells(data, column: str) -> list:
    """One column; class numbers become names."""
    cells, feature = list(data[column]), data.features[column]
    if hasattr(feature, "int2str"):
        cells = [None if cell is None or cell < 0 else feature.int2str(cell) for cell in cells]
    return cells


def _masked(error: Exception) -> str:
    """First line of an error, without access tokens."""
    lines = f"{type(error).__name__} {error}".splitlines()
    return re.sub(r"hf_\w+", "hf_***", lines[0])[:200]


def _read_cell(data, picture: str, root: Path, max_bytes: int, index: int) -> bytes:
    try:
        cell = data[index][picture]
    except Exception as error:  # of Arrow, of the operating system
        raise Rejected(f"unreadable: {_masked(error)}") from None
    if cell is None:
        raise Rejected("missing picture")
    if cell.get("bytes") is not None:
        return cell["bytes"]
    path = Path(cell.get("path") or "")
    if not path.resolve().is_relative_to(root.resolve()):
        raise Rejected("link out of the data set")
    return read_file(path, max_bytes)
