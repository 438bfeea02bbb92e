"""`defenses.exact` against 64-bit integers."""

import numpy as np
import pytest
import torch

from defenses.exact import centred, integer_type, l2_of, squared_differences


@pytest.mark.parametrize("size", [1, 1024, 1025, 20_000, 40_000])  # the last needs 64-bit sums
def test_squared_differences_are_exact(size):
    """Dark images: all products have one sign, so that a float32 sum over more than 1024 of them would round."""
    random = np.random.default_rng(size)
    left = random.integers(0, 4, (3, 1, 1, size), dtype=np.uint8)
    right = np.concatenate([random.integers(0, 4, (4, 1, 1, size)), np.full((1, 1, 1, size), 255)]).astype(np.uint8)
    expected = ((left[:, None].astype(np.int64) - right[None]) ** 2).sum(axis=(2, 3, 4))
    found = squared_differences(centred(left), centred(right))
    assert found.dtype == integer_type(size)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_l2_is_that_of_pixels_in_0_1():
    black, white = np.zeros((1, 3, 4, 4), np.uint8), np.full((1, 3, 4, 4), 255, np.uint8)
    assert l2_of(squared_differences(centred(black), centred(white)).numpy(), 48)[0, 0] == 1.0
    assert centred(torch.zeros(2, 1, 2, 2, dtype=torch.uint8)).tolist() == [[-128.0] * 4] * 2
