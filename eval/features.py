"""Image features for the utility metrics: one callable per extractor, uint8 [N, C, H, W] -> float32 [N, D]."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defenses.errors import UserError

FeatureExtractor = Callable[[np.ndarray], np.ndarray]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIDE = 224  # pixels; the size DINOv2 is evaluated at (Oquab et al. 2024)


class RandomConv(nn.Module):
    """Fixed random convolutions at four scales; 64 features that need no download and know no ImageNet.

    Random embeddings after Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics for Generative Models",
    section 4, who find them meaningful where ImageNet features do not fit the data. Distances on them compare runs of
    this program with each other; they are not Inception FID and cannot be set beside published figures.

    Per scale: a 3x3 convolution and a ReLU, the mean over all positions, of which log(1 + mean / FLOOR) / 4 is a feature
    (in the logarithm, lost fine detail counts as much as a change of brightness), then 2x2 pooling. All filters but the
    first PLAIN of a scale have zero mean, so that they answer to structure only. The weights come from raw Philox bits,
    whose stream numpy guarantees, so they are the same on every machine.
    """

    WIDTH, SCALES, KEY = 16, 4, 2020
    PLAIN, FLOOR = 4, 0.01  # filters with a mean; activation below which the logarithm is nearly linear

    def __init__(self) -> None:
        super().__init__()
        bits = np.random.Philox(key=self.KEY)
        self.weights = nn.ParameterList()
        for scale in range(self.SCALES):
            shape = (self.WIDTH, 3 if scale == 0 else self.WIDTH, 3, 3)
            uniform = (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53  # [0, 1)
            bound = (6 / np.prod(shape[1:])) ** 0.5  # He et al. (2015), Eq. 10: activations keep their size
            weight = torch.from_numpy(((2 * uniform - 1) * bound).reshape(shape)).float()
            weight[self.PLAIN :] -= weight[self.PLAIN :].mean(dim=(2, 3), keepdim=True)
            self.weights.append(nn.Parameter(weight, requires_grad=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 64]."""
        x = images.float() / 127.5 - 1
        features = []
        for weight in self.weights:
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight))  # [B, WIDTH, H, W]
            features.append(torch.log1p(x.mean(dim=(2, 3)) / self.FLOOR) / 4)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(features, dim=1)


class Dinov2(nn.Module):
    """Class token of a DINOv2 model, images squashed to 224 px (or the model's own size where smaller)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.side = min(DINOV2_SIDE, model.config.image_size)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, hidden_size]."""
        x = F.interpolate(images.float() / 255, size=(self.side, self.side), mode="bicubic", antialias=True)
        x = x.clamp(0, 1)  # bicubic overshoots
        return self.model((x - self.mean) / self.std).last_hidden_state[:, 0]


