"""SSCD, the copy detector of Pizzi et al. (2022), from a local weights file that is never executed."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defenses.errors import UserError
from defenses.references import Rows
from eval.features import IMAGENET_MEAN, IMAGENET_STD, FeatureExtractor, features, is_torchscript, verified_bytes

SIDE = 288  # pixels of the shorter side, as published for inference
DIMENSIONS = 512
_BATCH = 16  # images per forward pass
_KEY = "attack.copy_metrics.sscd_weights"
_REMEDY = "give sscd_disc_mixup.torchvision.pt, sscd_disc_mixup.classy.pt, or their tensors as .safetensors"
_COUNTER = "num_batches_tracked"  # of batch normalisation; plays no part in inference and may be missing
# Classy Vision's names of a bottleneck's layers, and torchvision's
_LAYERS = {
    "convolutional_block.0": "conv1",
    "convolutional_block.1": "bn1",
    "convolutional_block.3": "conv2",
    "convolutional_block.4": "bn2",
    "convolutional_block.6": "conv3",
    "bn": "bn3",
    "downsample.0": "downsample.0",
    "downsample.1": "downsample.1",
}
_OUTSIDE = {
    "backbone.initial_block._module.0": "backbone.conv1",
    "backbone.initial_block._module.1": "backbone.bn1",
    "embeddings.1": "backbone.fc",
}


class GeM(nn.Module):
    """Generalized mean over all positions with p = 3, [B, C, H, W] -> [B, C] (Radenović et al. 2018, Eq. 3)."""

    POWER, FLOOR = 3.0, 1e-6  # the published weights were trained with this floor under the activations

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2).clamp(min=self.FLOOR).pow(self.POWER).mean(2).pow(1 / self.POWER)


class Sscd(nn.Module):
    """ResNet-50, GeM pooling, a linear layer to 512 dimensions, l2 normalisation (Pizzi et al. 2022, section 4)."""

    def __init__(self) -> None:
        from torchvision.models import resnet50

        super().__init__()
        self.backbone = resnet50(weights=None, num_classes=DIMENSIONS)
        self.backbone.avgpool = GeM()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 1 or 3, H, W] -> descriptors of length 1, float32 [B, 512]; their dot product is the similarity."""
        height, width = images.shape[-2:]
        size = [SIDE * side // min(height, width) for side in (height, width)]
        x = F.interpolate(images.float() / 255, size=size, mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return F.normalize(self.backbone((x.expand(-1, 3, -1, -1) - mean) / std))


class Descriptors:
    """Descriptors of images, each computed once: equal images, as in several splits, copies or views, share theirs.

    Args:
        extract: uint8 [N, C, H, W] -> float32 [N, D] of length 1.
        accelerator: Accelerate's `Accelerator`, or None for one process.
    """

    def __init__(self, extract: FeatureExtractor, accelerator: Any):
        self.extract, self.accelerator = extract, accelerator
        self.row_of: dict[bytes, int] = {}  # SHA-256 of an image's pixels -> its row in ``known``
        self.known: np.ndarray | None = None

    def of(self, images: Any) -> np.ndarray:
        """Descriptors in order, float32 [N, D], on every rank; those not known yet are shared among the ranks.

        Args:
            images: uint8 [N, C, H, W], N > 0, array-like with ``dtype`` and ``shape``; of one shape in all calls.
        """
        rows, new = np.empty(len(images), dtype=np.int64), []
        for start in range(0, len(images), _BATCH):
            for place, image in enumerate(np.asarray(images[start : start + _BATCH]), start):
                known = len(self.row_of)
                rows[place] = self.row_of.setdefault(hashlib.sha256(image.tobytes()).digest(), known)
                if rows[place] == known:
                    new.append(place)
        if new:
            fresh = features(Rows(images, np.array(new)), self.extract, _BATCH, self.accelerator)
            self.known = fresh if self.known is None else np.concatenate([self.known, fresh])
        return self.known[rows]


def load_sscd(weights: str | None, weights_sha256: str | None, device: torch.device | str) -> FeatureExtractor:
    """SSCD's descriptors as a feature extractor: uint8 [N, 1 or 3, H, W] -> float32 [N, 512] of length 1.

    Args:
        weights: local file with the tensors of `Sscd`, under torchvision's or Classy Vision's names: ``.safetensors``,
            or a state dict that `torch.save` wrote.
        weights_sha256: what the file must hash to, in hex.

    Raises:
        UserError: no file, another hash, a TorchScript archive, pickled code, or weights of another network.
    """
    content = verified_bytes(weights, weights_sha256, _KEY, f"{_KEY}=null")
    state = _state(content, Path(str(weights)).suffix)
    with torch.device("meta"):  # no numbers are drawn that the file's would replace
        network = Sscd()
    layout = network.state_dict()
    _refuse_misfit(state, {name: value for name, value in layout.items() if not name.endswith(_COUNTER)})
    counters = {name: torch.zeros(()) for name in layout if name.endswith(_COUNTER)}
    network.to_empty(device=device).eval()
    network.load_state_dict(state | counters)

    @torch.no_grad()
    def extract(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(np.array(images)).to(device)).cpu().numpy()

    return extract


def _state(content: bytes, suffix: str) -> dict[str, torch.Tensor]:
    """The tensors in the file under torchvision's names, without counters; nothing in it is executed."""
    if is_torchscript(content):
        raise UserError(_KEY, "is a TorchScript archive, which runs code", _REMEDY)
    try:
        state = _tensors(content, suffix)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise UserError(_KEY, "is not a plain state dict of tensors", _REMEDY) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(_KEY, "is not a plain state dict of tensors", _REMEDY)
    return {_torchvision_name(str(name)): value for name, value in state.items() if not str(name).endswith(_COUNTER)}


def _tensors(content: bytes, suffix: str) -> Any:
    if suffix == ".safetensors":
        from safetensors.torch import load

        return load(content)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _torchvision_name(name: str) -> str:
    """Torchvision's name of a tensor of the published model; any other name as it is."""
    layer, _, tensor = name.rpartition(".")
    block = re.fullmatch(r"backbone\.blocks\.(\d)\.block\1-(\d)\.(.+)", layer)
    if block and block[3] in _LAYERS:
        return f"backbone.layer{int(block[1]) + 1}.{block[2]}.{_LAYERS[block[3]]}.{tensor}"
    return f"{_OUTSIDE[layer]}.{tensor}" if layer in _OUTSIDE else name


def _refuse_misfit(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Refuses missing, left over, misshapen and non-finite tensors."""
    wrong = sorted(
        name
        for name in state.keys() | wanted.keys()
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape
    )
    if wrong:
        problem = (
            f"does not fit SSCD's ResNet-50: {len(wrong)} tensors are missing, left over or misshapen, as {wrong[0]}"
        )
        raise UserError(_KEY, problem, _REMEDY)
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(_KEY, "holds numbers that are not finite", "fetch the file again")
