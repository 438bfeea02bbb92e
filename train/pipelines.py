"""Stable Diffusion 1.x, 2.x, XL and 3 pipelines: loaded from a folder or the hub, checked, and saved in diffusers' format."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from defenses.errors import UserError
from train import adapters, hub, pipelinefolder
from train.diffusion import schedule_of
from train.models import parameter_count
from train.pipelinefit import one_line, refuse, text_config
from train.pipelinefolder import Layout

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TEXT_CLASSES = {each.__name__: each for each in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}
NETWORKS = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}
TEXT_PREFIX = "text_model."  # of a CLIPTextModel's weights in files


@dataclass
class Parts:
    """A text-to-image pipeline taken apart.

    Attributes:
        kind: ``sd``: Stable Diffusion 1.x or 2.x; ``sdxl``: XL, with two tokenizers and text encoders; ``sd3``: 3, with two of CLIP
            and mostly one of T5.
        vae: images [B, 3, H, W] in [-1, 1] to latents [B, c, H/8, W/8]; subtract its ``shift_factor`` if it has one, multiply by its
            ``scaling_factor``.
        network: what denoises, a U-Net or a transformer.
        scheduler: the pipeline's own sampler; its configuration has the noise schedule and the prediction type.
        source: folder or hub id.
        force_zeros_for_empty_prompt: of XL: pipelines embed a missing negative prompt as zeros.
    """

    kind: Literal["sd", "sdxl", "sd3"]
    vae: AutoencoderKL
    network: UNet2DConditionModel | SD3Transformer2DModel
    tokenizers: list[CLIPTokenizer | T5TokenizerFast]
    text_encoders: list[nn.Module]
    scheduler: Any
    source: str
    force_zeros_for_empty_prompt: bool = True

    @property
    def part(self) -> str:
        """Name of the network in the folder."""
        return "transformer" if self.kind == "sd3" else "unet"

    @property
    def factor(self) -> int:
        """Pixels of the side of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def trainable_text_encoders(self) -> list[nn.Module]:
        """Those of CLIP, which come first."""
        return [encoder for encoder in self.text_encoders if not isinstance(encoder, T5EncoderModel)]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network, vae and the text encoders, under their names in the folder."""
        return {self.part: self.network, "vae": self.vae, **dict(zip(TEXT_ENCODERS, self.text_encoders, strict=False))}

    @property
    def absent(self) -> list[str]:
        """Parts that this pipeline does without, which a call of ``from_pretrained`` must say."""
        return ["text_encoder_3", "tokenizer_3"] if self.kind == "sd3" and len(self.text_encoders) < 3 else []

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents that the network is made for."""
        size = self.network.config.sample_size
        side = size if isinstance(size, int) else size[0]
        return self.network.config.in_channels, side, side

    @property
    def image_size(self) -> int:
        """Side of the pictures that belong to these latents, in pixels."""
        return self.latent_shape[1] * self.factor


def load(source: str | Path, revision: str | None = None) -> Parts:
    """Loads in float32, in evaluation mode, with gradients on for all parameters. Nothing is changed in ``source``.

    Args:
        source: folder of a pipeline, or a hub id.
        revision: full commit hash of the hub id; None for a folder.

    Raises:
        UserError: see `pipelinefolder.examine` and `hub.fetch`; weights or tokenizers that do not fit.
    """
    source, folder = str(source), Path(source)
    if not folder.is_dir():
        folder = hub.fetch(source, revision)
    elif revision is not None:
        raise UserError("model.revision", f"is for hub ids, {source} is a folder", "set it to null")
    layout = pipelinefolder.examine(folder, source)
    try:
        parts = _load_parts(folder, layout, source)
        _check_tokenizers(parts)
        schedule_of(parts.scheduler)  # what the trainer makes of it
        assemble(parts)  # diffusers corrects outdated settings of old schedulers here: do so once, before they are used
    except UserError:
        raise
    except Exception as error:
        raise refuse(source, f"cannot be loaded: {one_line(error)}") from error
    return parts


