"""Pairs of images, the i-th of one stack with the i-th of another: nearest view, tiled l2, SSIM."""

import torch

from defenses.neighbours import views

_GRID = 4  # tiles along each side, as in the prompted attack
_WINDOW, _SIGMA = 11, 1.5  # pixels; Wang et al. (2004), section III.C
_K1, _K2 = 0.01, 0.03


def nearest_view(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Place in `VIEWS` of the view of each reference that is nearest to its image by l2, int64 [N]; of equals the first.

    Args:
        images, references: uint8 [N, C, H, W].
    """
    squared = [(images.float() - view.float()).square().flatten(1).double().sum(1) for view in views(references)]
    return torch.stack(squared).argmin(0)  # the sums are whole numbers below 2^53: exact


def in_view(references: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Each reference as it looks in its view (place in `VIEWS`, int64 [N]), uint8 [N, C, H, W]."""
    return torch.stack(views(references))[view, torch.arange(len(view), device=view.device)]


def paired_tiled_l2(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Largest l2 over 4 x 4 tiles of each pair of uint8 [N, C, H, W], in [0, 1], float64 [N] (Carlini et al. 2023,
    section 4.2). Tiles as in `eval.prompted.tiled_l2`."""
    squared = (left.float() - right.float()).square()
    tiles = [tile for band in _cut(squared, -2) for tile in _cut(band, -1)]
    return torch.stack([tile.flatten(1).double().mean(1) for tile in tiles]).amax(0).sqrt() / 255


def ssim(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of uint8 [N, C, H, W], in [-1, 1], float64 [N] (Wang et al. 2004, Eqs. 13, 17).

    Gaussian window of `ssim_window` pixels with standard deviation 1.5, at all positions where it lies inside the image;
    K1 = 0.01, K2 = 0.03, L = 255; moments are weighted sums (no sample correction); channels are averaged.
    """
    window = _gaussian(ssim_window(*left.shape[-2:]))
    x, y = left.flatten(0, 1).double(), right.flatten(0, 1).double()  # [N*C, H, W]
    mean_x, mean_y = _local_mean(x, window), _local_mean(y, window)
    variance_x, variance_y = _local_mean(x * x, window) - mean_x**2, _local_mean(y * y, window) - mean_y**2
    covariance = _local_mean(x * y, window) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1).view(len(left), -1).mean(1)


def ssim_window(height: int, width: int) -> int:
    """Side of the window of `ssim`: 11 pixels, or the largest odd number that fits into a smaller image."""
    side = min(_WINDOW, height, width)
    return side if side % 2 else side - 1


def _cut(images: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor_split(images, min(_GRID, images.shape[dim]), dim)


def _gaussian(side: int) -> torch.Tensor:
    offset = torch.arange(side, dtype=torch.float64) - side // 2
    weight = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    return weight / weight.sum()


def _local_mean(maps: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """[M, H, W] -> [M, H - side + 1, W - side + 1]; the window is the product of two of one dimension.

    A sum of shifted maps: in float64 on a CPU it takes half the time of a convolution.
    """
    for dim in (1, 2):
        length = maps.shape[dim] - len(window) + 1
        maps = sum(weight * maps.narrow(dim, at, length) for at, weight in enumerate(window.tolist()))
    return maps
