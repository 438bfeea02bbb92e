"""From a source to decoded, divided records on disk: `prepare`, once per run, on all ranks.

Folder layout: ``pixels.npy`` (uint8 [N, C, S, S]), ``records.jsonl``, and last ``prepared.json``, which says that the
others are complete. All ranks must see the folder.
"""

import hashlib
import json
import secrets
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from defenses.copies import CopyRule, find_copies, relatives
from defenses.errors import UserError
from defenses.ranks import together
from train.dataconfig import DataConfig
from train.files import atomic, write_json
from train.planting import plant
from train.record import Record
from train.shards import Outcome, decode_shard, make_folder, merge_shards
from train.sources import Item, open_source
from train.splits import blocks, refuse_straddling, renumber, sides

HELDOUT_PREFIX = "heldout:"
NOT_IN_DIGEST = ("source", "heldout_source", "heldout_exchangeable", "restricted")  # do not change what is prepared


@dataclass
class Dataset:
    """All records and their pictures.

    Attributes:
        images: uint8 [N, C, S, S], a memory map; rows of rejected records are zero. Changes never reach the file.
        ignored: files in the sources that are no records (licences, hidden files, text files).
        notes: how often something had to be decided while decoding, by what.
    """

    records: list[Record]
    images: np.ndarray
    ignored: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    # defenses and the captions that they made (`train.textstage.captions_of`)
    rewritten: tuple[list, tuple] | None = field(default=None, init=False, repr=False, compare=False)

    def rows(self, split: str, kept: bool | None = None) -> np.ndarray:
        """Ascending rows of a split, int64; ``kept`` restricts them to records that are (not) kept. Canaries, trained on or
        not, are in no split but their own."""
        chosen = [
            row
            for row, record in enumerate(self.records)
            if record.split == split and (kept is None or record.kept == kept)
        ]
        return np.array(chosen, dtype=np.int64)

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Reads what `prepare` has written."""
        with (folder / "records.jsonl").open(encoding="utf-8") as file:
            records = [Record(**json.loads(line)) for line in file]
        prepared = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        return cls(records, _pixels(folder), prepared["ignored"], prepared["notes"])


def prepare(config: DataConfig, folder: Path, accelerator, all_train: bool = False) -> Dataset:
    """Lists, decodes, finds copies, splits, and writes the result into ``folder``; the second time it only loads it.

    Args:
        accelerator: its ranks share the decoding; all must call this.
        all_train: every record of ``data.source`` counts as trained on, whatever its split (evaluation of a model that
            somebody else trained).

    Raises:
        UserError: on all ranks alike, for unusable sources, settings or splits, or if ``folder`` holds other data.
    """
    if all_train and config.canaries is not None:
        raise UserError(
            "data.canaries", "are planted by the trainer, and this model is trained already", "set it to null"
        )
    items, ignored = together(accelerator, lambda: _list_items(config, all_train))
    digest = _digest(config, items, all_train)
    if len(set(gather_object([digest]))) > 1:
        raise UserError("data.source", "the processes see different files", "give all of them the same folder")
    if together(accelerator, lambda: _is_complete(folder, digest)):
        return Dataset.load(folder)
    together(accelerator, lambda: make_folder(folder, config, items, accelerator))
    decoded = gather_object(together(accelerator, lambda: decode_shard(items, config, folder, accelerator)))

    def finish() -> None:
        salt = secrets.token_hex(16)  # with it the owner of the data can find a group in the manifest
        notes = Counter(filter(None, (each.note for each in decoded)))
        merge_shards(folder, len(items), accelerator.num_processes)
        records = _records(items, sorted(decoded, key=lambda each: each.index), salt)
        _check_usable(records, config)
        _divide(records, items, config, folder, all_train)
        if config.canaries is not None:
            plant(records, config, folder / "pixels.npy")
            _rename(records)
        with atomic(folder / "records.jsonl") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        # last, because it says that the rest is complete
        write_json(folder / "prepared.json", {"digest": digest, "salt": salt, "ignored": ignored, "notes": notes})

    together(accelerator, lambda: finish() if accelerator.process_index == 0 else None)
    return Dataset.load(folder)


def _pixels(folder: Path) -> np.ndarray:
    """All pictures, copy-on-write: a read-only map would make torch warn at every tensor made from it."""
    return np.load(folder / "pixels.npy", mmap_mode="c")


def _list_items(config: DataConfig, all_train: bool) -> tuple[list[Item], int]:
    """Items of both sources, those of the held-out one marked; and the number of ignored files."""
    main = open_source(config.source, replace(config, split_key=None) if all_train else config)
    items = [replace(item, split="train") for item in main.items] if all_train else main.items
    given = [item for item in items if item.split and not item.problem]
    refuse_straddling([item.group for item in given], [item.split for item in given])  # before an hour of decoding
    ignored = main.ignored
    if config.heldout_source is not None:
        if any(item.split == "heldout" for item in items):
            raise UserError(
                "data.heldout_source", "data.source names held-out pictures of its own", "set data.heldout_source=null"
            )
        heldout = open_source(config.heldout_source, config, "data.heldout_source")
        items = items + [
            replace(item, source=HELDOUT_PREFIX + item.source, split="heldout", known_heldout=True)
            for item in heldout.items
        ]
        ignored += heldout.ignored
    if not items:
        raise UserError("data.source", "holds no pictures", "check the path")
    return items, ignored


def _digest(config: DataConfig, items: list[Item], all_train: bool) -> str:
    """Changes with the prepared data, as far as the listing shows, but not with the place where the source lies."""
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_IN_DIGEST}
    if "phantom" not in (config.source, config.heldout_source):
        del settings["phantom"]
    if config.canaries is None:
        del settings["canaries"]
    digest = hashlib.sha256(json.dumps([settings, all_train], sort_keys=True).encode())
    for item in items:
        parts = [item.source, item.stamp, item.problem, item.caption, item.label, item.group, item.split]
        parts += [item.more_captions] if item.more_captions else []  # without them as before there were any
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def _is_complete(folder: Path, digest: str) -> bool:
    try:
        prepared = json.loads((folder / "prepared.json").read_text())
    except FileNotFoundError:
        return False
    if prepared["digest"] != digest:
        raise UserError(
            "data", f"{folder} was prepared from other files or settings", f"choose another run.name or delete {folder}"
        )
    return True


def _records(items: list[Item], decoded: list[Outcome], salt: str) -> list[Record]:
    records = []
    for item, record_id, each in zip(items, _record_ids([item.source for item in items]), decoded, strict=True):
        group = None if item.group is None else hashlib.sha256(f"{salt}{item.group}".encode()).hexdigest()[:16]
        known = {
            "group": group,
            "caption": item.caption,
            "more_captions": list(item.more_captions),
            "label": item.label,
        }
        records.append(Record(record_id, item.source, each.sha256, each.pixel_hash, **known, reason=each.reason))
    return records


def _record_ids(sources: list[str]) -> list[str]:
    """Twelve hex digits for each source; more for all in the rare case that two would agree."""
    digests = [hashlib.sha256(source.encode()).hexdigest() for source in sources]
    length = next(length for length in range(12, 65, 4) if len({digest[:length] for digest in digests}) == len(digests))
    return [digest[:length] for digest in digests]


def _rename(records: list[Record]) -> None:
    """Record ids once more, now that canaries are among the records."""
    for record, record_id in zip(records, _record_ids([record.source for record in records]), strict=True):
        record.record_id = record_id


def _check_usable(records: list[Record], config: DataConfig) -> None:
    bad = [record for record in records if record.reason]
    first = "; ".join(f"{record.source!r}: {record.reason}" for record in bad[:3])
    if len(bad) == len(records):
        raise UserError("data.source", f"none of {len(records)} files is a usable picture, first {first}")
    if bad and config.on_bad_image == "fail":
        raise UserError(
            "data.on_bad_image",
            f"{len(bad)} of {len(records)} files are unusable, first {first}",
            "mend or remove them",
        )


def _divide(records: list[Record], items: list[Item], config: DataConfig, folder: Path, all_train: bool) -> None:
    """Fills cluster, block, split, copies and kept; rejects held-out records that belong to the training data."""
    usable = np.array([row for row, record in enumerate(records) if not record.reason], dtype=np.int64)
    images = _pixels(folder)
    images = images if len(usable) == len(images) else images[usable]
    hashes = [records[row].pixel_hash for row in usable]
    clusters = find_copies(images, hashes)
    related = relatives(
        images, hashes, CopyRule(flips=True)
    )  # a mirrored twin on the other side is no held-out picture
    if config.heldout_source is not None:
        stay = _drop_known_heldout(records, items, usable, clusters, related, folder)
        place = np.cumsum(stay) - 1
        both = stay[related[0]] & stay[related[1]]
        related = place[related[0][both]], place[related[1][both]]
        usable, clusters = usable[stay], clusters[stay]
    clusters = renumber(clusters)
    block = blocks([records[row].group for row in usable], clusters, related)
    chosen = [records[row] for row in usable]
    splits = sides([items[row].split for row in usable], chosen, clusters, block, config)
    copies = Counter(zip(clusters.tolist(), splits, strict=True))
    for row, cluster, number, split in zip(usable, clusters.tolist(), block.tolist(), splits, strict=True):
        record = records[row]
        record.cluster, record.block, record.split, record.kept = cluster, number, split, True
        record.copies = copies[cluster, split]
    if splits.count("train") < 2:
        remedy = "use more data" if all_train else "use more data, or lower the other fractions"
        raise UserError("data.source", f"leaves {splits.count('train')} training pictures", remedy)


def _drop_known_heldout(
    records: list[Record],
    items: list[Item],
    usable: np.ndarray,
    clusters: np.ndarray,
    related: tuple[np.ndarray, np.ndarray],
    folder: Path,
) -> np.ndarray:
    """Rejects pictures of ``data.heldout_source`` that show a picture or a group of ``data.source``; bool [usable]."""
    heldout = np.array([items[row].known_heldout for row in usable])
    known_clusters = set(clusters[~heldout].tolist())
    first, second = related
    twins = {*first[heldout[first] & ~heldout[second]].tolist(), *second[heldout[second] & ~heldout[first]].tolist()}
    known_groups = {records[row].group for row in usable[~heldout]} - {None}
    stay = np.ones(len(usable), dtype=bool)
    for position in np.flatnonzero(heldout):
        record = records[usable[position]]
        if clusters[position] in known_clusters or int(position) in twins:
            record.reason = "copy of a training picture"
        elif record.group in known_groups:
            record.reason = "group of data.source"
        if record.reason:
            record.pixel_hash, stay[position] = "", False
    if not np.any(stay & heldout):
        raise UserError(
            "data.heldout_source",
            f"none of its {int(heldout.sum())} usable pictures is new: all show a picture or a group of data.source",
            "use pictures that the model has not seen, and group ids that are distinct",
        )
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    pixels[usable[~stay]] = 0
    pixels.flush()
    return stay
