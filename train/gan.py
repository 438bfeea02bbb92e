"""A compact generative adversarial network: the baseline that the leakage of diffusion models is held against.

Residual generator and discriminator in the manner of Mescheder et al. (2018, appendix), with the latent steering every block of the
generator (Karras et al. 2019) and a projection discriminator for classes (Miyato and Koyama 2018). No layer mixes examples (no batch
norm, no minibatch statistics), so that every record keeps a loss of its own. How the two are trained: `train.adversarial`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional

from defenses.errors import UserError
from defenses.seeding import generator as seeded
from train.diffusion import autocast
from train.files import write_json
from train.models import ModelConfig
from train.sampling import to_pil, to_uint8

# Channels from the finest level to the coarsest (the last one is repeated where an image has more levels). The generators have about
# as many parameters as the pixel networks of the same name.
SIZES = {
    "tiny": (32, 64, 160),
    "small": (80, 160, 416),
}
PATCH = 2  # pixels per side that the finest maps hold as channels: the full size is the costly one
LATENT = 128  # numbers that an image is made from
PIPELINE = "GANPipeline"  # `_class_name` in model_index.json
COARSEST = 7  # pixels per side, at most, where the generator begins


def sides(image_size: int) -> list[int]:
    """Side of the feature maps from the finest level to the coarsest: halved, rounded up, until at most `COARSEST` pixels."""
    found = [image_size // PATCH]
    while found[-1] > COARSEST:
        found.append((found[-1] + 1) // 2)
    return found


def _widths(size: str, levels: int) -> list[int]:
    widths = SIZES[size]
    return [widths[min(level, len(widths) - 1)] for level in range(levels)]


class Generator(ModelMixin, ConfigMixin):
    """Images from latents; saved as config.json and safetensors, like any network of diffusers.

    Args:
        sample_size: side of the images in pixels.
        channels: 1 or 3.
        size: key of `SIZES`.
        latent: numbers per image.
        num_class_embeds: classes, or None for an unconditional model.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        channels: int,
        size: str = "tiny",
        latent: int = LATENT,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.sides = sides(sample_size)[::-1]  # coarse to fine
        widths = _widths(size, len(self.sides))[::-1]
        self.embedding = nn.Embedding(num_class_embeds, latent) if num_class_embeds else None
        self.style = nn.Sequential(nn.Linear(latent, latent), nn.SiLU(), nn.Linear(latent, latent), nn.SiLU())
        self.start = nn.Linear(latent, widths[0] * self.sides[0] ** 2)
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.ModuleList(_UpBlock(before, after, latent) for before, after in pairs)
        self.norm = nn.GroupNorm(4, widths[-1])
        self.to_pixels = nn.Conv2d(widths[-1], channels * PATCH**2, 3, padding=1)
        self.apply(_initialise)
        # at the default scale all latents would begin as nearly the same picture, which invites the collapse to one mode
        for layer in (self.style[0], self.style[2], self.start):
            nn.init.kaiming_normal_(layer.weight, a=0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images, [B, channels, S, S] in [-1, 1].

        Args:
            latents: standard normal, float32 [B, latent].
            class_labels: int64 [B]; None for unconditional models.
        """
        # on a sphere, so that no latent is far from the others (Karras et al. 2018, section 4.2)
        latents = latents * latents.square().mean(1, keepdim=True).add(1e-8).rsqrt()
        if self.embedding is not None:
            latents = latents + self.embedding(class_labels)
        style = self.style(latents)  # [B, latent]
        maps = self.start(latents).unflatten(1, (-1, self.sides[0], self.sides[0]))
        for side, block in zip(self.sides, self.blocks, strict=True):
            if maps.shape[-1] != side:
                maps = functional.interpolate(maps, size=(side, side), mode="nearest")
            maps = block(maps, style)
        pixels = functional.pixel_shuffle(self.to_pixels(functional.silu(self.norm(maps))), PATCH)
        return torch.tanh(pixels)


class _UpBlock(nn.Module):
    """Residual block whose norms are scaled and shifted by the style."""

    def __init__(self, before: int, after: int, style: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, before, affine=False), nn.GroupNorm(4, after, affine=False)])
        self.modulations = nn.ModuleList([nn.Linear(style, 2 * before), nn.Linear(style, 2 * after)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)]
        )
        self.skip = nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, maps: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        out = maps  # [B, before, S, S]
        for norm, modulation, convolution in zip(self.norms, self.modulations, self.convolutions, strict=True):
            scale, shift = modulation(style)[:, :, None, None].chunk(2, dim=1)
            out = convolution(functional.silu(norm(out) * (1 + scale) + shift))
        return self.skip(maps) + out  # [B, after, S, S]


class Discriminator(nn.Module):
    """One logit per image, higher for those that seem real; with classes ``D(x, y) = w . h(x) + b + v_y . h(x)`` (Miyato and Koyama
    2018, Eq. 4)."""

    def __init__(self, sample_size: int, channels: int, size: str = "tiny", classes: int = 0):
        super().__init__()
        self.sides = sides(sample_size)
        widths = _widths(size, len(self.sides))
        self.from_pixels = nn.Conv2d(channels * PATCH**2, widths[0], 3, padding=1)
        pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
        self.blocks = nn.ModuleList(_DownBlock(before, after) for before, after in pairs)
        self.features = nn.Linear(widths[-1] * self.sides[-1] ** 2, LATENT)
        self.logit = nn.Linear(LATENT, 1)
        self.embedding = nn.Embedding(classes, LATENT) if classes else None
        self.apply(_initialise)
        if self.embedding is not None:
            nn.init.zeros_(self.embedding.weight)  # judges without the class until that helps

    def forward(self, images: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, [B], of images [B, channels, S, S] in [-1, 1]."""
        maps = self.from_pixels(functional.pixel_unshuffle(images, PATCH))
        for level, block in enumerate(self.blocks):
            maps = block(maps)
            if level < len(self.blocks) - 1:
                maps = functional.avg_pool2d(maps, 2, ceil_mode=True)
        features = functional.leaky_relu(self.features(functional.leaky_relu(maps, 0.2).flatten(1)), 0.2)
        logit = self.logit(features)[:, 0]
        return logit if self.embedding is None else logit + (self.embedding(class_labels) * features).sum(1)


class _DownBlock(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.first = nn.Conv2d(before, before, 3, padding=1)
        self.second = nn.Conv2d(before, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        out = self.first(functional.leaky_relu(maps, 0.2))  # [B, before, S, S]
        out = self.second(functional.leaky_relu(out, 0.2))
        return (self.skip(maps) + out) * 0.5**0.5  # [B, after, S, S]; keeps the scale without norms


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, a=0.2)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class GAN(nn.Module):
    """Both players in one module: what is trained, averaged and kept in checkpoints. Only ``generator`` is released."""

    def __init__(self, generator: Generator, discriminator: nn.Module):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator


def build(config: ModelConfig, image_size: int, channels: int, classes: int) -> GAN:
    """Networks with random weights from torch's global generator; ``classes`` 0 means unconditional.

    Raises:
        UserError: the size is not offered, or the images are too small.
    """
    if config.size not in SIZES:
        raise UserError("model.size", f"{config.size} is not offered for a GAN", f"one of {', '.join(SIZES)}")
    if image_size < 16 or image_size % PATCH:
        near = max(16, image_size + image_size % PATCH)
        raise UserError("data.image_size", f"{image_size} does not fit a GAN: even and at least 16", f"take {near}")
    generator = Generator(image_size, channels, config.size, num_class_embeds=classes or None)
    return GAN(generator, Discriminator(image_size, channels, config.size, classes))


@torch.no_grad()
def sample(
    network: Generator,
    indices: Sequence[int],
    *,
    seed: int,
    labels: torch.Tensor | None = None,
    precision: str = "fp32",
) -> torch.Tensor:
    """Images for the given sample indices, float32 [n, C, S, S] in [0, 1], on the CPU.

    Args:
        seed: the latent of index i comes from (seed, "sample", i) alone.
        labels: int64 [n] class indices for class-conditional models.
        precision: "bf16" or "fp32" arithmetic inside the network.
    """
    size, device = network.config.latent, next(network.parameters()).device
    latents = torch.stack([torch.randn(size, generator=seeded(seed, "sample", int(i))) for i in indices])
    with autocast(device, precision):
        images = network(latents.to(device), None if labels is None else labels.to(device))
    return to_unit(images)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to float32 [0, 1] on the CPU."""
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


def save(folder: Path, model: GAN, schedule: object = None) -> None:
    """Writes the generator as a pipeline folder that `GANPipeline` reads; the discriminator, which has seen the training pictures,
    stays behind.

    Args:
        schedule: not used: a GAN has none.
    """
    GANPipeline(model.generator).save_pretrained(folder)


class GANPipeline:
    """A saved generator and how it is called; like a pipeline of diffusers, which does not know this kind itself.

    Args:
        generator: network that draws.
    """

    def __init__(self, generator: Generator):
        self.generator = generator.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GANPipeline":
        """Reads a folder that `save_pretrained` wrote: JSON and safetensors only, nothing is downloaded or executed.

        Raises:
            UserError: it is no such folder.
        """
        try:
            found = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
            if found != PIPELINE:
                raise ValueError(f"holds a {found}")
            network = Generator.from_pretrained(
                folder, subfolder="generator", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise UserError("pipeline", f"{folder}: {reason}", f"give a folder of a saved {PIPELINE}") from error
        return cls(network)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``generator/`` (config.json, safetensors), then ``model_index.json``."""
        self.generator.save_pretrained(Path(folder) / "generator", safe_serialization=True)
        write_json(Path(folder) / "model_index.json", {"_class_name": PIPELINE, "generator": [__name__, "Generator"]})

    def to(self, device: torch.device | str) -> "GANPipeline":
        """Moves the network."""
        self.generator.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws images.

        Args:
            class_labels: one class index per image, for class-conditional models.
            generator: of the latents; a list: one per image.
            output_type: "pil"; "np": float32 [n, S, S, C]; "pt": float32 [n, C, S, S], both in [0, 1].

        Raises:
            ValueError: class labels are missing, too many, or not wanted.
        """
        classes = self.generator.config.num_class_embeds
        if (class_labels is not None) != bool(classes) or (classes and len(class_labels) != batch_size):
            raise ValueError(
                f"give class_labels, one of {classes} per image" if classes else "the model has no classes"
            )
        device = next(self.generator.parameters()).device
        latents = randn_tensor((batch_size, self.generator.config.latent), generator=generator, device=device)
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device)
        images = to_unit(self.generator(latents, labels))
        if output_type == "pil":
            return ImagePipelineOutput(images=[to_pil(image) for image in to_uint8(images)])
        return ImagePipelineOutput(images=images.movedim(1, -1).numpy() if output_type == "np" else images)
