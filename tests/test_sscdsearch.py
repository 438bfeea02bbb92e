"""SSCD's search over all training pictures with descriptors whose answers are known: brute force, angles, planted copies."""

import accelerate.utils
import numpy as np
import pytest

from defenses import knn, neighbours
from eval import copymetrics, copyvalues
from eval.copymetrics import COLUMNS
from eval.sscd import Descriptors
from eval.sscdsearch import SscdSearch
from tests.reference import fabricated
from tests.test_copymetrics import Ranks, run

WEIGHTS = {"sscd_weights": "w", "sscd_weights_sha256": "00"}

TURNED = [10, 12, 13, 14, 15, 18]  # training pictures that, turned by 90 degrees, lie nearer to another by l2


def sorted_pixels(images: np.ndarray) -> np.ndarray:
    """A descriptor that turning and mirroring leave as it is: the pixels by size, less their mean; length 1."""
    vector = np.sort(images.reshape(len(images), -1).astype(float), axis=1)
    vector -= vector.mean(axis=1, keepdims=True)
    return (vector / np.linalg.norm(vector, axis=1, keepdims=True)).astype(np.float32)


def angle(images: np.ndarray) -> np.ndarray:
    """The grey level of the first pixel as an angle in degrees."""
    degrees = np.deg2rad(images[:, 0, 0, 0].astype(float))
    return np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)


def flat(*levels: int) -> np.ndarray:
    """Pictures of one grey level each, uint8 [N, 1, 8, 8]."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 1, 8, 8)).copy()


def largest(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair's cosine in float64: the largest of each on the left, and whose it is."""
    cosine = sorted_pixels(left).astype(float) @ sorted_pixels(right).astype(float).T
    return cosine.max(axis=1), cosine.argmax(axis=1)


@pytest.fixture(scope="module")
def scene():
    """80 training, 60 held-out and 50 calibration pictures; generations 0..5 are `TURNED`, 6..8 plain copies."""
    training, heldout, calibration = (fabricated.blobs(seed, n) for seed, n in ((11, 80), (12, 60), (13, 50)))
    generations = np.concatenate([np.rot90(training[TURNED], axes=(2, 3)), training[40:43], fabricated.blobs(14, 30)])
    return generations, *(fabricated.pictures(images) for images in (training, heldout, calibration))


@pytest.fixture
def stub(monkeypatch):
    """`sorted_pixels` in the place of SSCD; the list of all images that it described."""
    described = []

    def extract(images: np.ndarray) -> np.ndarray:
        described.extend(image.tobytes() for image in images)
        return sorted_pixels(images)

    monkeypatch.setattr(copymetrics, "load_sscd", lambda *_: extract)
    return described


def test_turned_copies_that_l2_misses_are_found(scene, stub):
    report, table = run(*scene, **WEIGHTS, sscd_threshold=0.99999)
    assert list(table[0]) == COLUMNS
    for row, original in zip(table[:6], TURNED, strict=True):
        assert row["sscd_nearest"] == f"r{original}" != row["record_id"]
        assert row["sscd_best"] == pytest.approx(1, abs=1e-6) and row["sscd"] < 0.9999
    search = report["sscd_search"]
    assert (search["copies"], search["pictures"], search["background"]) == (9, 9, 0)
    assert report["metrics"][-1]["name"] == "sscd" and report["metrics"][-1]["copies"] == 3  # of the pairs by l2