def _load_parts(folder: Path, layout: Layout, source: str) -> Parts:
    encoders = {part: TEXT_CLASSES[layout.classes[part]] for part in TEXT_ENCODERS if part in layout.classes}
    network = next(part for part in NETWORKS if part in layout.classes)
    return Parts(
        kind=layout.kind,
        vae=_load_network("vae", AutoencoderKL, folder, layout, source),
        network=_load_network(network, NETWORKS[network], folder, layout, source),
        tokenizers=[_load_tokenizer(part, folder, source) for part in TOKENIZERS if part in layout.classes],
        text_encoders=[_load_network(part, cls, folder, layout, source) for part, cls in encoders.items()],
        scheduler=getattr(diffusers, layout.classes["scheduler"]).from_pretrained(
            folder / "scheduler", local_files_only=True
        ),
        source=source,
        force_zeros_for_empty_prompt=layout.force_zeros_for_empty_prompt,
    )


def _load_tokenizer(part: str, folder: Path, source: str) -> CLIPTokenizer | T5TokenizerFast:
    try:
        cls = T5TokenizerFast if part == "tokenizer_3" else CLIPTokenizer
        return cls.from_pretrained(folder / part, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise refuse(source, f"its {part} cannot be read: {one_line(error)}", "copy its files again") from error


def _load_network(part: str, cls: type, folder: Path, layout: Layout, source: str) -> nn.Module:
    """One network with exactly the weights of its configuration: what a file lacks would stay random."""
    options: dict[str, Any] = {"variant": layout.variants[part], "use_safetensors": True, "local_files_only": True}
    if part in TEXT_ENCODERS:
        config = text_config(layout.configs[part], cls)
        options |= {"config": config, "dtype": torch.float32}
        options |= {} if cls is T5EncoderModel else {"attn_implementation": "sdpa"}
    else:
        options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # told here rather than by their errors
    network, found = cls.from_pretrained(folder / part, **options)
    for problem in ("mismatched", "missing", "unexpected"):
        names = sorted(key if isinstance(key, str) else key[0] for key in found[f"{problem}_keys"])
        if names:
            raise refuse(source, f"the weights of its {part} do not fit its configuration: {problem} {names[0]}")
    if part not in TEXT_ENCODERS:
        network.register_to_config(_name_or_path="")  # diffusers would publish the folder's path with the weights
    return network.eval()


def _check_tokenizers(parts: Parts) -> None:
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=True):
        if len(tokenizer) > encoder.config.vocab_size:
            problem = f"its tokenizer knows {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}"
            raise refuse(parts.source, problem, "its parts are of other models")
        if isinstance(encoder, T5EncoderModel):  # which knows relative places, and is given as many tokens as we say
            continue
        places = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > places:
            problem = f"its tokenizer makes {tokenizer.model_max_length} tokens, its text encoder takes {places}"
            raise refuse(parts.source, problem, "set model_max_length in tokenizer_config.json")
    lengths = {tokenizer.model_max_length for tokenizer in parts.tokenizers[:2]}
    if len(lengths) > 1:
        raise refuse(parts.source, f"its tokenizers make texts of {sorted(lengths)} tokens", "they must be equal")


