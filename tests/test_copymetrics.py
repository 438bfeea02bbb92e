"""Copy metrics against double loops, scipy, closed forms and planted copies."""

import math
import threading
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from defenses import knn, neighbours
from defenses.errors import UserError
from defenses.neighbours import VIEWS
from eval import copymetrics, copyvalues
from eval.copymetrics import COLUMNS, METRICS, CopyMetricsConfig, copy_metrics
from eval.copyvalues import CopyValues, nn_ratio
from eval.extraction import ExtractionConfig, untargeted
from eval.pairs import in_view, nearest_view, paired_tiled_l2, ssim, ssim_window
from eval.prompted import tiled_l2
from tests.reference import brute_force, fabricated
from train.phantom import PhantomConfig, phantom_items


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tensors(*images: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(each)) for each in images]


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 with a loop over channels and window positions, pixels in [0, 1]."""
    side = min(11, *a.shape[-2:])
    side -= side % 2 == 0
    at = np.arange(side) - side // 2
    weight = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    found = []
    for x, y in zip(a / 255.0, b / 255.0, strict=True):
        channel = []
        for top in range(x.shape[0] - side + 1):
            for left in range(x.shape[1] - side + 1):
                p, q = (each[top : top + side, left : left + side] for each in (x, y))
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                channel.append(
                    (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
                    / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))
                )  # fmt: skip
        found.append(np.mean(channel))
    return float(np.mean(found))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 19), (1, 11, 11), (2, 8, 10), (1, 5, 6), (1, 1, 4)])
def test_ssim_is_the_double_loop(shape):
    left = noise(1, 3, *shape)
    right = np.clip(left.astype(int) + np.random.default_rng(2).integers(-60, 60, left.shape), 0, 255).astype(np.uint8)
    expected = [naive_ssim(a, b) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(ssim(*tensors(left, right)), expected, rtol=1e-10)


def test_ssim_is_that_of_a_filter_library():
    """Gaussian filters of scipy, cut at 11 pixels, without the border: as scikit-image computes it."""
    left, right = fabricated.blobs(3, 2, side=40)[:, 0] / 255.0, fabricated.noisy(fabricated.blobs(3, 2, 40), 0.1)
    right = right[:, 0] / 255.0
    for x, y in zip(left, right, strict=True):
        ux, uy, uxx, uyy, uxy = (gaussian_filter(m, 1.5, truncate=3.5) for m in (x, y, x * x, y * y, x * y))
        top = (2 * ux * uy + 1e-4) * (2 * (uxy - ux * uy) + 9e-4)
        expected = (top / ((ux**2 + uy**2 + 1e-4) * (uxx - ux**2 + uyy - uy**2 + 9e-4)))[5:-5, 5:-5].mean()
        pair = [np.rint(255 * m).astype(np.uint8)[None, None] for m in (x, y)]
        assert ssim(*tensors(*pair)).item() == pytest.approx(expected, rel=1e-9)
        assert expected < 0.95


def test_ssim_closed_forms():
    image = noise(4, 1, 1, 16, 16)
    assert ssim(*tensors(image, image)).item() == pytest.approx(1)
    a, b = np.full((1, 1, 16, 16), 51, np.uint8), np.full((1, 1, 16, 16), 204, np.uint8)
    luminance = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)  # flat pictures have no structure
    assert ssim(*tensors(a, b)).item() == pytest.approx(luminance, rel=1e-9)
    assert [ssim_window(*size) for size in ((32, 32), (11, 40), (10, 40), (28, 8), (1, 1))] == [11, 11, 9, 7, 1]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 10, 7), (1, 3, 2)])
def test_tiled_l2_of_pairs_is_the_prompted_attacks(shape):
    images = noise(5, 6, *shape)
    everyone = tiled_l2(images)
    found = paired_tiled_l2(*tensors(images[:5], images[1:]))
    np.testing.assert_allclose(found, [everyone[i, i + 1] for i in range(5)], rtol=1e-12)


def test_a_changed_tile_is_a_tile_not_a_sixteenth():
    left = np.full((1, 1, 16, 16), 100, np.uint8)
    right = left.copy()
    right[..., 4:8, 12:16] = 151
    assert paired_tiled_l2(*tensors(left, right)).item() == pytest.approx(0.2)


def test_the_nearest_view_is_the_planted_one():
    pictures = noise(6, len(VIEWS), 1, 32, 32)
    shown = np.stack([brute_force.views(picture)[place] for place, picture in enumerate(pictures)])
    view = nearest_view(*tensors(fabricated.noisy(shown, 0.05), pictures))
    assert view.tolist() == list(range(len(VIEWS)))
    np.testing.assert_array_equal(in_view(torch.from_numpy(pictures), view).numpy(), shown)
    flat = torch.full((1, 1, 8, 8), 7, dtype=torch.uint8)
    assert nearest_view(flat, flat).item() == 0  # of equals the first, the identity


def test_nn_ratio_closed_forms():
    assert nn_ratio(np.array([[0.1, 0.4], [0.2, 0.2], [0, 0.3], [0, 0]])).tolist() == [0.25, 1, 0, 1]
    assert np.isnan(nn_ratio(np.array([[0.1]]))).all()


def oracle(images: np.ndarray, pictures) -> dict[str, list[float]]:
    """Every metric by its definition: all views of all records, then the naive formulas on the nearest view."""
    shown = np.array([brute_force.views(picture) for picture in pictures.images])  # [R, V, C, H, W]
    found = {"nn_ratio": [], "tiled_l2": [], "ssim": []}
    for image in images:
        distance = np.sqrt(((shown / 255.0 - image / 255.0) ** 2).mean(axis=(2, 3, 4)))  # [R, V]
        near = sorted(min(distance[pictures.picture == name].ravel()) for name in pictures.ids)
        match = shown[np.unravel_index(distance.argmin(), distance.shape)]
        tiles = [
            brute_force.l2(a, b)
            for band in zip(*(np.array_split(x, 4, -2) for x in (image, match)), strict=True)
            for a, b in zip(*(np.array_split(x, 4, -1) for x in band), strict=True)
        ]
        found["nn_ratio"].append(near[0] / near[1])
        found["tiled_l2"].append(max(tiles))
        found["ssim"].append(naive_ssim(image, match))
    return found


@pytest.mark.parametrize("cells", [2**20, 3 * 8 * 8])
def test_values_are_the_loops(monkeypatch, cells):
    """Copies share a picture id; several blocks."""
    monkeypatch.setattr(copyvalues, "_CELLS", cells)
    references = fabricated.blobs(7, 6, side=8, channels=3)
    references = np.concatenate([references, fabricated.noisy(references[:1], 0.05)])
    pictures = fabricated.pictures(references, picture=[5, 1, 2, 3, 4, 0, 5])
    images = np.concatenate([fabricated.noisy(references[[0, 3]], 0.1)[..., ::-1], fabricated.blobs(8, 5, 8, 3)])
    found = CopyValues(None, None).of(images, pictures)
    for name, expected in oracle(images, pictures).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
    assert len(set(np.round(found["ssim"], 3))) > 5


def run(generations, training, heldout=None, calibration=None, accelerator=None, **settings):
    """The attack, then the metrics on its matches, handed over backwards."""
    names = [f"g{index}" for index in range(len(generations))]
    attack = untargeted(
        generations, training, None, ExtractionConfig(permutations=1), exchangeable=True, seed=1, names=names
    )
    config = CopyMetricsConfig(**settings)
    return copy_metrics(
        generations, names, attack.matches[::-1], training, heldout, calibration, config, accelerator
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    """80 training, 60 held-out, 60 calibration pictures; generations 0..8 are made of training pictures 0..8."""
    training, heldout, calibration = (fabricated.blobs(seed, n) for seed, n in ((11, 80), (12, 60), (13, 60)))
    exact, mirrored = training[:3], training[3:6, :, :, ::-1]
    patched = training[6:8].copy()
    patched[:, :, 4:8, 4:8] = 255 - patched[:, :, 4:8, 4:8]  # one tile of sixteen is another picture's
    grey = (training[8:9].astype(int) // 8 + 120).astype(np.uint8)  # an eighth of the contrast
    generations = np.concatenate([exact, mirrored, patched, grey, fabricated.blobs(14, 40)])
    return generations, *(fabricated.pictures(images) for images in (training, heldout, calibration))


def entry(report, name):
    return next(metric for metric in report["metrics"] if metric["name"] == name)


def test_planted_copies_are_counted_and_disagreements_shown(planted):
    generations, training, heldout, calibration = planted
    report, table = run(*planted)
    assert [metric["name"] for metric in report["metrics"]] == ["adaptive_score", "nn_ratio", "tiled_l2", "ssim"]
    assert [row["generation"] for row in table] == [f"g{i}" for i in range(49)] and list(table[0]) == COLUMNS
    assert [row["record_id"] for row in table[:8]] == [f"r{i}" for i in range(8)]
    for row in table[:6]:  # copies, plain and mirrored
        assert (row["nn_ratio"], row["tiled_l2"]) == (0, 0) and row["ssim"] == pytest.approx(1)
    tiled = {row["generation"] for row in table if row["tiled_l2"] < 0.15}
    assert tiled == {f"g{i}" for i in range(6)}  # not those with a foreign tile
    assert entry(report, "tiled_l2")["copies"] == entry(report, "tiled_l2")["pictures"] == 6
    ratio = [row["generation"] for row in table if row["nn_ratio"] < 1 / 3]
    assert entry(report, "nn_ratio")["copies"] == len(ratio) and set(ratio) >= tiled
    assert entry(report, "adaptive_score")["copies"] == sum(row["adaptive_score"] <= 1 for row in table) >= 8
    shown = [row["generation"] for row in report["disagreements"]]
    assert {"g6", "g7"} <= set(shown) and not set(shown) & tiled  # all agree on plain copies
    assert "tiled_l2" not in report["disagreements"][shown.index("g6")]["copy_by"]
    assert "adaptive_score" in report["disagreements"][shown.index("g6")]["copy_by"]
    assert (report["generations"], report["heldout"], report["calibration"], report["ssim_window"]) == (49, 60, 60, 11)


def test_counts_background_and_agreement_are_those_of_the_loops(planted):
    generations, training, heldout, calibration = planted
    report, _ = run(*planted)
    values, strangers = (oracle(images, training) for images in (generations, heldout.images))
    passed = {}
    for name in ("nn_ratio", "tiled_l2", "ssim"):
        found, sign = entry(report, name), -1 if METRICS[name].direction == ">" else 1
        hits = [sign * value < sign * found["threshold"] for value in values[name]]
        passed[name] = np.array(hits)
        alarms = [sign * value < sign * found["threshold"] for value in strangers[name]]
        assert found["copies"] == sum(hits) and found["background"] == np.mean(alarms), name
    assert entry(report, "adaptive_score")["background"] is None  # the control's
    for pair in report["agreement"]:
        counts = [pair[key] for key in ("both", "only_first", "only_second", "neither")]
        assert sum(counts) == 49
        if "adaptive_score" not in (pair["first"], pair["second"]):
            one, other = passed[pair["first"]], passed[pair["second"]]
            expected = [(one & other).sum(), (one & ~other).sum(), (~one & other).sum(), (~one & ~other).sum()]
            assert counts == [int(count) for count in expected]
    assert len(report["agreement"]) == 6


def test_disagreements_are_ordered_by_votes_then_by_ranks():
    """g0: all say copy, g4: none; g2: two of four; g3 and g1: one; SSIM ranks g3 first, the others fourth."""
    falling = np.array([1.0, 2, 3, 4, 5])
    values = {name: falling for name in ("adaptive_score", "nn_ratio", "tiled_l2")}
    values["ssim"] = np.array([0.6, 0.7, 0.3, 0.9, 0.1])
    votes = {"adaptive_score": [1, 1, 1, 0, 0], "nn_ratio": [1, 0, 1, 0, 0], "tiled_l2": [1, 0, 0, 0, 0]}
    passed = {name: np.array(vote, dtype=bool) for name, vote in (votes | {"ssim": [1, 0, 0, 1, 0]}).items()}
    table = [{"generation": f"g{i}"} for i in range(5)]
    found = copymetrics._disagreements(table, values, passed)
    assert [row["generation"] for row in found] == ["g2", "g3", "g1"]
    assert found[0]["copy_by"] == ["adaptive_score", "nn_ratio"] and found[1]["copy_by"] == ["ssim"]
    tenfold = [{name: np.tile(each, 10) for name, each in part.items()} for part in (values, passed)]
    assert [row["generation"] for row in copymetrics._disagreements(table * 10, *tenfold)] == ["g2"] * 10 + ["g3"] * 2
    assert copymetrics._disagreements(table, values, {"ssim": passed["ssim"]}) == []


def test_several_generations_of_one_picture_are_one_picture(planted):
    training = planted[1]
    report, _ = run(np.repeat(training.images[:2], [3, 1], axis=0), training)
    assert (entry(report, "tiled_l2")["copies"], entry(report, "tiled_l2")["pictures"]) == (4, 2)


@pytest.mark.parametrize("rule", ["published", "dar"])
def test_thresholds_are_percentiles_of_the_stated_pairs(planted, rule):
    generations, training, heldout, calibration = planted
    report, _ = run(generations, training, heldout, calibration, threshold=rule)
    pairs = oracle(training.images, calibration) if rule == "dar" else oracle(calibration.images, training)
    assert entry(report, "ssim")["threshold"] == pytest.approx(np.percentile(pairs["ssim"], 95), rel=1e-6)
    for name, published in (("nn_ratio", 1 / 3), ("tiled_l2", 0.15)):
        expected = np.percentile(pairs[name], 5) if rule == "dar" else published
        assert entry(report, name)["threshold"] == pytest.approx(expected, rel=1e-6)
    assert entry(report, "adaptive_score")["threshold"] == 1
    other, _ = run(generations, training, fabricated.pictures(fabricated.blobs(15, 9)), calibration, threshold=rule)
    assert [m["threshold"] for m in other["metrics"]] == [m["threshold"] for m in report["metrics"]]  # held-out: unused


def test_dar_counts_copies_in_the_training_set_once():
    images = fabricated.blobs(16, 21)
    twenty = fabricated.pictures(np.concatenate([images[:1]] * 20 + [images[1:]]), [0] * 20 + list(range(1, 21)))
    calibration = fabricated.pictures(fabricated.blobs(17, 15))
    once, _ = run(images[:2], fabricated.pictures(images), None, calibration, threshold="dar")
    often, _ = run(images[:2], twenty, None, calibration, threshold="dar")
    assert entry(often, "ssim")["threshold"] == entry(once, "ssim")["threshold"]


def test_false_alarms_are_as_many_as_the_rule_says():
    """New pictures pass at 5 %: SSIM calibrated on other new pictures, over 8 draws of 150 each (+- 3 standard errors)."""
    shares = []
    for seed in range(8):
        draws = np.random.default_rng(seed).integers(0, 256, (3, 150, 1, 6, 6), dtype=np.uint8)
        training, calibration, new = (fabricated.pictures(images) for images in draws)
        report, _ = run(new.images[:1], training, new, calibration)
        shares.append(entry(report, "ssim")["background"])
    # the threshold's error and the control's: 2 * 0.05 * 0.95 / 150 is the variance of one share
    assert np.mean(shares) == pytest.approx(0.05, abs=3 * math.sqrt(2 * 0.05 * 0.95 / 150 / 8))


def test_without_calibration_pictures_ssim_counts_nothing(planted):
    generations, training, heldout, _ = planted
    report, table = run(generations, training, heldout)
    assert [entry(report, "ssim")[key] for key in ("threshold", "copies", "pictures", "background")] == [None] * 4
    assert "no calibration" in entry(report, "ssim")["threshold_rule"] and table[0]["ssim"] is not None
    assert {pair["second"] for pair in report["agreement"]} == {"nn_ratio", "tiled_l2"}
    with pytest.raises(UserError, match="attack.copy_metrics.threshold: dar needs calibration"):
        run(generations, training, heldout, threshold="dar")


def test_one_training_picture_has_no_ratio():
    one = fabricated.pictures(fabricated.blobs(18, 1))
    for rule in ("published", "dar"):
        report, table = run(one.images, one, one, one, threshold=rule)
        assert table[0]["nn_ratio"] is None and entry(report, "nn_ratio")["copies"] == (
            0 if rule == "published" else None
        )


def test_the_prompted_attack_has_no_score(planted):
    generations, training, heldout, calibration = planted
    matches = [
        {"generation": str(i), "record_id": f"r{i}", "l2": 0.0, "adaptive_score": None, "clique": "", "verified": False}
        for i in range(3)
    ]
    report, table = copy_metrics(
        generations[:3], ["0", "1", "2"], matches, training, heldout, calibration, CopyMetricsConfig()
    )
    assert [metric["name"] for metric in report["metrics"]] == ["nn_ratio", "tiled_l2", "ssim"]
    assert [row["adaptive_score"] for row in table] == [None] * 3


@pytest.mark.slow
def test_edited_copies_as_documented():
    """docs/copy-metrics.md, first table: which metric sees which edited copy of 60 phantom pictures at 32 px."""
    items = phantom_items(PhantomConfig(pictures=300, copied=0, outliers=6, heldout=300, calibration=150))
    splits = {
        split: np.stack([item.draw(32, 1) for item in items if item.split == split])
        for split in ("train", "calibration", "heldout")
    }
    training, calibration, heldout = (fabricated.pictures(splits[name]) for name in ("train", "calibration", "heldout"))
    original = training.images[:60].astype(float)
    brighter = np.clip(original + 40, 0, 255).astype(np.uint8)
    patched = training.images[:60].copy()
    patched[..., 8:16, 8:16] = np.roll(patched, 1, axis=0)[..., 8:16, 8:16]
    crops = [Image.fromarray(image[0, 4:-4, 4:-4]).resize((32, 32), Image.BICUBIC) for image in training.images[:60]]
    cropped = np.stack([np.asarray(crop)[None] for crop in crops])
    mean = np.rint((original + np.roll(original, 1, axis=0)) / 2).astype(np.uint8)
    expected = {  # adaptive score, NN ratio, tiled l2, SSIM
        "noise": (fabricated.noisy(training.images[:60], 0.1), [1.0, 0.03, 1.0, 0.98]),
        "contrast": (np.rint(original / 2 + 64).astype(np.uint8), [0.03, 0.0, 0.02, 0.70]),
        "brighter": (brighter, [0.18, 0.0, 0.0, 0.98]),
        "cropped": (cropped, [0.02, 0.0, 0.0, 0.03]),
        "mean": (mean, [0.0, 0.0, 0.0, 0.55]),
        "patched": (patched, [0.95, 0.58, 0.10, 1.0]),
        "strangers": (heldout.images[150:], [0.0, 0.0, 0.0, 0.07]),
    }
    for name, (images, shares) in expected.items():
        report, _ = run(images, training, None, calibration)
        found = [metric["copies"] / len(images) for metric in report["metrics"]]
        assert found == pytest.approx(shares, abs=0.02), name


class Ranks:
    """W threads that stand for processes: gathering waits for all and returns the parts in the order of the ranks."""

    def __init__(self, world: int):
        self.world, self.barrier, self.parts, self.local = world, threading.Barrier(world), {}, threading.local()

    def gather(self, part: list) -> list:
        self.parts[self.local.rank] = part
        self.barrier.wait(60)
        everything = [item for rank in range(self.world) for item in self.parts[rank]]
        self.barrier.wait(60)
        return everything

    def run(self, work) -> list:
        results = [None] * self.world

        def one(rank: int) -> None:
            self.local.rank = rank
            torch.set_num_threads(1)
            results[rank] = work(SimpleNamespace(process_index=rank, num_processes=self.world, device="cpu"))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_share_the_work_and_agree(planted, monkeypatch):
    """SSCD is stood in for by brightness left and right, so that its seam is used, too, and a mirrored copy needs its view."""

    def describe(images: np.ndarray) -> np.ndarray:
        vector = np.stack([half.mean((1, 2, 3)) for half in np.array_split(images, 2, axis=-1)], 1)
        return (vector / np.linalg.norm(vector, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(copymetrics, "load_sscd", lambda *_: describe)
    monkeypatch.setattr(copyvalues, "_CELLS", 5 * 256)
    settings = {"sscd_weights": "w", "sscd_weights_sha256": "00", "threshold": "dar"}
    alone = run(*planted, **settings)
    assert alone[0]["sscd_search"]["copies"] >= 3 and all(row["sscd_nearest"] for row in alone[1])
    assert entry(alone[0], "sscd")["weights_sha256"] == "00" and entry(alone[0], "sscd")["copies"] >= 3
    assert all(row["sscd"] == pytest.approx(1, abs=1e-6) for row in alone[1][:6])
    ranks = Ranks(3)
    for module in (accelerate.utils, neighbours, knn, copyvalues):
        monkeypatch.setattr(module, "gather_object", ranks.gather)
    for found in ranks.run(lambda accelerator: run(*planted, accelerator=accelerator, **settings)):
        assert found == alone


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("sscd_weights", {"sscd_weights_sha256": "00"}),
        ("sscd_weights", {"sscd_threshold": 0.5}),
        ("sscd_threshold", {"sscd_weights": "w", "sscd_threshold": 1.0}),
        ("sscd_threshold", {"sscd_weights": "w", "sscd_threshold": math.nan}),
        ("sscd_threshold", {"sscd_weights": "w", "sscd_threshold": 0.5, "threshold": "dar"}),
    ],
)
def test_bad_settings_name_their_key(key, settings):
    with pytest.raises(UserError, match=f"^attack.copy_metrics.{key}:"):
        CopyMetricsConfig(**settings)
