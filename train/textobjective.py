"""The loss of text-to-image diffusion: latents, conditions, noise, per-example error."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from defenses.base import Batch
from train import diffusion
from train.conditioner import Condition
from train.diffusion import DiffusionConfig, Schedule, autocast
from train.latent import LatentModel, spread, time_ids, trained_conditions
from train.objective import Objective, Process

TEXT_MAGNITUDE = "text_magnitude"  # what a defense may want to know beside the loss (`defenses.base.Defense.wants`)


@dataclass
class TextObjective:
    """Denoising of latents under captions.

    Attributes:
        model: the bare module: what encodes pictures and captions.
        config: section ``train.diffusion``.
        schedule: forward process.
        caption_dropout: probability that a record is trained without its caption, which guidance needs (Ho and Salimans 2022).
        precision: of autoencoder and text encoders.
        wants: names of what seam 3 is told beside the loss.
        encode: captions -> condition, where their embeddings are cached; None: the model's own encoders.
    """

    model: LatentModel
    config: DiffusionConfig
    schedule: Schedule
    caption_dropout: float
    precision: str
    wants: Collection[str] = ()
    encode: Callable[[Sequence[str]], Condition] | None = None
    process: Process = field(init=False, repr=False)
    _empty: Condition | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.process = diffusion.process(self.config, self.schedule)

    def draw(self, batch: Batch) -> Batch:
        """Latents, conditions, timesteps and noise, from each record's own random stream."""
        mean, deviation = self.moments_of(batch)
        latents = mean + deviation * batch.random.normal("latent", *mean.shape[1:]).to(mean.device)
        if self.caption_dropout:
            dropped = batch.random.uniform("caption dropout") < self.caption_dropout
            kept = zip(batch.captions, dropped.tolist(), strict=True)
            captions = ["" if drop else caption for caption, drop in kept]
            noise = batch.text_noise
            if noise is not None:  # guidance leads away from the empty condition as it is
                noise = torch.where(dropped.to(noise.device), torch.zeros_like(noise), noise)
            batch = replace(batch, captions=captions, text_noise=noise)
        return self.process.draw(self.conditioned(batch, latents))

    def fix(self, batch: Batch, position: np.ndarray) -> Batch:
        """`draw` without chance: mean latents, every caption, noise of the record alone."""
        device = next(self.model.parameters()).device
        prepared = self.conditioned(batch.to(device), self.moments_of(batch.to(device))[0])
        return self.process.fix(prepared, position).to(torch.device("cpu"))

    def moments_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, before scaling, each [B, c, h, w]."""
        moments = batch.moments
        if moments is None:
            with autocast(batch.images.device, self.precision):
                moments = self.model.moments(batch.images)
        mean, log_variance = moments.to(batch.images.device).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    @torch.no_grad()
    def conditioned(self, batch: Batch, latents: torch.Tensor) -> Batch:
        """The batch with scaled latents and what the network is conditioned on."""
        device, size = latents.device, batch.images.shape[-1]
        prepared = replace(batch, latents=self.model.scale(latents), moments=None)
        if self.model.trains_text:
            prepared.tokens = self.model.conditioner.tokens(batch.captions).to(device)
            if batch.text_noise is not None:
                prepared.text = self.text_noise(batch, *self.model.kind.text_shape(), device)
        else:
            with autocast(device, self.precision):
                found = trained_conditions(self.model, batch.captions, self.encode)
            text = found.text.to(device)
            if batch.text_noise is not None:
                text = text + self.text_noise(batch, *text.shape[1:], device) * spread(text)
            prepared.text, prepared.pooled = text, None if found.pooled is None else found.pooled.to(device)
        if self.model.kind.takes_sizes:
            prepared.time_ids = torch.tensor([time_ids(size)] * len(batch), device=device)
        return prepared

    def text_noise(self, batch: Batch, length: int, width: int, device: torch.device) -> torch.Tensor:
        """Noise of the strength that a defense set, in units of the embedding's standard deviation, [B, length, width]."""
        noise = batch.random.normal("text noise", length, width).to(device)
        return noise * batch.text_noise.to(device)[:, None, None]

    def loss(self, model: nn.Module, batch: Batch, told: bool = True) -> torch.Tensor:
        """Weighted mean squared error of each record, float32 [B]."""
        noisy = self.process.noised(batch.latents, batch.noise, batch.timesteps)  # [B, c, h, w]
        prediction = model(noisy, batch)
        if told and TEXT_MAGNITUDE in self.wants:
            with torch.no_grad():
                without = model(noisy, batch, empty=self.empty)
            batch.told = {TEXT_MAGNITUDE: self.magnitude(prediction.detach(), without, batch.timesteps)}
        return self.process.error(prediction, batch.latents, batch)

    @property
    def empty(self) -> Condition:
        """The empty condition of one record, with the text encoders as they are now."""
        if self._empty is None or self.model.trains_text:
            found = self.model.conditioner.empty()
            self._empty = Condition(found.text.detach(), None if found.pooled is None else found.pooled.detach())
        return self._empty

    def magnitude(self, prediction: torch.Tensor, without: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """l2 norm of the difference that the caption makes to the predicted noise, float32 [B] (Wen et al. 2024, equation 4)."""
        difference = (prediction.float() - without.float()).flatten(1).norm(dim=1)
        return difference * self.process.noise_share(timesteps)


def objective(
    model: LatentModel,
    config: DiffusionConfig,
    schedule: Schedule,
    *,
    caption_dropout: float,
    precision: str,
    wants: Collection[str] = (),
    encode: Callable[[Sequence[str]], Condition] | None = None,
) -> Objective:
    """Denoising of latents at random timesteps; held-out losses at evenly spread ones. Arguments: see `TextObjective`."""
    found = TextObjective(model, config, schedule, caption_dropout, precision, frozenset(wants), encode)
    return Objective(loss=found.loss, heldout_loss=partial(found.loss, told=False), draw=found.draw, fix=found.fix)
