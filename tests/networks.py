"""Real diffusers networks of tiny width with random weights, and a loss per example for each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import nn

from defenses.base import Batch

TEXT = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(5))  # a prompt's embedding per label


@dataclass(frozen=True)
class Network:
    """How to build the network, its loss (float32 [B]), and channels and height of its images."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    channels: int = 2
    size: int = 8


def batch(network: Network, count: int, seed: int = 0) -> Batch:
    """Random records with labels, timesteps and noise."""
    numbers = torch.Generator().manual_seed(seed)
    shape = (count, network.channels, network.size, network.size)
    return Batch(
        torch.randn(shape, generator=numbers),
        np.arange(count),
        torch.randint(3, (count,), generator=numbers),
        None,
        torch.randint(1000, (count,), generator=numbers),
        torch.randn(shape, generator=numbers),
    )


def error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction.float() - target).square().flatten(1).mean(1)


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=3,
    )


def conditional_unet(adapter: bool) -> nn.Module:
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    if adapter:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    return model


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=4,
    )


def autoencoder() -> nn.Module:
    return AutoencoderKL(
        in_channels=2,
        out_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
    )


NETWORKS = {
    "UNet2DModel": Network(
        unet, lambda m, b: error(m(b.images, b.timesteps, class_labels=b.labels, return_dict=False)[0], b.noise)
    ),
    "UNet2DConditionModel": Network(
        lambda: conditional_unet(adapter=False),
        lambda m, b: error(
            m(b.images, b.timesteps, encoder_hidden_states=TEXT[b.labels], return_dict=False)[0], b.noise
        ),
    ),
    "LoRA": Network(
        lambda: conditional_unet(adapter=True),
        lambda m, b: error(
            m(b.images, b.timesteps, encoder_hidden_states=TEXT[b.labels], return_dict=False)[0], b.noise
        ),
    ),
    "DiT": Network(
        dit,
        lambda m, b: error(m(b.images, timestep=b.timesteps, class_labels=b.labels, return_dict=False)[0], b.noise),
    ),
    "AutoencoderKL": Network(autoencoder, lambda m, b: error(m(b.images, return_dict=False)[0], b.images)),
}


def trained(name: str, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """The network in training mode, with no tensor at its starting value (zero biases, zero lora_B) and no label dropout."""
    torch.manual_seed(1)
    model = NETWORKS[name].build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.to(memory_format=memory_format)
