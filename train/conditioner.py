"""Captions to what a Stable Diffusion network is conditioned on: tokens, embeddings, the empty condition of guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

T5_LENGTH = 256  # tokens that T5 is given, as in a call of Stable Diffusion 3's pipeline


@dataclass
class Condition:
    """What one forward pass is conditioned on.

    Attributes:
        text: float32 [B, length, width], one embedding per token.
        pooled: float32 [B, width] of the whole caption (Stable Diffusion XL and 3); None elsewhere.
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
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return torch.stack(list(map(_padded, self.tokenizers, [captions] * len(lengths), lengths)), dim=1)

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


class JointConditioner(Conditioner):
    """As Stable Diffusion 3 reads captions (Esser et al. 2024, appendix B.1): the last but one hidden states of two CLIP encoders side by
    side, filled up with zeros to the width of T5; after them in the sequence those of T5, or zeros where the pipeline has none. Pooled
    are the projections of both CLIP encoders.

    Args:
        tokenizers, encoders: two of CLIP, then T5's where there is one.
        width: of the text that the network takes.
    """

    def __init__(self, tokenizers: Sequence, encoders: Sequence[nn.Module], width: int):
        super().__init__(tokenizers, encoders)
        self.width = width

    def tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """int64 [B, length of all], one encoder's after the other's."""
        lengths = [self.tokenizers[0].model_max_length] * 2 + [T5_LENGTH]
        return torch.cat(
            [_padded(tokenizer, captions, length) for tokenizer, length in zip(self.tokenizers, lengths, strict=False)],
            dim=1,
        )

    def embed(self, tokens: torch.Tensor) -> Condition:
        length = self.tokenizers[0].model_max_length
        found = [
            encoder(tokens[:, place * length : (place + 1) * length], output_hidden_states=True)
            for place, encoder in enumerate(self.encoders[:2])
        ]
        clip = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if len(self.encoders) > 2:
            further = self.encoders[2](tokens[:, 2 * length :])[0]
        else:
            further = clip.new_zeros(len(tokens), T5_LENGTH, self.width)
        pooled = torch.cat([each.text_embeds for each in found], dim=-1)
        return Condition(torch.cat([clip, further.to(clip.dtype)], dim=1), pooled)


def _padded(tokenizer, captions: Sequence[str], length: int) -> torch.Tensor:
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(captions), **options).input_ids


def embed(encoders: Sequence[nn.Module], tokens: torch.Tensor) -> Condition:
    """One encoder: its last hidden states. Two: the last but one of each, side by side, and the projection of the second (Podell
    et al. 2023, section 2.1)."""
    if len(encoders) == 1:
        return Condition(encoders[0](tokens[:, 0])[0])
    found = [encoder(tokens[:, place], output_hidden_states=True) for place, encoder in enumerate(encoders)]
    return Condition(torch.cat([each.hidden_states[-2] for each in found], dim=-1), found[1].text_embeds)
