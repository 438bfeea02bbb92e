"""Captions to what a Stable Diffusion network is conditioned on: tokens, embeddings, the empty condition of guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Condition:
    """What one forward pass is conditioned on.

    Attributes:
        text: float32 [B, length, width], one embedding per token.
        pooled: float32 [B, width] of the whole caption (Stable Diffusion XL); None elsewhere.
    """

    text: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> "Condition":
        return Condition(self.text.to(device), None if self.pooled is None else self.pooled.to(device))

    def without(self, which: torch.Tensor) -> "Condition":
        """Zeros for some records, bool [B]: the empty condition of `Conditioner` with ``zero_for_empty``."""
        text = self.text.masked_fill(which[:, None, None], 0.0)
        return Condition(text, None if self.pooled is None else self.pooled.masked_fill(which[:, None], 0.0))


class Conditioner:
    """Tokenizers and text encoders of a pipeline, used as diffusers' own pipelines use them.

    Args:
        tokenizers: one, or two for Stable Diffusion XL.
        encoders: as many CLIP text encoders.
        zero_for_empty: the empty condition is all zeros instead of the embedding of "" (``force_zeros_for_empty_prompt`` of XL).
    """

    def __init__(self, tokenizers: Sequence, encoders: Sequence[nn.Module], zero_for_empty: bool = False):
        self.tokenizers, self.encoders, self.zero_for_empty = list(tokenizers), list(encoders), zero_for_empty

    def tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """int64 [B, encoders, length], cut off at the tokenizers' length, padded as they say; on the CPU."""
        columns = [
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(columns, dim=1)

    def embed(self, tokens: torch.Tensor) -> Condition:
        """Embeddings of ``tokens`` (int64 [B, encoders, length]) by these encoders."""
        return embed(self.encoders, tokens)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Condition:
        """Embeddings of captions, on the encoders' device."""
        device = next(self.encoders[0].parameters()).device
        found = self.embed(self.tokens(captions).to(device))
        return Condition(found.text.float(), None if found.pooled is None else found.pooled.float())

    def empty(self) -> Condition:
        """The condition that guidance moves away from, one record."""
        found = self.encode([""])
        if self.zero_for_empty:
            return Condition(
                torch.zeros_like(found.text), None if found.pooled is None else torch.zeros_like(found.pooled)
            )
        return found


def embed(encoders: Sequence[nn.Module], tokens: torch.Tensor) -> Condition:
    """One encoder: its last hidden states. Two: the last but one of each, side by side, and the projection of the second (Podell
    et al. 2023, section 2.1)."""
    if len(encoders) == 1:
        return Condition(encoders[0](tokens[:, 0])[0])
    found = [encoder(tokens[:, place], output_hidden_states=True) for place, encoder in enumerate(encoders)]
    return Condition(torch.cat([each.hidden_states[-2] for each in found], dim=-1), found[1].text_embeds)
