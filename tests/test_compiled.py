"""A network compiled for one batch size: the values of the plain one, for every number of rows, compiled once."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from defenses.errors import UserError
from eval.textsource import TextSampler, load_model
from tests.pipelines import stable_diffusion
from train import compiled
from train.compiled import FixedBatch, refuse_without_compiler
from train.sampling import SamplerConfig, sample

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, values, times, more=None):
        return (self.layers(values) * times[:, None] + more["shift"],)


def test_every_number_of_rows_gives_the_plain_values_and_is_compiled_once():
    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code = FixedBatch(network, 4)
    with torch.no_grad():
        for count in (4, 1, 3):
            values, times, shift = torch.randn(count, 6), torch.rand(count), torch.randn(count, 1)
            (found,) = code(values, times, more={"shift": shift})
            (wanted,) = network(values, times, {"shift": shift})
            assert found.shape == (count, 6) and torch.allclose(found, wanted, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(ValueError, match="5 rows"):
        code(torch.randn(5, 6), torch.rand(5), more={"shift": torch.randn(5, 1)})


def test_further_checkpoints_take_the_code_of_the_first_and_their_own_weights():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    values, times, shift = torch.randn(4, 6), torch.rand(4), torch.randn(4, 1)
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            network = Network().eval().requires_grad_(False)
            (found,) = FixedBatch(network, 4)(values, times, more={"shift": shift})
            assert torch.allclose(found, network(values, times, {"shift": shift})[0], atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def traced(monkeypatch):
    """By the tracing part of the compiler alone: code for a whole network takes half a minute."""
    plain, sizes = torch.compile, []

    def trace(network, dynamic):
        def watched(*args, **kwargs):
            sizes.append(len(args[0]))
            return code(*args, **kwargs)

        code = plain(network, dynamic=dynamic, backend="aot_eager")
        return watched

    monkeypatch.setattr(compiled.torch, "compile", trace)
    return sizes


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_of_prompts_are_those_of_the_plain_network(guidance, tmp_path, traced):
    torch.manual_seed(0)
    stable_diffusion(tmp_path, "epsilon")
    config = SamplerConfig(steps=2, batch_size=3, guidance_scale=guidance)
    model = load_model(tmp_path, CPU)
    plain = TextSampler(model, config, "fp32", 5, 16, 3)([0, 1], ["a chest", "left lung"])
    found = TextSampler(model, config, "fp32", 5, 16, 3, compiles=True)([0, 1], ["a chest", "left lung"])
    assert torch.allclose(found, plain, atol=1e-5)
    assert traced == [3 if guidance == 1 else 6] * 2


def test_images_of_pixels_are_those_of_the_plain_network(traced):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    model = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks).eval()
    schedule, config = DDPMScheduler().config, SamplerConfig(steps=2, batch_size=4)
    options = {"indices": range(3), "shape": (1, 8, 8), "seed": 0}
    plain = sample(model, schedule, config, **options)
    found = sample(model, schedule, config, **options, network=FixedBatch(model, 4))
    assert torch.allclose(found, plain, atol=1e-5)
    assert traced == [4, 4]


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"generate.compile"):
        refuse_without_compiler("generate.compile", CPU)
    refuse_without_compiler("generate.compile", torch.device("cuda"))
