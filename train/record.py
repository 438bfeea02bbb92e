"""One picture that was found: a row of the manifest."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Record:
    """One picture that was found, used or not; a row of the manifest.

    Attributes:
        record_id: first 12 hex digits of the SHA-256 of ``source`` (more if two records agree in them).
        source: path relative to ``data.source`` or number of the row; those of ``data.heldout_source`` begin with
            ``heldout:``, those that the trainer planted with ``canary:``.
        sha256: of the file's bytes; "" if they could not be read.
        pixel_hash: of the decoded pixels at their original size; "" if rejected.
        group: salted hash of the group (patient); equal means the same group; None: no group.
        split: ``train``, ``calibration``, ``heldout``, ``canary`` (`train.planting`), or "" if rejected.
        cluster: number of the picture; exact and near copies share it; -1 if rejected.
        copies: records of the cluster in this record's split, before any defense; 0 if rejected.
        block: number of the block (`train.splits`); -1 if rejected.
        kept: still used; a defense may take a training record out, and a coin a canary.
        reason: why it was rejected or taken out, else "".
        duplicate_of: record_id of the record that was kept in its place, else "".
        distance: to that record, as the defense that removed it measures it (dedup: standard deviations of the picture).
        canary: part in the split ``canary``: ``planted``; ``coin``: planted where a coin says so; ``pool``: never planted;
            ``origin``: a held-out picture that left its split for a canary. "" for all others.
        caption: the first of its captions; None: it has none.
        more_captions: the others, where the data give several of one picture.
    """

    record_id: str
    source: str
    sha256: str = ""
    pixel_hash: str = ""
    group: str | None = None
    caption: str | None = None
    label: str | None = None
    split: str = ""
    cluster: int = -1
    copies: int = 0
    block: int = -1
    kept: bool = False
    reason: str = ""
    duplicate_of: str = ""
    distance: float | None = None
    canary: Literal["", "planted", "coin", "pool", "origin"] = ""
    more_captions: list[str] = field(default_factory=list)
