import hashlib
import pickle
from types import SimpleNamespace

import accelerate.utils
import numpy as np
import pytest
import torch

from defenses.errors import UserError
from eval.features import RandomConv, build_extractor, features

CPU = torch.device("cpu")


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(n=5, channels=1, side=32):
    return np.random.default_rng(0).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_random_weights_are_pinned():
    """Weights and features of today: a change of either makes old reports incomparable."""
    total = hashlib.sha256()
    bits = np.random.Philox(key=2020)
    expected = [(bits.random_raw(16 * c * 9) >> np.uint64(11)) * 2.0**-53 for c in (3, 16, 16, 16)]
    for weight, uniform in zip(RandomConv().weights, expected, strict=True):
        bound = (6 / (weight.shape[1] * 9)) ** 0.5
        np.testing.assert_allclose(weight[0].numpy().ravel(), (2 * uniform[: weight[0].numel()] - 1) * bound, rtol=1e-5)
        np.testing.assert_allclose(weight[4:].mean(dim=(2, 3)).numpy(), 0, atol=1e-7)
        total.update(uniform.tobytes())
    assert total.hexdigest() == "49d756257fa64f8c64bfd704e29382fc932da1dc25cd3bd088769c5a3f661b51"


@pytest.mark.parametrize("side", [1, 5, 28, 33])
def test_any_size_grey_or_rgb(side):
    extract = build_extractor("random-conv", None, None, CPU)
    grey = images(side=side)
    found = extract(grey)
    assert found.shape == (5, 64) and found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_array_equal(found, extract(np.repeat(grey, 3, axis=1)))  # grey means three equal channels


def test_flat_pictures_have_closed_form_features():
    """On a flat picture only filters with a mean answer: the first scale's features are those of a dot product."""
    extract = build_extractor("random-conv", None, None, CPU)
    flat = np.full((1, 1, 16, 16), 200, np.uint8)
    weight = RandomConv().weights[0].double().numpy()
    answer = np.maximum(weight.sum(axis=(1, 2, 3)) * (200 / 127.5 - 1), 0)
    np.testing.assert_allclose(extract(flat)[0, :16], np.log1p(answer / 0.01) / 4, atol=1e-4)


def test_ranks_share_the_work_and_agree(monkeypatch):
    extract = build_extractor("random-conv", None, None, CPU)
    pictures = images(11)
    alone = features(pictures, extract, batch_size=2)
    parts, seen = [], []
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: parts.extend(mine) or parts)
    for rank in range(3):
        accelerator = SimpleNamespace(process_index=rank, num_processes=3)
        together = features(pictures, lambda batch: seen.append(len(batch)) or extract(batch), 2, accelerator)
    np.testing.assert_array_equal(together, alone)
    assert sum(seen) == 11  # nothing computed twice


def test_missing_wrong_and_unset_hashes(tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(UserError) as error:
        build_extractor("inception", str(file), "00", CPU)
    assert error.value.key == "utility.weights"
    file.write_bytes(b"weights")
    for given in (None, "00" * 32):
        with pytest.raises(UserError) as error:
            build_extractor("inception", str(file), given, CPU)
        assert error.value.key == "utility.weights_sha256" and digest(file) in error.value.remedy


def test_pickled_code_never_runs(tmp_path):
    for writer in (lambda payload, path: torch.save(payload, path), lambda p, path: path.write_bytes(pickle.dumps(p))):
        file, trace = tmp_path / "weights.pth", tmp_path / "executed"
        writer({"state": Payload(trace)}, file)
        with pytest.raises(UserError) as error:
            build_extractor("inception", str(file), digest(file), CPU)
        assert error.value.key == "utility.weights" and not trace.exists()


def test_torchscript_is_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(UserError, match="TorchScript"):
        build_extractor("inception", str(file), digest(file), CPU)


def test_inception_from_a_local_file(tmp_path, monkeypatch):
    """Random weights of the right shapes give the same features as torch-fidelity loading the file itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="unused")
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    extract = build_extractor("inception", str(file), digest(file).upper(), CPU)
    pictures = images(2)
    found = extract(pictures)
    with torch.no_grad():
        expected = network(torch.from_numpy(pictures).expand(-1, 3, -1, -1))[0].numpy()
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    torch.save({"fc.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="Inception"):
        build_extractor("inception", str(file), digest(file), CPU)


def test_dinov2_from_a_local_folder(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extract = build_extractor("dinov2", str(file), digest(file), CPU)
    pictures = images(3, channels=3, side=28)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model((torch.from_numpy(pictures) / 255 - mean) / std).last_hidden_state[:, 0]
    np.testing.assert_allclose(extract(pictures), expected.numpy(), atol=1e-5)

    state = load_file(file)
    state.pop(next(name for name in state if "layernorm" in name))
    save_file(state, file)
    with pytest.raises(UserError, match="missing"):
        build_extractor("dinov2", str(file), digest(file), CPU)
    file.write_bytes(b"not safetensors")
    with pytest.raises(UserError) as error:
        build_extractor("dinov2", str(file), digest(file), CPU)
    assert error.value.key == "utility.weights"
    other = tmp_path / "model.bin"
    torch.save({}, other)
    with pytest.raises(UserError, match="safetensors"):
        build_extractor("dinov2", str(other), digest(other), CPU)
