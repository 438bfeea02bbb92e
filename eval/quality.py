"""Utility: how close generations are to held-out pictures. All metric arithmetic is torch-fidelity's."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from defenses.errors import UserError
from defenses.seeding import derive
from eval.downstream import DownstreamConfig
from eval.features import build_extractor, features


@dataclass(kw_only=True)
class UtilityConfig:
    """Section ``utility``."""

    # random-conv: fixed random convolutions, offline, comparable only with itself; inception: the extractor of
    # published FID; dinov2: class token. The last two need `weights`.
    features: Literal["random-conv", "inception", "dinov2"] = "random-conv"
    weights: str | None = None  # local file (dinov2: model.safetensors with config.json beside it); null: none
    weights_sha256: str | None = None  # hex digest that `weights` must have; null: only without weights
    batch_size: int = 64  # images per forward pass; changes results by rounding only
    kid_subsets: int = 100  # random subsets whose mean is KID and whose standard deviation is kid_std
    kid_subset_size: int = 100  # images per subset, at most what is there; KID is unbiased for any size
    neighbourhood: int = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
    # a classifier trained on generations, tested on held-out pictures; {}: on, for class-conditional models; null: off
    downstream: DownstreamConfig | None = None

    def __post_init__(self):
        for key, least in (("batch_size", 1), ("kid_subsets", 1), ("kid_subset_size", 2), ("neighbourhood", 1)):
            if getattr(self, key) < least:
                raise UserError(f"utility.{key}", f"{getattr(self, key)} is less than {least}", f"take {least} or more")
        if self.features == "random-conv" and self.weights is not None:
            raise UserError(
                "utility.weights", "random-conv has no weights file", "set utility.features, or weights=null"
            )
        if self.features != "random-conv" and self.weights is None:
            raise UserError(
                "utility.weights", f"{self.features} needs a local weights file", "set it, or features=random-conv"
            )


def measure(
    generated: np.ndarray,
    reference: np.ndarray,
    config: UtilityConfig,
    device: torch.device,
    seed: int,
    accelerator: Any = None,
) -> dict[str, Any]:
    """Of the report's ``utility``: FID, KID, precision and recall of generations against held-out pictures.

    Args:
        generated, reference: uint8 [N, C, H, W], same C, H, W.
        seed: chooses the subsets of FID and KID.
        accelerator: Accelerate's `Accelerator`; every rank computes a share of the features, all return the same.

    Returns:
        A value that too few pictures do not allow is None. ``fid`` compares equal numbers of both, ``fid_n``.
        ``kid_std`` is None where every subset is the whole set.
    """
    extractor = build_extractor(config.features, config.weights, config.weights_sha256, device)
    sets = [features(images, extractor, config.batch_size, accelerator) for images in (generated, reference)]
    generated_features, reference_features = (torch.from_numpy(values).double() for values in sets)
    return {
        "features": config.features,
        "features_dim": max(generated_features.shape[1], reference_features.shape[1]),
        "weights_sha256": config.weights_sha256,
        "reference": "heldout",
        "n_reference": len(reference),
        "n_generated": len(generated),
        **frechet(generated_features, reference_features, seed),
        **kernel(generated_features, reference_features, config.kid_subsets, config.kid_subset_size, seed),
        **precision_recall(generated_features, reference_features, config.neighbourhood, seed),
    }


def frechet(generated: torch.Tensor, reference: torch.Tensor, seed: int) -> dict[str, float | int | None]:
    """Fréchet distance (Heusel et al. 2017, Eq. 6) of equal numbers of both, because its bias depends on the number.

    Args:
        generated, reference: float64 [N, D].
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    n = min(len(generated), len(reference))
    if n < 2:
        return {"fid": None, "fid_n": n}
    chosen = [_choose(values, n, seed, part) for values, part in ((generated, "generated"), (reference, "reference"))]
    statistics = [fid_features_to_statistics(values) for values in chosen]
    return {"fid": fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID], "fid_n": n}


def kernel(
    generated: torch.Tensor, reference: torch.Tensor, subsets: int, subset_size: int, seed: int
) -> dict[str, float | int | None]:
    """Kernel distance (Binkowski et al. 2018, unbiased MMD^2, cubic kernel): mean and deviation over random subsets.

    Args:
        generated, reference: float64 [N, D].
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(subset_size, len(generated), len(reference))
    if size < 2:
        return {"kid": None, "kid_std": None, "kid_subset_size": size}
    whole = size == len(generated) == len(reference)
    result = kid_features_to_metric(
        generated,
        reference,
        kid_subsets=1 if whole else subsets,
        kid_subset_size=size,
        rng_seed=derive(seed, "kid") % 2**32,
        verbose=False,
    )
    deviation = None if whole else result[KEY_METRIC_KID_STD]
    return {"kid": result[KEY_METRIC_KID_MEAN], "kid_std": deviation, "kid_subset_size": size}


def precision_recall(
    generated: torch.Tensor, reference: torch.Tensor, neighbourhood: int, seed: int
) -> dict[str, float | int | None]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Eq. 2): share of each set in the other's k-nearest balls.

    Of equal numbers of both, ``prc_n``: recall grows with the number of generations.

    Args:
        generated, reference: float64 [N, D].
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    size = min(len(generated), len(reference))
    if size <= neighbourhood:
        return {"precision": None, "recall": None, "prc_n": size, "neighbourhood": neighbourhood}
    sets = _choose(generated, size, seed, "generated"), _choose(reference, size, seed, "reference")
    result = prc_features_to_metric(
        *sets, prc_neighborhood=neighbourhood, save_cpu_ram=True, prc_batch_size=2048, verbose=False
    )
    return {
        "precision": result[KEY_METRIC_PRECISION],
        "recall": result[KEY_METRIC_RECALL],
        "prc_n": size,
        "neighbourhood": neighbourhood,
    }


def _choose(values: torch.Tensor, n: int, seed: int, part: str) -> torch.Tensor:
    order = np.random.Generator(np.random.Philox(derive(seed, "fid", part))).permutation(len(values))
    return values[np.sort(order[:n])]