@pytest.mark.parametrize("rule", ["published", "dar"])
def test_every_figure_is_that_of_brute_force(scene, stub, rule):
    generations, training, heldout, calibration = scene
    report, table = run(*scene, **WEIGHTS, threshold=rule)
    best, row = largest(generations, training.images)
    assert [found["sscd_best"] for found in table] == pytest.approx(best.tolist(), abs=1e-6)
    assert [found["sscd_nearest"] for found in table] == [f"r{place}" for place in row]
    pairs = (training.images, calibration.images) if rule == "dar" else (calibration.images, training.images)
    threshold = np.percentile(largest(*pairs)[0], 95)
    search = report["sscd_search"]
    assert search["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert search["threshold_rule"] == (copymetrics.DAR if rule == "dar" else copymetrics.STRANGERS)
    passed = best > threshold
    assert (search["copies"], search["pictures"]) == (passed.sum(), len(set(row[passed]))) and passed.sum() >= 9
    assert search["background"] == (largest(heldout.images, training.images)[0] > threshold).mean() > 0
    same = [found["record_id"] == f"r{place}" for found, place in zip(table, row, strict=True)]
    assert search["same_as_l2"] == np.mean(same) and 0 < np.mean(same) < 0.9
    others = [largest(training.images[[i]], np.delete(training.images, i, axis=0))[0][0] for i in range(80)]
    for name, values in (("generation_train", best), ("train_train", others)):
        expected = {level: np.percentile(values, float(level)) for level in ("50", "75", "90", "95")}
        assert search[name] == pytest.approx(expected, abs=1e-6)


def test_closed_forms_of_angles():
    """Degrees 0, 10, 30, 60: the nearest others lie 10, 10, 20 and 30 away; equal pictures are each other's nearest."""
    search = SscdSearch(Descriptors(angle, None), None)
    training = fabricated.pictures(flat(0, 10, 30, 60))
    cosine, row = search.largest(flat(14, 59, 90), training)
    np.testing.assert_allclose(cosine, np.cos(np.deg2rad([4, 1, 30])), atol=1e-6)
    assert row.tolist() == [1, 3, 3]
    np.testing.assert_allclose(search.among(training), np.cos(np.deg2rad([10, 10, 20, 30])), atol=1e-6)
    np.testing.assert_allclose(
        search.among(fabricated.pictures(flat(50, 50, 50, 0, 90))), [1, 1, 1, *np.cos(np.deg2rad([50, 40]))], atol=1e-6
    )
    assert search.among(fabricated.pictures(flat(7))) is None


def test_copies_of_a_picture_are_no_other_picture():
    """Records 0 and 2 are one picture: its nearest other is 20 degrees away, and its first record is named."""
    search = SscdSearch(Descriptors(angle, None), None)
    training = fabricated.pictures(flat(0, 20, 0), picture=[4, 7, 4])
    np.testing.assert_allclose(search.among(training), np.cos(np.deg2rad([20, 20])), atol=1e-6)
    report, columns = search.report(flat(2, 1, 19), np.array([2, 1, 1]), training, None, 0.9, "a rule")
    assert [row["sscd_nearest"] for row in columns] == ["r0", "r0", "r1"]
    assert (report["copies"], report["pictures"], report["background"]) == (3, 2, None)
    assert report["same_as_l2"] == pytest.approx(2 / 3)


def test_each_image_is_described_once(scene, stub):
    """In pairs, search, calibration, control and background alike; views of pictures are images of their own."""
    generations, training, heldout, calibration = scene
    run(*scene, **WEIGHTS)
    assert len(stub) == len(set(stub))
    everything = np.concatenate([generations, training.images, heldout.images, calibration.images])
    assert set(stub) >= {image.tobytes() for image in everything}
    assert len(stub) <= len(everything) + len(generations) + len(heldout.images) + len(calibration.images)


def test_descriptors_come_in_order_from_several_calls():
    described = Descriptors(angle, None)
    for levels in ((3, 9, 3), (9, 40, 3, 40, 41), tuple(range(50))):
        np.testing.assert_array_equal(described.of(flat(*levels)), angle(flat(*levels)))
    assert len(described.known) == 50


def test_without_weights_or_calibration_nothing_is_counted(scene, stub):
    report, table = run(scene[0], scene[1], scene[2])
    assert report["sscd_search"] is None and table[0]["sscd_nearest"] is table[0]["sscd_best"] is None
    report, table = run(scene[0], scene[1], scene[2], **WEIGHTS)
    search = report["sscd_search"]
    assert [search[key] for key in ("threshold", "copies", "pictures", "background")] == [None] * 4
    assert "no calibration" in search["threshold_rule"] and search["train_train"] and table[0]["sscd_best"] is not None


def test_ranks_return_what_one_process_returns(scene, stub, monkeypatch):
    alone = run(*scene, **WEIGHTS)
    count = len(stub)
    ranks = Ranks(3)
    for module in (accelerate.utils, neighbours, knn, copyvalues):
        monkeypatch.setattr(module, "gather_object", ranks.gather)
    for found in ranks.run(lambda accelerator: run(*scene, accelerator=accelerator, **WEIGHTS)):
        assert found == alone
    assert len(stub) == 2 * count  # the ranks together described each image once more
