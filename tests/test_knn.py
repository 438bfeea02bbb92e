"""`defenses.knn` against brute force in float64, scipy and faiss; the bounds of `defenses.bounds` against the truth."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from defenses import bounds, knn
from defenses.bounds import Products
from defenses.knn import nearest, nearest_sharded, squared_distances


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def brute_force(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All distances in float64, sorted; of equals the lower row first."""
    squared = np.stack([((references.astype(np.float64) - query) ** 2).sum(axis=1) for query in queries])
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, axis=1), order


def assert_equals_brute_force(queries, references, k, **options):
    found = nearest(queries, references, k, **options)
    squared, row = brute_force(queries, references, k)
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_allclose(found.squared, squared, rtol=1e-12)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small inputs take all ways through the code."""
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(bounds, "_REFERENCES", 48)


FORMATS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("count", "size", "k"), [(1, 3, 5), (47, 5, 2), (500, 24, 3), (500, 24, 51), (130, 512, 130)])
def test_nearest_equal_brute_force(small_blocks, dtype, count, size, k):
    assert_equals_brute_force(gaussian(1, 20, size), gaussian(2, count, size), k, dtype=dtype)


def test_nearest_equal_scipy_at_the_size_of_whole_blocks():
    references, queries = gaussian(3, 9000, 8), gaussian(4, 60, 8)
    found = nearest(queries, references, 64)
    distance, row = cKDTree(references).query(queries, k=64)
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_allclose(np.sqrt(found.squared), distance, rtol=1e-12)


def test_nearest_equal_faiss():
    """Gaps between neighbours are far above float32 rounding here, so faiss's float32 distances give the same order."""
    faiss = pytest.importorskip("faiss")
    random = np.random.default_rng(19)
    radius = np.linspace(1, 20, 3000)[random.permutation(3000), None]
    direction = gaussian(20, 3000, 40)
    references = (radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    queries = np.zeros((25, 40), np.float32)  # faiss takes matrix products from 20 queries on
    index = faiss.IndexFlatL2(40)
    index.add(references)
    squared, row = index.search(queries, 51)
    found = nearest(queries, references, 51)
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_allclose(found.squared, squared, rtol=1e-5)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("offset", [0.0, 30.0, 4e5])
def test_far_from_the_origin(small_blocks, dtype, offset):
    """|a|^2 + |b|^2 - 2ab in float32 would keep nothing of these distances."""
    assert_equals_brute_force(
        gaussian(5, 9, 16) + np.float32(offset), gaussian(6, 300, 16) + np.float32(offset), 4, dtype=dtype
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_two_far_clusters_of_close_points(small_blocks, dtype):
    """No centre helps here: distances are 1e-3, lengths 500, and the bound separates nothing within a cluster."""
    side = np.where(np.arange(200) % 2, 500, -500)[:, None]
    references = (np.random.default_rng(7).normal(scale=1e-3, size=(200, 32)) + side).astype(np.float32)
    assert_equals_brute_force(references[::9], references, 6, dtype=dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_equal_references_go_to_the_lower_row(small_blocks, monkeypatch, dtype):
    """More equal candidates than are kept: they are settled by direct distances on the way, also beside nearer ones to come."""
    monkeypatch.setattr(knn, "_CANDIDATES", 60)
    references = np.repeat(gaussian(8, 1, 12), 700, axis=0)
    references[650:660] = gaussian(9, 10, 12) * 0.1
    queries = np.concatenate([references[:1], gaussian(10, 8, 12) * 0.1])
    assert_equals_brute_force(queries, references, 13, dtype=dtype)
    assert nearest(queries[:1], references, 4).row.tolist() == [[0, 1, 2, 3]]


def test_one_query_with_many_candidates_does_not_cost_the_others_memory(monkeypatch):
    """All references lie on a sphere about the first query: everything of what is kept must be linear in the candidates."""
    largest = []

    def counted(left, i, right, j):
        largest.append(len(i))
        return squared_distances(left, i, right, j)

    monkeypatch.setattr(knn, "squared_distances", counted)
    monkeypatch.setattr(knn, "_CANDIDATES", 3000)
    references = gaussian(21, 12_000, 3)
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    queries = np.concatenate([np.zeros((1, 3), np.float32), gaussian(22, 30, 3)])
    found = nearest(queries, references, 5)
    np.testing.assert_array_equal(found.row[1:], brute_force(queries, references, 5)[1][1:])
    np.testing.assert_allclose(found.squared[0], brute_force(queries, references, 5)[0][0], rtol=1e-12)
    assert max(largest) < 3000 + 2048 + 31 * 5


def test_one_long_vector_does_not_hide_the_others(small_blocks):
    references = gaussian(11, 400, 10)
    references[3] *= 1e8
    assert_equals_brute_force(gaussian(12, 12, 10), references, 5)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_any_small_input_equals_brute_force(data):
    """Whole numbers: equal distances abound and every sum is exact, so that the order is the stated one."""
    size, count, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 90)), data.draw(st.integers(1, 70))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    scale = np.float32(data.draw(st.sampled_from([2.0**-60, 1.0, 2.0**40])))
    queries, references = (random.integers(-2, 3, (n, size)).astype(np.float32) * scale for n in (5, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_REFERENCES", data.draw(st.sampled_from([17, 40, 2048])))
        patch.setattr(knn, "_CANDIDATES", data.draw(st.sampled_from([20, 2**22])))
        assert_equals_brute_force(queries, references, k, dtype=data.draw(st.sampled_from(FORMATS)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1, 40, 700])
def test_the_bound_encloses_the_truth_and_is_no_wider_than_need_be(dtype, size):
    """Vectors of one sign, whose rounding errors add up rather than cancel, and of very different lengths."""
    random = np.random.default_rng(size)
    queries, references = (
        (random.random((n, size)) * 10.0 ** random.integers(-2, 3, (n, 1))).astype(np.float32) for n in (30, 50)
    )
    products = Products(references, torch.device("cpu"), dtype)
    left, own = products.left(queries)
    right, length = products.right(0)
    low = products.bounds(left, right).double() - products.of_lengths * own.square()[:, None]
    gap = products.gap(own[:, None], length[None])
    squared = np.stack([((references.astype(np.float64) - query) ** 2).sum(axis=1) for query in queries])
    truth = (torch.from_numpy(squared) - own.square()[:, None]) / 2
    assert (low <= truth).all() and (truth <= low + gap).all()
    reach = (own[:, None] + length[None]).square()
    assert (gap <= reach * (0.05 if dtype == torch.bfloat16 else 3e-7 * (size + 20))).all()


def test_few_references_survive_the_shortlist(monkeypatch):
    """The direct distances are computed of little more than k references: otherwise the product would be for nothing."""
    pairs = []

    def counted(left, i, right, j):
        pairs.append(len(i))
        return squared_distances(left, i, right, j)

    monkeypatch.setattr(knn, "squared_distances", counted)
    nearest(gaussian(13, 50, 128), gaussian(14, 6000, 128), 20, dtype=torch.float32)
    assert 50 * 20 <= sum(pairs) < 50 * 22


def test_reduced_products_widen_the_bound():
    """Where the process allows TF32 or bfloat16 for float32 products, the bound must not assume float32."""
    cpu = torch.device("cpu")
    plain = bounds._error(512, torch.float32, cpu)
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = bounds._error(512, torch.float32, cpu)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (
        plain[0] < 1e-4
        and allowed[0] > 2 * 2.0**-8
        and bounds._error(512, torch.float32, torch.device("cuda")) == allowed
    )


def test_ranks_return_what_one_process_returns(monkeypatch):
    queries, references = gaussian(15, 23, 6), gaussian(16, 90, 6)
    whole = nearest(queries, references, 5)
    parts = [nearest(queries, references, 5, rows=np.arange(rank, 23, 3)) for rank in range(3)]
    monkeypatch.setattr(knn, "gather_object", lambda part: parts)
    rank = SimpleNamespace(process_index=1, num_processes=3, device=torch.device("cpu"))
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    for found in (nearest_sharded(queries, references, 5, accelerator=each) for each in (rank, alone, None)):
        for name in ("query", "squared", "row"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_memory_maps_and_no_queries(tmp_path):
    np.save(tmp_path / "references.npy", gaussian(17, 50, 4))
    references = np.load(tmp_path / "references.npy", mmap_mode="r")
    assert_equals_brute_force(gaussian(18, 3, 4), references, 5)
    empty = nearest(np.zeros((0, 4), np.float32), references, 5)
    assert empty.squared.shape == empty.row.shape == (0, 5) and empty.row.dtype == np.int64


@pytest.mark.parametrize(
    ("queries", "references", "k"),
    [
        (np.zeros((1, 4)), np.zeros((1, 4), np.float32), 1),
        (np.zeros((1, 4), np.float32), np.zeros((1, 5), np.float32), 1),
        (np.zeros((1, 4), np.float32), np.zeros((0, 4), np.float32), 1),
        (np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), 0),
        (np.full((1, 4), np.nan, np.float32), np.zeros((1, 4), np.float32), 1),
        (np.zeros((1, 4), np.float32), np.array([[0, 0, 0, 0], [0, 0, 0, np.inf]], np.float32), 1),
        (np.zeros((1, 4), np.float32), np.full((1, 4), 1e18, np.float32) * [1, 1, 1, -1], 1),
    ],
)
def test_wrong_input_is_refused(queries, references, k):
    with pytest.raises(ValueError):
        nearest(queries, references, k)
