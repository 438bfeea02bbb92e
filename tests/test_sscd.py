"""SSCD with random weights against torchvision's layers and a second network with Classy Vision's names. No download."""

import hashlib
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import resnet50

from defenses.errors import UserError
from eval import sscd
from eval.copymetrics import CopyMetricsConfig, copy_metrics
from eval.sscd import load_sscd
from tests.reference import fabricated

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights, biases and running statistics that all matter, with activations of ordinary size."""
    random = torch.Generator().manual_seed(3)
    with torch.device("meta"):  # what a constructor draws is not needed
        network = make()
    network.to_empty(device="cpu")
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=random)
            if value.dim() > 1:
                value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
            elif name.endswith(("running_var", ".weight")):
                value.copy_(0.6 + 0.1 * drawn.clamp(-3, 3))
            else:
                value.copy_(0.3 * drawn)
        else:
            value.zero_()
    return network.eval()


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(folder, state, name="sscd.torchvision.pt"):
    file = folder / name
    save_file(state, file) if name.endswith(".safetensors") else torch.save(state, file)
    return file


def opened(file):
    return load_sscd(str(file), digest(file), "cpu")


@pytest.fixture(scope="module")
def backbone():
    return randomised(partial(resnet50, num_classes=512))


@pytest.fixture(scope="module")
def state(backbone):
    """Names of the published ``.torchvision.pt`` files."""
    return {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sscd"), state)


@pytest.fixture(scope="module")
def extract(file):
    return opened(file)


def pictures(count: int, channels: int = 3, side: int = 40) -> np.ndarray:
    return fabricated.blobs(5, count, side, channels)


@torch.no_grad()
def descriptor(backbone: nn.Module, batch: torch.Tensor) -> np.ndarray:
    """By torchvision's layers one by one; pooling, linear layer and normalisation in numpy, float64."""
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(batch))))
    x = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x)))).double().numpy()
    pooled = np.cbrt((np.maximum(x, 1e-6) ** 3).mean(axis=(2, 3)))
    out = pooled @ backbone.fc.weight.double().numpy().T + backbone.fc.bias.double().numpy()
    return out / np.sqrt((out**2).sum(axis=1, keepdims=True))


