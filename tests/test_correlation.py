"""Copies by correlation against np.corrcoef, Dar's threshold, planted copies, the control."""

import numpy as np
import pytest

from eval import correlation
from eval.correlation import by_correlation, closest, copy_threshold
from eval.pictures import Pictures


def random_images(count: int, seed: int, shape=(1, 8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def pictures(images: np.ndarray, picture=None) -> Pictures:
    ids = np.arange(len(images)) if picture is None else np.asarray(picture)
    names = [str(row) for row in range(len(images))]
    return Pictures(images, names, ids, ids, [None] * len(images), np.ones(len(images), dtype=np.int64))


def oracle(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Largest np.corrcoef with each reference and its mirror image, [Q, R]."""
    return np.array(
        [
            [max(np.corrcoef(q.ravel(), v.ravel())[0, 1] for v in (r, r[..., ::-1])) for r in references.astype(float)]
            for q in queries.astype(float)
        ]
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (3, 40, 40)])
@pytest.mark.parametrize("block", [1024, 3])
def test_closest_is_numpys(shape, block, monkeypatch):
    """More than 1024 dimensions, several blocks, ids in any order; bright pictures, where float32 sums would cancel."""
    monkeypatch.setattr(correlation, "_BLOCK", block)
    queries, references = random_images(7, 0, shape), random_images(10, 1, shape)
    references[5:] = 250 + references[5:] % 6
    picture = np.array([9, 4, 4, 7, 1, 0, 2, 3, 8, 6])
    expected = oracle(queries, references)
    found = closest(queries, references, picture)
    np.testing.assert_allclose(found.correlation, expected.max(1), atol=1e-12)
    np.testing.assert_array_equal(found.picture, picture[expected.argmax(1)])


def test_equal_correlations_go_to_the_lowest_picture():
    references = random_images(1, 0).repeat(5, 0)
    assert closest(references[:1], references, np.array([8, 3, 9, 2, 5])).picture.tolist() == [2]


def test_contrast_brightness_and_mirror_do_not_matter():
    references = random_images(20, 2)
    queries = (references[[3, 4]] // 4 + 90)[..., ::-1]
    found = closest(queries, references, np.arange(20))
    assert found.picture.tolist() == [3, 4] and found.correlation.min() > 0.999


def test_flat_pictures_are_nobodys_copy():
    images = random_images(6, 3)
    images[:2] = 77
    found = closest(images, images, np.arange(6))
    assert found.correlation[:2].tolist() == [0, 0] and found.correlation[2:] == pytest.approx(1)
    assert found.copied(0.0).tolist() == [False, False, True, True, True, True]
    flat = pictures(np.full((4, 1, 8, 8), 9, dtype=np.uint8))
    assert copy_threshold(flat, flat) == 0 and by_correlation(flat.images, flat, flat, flat)["verified"] == 0


def test_threshold_is_dars():
    """The 95th percentile over distinct training pictures (records 0 and 1 are one) of the best calibration picture."""
    train, calibration = random_images(41, 4), random_images(15, 5)
    picture = [0, *range(40)]
    best = oracle(train, calibration).max(1)
    expected = np.percentile([max(best[0], best[1]), *best[2:]], 95)
    assert copy_threshold(pictures(train, picture), pictures(calibration)) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def planted():
    """60 training, 40 held-out, 60 calibration pictures; generations copy training 5, 6, 6, held-out 7, and noise follows."""
    train, heldout, calibration = (random_images(count, seed) for count, seed in ((60, 6), (40, 7), (60, 8)))
    noise = np.random.default_rng(9).integers(-12, 13, (4, 1, 8, 8))
    copies = np.clip(np.stack([train[5], train[6], train[6], heldout[7]]) + noise, 0, 255).astype(np.uint8)
    copies[1] = 255 - (255 - copies[1]) // 2
    generations = np.concatenate([copies, random_images(30, 10) // 2 + 128])
    return generations, pictures(train), pictures(heldout), pictures(calibration)


def test_planted_copies_are_counted(planted):
    generations, train, heldout, calibration = planted
    threshold = copy_threshold(train, calibration)
    found = closest(generations, train.images, train.picture)
    strong = found.correlation > 0.9
    assert {5, 6} <= set(found.verified(threshold).tolist()) and np.unique(found.picture[strong]).tolist() == [5, 6]
    report = by_correlation(*planted)
    best = oracle(generations, train.images)
    hits = best.max(1) > threshold
    assert report["threshold"] == threshold and report["quantile"] == 0.95
    assert report["candidates"] == hits.sum() and report["verified"] == len(set(best.argmax(1)[hits].tolist()))
    assert 2 <= report["verified"] < 10
    control = report["control"]
    assert control["n"] == 40 and control["background"] == np.mean(
        oracle(heldout.images, train.images).max(1) > threshold
    )
    other = oracle(generations, heldout.images)
    assert control["verified"] == len(set(other.argmax(1)[other.max(1) > threshold].tolist())) >= 1
    assert control["verified_train_m"] <= report["verified"]
    assert by_correlation(*planted) == report and isinstance(report["rule"], str)


def test_false_alarms_are_as_many_as_the_rule_says():
    """New pictures against as many training pictures as there were calibration pictures: 5 %, over 5 draws of 200."""
    shares = []
    for seed in range(5):
        train, calibration, new = (pictures(random_images(200, 3 * seed + part, (1, 4, 4))) for part in (100, 101, 102))
        shares.append(by_correlation(new.images, train, new, calibration)["control"]["background"])
    assert np.mean(shares) == pytest.approx(0.05, abs=0.02)


def test_without_calibration_or_held_out_pictures(planted):
    generations, train, _, calibration = planted
    assert by_correlation(generations, train, None, None) is None
    assert by_correlation(generations, train, None, calibration)["control"] is None


def test_the_control_draws_as_many_on_either_side(planted):
    """All 60 training pictures against 60 held-out ones: with n = 60 the training side is the whole count."""
    generations, train, heldout, calibration = planted
    more = pictures(np.concatenate([heldout.images, random_images(40, 11)]))
    report = by_correlation(generations, train, more, calibration)
    assert report["control"]["n"] == 60 and report["control"]["verified_train_m"] == report["verified"]
