"""A text-to-image model as a defense at seam 6 sees it, and what such a defense may put in a prompt's place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class TextCondition:
    """What a text-to-image model is told of one image in place of its prompt's own embedding.

    Attributes:
        prompt: whose embedding was changed. The start noise of an image stays that of (seed, prompt, sample index).
        text: float32 [L, D], what the cross-attention sees.
        pooled: float32 [P], or None where the network takes none.
    """

    prompt: str
    text: torch.Tensor
    pooled: torch.Tensor | None = None


class TextModel(Protocol):
    """A text-to-image model as a defense at seam 6 may ask it; its weights are frozen and in evaluation mode.

    Attributes:
        first_timestep: at which sampling begins; None for a flow, where the noise predicted then is the input, whatever the prompt.
    """

    first_timestep: int | None

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings, float32 [B, L, D], and pooled ones, float32 [B, P] (None: the network takes none)."""
        ...

    def null(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What guidance leads away from, as `encode` of one prompt, B = 1."""
        ...

    def start(self, prompts: Sequence[str], indices: Sequence[int]) -> torch.Tensor:
        """What the network is given at the first step of these images, float32 [B, c, h, w]: their start noise."""
        ...

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """Predicted noise, float32 [B, c, h, w], whatever the network itself predicts; differentiable in ``text``.

        Args:
            latents: float32 [B, c, h, w].
            timesteps: int64 [B].
            text, pooled: as `encode` gives them.
        """
        ...