def test_descriptors_are_those_of_the_published_recipe(backbone, extract):
    """torchvision's transforms on 8-bit images, as the authors publish them; their resizing rounds to grey levels."""
    recipe = transforms.Compose([transforms.Resize(288), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    y, x = np.arange(40)[:, None], np.arange(32)
    boards = [255 * ((y // size + x // size) % 2) for size in (1, 3)]  # edges tell one way of resizing from another
    images = np.stack([np.stack([board] * 3) for board in boards]).astype(np.uint8)
    batch = torch.stack([recipe(Image.fromarray(image.transpose(1, 2, 0))) for image in images])
    assert batch.shape[-2:] == (360, 288)  # the shorter side becomes 288
    expected, found = descriptor(backbone, batch), extract(images)
    assert found.shape == (2, 512) and found.dtype == np.float32
    between = np.linalg.norm(expected[0] - expected[1])  # else any constant would pass
    assert between > 0.05
    assert np.linalg.norm(found - expected, axis=1).max() < 0.02 * between


def test_without_resizing_descriptors_are_equal(backbone, extract, monkeypatch):
    monkeypatch.setattr(sscd, "SIDE", 64)
    images = pictures(2, side=64)
    batch = (torch.from_numpy(images) / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    found = extract(images)
    np.testing.assert_allclose(found, descriptor(backbone, batch), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_batches_and_grey_pictures(extract, monkeypatch):
    monkeypatch.setattr(sscd, "SIDE", 64)
    grey = pictures(4, channels=1)
    together = extract(grey)
    np.testing.assert_allclose(np.concatenate([extract(grey[:1]), extract(grey[1:])]), together, atol=2e-6)
    np.testing.assert_allclose(extract(np.repeat(grey, 3, axis=1)), together, atol=2e-6)


class ClassyBottleneck(nn.Module):
    """The block of Classy Vision's ResNeXt, with its names."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        middle = outside // 4
        self.convolutional_block = nn.Sequential(
            nn.Conv2d(inside, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, outside, 1, bias=False),
        )
        self.bn = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn(self.convolutional_block(x)) + shortcut)


class Classy(nn.Module):
    """The published model on Classy Vision's ResNet-50."""

    def __init__(self):
        super().__init__()
        stages, inside = [], 64
        for number, (depth, outside) in enumerate(((3, 256), (4, 512), (6, 1024), (3, 2048))):
            stage = nn.Sequential()
            for index in range(depth):
                stride = 2 if number and not index else 1
                stage.add_module(f"block{number}-{index}", ClassyBottleneck(inside, outside, stride))
                inside = outside
            stages.append(stage)
        stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        initial = nn.Module()
        initial._module = stem
        self.backbone = nn.Module()
        self.backbone.initial_block, self.backbone.blocks = initial, nn.Sequential(*stages)
        self.embeddings = nn.Sequential(nn.Identity(), nn.Linear(2048, 512))

    def forward(self, x):
        x = self.backbone.blocks(self.backbone.initial_block._module(x))
        pooled = x.clamp(min=1e-6).pow(3).mean((2, 3)) ** (1 / 3)
        out = self.embeddings(pooled)
        return out / out.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def network():
    return randomised(Classy)


@pytest.mark.parametrize("name", ["sscd.classy.pt", "sscd.safetensors"])
def test_classy_visions_names(network, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sscd, "SIDE", 64)
    state = network.state_dict()
    assert "backbone.blocks.3.block3-2.convolutional_block.6.weight" in state and "embeddings.1.bias" in state
    if name.endswith(".safetensors"):
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    images = pictures(2, side=64)
    batch = (torch.from_numpy(images) / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    with torch.no_grad():
        expected = network(batch).numpy()
    found = opened(saved(tmp_path, state, name))(images)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_copy_is_found_by_sscd(file, extract, monkeypatch):
    """The whole way: attack's matches, descriptors, search of all pictures, threshold given by hand."""
    monkeypatch.setattr(sscd, "SIDE", 64)
    training = fabricated.pictures(fabricated.blobs(21, 6))
    generations = np.concatenate([training.images[:2], fabricated.blobs(22, 3)])
    matches = [{"generation": str(i), "record_id": f"r{i}", "l2": 0.1, "adaptive_score": 0.5} for i in range(5)]
    sha256 = digest(file)
    config = CopyMetricsConfig(sscd_weights=str(file), sscd_weights_sha256=sha256, sscd_threshold=0.999999)
    report, table = copy_metrics(generations, list("01234"), matches, training, None, None, config)
    left, right = extract(generations).astype(float), extract(training.images).astype(float)
    expected = (left * right[:5]).sum(axis=1)
    found = [row["sscd"] for row in table]
    assert found[:2] == pytest.approx([1, 1], abs=1e-6) and max(found[2:]) < 0.99999
    assert found[:2] == pytest.approx(expected[:2].tolist(), abs=1e-6)
    metric = report["metrics"][-1]
    assert (metric["name"], metric["threshold"], metric["weights_sha256"]) == ("sscd", 0.999999, sha256)
    assert metric["threshold_rule"] == "attack.copy_metrics.sscd_threshold"
    cosine = left @ right.T  # every pair
    assert [row["sscd_best"] for row in table] == pytest.approx(cosine.max(axis=1).tolist(), abs=1e-6)
    assert [row["sscd_nearest"] for row in table] == [f"r{row}" for row in cosine.argmax(axis=1)]
    search = report["sscd_search"]
    assert (search["copies"], search["pictures"], search["threshold"]) == (2, 2, 0.999999)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def refused(file, match: str, sha256: str | None = None) -> UserError:
    with pytest.raises(UserError, match=match) as error:
        load_sscd(str(file), sha256 or digest(file), "cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return error.value


def test_torchscript_is_refused(tmp_path):
    file = tmp_path / "sscd_disc_mixup.torchscript.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    error = refused(file, "TorchScript")
    assert error.key == "attack.copy_metrics.sscd_weights" and "torchvision.pt" in error.remedy


def test_pickled_code_never_runs(tmp_path):
    trace = tmp_path / "executed"
    for write in (lambda p, path: torch.save(p, path), lambda p, path: path.write_bytes(pickle.dumps(p))):
        file = tmp_path / "sscd.pt"
        write({"backbone.conv1.weight": Payload(trace)}, file)
        assert refused(file, "plain state dict").key == "attack.copy_metrics.sscd_weights"
        assert not trace.exists()


def test_missing_file_and_wrong_hash(tmp_path, file):
    error = refused(tmp_path / "none.pt", "cannot read", "00")
    assert error.key == "attack.copy_metrics.sscd_weights"
    error = refused(file, "does not match", "00" * 32)
    assert error.key == "attack.copy_metrics.sscd_weights_sha256"
    assert error.remedy.endswith(f"attack.copy_metrics.sscd_weights_sha256={digest(file)}")


def test_other_networks_and_damaged_files_are_refused(tmp_path, state):
    bias = state["backbone.fc.bias"].clone()
    bias[7] = torch.nan
    state = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}  # files of a few numbers
    wrong = state | {"backbone.head": torch.zeros(2), "backbone.fc.weight": torch.zeros(1024, 2048)}
    wrong.pop("backbone.fc.bias")
    cases = {
        "ResNet-50: 3 tensors .*, as backbone.fc.bias": wrong,
        "ResNet-50: 268 tensors .*, as backbone.bn1.bias": {"conv1.weight": torch.zeros(2)},
        "not finite": state | {"backbone.fc.bias": bias},
        "plain state dict": {"state_dict": {"backbone.fc.bias": bias}, "epoch": 3},
    }
    for match, content in cases.items():
        assert refused(saved(tmp_path, content), match).key == "attack.copy_metrics.sscd_weights"
    assert refused(saved(tmp_path, [torch.zeros(2)]), "plain state dict")
    broken = tmp_path / "sscd.safetensors"
    broken.write_bytes(b"not safetensors")
    refused(broken, "plain state dict")
