"""The embedded data set: planted truth, the same bytes everywhere, and pictures that do not pass for copies."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from defenses.errors import UserError
from train.phantom import FINDINGS, OUTLIERS, PhantomConfig, phantom_items

GOLDEN = ["19c97495041f81b8", "7d1b6cca22ea9f9a", "2883f5b57db59164", "45f4c72c1aaf04e0"]
SMALL = PhantomConfig(pictures=60, copied=4, copies=5, outliers=8, heldout=20, calibration=10)


@pytest.fixture(scope="module")
def default_items():
    return phantom_items(PhantomConfig())


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_same_bytes_on_every_machine(default_items):
    drawn = [
        digest(default_items[0].draw(32, 1)),
        digest(default_items[399].draw(64, 3)),
        digest(default_items[711].draw(16, 1)),
        digest(default_items[-1].draw(32, 1)),
    ]
    assert drawn == GOLDEN


def test_planted_truth_adds_up(default_items):
    assert Counter(item.split for item in default_items) == {"train": 400 + 8 * 39, "calibration": 80, "heldout": 400}
    planted = Counter(item.planted for item in default_items if item.planted is not None)
    assert planted == dict.fromkeys(range(8), 40)
    outliers = [item.outlier for item in default_items if item.outlier]
    assert sorted(outliers) == sorted(OUTLIERS)
    assert all(item.planted is None and item.split == "train" for item in default_items if item.outlier)
    assert [item.source for item in default_items] == [f"phantom/{row:04d}" for row in range(len(default_items))]
    assert len({item.film for item in default_items if item.split == "train"}) == 400
    labels = Counter(item.label for item in default_items if item.split == "heldout")
    assert set(labels) == set(FINDINGS) and min(labels.values()) > 56  # 400/4, five standard deviations below


def test_no_patient_on_two_sides_and_one_to_four_films_each(default_items):
    sides, films = defaultdict(set), defaultdict(set)
    for item in default_items:
        sides[item.patient].add(item.split)
        films[item.patient].add(item.film)
    assert {len(side) for side in sides.values()} == {1}
    assert set(Counter(len(film) for film in films.values())) == {1, 2, 3, 4}


def test_half_of_the_planted_pictures_are_exact_copies_the_others_nearly():
    drawn = defaultdict(list)
    for item in phantom_items(SMALL):
        if item.planted is not None:
            drawn[item.planted].append(item.draw(32, 1))
    for number, pictures in drawn.items():
        different = len({picture.tobytes() for picture in pictures})
        assert len(pictures) == 5 and different == (1 if number % 2 == 0 else 5)
        for picture in pictures:
            # at most 2 % of the original, one level of noise and half a level of rounding
            gap = np.abs(picture.astype(float) - pictures[0])
            assert (gap <= 0.02 * pictures[0] + 1.5).all()


def test_other_counts_leave_the_pictures_as_they_are():
    few, many = phantom_items(SMALL), phantom_items(PhantomConfig(pictures=60, copied=4, copies=9, heldout=40))
    assert [item.film for item in few[:60]] == [item.film for item in many[:60]]
    heldout = [[item.film for item in items if item.split == "heldout"] for items in (few, many)]
    assert heldout[0] == heldout[1][:20]
    other = phantom_items(PhantomConfig(pictures=60, copied=4, copies=5, heldout=20, calibration=10, seed=1))
    assert not {item.film for item in few} & {item.film for item in other}


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (33, 3), (128, 1)])
def test_shapes(size, channels):
    picture = phantom_items(SMALL)[0].draw(size, channels)
    assert picture.shape == (channels, size, size) and picture.dtype == np.uint8
    assert picture.std() > 25  # neither blank nor flat


def test_a_larger_picture_shows_the_same_film():
    item = phantom_items(SMALL)[1]
    large = item.draw(128, 1)[0].astype(float).reshape(32, 4, 32, 4).mean(axis=(1, 3))
    assert np.sqrt(np.mean((large - item.draw(32, 1)[0]) ** 2)) < 8


def test_no_heldout_picture_passes_for_a_generation():
    """Background 0: brute force over ten views, score = nearest / (0.5 * mean of the 50 nearest distinct pictures)."""
    items = phantom_items(PhantomConfig(pictures=300, copies=1, heldout=60, calibration=0))
    pixels = np.stack([item.draw(32, 1)[0] for item in items]).astype(np.float32) / 255
    train, heldout = pixels[:300], pixels[300:]
    nearest = np.full((60, 300), np.inf)
    for picture in (train, train[..., ::-1]):
        padded = np.pad(picture, ((0, 0), (1, 1), (1, 1)), mode="edge")
        for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
            view = padded[:, y : y + 32, x : x + 32]
            squared = np.stack([np.mean((one - view) ** 2, axis=(1, 2)) for one in heldout])
            nearest = np.minimum(nearest, np.sqrt(squared))
    ranked = np.sort(nearest, axis=1)
    score = ranked[:, 0] / (0.5 * ranked[:, :50].mean(axis=1))
    assert score.min() > 1.15
    assert ranked[:, 0].min() > 0.1


def test_two_films_of_a_patient_differ_like_those_of_strangers():
    items = phantom_items(PhantomConfig(pictures=200, copied=0, outliers=0, heldout=0, calibration=0))
    pixels = np.stack([item.draw(32, 1) for item in items]).reshape(200, -1) / 255
    distance = np.stack([np.sqrt(((one - pixels) ** 2).mean(axis=1)) for one in pixels])
    patient = np.array([item.patient for item in items])
    same = (patient[:, None] == patient) & ~np.eye(200, dtype=bool)
    assert distance[same].min() > 0.12
    assert np.median(distance[same]) > 0.9 * np.median(distance[~same & ~np.eye(200, dtype=bool)])


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"pictures": 10}, "pictures"),
        ({"copies": 0}, "copies"),
        ({"heldout": -1}, "heldout"),
        ({"pictures": 0}, "pictures"),
    ],
)
def test_bad_sizes_name_their_key(bad, key):
    with pytest.raises(UserError, match=f"data.phantom.{key}"):
        PhantomConfig(**bad)
