"""Stable Diffusion 1.x, 2.x and XL pipelines: loaded from a folder or the hub, checked, and saved in diffusers' format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from defenses.errors import UserError
from train import adapters, pipelinefolder
from train.pipelinefolder import one_line, refuse

TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@dataclass
class Parts:
    """A text-to-image pipeline taken apart.

    Attributes:
        kind: ``sd``: Stable Diffusion 1.x or 2.x; ``sdxl``: XL, with two tokenizers and text encoders.
        vae: images [B, 3, H, W] in [-1, 1] to latents [B, 4, H/8, W/8]; multiply by its ``scaling_factor``.
        scheduler: the pipeline's own sampler; its configuration has the noise schedule and the prediction type.
        source: folder or hub id.
        force_zeros_for_empty_prompt: of XL: pipelines embed a missing negative prompt as zeros.
    """

    kind: Literal["sd", "sdxl"]
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    tokenizers: list[CLIPTokenizer]
    text_encoders: list[nn.Module]
    scheduler: Any
    source: str
    force_zeros_for_empty_prompt: bool = True


def load(source: str | Path, revision: str | None = None) -> Parts:
    """Loads in float32, in evaluation mode, all parameters with ``requires_grad``.

    Args:
        source: folder of a pipeline, or a hub id.
        revision: full commit hash of the hub id.

    Raises:
        UserError: see `pipelinefolder.examine`; a hub id without a full commit hash, or that cannot be reached.
    """
    source = str(source)
    folder = Path(source)
    layout = pipelinefolder.examine(folder, source)
    try:
        parts = _load_parts(folder, layout, source)
    except UserError:
        raise
    except Exception as error:
        raise refuse(source, one_line(error)) from error
    assemble(parts)
    return parts


def _load_parts(folder: Path, layout: pipelinefolder.Layout, source: str) -> Parts:
    encoders = [name for name in TEXT_ENCODERS if name in layout.classes]
    schedulers = getattr(diffusers, layout.classes["scheduler"])
    return Parts(
        kind=layout.kind,
        vae=_load_module(AutoencoderKL, folder, "vae", layout, source),
        unet=_load_module(UNet2DConditionModel, folder, "unet", layout, source),
        tokenizers=[
            CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"), local_files_only=True)
            for name in encoders
        ],
        text_encoders=[_load_module(TEXT_ENCODERS[name], folder, name, layout, source) for name in encoders],
        scheduler=schedulers.from_pretrained(folder / "scheduler", local_files_only=True),
        source=source,
        force_zeros_for_empty_prompt=layout.force_zeros_for_empty_prompt,
    )


def _load_module(cls: type, folder: Path, part: str, layout: pipelinefolder.Layout, source: str) -> nn.Module:
    """One network with all its weights: what is missing in the file would be random."""
    options: dict[str, Any] = {"variant": layout.variants[part], "use_safetensors": True, "local_files_only": True}
    options |= {"low_cpu_mem_usage": False, "torch_dtype": torch.float32} if part in ("unet", "vae") else {}
    options |= {"attn_implementation": "sdpa", "dtype": torch.float32} if part in TEXT_ENCODERS else {}
    model, found = cls.from_pretrained(folder / part, output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found[kind]:
            names = sorted(str(name) for name in found[kind])
            raise refuse(source, f"weights of {part} do not fit its config: {kind.replace('_', ' ')} {names[0]}")
    return model.eval()


def assemble(parts: Parts) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of these very parts, without a safety checker or watermark."""
    shared = {"vae": parts.vae, "unet": parts.unet, "scheduler": parts.scheduler}
    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), parts.tokenizers, strict=False))
    encoders = dict(zip(TEXT_ENCODERS, parts.text_encoders, strict=False))
    if parts.kind == "sdxl":
        zeros = parts.force_zeros_for_empty_prompt
        return StableDiffusionXLPipeline(
            **shared, **tokenizers, **encoders, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **shared, **tokenizers, **encoders, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def save(folder: Path, parts: Parts) -> None:
    """Writes a complete pipeline (safetensors) for ``DiffusionPipeline.from_pretrained(folder)``, which needs no PEFT:
    adapters are merged into the weights. The released pipeline has no safety checker."""
    whole = Parts(
        **{
            **vars(parts),
            "unet": adapters.merged(parts.unet),
            "vae": parts.vae,
            "text_encoders": [adapters.merged(encoder) for encoder in parts.text_encoders],
        }
    )
    assemble(whole).save_pretrained(folder, safe_serialization=True)
