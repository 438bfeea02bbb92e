"""`defenses.neighbours` against loops in float64 (tests/reference/brute_force.py)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses import bounds, neighbours
from defenses.neighbours import VIEWS, adaptive_score, pairs_within, search, views
from tests.reference import brute_force as brute


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_equals_brute_force(queries, references, picture, k):
    result = search(queries, references, picture, k)
    pictures = len(set(picture.tolist()))
    assert result.distinct.distance.shape == (len(queries), min(k, pictures))
    assert result.records.distance.shape == (len(queries), min(k, len(references)))
    for q, query in enumerate(queries):
        for found, all_views in ((result.distinct, True), (result.identity, False)):
            expected = brute.distinct(query, references, picture, all_views)[:k]
            np.testing.assert_allclose(found.distance[q], [row[0] for row in expected], rtol=1e-6)
            assert found.picture[q].tolist() == [row[1] for row in expected]
            assert found.row[q].tolist() == [row[2] for row in expected]
        single = brute.records(query, references, True)[:k]
        np.testing.assert_allclose(result.records.distance[q], [row[0] for row in single], rtol=1e-6)
        assert result.records.row[q].tolist() == [row[1] for row in single]
        assert (result.records.picture[q] == picture[result.records.row[q]]).all()
    everyone = [{row[1]: row[0] for row in brute.distinct(query, references, picture)} for query in queries]
    for column, name in enumerate(result.pictures.tolist()):
        distances = [table[name] for table in everyone]
        assert result.best_distance[column] == pytest.approx(min(distances), rel=1e-9)
        assert distances[result.best_query[column]] == pytest.approx(min(distances), rel=1e-12)


def test_views_are_the_ten_of_the_reference():
    for shape in ((1, 8, 8), (3, 40, 64), (1, 96, 96), (1, 1, 1)):
        image = noise(1, *shape)
        found = views(torch.from_numpy(image))
        assert len(found) == len(VIEWS) == 10 and VIEWS[0] == "identity"
        for view, expected in zip(found, brute.views(image), strict=True):
            np.testing.assert_array_equal(view.numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 5), (3, 20, 20)])  # the last is longer than one exact product
def test_random_images_equal_brute_force(shape):
    picture = np.array([7, 3, 3, 9, 7, 1, 5, 0, 0, 0, 2])
    assert_equals_brute_force(noise(2, 4, *shape), noise(3, 11, *shape), picture, 5)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.data())
def test_any_small_input_equals_brute_force(data):
    side, levels = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([2, 256]))
    count, queries, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    draw = [
        (random.integers(0, levels, (n, 1, side, side)) * (255 // (levels - 1))).astype(np.uint8)
        for n in (queries, count)
    ]
    picture = random.integers(0, 4, count)
    result = search(*draw, picture, k)
    for q, query in enumerate(draw[0]):  # equal distances occur: only exact arithmetic gives the stated order
        expected = brute.distinct(query, draw[1], picture)[:k]
        np.testing.assert_allclose(result.distinct.distance[q], [row[0] for row in expected], rtol=1e-6, atol=1e-9)


def test_extreme_grey_levels_are_exact():
    """All-black against all-white at a size where float32 sums of squares would round."""
    black, white = np.zeros((1, 3, 128, 128), np.uint8), np.full((1, 3, 128, 128), 255, np.uint8)
    nearly = white.copy()
    nearly[0, 0, 0, 0] = 254
    result = search(black, np.concatenate([white, nearly, black]), np.array([0, 1, 2]), 3)
    size = 3 * 128 * 128
    exact = [0.0, np.sqrt((255**2 * (size - 1) + 254**2) / (size * 255**2)), 1.0]
    np.testing.assert_allclose(result.identity.distance[0], exact, rtol=7e-8)  # float32 rounding of the result alone
    assert result.identity.picture[0].tolist() == [2, 1, 0]


def test_mirrored_and_shifted_copies_are_found_only_with_views():
    references = noise(4, 6, 1, 32, 32)
    queries = np.stack([references[2][..., ::-1], brute.shifted(references[3], 1, 0)])
    result = search(queries, references, np.arange(6), 1)
    assert result.distinct.picture[:, 0].tolist() == [2, 3]
    assert (result.distinct.distance[:, 0] == 0).all()
    assert (result.identity.distance[:, 0] > 0.3).all()


def test_ties_go_to_the_lower_picture_then_row():
    reference = noise(5, 1, 1, 4, 4)
    result = search(reference, np.repeat(reference, 5, axis=0), np.array([8, 2, 8, 2, 5]), 5)
    assert result.distinct.picture[0].tolist() == [2, 5, 8]
    assert result.distinct.row[0].tolist() == [1, 4, 0]
    assert result.records.row[0].tolist() == [1, 3, 4, 0, 2]


def test_blocks_and_shards_do_not_change_the_result(monkeypatch):
    queries, references, picture = noise(6, 23, 1, 8, 8), noise(7, 40, 1, 8, 8), np.arange(40) // 3
    whole = search(queries, references, picture, 6)
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    monkeypatch.setattr(neighbours, "_MEMORY_BYTES", 8 * 40 * 5)
    parts = [search(queries, references, picture, 6, rows=np.arange(rank, 23, 3)) for rank in range(3)]
    merged = neighbours._merge(parts)
    for name in ("distinct", "identity", "records"):
        for field in ("distance", "picture", "row"):
            np.testing.assert_array_equal(getattr(getattr(merged, name), field), getattr(getattr(whole, name), field))
    for field in ("query", "pictures", "best_distance", "best_query"):
        np.testing.assert_array_equal(getattr(merged, field), getattr(whole, field))


def test_no_queries_give_empty_neighbours():
    result = search(noise(8, 0, 1, 4, 4), noise(8, 3, 1, 4, 4), np.arange(3), 2)
    assert result.distinct.distance.shape == (0, 2) and np.isinf(result.best_distance).all()
    assert (result.best_query == -1).all()


@pytest.mark.parametrize(
    ("queries", "references", "k"),
    [
        (np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 1, 4, 4), np.uint8), 1),
        (np.zeros((1, 1, 4, 4), np.uint8), np.zeros((1, 1, 4, 5), np.uint8), 1),
        (np.zeros((1, 1, 4, 4), np.uint8), np.zeros((0, 1, 4, 4), np.uint8), 1),
        (np.zeros((1, 1, 4, 4), np.uint8), np.zeros((1, 1, 4, 4), np.uint8), 0),
    ],
)
def test_wrong_input_is_refused(queries, references, k):
    with pytest.raises(ValueError):
        search(queries, references, np.arange(len(references)), k)


def test_adaptive_score_worked_cases():
    """Carlini et al. 2023, section 5.1: 0.06 with many peers fails, 0.07 with all others beyond 0.2 succeeds."""
    peers = np.full(50, 0.07)
    peers[0] = 0.06
    alone = np.full(50, 0.21)
    alone[0] = 0.07
    score = adaptive_score(np.stack([peers, alone]), 0.5, 50)
    np.testing.assert_allclose(score, [0.06 / (0.5 * (0.06 + 49 * 0.07) / 50), 0.07 / (0.5 * (0.07 + 49 * 0.21) / 50)])
    assert score[0] > 1.6 and score[1] < 0.7


def test_adaptive_score_at_its_ends():
    np.testing.assert_allclose(adaptive_score(np.array([[0.1, 0.1, 0.9]]), 0.5, 2), [2.0])  # only the first n
    np.testing.assert_allclose(adaptive_score(np.array([[0.3]]), 0.5, 50), [2.0])  # one picture: no contrast
    np.testing.assert_allclose(adaptive_score(np.zeros((1, 3)), 0.25, 3), [4.0])  # all equal, though at 0
    np.testing.assert_allclose(adaptive_score(np.array([[0.0, 0.2]]), 0.5, 2), [0.0])
    with pytest.raises(ValueError):
        adaptive_score(np.zeros((2, 0)), 0.5, 5)


def brute_pairs(vectors: np.ndarray, radius: float):
    rows = []
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            difference = vectors[i].astype(np.float64) - vectors[j]
            distance = np.sqrt(np.mean(difference**2))
            if distance <= radius:
                rows.append((i, j, distance))
    return rows


@pytest.mark.parametrize("offset", [0.0, 1000.0])  # far from the origin |a|^2 + |b|^2 - 2ab alone loses everything
def test_pairs_within_equal_brute_force(monkeypatch, offset):
    monkeypatch.setattr(bounds, "_REFERENCES", 16)
    random = np.random.default_rng(9)
    vectors = random.normal(size=(60, 12))
    vectors[40] = vectors[3] + 1e-3
    vectors[41] = vectors[3]
    vectors = (vectors + offset).astype(np.float32)
    i, j, distance = pairs_within(vectors, 1.0)
    expected = brute_pairs(vectors, 1.0)
    assert 5 < len(expected) < 1000
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [row[:2] for row in expected]
    np.testing.assert_allclose(distance, [row[2] for row in expected], rtol=1e-12)


def test_pairs_within_keep_pairs_that_float32_products_lose():
    """Two far clusters of close points: |a|^2 + |b|^2 - 2ab in float32 errs by far more than the radius squared."""
    random = np.random.default_rng(10)
    vectors = (random.normal(scale=1e-3, size=(40, 32)) + np.repeat([-500, 500], 20)[:, None]).astype(np.float32)
    i, j, _ = pairs_within(vectors, 1.4e-3)
    expected = brute_pairs(vectors, 1.4e-3)
    assert 50 < len(expected) < 350
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [row[:2] for row in expected]


def test_pairs_within_edges():
    assert [len(part) for part in pairs_within(np.zeros((0, 4), np.float32), 1.0)] == [0, 0, 0]
    assert [len(part) for part in pairs_within(np.zeros((1, 4), np.float32), 1.0)] == [0, 0, 0]
    i, j, distance = pairs_within(np.ones((3, 4), np.float32), 0.0)
    assert (i.tolist(), j.tolist(), distance.tolist()) == ([0, 0, 1], [1, 2, 2], [0, 0, 0])
    with pytest.raises(ValueError):
        pairs_within(np.full((2, 2), np.nan, np.float32), 1.0)
