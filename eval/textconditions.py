"""What the network of a text-to-image pipeline is told of captions, made by the pipeline itself."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def text_condition(pipeline: Any, side: int, device: torch.device, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Embeddings of captions as the pipeline itself makes them, with SDXL's sizes of an uncropped picture."""
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    options |= {"prompt_2": None, "prompt_3": None}  # the same
    known = inspect.signature(pipeline.encode_prompt).parameters
    found = pipeline.encode_prompt(list(captions), **{key: value for key, value in options.items() if key in known})
    if len(found) == 2:
        return {"encoder_hidden_states": found[0]}
    if not hasattr(pipeline, "unet"):
        return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device)
    return {
        "encoder_hidden_states": found[0],
        "text_embeds": found[2],
        "time_ids": sizes.expand(len(captions), -1),
    }


def null_condition(pipeline: Any, side: int, device: torch.device, count: int) -> dict[str, torch.Tensor]:
    """Embedding of the empty prompt, or zeros where the pipeline's guidance takes zeros for it (SDXL)."""
    condition = text_condition(pipeline, side, device, [""])
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        text = {name: torch.zeros_like(value) for name, value in condition.items() if name != "time_ids"}
        condition |= text
    return {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}
