"""Augmentation against torch's own flips and turns, closed formulas and binomial bounds."""

import math

import numpy as np
import pytest
import torch

from defenses.augment import Augment, AugmentConfig
from defenses.base import Batch
from defenses.errors import UserError
from defenses.seeding import RecordRandom

OFF = {f"{name}_probability": 0.0 for name in ("flip", "crop", "rotate", "brightness", "contrast", "noise")}


def make_batch(rows, images=None, step=3):
    if images is None:
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        images = torch.stack([torch.rand(1, 16, 16, generator=g) for g in generators]) * 2 - 1
    return Batch(images=images, rows=np.asarray(rows), labels=None, random=RecordRandom(7, step, rows, [0] * len(rows)))


def apply(batch, **settings):
    return Augment(AugmentConfig(**(OFF | settings))).change_batch(batch).images


def test_probability_zero_is_the_exact_identity():
    batch = make_batch(range(8))
    assert torch.equal(apply(batch), batch.images)


def test_flip_is_torch_flip_and_happens_at_its_rate():
    batch = make_batch(range(2000))
    assert torch.equal(apply(batch, flip_probability=1.0), batch.images.flip(-1))
    some = apply(batch, flip_probability=0.3)
    flipped = (some == batch.images.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(some[~flipped], batch.images[~flipped])
    assert abs(flipped.sum().item() - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)


@pytest.mark.parametrize("name", ["crop", "rotate", "brightness", "contrast", "noise"])
def test_every_transformation_happens_at_its_rate(name):
    batch = make_batch(range(2000), torch.linspace(-0.5, 0.5, 64).reshape(1, 1, 8, 8).repeat(2000, 1, 1, 1))
    changed = (apply(batch, **{f"{name}_probability": 0.2}) != batch.images).flatten(1).any(dim=1)
    assert abs(changed.sum().item() - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8)


def plane(size=32):
    """x and y of each pixel centre, -1 to 1 over the picture, as two channels: shows where a sample came from."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    return torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)])


def test_rotation_turns_by_uniform_angles():
    batch = make_batch(range(500), plane().repeat(500, 1, 1, 1))
    inner = apply(batch, rotate_probability=1.0, rotate_degrees=20.0)[:, :, 10:22, 10:22]
    # each channel is linear in the middle: its slopes are the entries of the rotation
    step = 2 / 32
    cosine = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) / (11 * step)
    sine = (inner[:, 1, 0, -1] - inner[:, 1, 0, 0]) / (11 * step)
    assert torch.allclose(cosine**2 + sine**2, torch.ones(500), atol=1e-4)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    assert angle.abs().max() <= 20.001
    assert angle.abs().max() > 19
    assert angle.mean().abs() < 5 * (20 / math.sqrt(3)) / math.sqrt(500)
    assert angle.std().item() == pytest.approx(20 / math.sqrt(3), rel=0.1)


def test_quarter_turn_is_rot90(monkeypatch):
    batch = make_batch(range(4))
    monkeypatch.setattr(batch.random, "uniform", lambda purpose, *shape: torch.full((4, *shape), 0.9999999))
    turned = apply(batch, rotate_probability=1.0, rotate_degrees=90.0)
    assert torch.allclose(turned, torch.rot90(batch.images, 1, (2, 3)), atol=1e-4)
    assert not torch.allclose(turned, batch.images, atol=0.1)


def test_crop_is_a_square_inside_the_picture():
    batch = make_batch(range(500), plane().repeat(500, 1, 1, 1))
    out = apply(batch, crop_probability=1.0, crop_scale=0.5)
    inner = out[:, :, 4:28, 4:28]  # away from the border, where bilinear sampling is exactly linear
    width = (inner[:, 0, 0, -1] - inner[:, 0, 0, 0]) / (23 * 2 / 32)
    height = (inner[:, 1, -1, 0] - inner[:, 1, 0, 0]) / (23 * 2 / 32)
    assert torch.allclose(width, height, atol=1e-4)
    assert 0.499 <= width.min() < 0.52
    assert 0.98 < width.max() <= 1.001
    assert width.mean().item() == pytest.approx(0.75, abs=0.035)
    middle = inner.mean(dim=(2, 3))  # centre of the square, [500, 2]
    assert (middle.abs() + width[:, None] <= 1.001).all()
    assert middle.mean().abs() < 0.03


def test_flip_mirrors_the_original_before_it_is_turned():
    batch = make_batch(range(6))
    turn = {"rotate_probability": 1.0, "rotate_degrees": 15.0, "crop_probability": 1.0}
    both = apply(batch, flip_probability=1.0, **turn)
    mirrored = make_batch(range(6), batch.images.flip(-1))
    assert torch.allclose(both, apply(mirrored, **turn), atol=1e-5)


def test_brightness_adds_one_constant_in_pixels_of_0_to_1():
    batch = make_batch(range(500), torch.zeros(500, 1, 4, 4))
    added = apply(batch, brightness_probability=1.0, brightness=0.2)[:, 0] / 2
    assert torch.equal(added.amax(dim=(1, 2)), added.amin(dim=(1, 2)))
    assert 0.19 < added.max() <= 0.2 and -0.2 <= added.min() < -0.19
    assert added[:, 0, 0].std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.1)


def test_contrast_stretches_around_the_mean():
    batch = make_batch(range(500), 0.3 + 0.2 * plane(8).repeat(500, 1, 1, 1))
    out = apply(batch, contrast_probability=1.0, contrast=0.4)
    assert torch.allclose(out.mean(dim=(1, 2, 3)), torch.full((500,), 0.3), atol=1e-5)
    factor = out.std(dim=(1, 2, 3)) / batch.images.std(dim=(1, 2, 3))
    assert 0.599 <= factor.min() < 0.63 and 1.37 < factor.max() <= 1.401


def test_noise_has_its_standard_deviation():
    batch = make_batch(range(200), torch.zeros(200, 1, 16, 16))
    noise = apply(batch, noise_probability=1.0, noise_std=0.05) / 2
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert noise.mean().abs() < 5 * 0.05 / math.sqrt(noise.numel())


def test_a_record_does_not_see_the_rest_of_its_batch():
    full = Augment(AugmentConfig(noise_probability=0.5))
    rows = [5, 17, 2, 90, 41]
    together = full.change_batch(make_batch(rows)).images
    for place, row in enumerate(rows):
        alone = full.change_batch(make_batch([row])).images[0]
        assert torch.allclose(together[place], alone, atol=1e-6)
    assert not torch.allclose(together, full.change_batch(make_batch(rows, step=4)).images, atol=1e-3)


def test_output_stays_in_range_and_empty_batches_pass():
    strong = AugmentConfig(brightness=1.0, contrast=0.9, noise_probability=1.0, noise_std=1.0, rotate_degrees=180.0)
    out = Augment(strong).change_batch(make_batch(range(64))).images
    assert out.dtype == torch.float32 and out.min() >= -1 and out.max() <= 1 and torch.isfinite(out).all()
    assert Augment(strong).change_batch(make_batch([], torch.zeros(0, 1, 16, 16))).images.shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    "bad", [{"flip_probability": 1.2}, {"crop_scale": 0.0}, {"noise_std": -0.1}, {"contrast": 1.0}]
)
def test_bad_values_name_their_key(bad):
    with pytest.raises(UserError, match=f"defenses.augment.{next(iter(bad))}"):
        AugmentConfig(**bad)


def test_claim_is_heuristic():
    assert Augment(AugmentConfig()).claim()["kind"] == "heuristic"
