"""Pictures and generations of which the right answer is known."""

import numpy as np

from eval.pictures import Pictures


def blobs(seed: int, count: int, side: int = 16, channels: int = 1) -> np.ndarray:
    """Smooth random pictures, uint8 [count, C, side, side], about 0.3 apart from each other in l2."""
    coarse = np.random.default_rng(seed).random((count, channels, 5, 5))
    at = np.linspace(0, 4, side)
    low = np.minimum(at.astype(int), 3)
    weight = np.zeros((side, 5))
    weight[np.arange(side), low], weight[np.arange(side), low + 1] = 1 - (at - low), at - low
    return np.rint(255 * np.einsum("yi,ncij,xj->ncyx", weight, coarse, weight)).astype(np.uint8)


def noisy(images: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    """Images with normal noise of this standard deviation (pixels in [0, 1])."""
    noise = np.random.default_rng(seed).normal(scale=255 * sigma, size=images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def pictures(images: np.ndarray, picture=None, block=None, group=None, prefix: str = "r", offset: int = 0) -> Pictures:
    """Records of these images; without more, each is a picture and a block of its own and has no group."""
    picture = np.arange(offset, offset + len(images)) if picture is None else np.asarray(picture)
    _, inverse, size = np.unique(picture, return_inverse=True, return_counts=True)
    return Pictures(
        images=images,
        record_id=[f"{prefix}{index}" for index in range(len(images))],
        picture=picture,
        block=picture if block is None else np.asarray(block),
        group=[None] * len(images) if group is None else group,
        copies=size[inverse],
    )
