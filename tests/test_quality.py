import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from defenses.errors import UserError
from eval.quality import UtilityConfig, frechet, kernel, measure, precision_recall

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vectors(shared):
    return {
        case["id"]: case for case in json.loads((shared / "reference" / "metric_vectors.json").read_text())["cases"]
    }


def with_moments(mean, covariance) -> torch.Tensor:
    """Four points with exactly this mean and np.cov."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    values, axes = np.linalg.eigh(np.array(covariance, dtype=float))
    return torch.from_numpy(corners @ (axes * np.sqrt(values)).T + mean)


@pytest.mark.parametrize("case", ["mean shift only", "non-commuting", "rank 1 against identity"])
def test_frechet_of_known_moments(vectors, case):
    known = vectors[f"frechet: {case}"]
    sets = [with_moments(known[f"mu{i}"], known[f"sigma{i}"]) for i in (1, 2)]
    assert frechet(*sets, seed=0) == {"fid": pytest.approx(known["fid"], rel=1e-6), "fid_n": 4}


def test_kernel_of_exact_fraction(vectors):
    known = vectors["kid: 3 against 3 points in 2 dimensions"]
    sets = [torch.tensor(known[name], dtype=torch.float64) for name in "XY"]
    result = kernel(*sets, subsets=7, subset_size=3, seed=0)
    assert result == {"kid": pytest.approx(float(Fraction(-5, 12))), "kid_std": None, "kid_subset_size": 3}


def test_feature_pair(vectors, shared):
    pair = np.load(shared / "reference" / "feature_pair_seed0.npz", allow_pickle=False)
    known = vectors["features: seed 0"]
    x, y = torch.from_numpy(pair["X"]), torch.from_numpy(pair["Y"])
    mean, covariance = y.mean(0), torch.cov(y.T)
    # 64 other points with the moments of the 80, so that equal numbers give the known distance of unequal ones
    z = x - x.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T @ torch.linalg.cholesky(covariance).T + mean
    assert frechet(x, z, seed=0)["fid"] == pytest.approx(known["fid"], rel=1e-9)
    result = kernel(x, y, subsets=2000, subset_size=40, seed=0)
    assert result["kid"] == pytest.approx(known["kid_unbiased"], abs=4 * result["kid_std"] / 2000**0.5 + 0.01)
    assert result["kid_std"] > 0 and result["kid_subset_size"] == 40


def test_frechet_uses_equal_numbers():
    """Of two samples of one law the distance is bias alone, which falls with the numbers: all 500 would give a smaller one."""
    random = np.random.default_rng(0)
    values, equal, unequal = random.normal(size=(40, 560, 4)), [], []
    for sample in values:
        generated, reference = torch.from_numpy(sample[:500]), torch.from_numpy(sample[500:])
        result = frechet(generated, reference, seed=1)
        assert result["fid_n"] == 60
        equal.append(result["fid"])
        unequal.append(frechet_of_moments(sample[:500], sample[500:]))
    fresh = [frechet_of_moments(sample[:60], sample[500:]) for sample in values]
    assert np.mean(equal) == pytest.approx(np.mean(fresh), rel=0.2)
    assert np.mean(equal) > 1.4 * np.mean(unequal)


def frechet_of_moments(x: np.ndarray, y: np.ndarray) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) by scipy."""
    a, b = np.cov(x.T), np.cov(y.T)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


def share_inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """Share of points inside a ball around some manifold point that reaches to its k-th neighbour (Kynkaanniemi 2019, Eq. 1)."""
    radius = np.sort(cdist(manifold, manifold), axis=1)[:, k]
    return float((cdist(points, manifold) <= radius).any(axis=1).mean())


def test_precision_and_recall_by_their_definition():
    rng = np.random.default_rng(0)
    generated, reference = rng.normal(size=(80, 5)), rng.normal(0.6, 1.3, size=(80, 5))
    ours = precision_recall(torch.from_numpy(generated), torch.from_numpy(reference), 3, seed=0)
    precision, recall = share_inside(generated, reference, 3), share_inside(reference, generated, 3)
    assert 0.2 < recall < precision < 1
    assert ours["precision"] == pytest.approx(precision) and ours["recall"] == pytest.approx(recall)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pictures_are_not_measured(n):
    images = np.zeros((20, 1, 16, 16), np.uint8)
    report = measure(images[:n], images, UtilityConfig(), CPU, 0)
    assert [report[key] for key in ("fid", "kid", "kid_std", "precision", "recall")] == [None] * 5
    assert (report["n_generated"], report["n_reference"], report["reference"]) == (n, 20, "heldout")


@pytest.mark.parametrize(("name", "mode"), [("cxr_nih1000", "L"), ("emoji", "RGB")])
def test_offline_features_order_real_pictures(shared, name, mode):
    """Real against real << blurred < noise, and more noise is farther; a shift of brightness is seen."""
    files = np.random.default_rng(0).permutation(sorted((shared / name / "images").glob("*.png")))[:200]
    pictures = [Image.open(file).convert(mode).resize((32, 32), Image.Resampling.BOX) for file in files]

    def stack(images):
        return np.stack([np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image in images])

    def noisy(images, level):
        noise = np.random.default_rng(1).normal(0, 255 * level, images.shape)
        return np.clip(images + noise, 0, 255).astype(np.uint8)

    real, reference = stack(pictures[:100]), stack(pictures[100:])
    blurred = stack([picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures[:100]])
    arms = [real, noisy(real, 0.05), noisy(real, 0.1), noisy(real, 0.2), noisy(real, 0.5)]
    fid = [measure(arm, reference, UtilityConfig(), CPU, 0)["fid"] for arm in arms]
    assert all(1.5 * low < high for low, high in zip(fid[1:], fid[2:], strict=False)) and 2 * fid[0] < fid[1]
    assert 5 * fid[0] < measure(blurred, reference, UtilityConfig(), CPU, 0)["fid"] < fid[-1]
    brighter = np.clip(real.astype(int) + 60, 0, 255).astype(np.uint8)
    assert 3 * fid[0] < measure(brighter, reference, UtilityConfig(), CPU, 0)["fid"]
    collapsed = np.repeat(real[:5], 20, axis=0)
    assert measure(collapsed, reference, UtilityConfig(), CPU, 0)["recall"] < 0.1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch_size": 0}, "utility.batch_size"),
        ({"kid_subset_size": 1}, "utility.kid_subset_size"),
        ({"neighbourhood": 0}, "utility.neighbourhood"),
        ({"features": "inception"}, "utility.weights"),
        ({"weights": "file.pth"}, "utility.weights"),
    ],
)
def test_bad_settings_are_named(change, key):
    with pytest.raises(UserError) as error:
        replace(UtilityConfig(), **change)
    assert error.value.key == key