def assemble(parts: Parts) -> DiffusionPipeline:
    """The pipeline of these very parts, without a safety checker or watermark."""
    pieces = {"vae": parts.vae, parts.part: parts.network, "scheduler": parts.scheduler}
    pieces |= zip(TOKENIZERS, parts.tokenizers, strict=False)
    pieces |= zip(TEXT_ENCODERS, parts.text_encoders, strict=False)
    if parts.kind == "sd3":
        return StableDiffusion3Pipeline(**pieces, **dict.fromkeys(parts.absent))
    if parts.kind == "sdxl":
        zeros = parts.force_zeros_for_empty_prompt
        return StableDiffusionXLPipeline(**pieces, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    return StableDiffusionPipeline(**pieces, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save(folder: Path, parts: Parts) -> None:
    """Writes a complete pipeline (safetensors) for ``DiffusionPipeline.from_pretrained(folder)``, which needs no PEFT: adapters
    are merged into the weights. The released pipeline has no safety checker."""
    released = replace(
        parts,
        network=adapters.merged(parts.network),
        text_encoders=[adapters.merged(encoder) for encoder in parts.text_encoders],
    )
    assemble(released).save_pretrained(folder, safe_serialization=True)
    _write_older_names(folder, released)


def _write_older_names(folder: Path, parts: Parts) -> None:
    """Tokenizer and text encoder as the published pipelines name them, for readers before transformers 5 too."""
    for part, tokenizer in zip(TOKENIZERS, parts.tokenizers, strict=False):
        if part != "tokenizer_3":
            tokenizer.backend_tokenizer.model.save(str(folder / part))  # vocab.json and merges.txt
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    if not any(name.startswith(TEXT_PREFIX) for name in weights):
        prefixed = {TEXT_PREFIX + name: tensor for name, tensor in weights.items()}
        temporary = file.with_suffix(".tmp")  # never over the file itself, which the tensors may still be mapped to
        save_file(prefixed, temporary, metadata={"format": "pt"})
        temporary.replace(file)


def save_lora(folder: Path, network: nn.Module, text_encoders: list[nn.Module]) -> bool:
    """Writes the adapters alone to ``pytorch_lora_weights.safetensors``: ``pipeline.load_lora_weights(folder)`` on the pipeline that
    was loaded gives the one that `save` writes.

    The scale alpha / rank is multiplied into B, in float32, so that readers that know no alpha find W + B A too.

    Args:
        network: with or without an adapter (`adapters.apply`), what is frozen with ``requires_grad`` off.
        text_encoders: one, or two of XL, or two and T5 of 3, likewise.

    Returns:
        Whether it was written: not where there is no adapter, nor where other parameters were trained, since the adapters
        without them would be another model.
    """
    flow = isinstance(network, SD3Transformer2DModel)
    part = "transformer" if flow else "unet"
    modules = {part: network, **dict(zip(TEXT_ENCODERS, text_encoders, strict=False))}
    layers = {name: _lora_layers(module) for name, module in modules.items()}
    trained = sum(parameter_count(module, trainable=True) for module in modules.values())
    if not any(layers.values()) or trained != sum(t.numel() for found in layers.values() for t in found.values()):
        return False
    pipeline = StableDiffusionXLPipeline if len(text_encoders) == 2 else StableDiffusionPipeline
    pipeline = StableDiffusion3Pipeline if flow else pipeline
    pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": found for name, found in layers.items() if found})
    return True


def _lora_layers(module: nn.Module) -> dict[str, torch.Tensor]:
    """A and (alpha / rank) B of each adapted layer; empty without an adapter.

    The names are PEFT's: of those in diffusers' older style a reader converts all or none by the first in the file, and layers of
    other kinds than attention have none.
    """
    if getattr(module, "peft_config", None) is None:
        return {}
    from peft import get_peft_model_state_dict

    config = module.peft_config[adapters.NAME]
    prefix = TEXT_PREFIX if isinstance(module, CLIPTextModel) else ""  # left out by transformers 5 alone
    weights = get_peft_model_state_dict(module, adapter_name=adapters.NAME, save_embedding_layers=False)
    scale = config.lora_alpha / config.r
    return {
        prefix + name: (tensor.detach().cpu() * (scale if ".lora_B." in name else 1)).contiguous()
        for name, tensor in weights.items()
    }


def frozen_digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over names, types, shapes and values of what is not trained: buffers, and parameters with ``requires_grad`` off.

    Training with frozen parts can go on only from the same ones; they are not in its checkpoints.
    """
    digest = hashlib.sha256()
    for index, module in enumerate(modules):
        frozen = [(name, tensor) for name, tensor in module.named_parameters() if not tensor.requires_grad]
        for name, tensor in (*frozen, *module.named_buffers()):
            digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(parts: Parts) -> str:
    """One line: class, millions of parameters of each network, shape of the latents, size of the pictures, prediction."""
    counts = ", ".join(f"{name} {parameter_count(network) / 1e6:.1f} M" for name, network in parts.networks.items())
    shape = " x ".join(map(str, parts.latent_shape))
    prediction = parts.scheduler.config.get("prediction_type", "flow")
    return (
        f"{type(assemble(parts)).__name__}: parameters {counts}; latents {shape} of {parts.image_size} px pictures; "
        f"predicts {prediction}"
    )
