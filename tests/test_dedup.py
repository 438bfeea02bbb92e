"""Deduplication on planted copies: what goes, what stays, what is said."""

import hashlib

import numpy as np
import pytest

from defenses.base import Pool
from defenses.dedup import Dedup, DedupConfig
from defenses.errors import UserError
from train.phantom import PhantomConfig, phantom_items


@pytest.fixture(scope="module")
def planted():
    """60 distinct films, 4 of them 5-fold (numbers 0 and 2 exactly, 1 and 3 re-encoded)."""
    items = phantom_items(PhantomConfig(pictures=60, copied=4, copies=5, outliers=8, heldout=0, calibration=0))
    images = np.stack([item.draw(32, 1) for item in items])
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return items, Pool(images, np.arange(len(items)), digests, [item.patient for item in items])


def test_exactly_the_planted_copies_go(planted):
    items, pool = planted
    dedup = Dedup(DedupConfig())
    removals = dedup.select(pool)
    assert [removal.row for removal in removals] == list(range(60, 76))
    for removal in removals:
        twin = items[removal.duplicate_of]
        assert removal.duplicate_of < 60 and twin.planted == items[removal.row].planted
        exact = items[removal.row].planted % 2 == 0
        assert removal.reason == ("exact copy" if exact else "near copy")
        assert removal.distance == 0 if exact else 0 < removal.distance < 0.12
    claim = dedup.claim()
    assert claim["kind"] == "heuristic" and "No guarantee" in claim["statement"]
    assert claim["removed"] == {"exact": 8, "near": 8, "within_groups": 16, "across_groups": 0}


def test_exact_only(planted):
    items, pool = planted
    removals = Dedup(DedupConfig(near=False)).select(pool)
    assert {items[removal.row].planted for removal in removals} == {0, 2} and len(removals) == 8


def test_only_rows_that_are_still_kept_are_looked_at(planted):
    items, pool = planted
    rows = np.array([row for row, item in enumerate(items) if item.planted == 0][1:])
    removals = Dedup(DedupConfig()).select(Pool(pool.images, rows, pool.pixel_hash, pool.group))
    assert [(removal.row, removal.duplicate_of) for removal in removals] == [(row, rows[0]) for row in rows[1:]]


def test_removals_across_patients_are_counted_apart(planted):
    items, pool = planted
    group = [item.patient for item in items]
    group[60], group[61] = "somebody else", None
    dedup = Dedup(DedupConfig())
    dedup.select(Pool(pool.images, pool.rows, pool.pixel_hash, group))
    assert dedup.claim()["removed"] == {"exact": 8, "near": 8, "within_groups": 14, "across_groups": 2}


def test_threshold_decides_what_is_near(planted):
    items, pool = planted
    strict = Dedup(DedupConfig(threshold=1e-4)).select(pool)
    assert all(items[removal.row].planted % 2 == 0 for removal in strict) and len(strict) == 8
    loose = Dedup(DedupConfig(threshold=0.5)).select(pool)
    assert len(loose) > 16


def test_state_survives_a_stop(planted):
    before, after = Dedup(DedupConfig()), Dedup(DedupConfig())
    before.select(planted[1])
    after.load_state_dict(before.state_dict())
    assert after.claim() == before.claim()


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"near": False, "flips": True}, "flips"),
        ({"near": False, "threshold": 0.1}, "threshold"),
    ],
)
def test_bad_settings_name_their_key(bad, key):
    with pytest.raises(UserError, match=f"defenses.dedup.{key}"):
        DedupConfig(**bad)