class First(nn.Module):
    """First of the tuple of outputs that a torch-fidelity extractor returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[0]


def build_extractor(
    name: str, weights: str | None, weights_sha256: str | None, device: torch.device
) -> FeatureExtractor:
    """Extractor by its name in ``utility.features``.

    Args:
        name: "random-conv", "inception" (torch-fidelity's Inception-v3, 2048 features) or "dinov2" (class token).
        weights: local file; for DINOv2 a ``model.safetensors`` with its ``config.json`` in the same folder.
        weights_sha256: what the file must hash to, in hex.

    Raises:
        UserError: no file, another hash, a TorchScript archive, pickled code, or weights of another network.
    """
    if name == "random-conv":
        return _extractor(RandomConv(), device)
    content = verified_bytes(weights, weights_sha256)
    model = _load_inception(content) if name == "inception" else _load_dinov2(content, Path(str(weights)))
    return _extractor(model, device)


def features(
    images: np.ndarray, extractor: FeatureExtractor, batch_size: int = 64, accelerator: Any = None
) -> np.ndarray:
    """Features of all images in order, float32 [N, D], on every rank.

    Rank r computes batches r, r + W, ...; a batch holds the same images for any number of ranks W, so the result is the
    same.

    Args:
        images: uint8 [N, C, H, W], array-like; read one batch at a time.
        accelerator: Accelerate's `Accelerator`, or None for one process.
    """
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    starts = range(0, len(images), batch_size)[rank::world_size]
    parts = [(start, extractor(np.asarray(images[start : start + batch_size]))) for start in starts]
    if world_size > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    if not parts:
        return np.zeros((0, 0), np.float32)
    return np.concatenate([part for _, part in sorted(parts, key=lambda item: item[0])])


def _extractor(model: nn.Module, device: torch.device) -> FeatureExtractor:
    model = model.to(device).eval()

    @torch.no_grad()
    def extract(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(np.array(images)).to(device)  # a copy: memory maps are read-only
        if batch.shape[1] == 1:
            batch = batch.expand(-1, 3, -1, -1)
        return model(batch).float().cpu().numpy()

    return extract


def verified_bytes(
    weights: str | None,
    weights_sha256: str | None,
    key: str = "utility.weights",
    without: str = "utility.features=random-conv",
) -> bytes:
    """The file's content, read once, so that what was hashed is what is loaded.

    Args:
        key: configuration key of the file; that of the digest is the same with ``_sha256``.
        without: setting that needs no file.

    Raises:
        UserError: no file, or one that does not hash to the digest.
    """
    if not weights:
        raise UserError(key, "no weights file given", f"name a local file, or set {without}")
    try:
        content = Path(weights).read_bytes()
    except OSError as error:
        raise UserError(key, f"cannot read {weights}: {error.strerror}", "name a local file") from error
    found = hashlib.sha256(content).hexdigest()
    if (weights_sha256 or "").lower() != found:
        problem = "is not set" if not weights_sha256 else f"does not match {weights}"
        raise UserError(f"{key}_sha256", problem, f"if you trust this file: {key}_sha256={found}")
    return content


def _load_inception(content: bytes) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if is_torchscript(content):
        raise UserError("utility.weights", "is a TorchScript archive, which runs code", "give a plain state dict")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise UserError(
            "utility.weights", "is not a plain state dict of tensors", "give torch-fidelity's .pth file"
        ) from error
    checked = (
        io.BytesIO()
    )  # torch-fidelity unpickles what it is given without limits: it gets our own copy of the tensors
    torch.save(state, checked)
    checked.seek(0)
    try:
        return First(
            FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=checked)
        )
    except (RuntimeError, TypeError) as error:
        raise UserError("utility.weights", "does not fit Inception-v3", "give torch-fidelity's .pth file") from error


def is_torchscript(content: bytes) -> bool:
    """TorchScript files are zip archives with a ``code`` folder and ``constants.pkl``."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any("/code/" in f"/{name}" or name.endswith("constants.pkl") for name in archive.namelist())


def _load_dinov2(content: bytes, path: Path) -> nn.Module:
    from safetensors.torch import load
    from transformers import Dinov2Config, Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    remedy = "give model.safetensors of a Dinov2Model with config.json in its folder"
    if path.suffix != ".safetensors":
        raise UserError("utility.weights", f"{path.name} is not a .safetensors file", remedy)
    try:
        config = Dinov2Config.from_json_file(path.parent / "config.json")
        # Not by load_state_dict: published files use older names of attention weights, which transformers translates.
        model, loading = Dinov2Model.from_pretrained(
            None, config=config, state_dict=load(content), output_loading_info=True
        )
    except Exception as error:  # OSError, JSON, safetensors, shape and configuration errors of three libraries
        raise UserError("utility.weights", f"cannot be loaded: {str(error).splitlines()[0][:200]}", remedy) from error
    if any(loading.values()):
        raise UserError("utility.weights", "does not fit a Dinov2Model: tensors are missing or left over", remedy)
    return Dinov2(model)
