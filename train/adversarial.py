"""How a GAN is trained: the losses of both players as one loss per record, and the gradient rule that averages it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus

from defenses.base import Batch, LossFunction, Microbatches
from defenses.errors import UserError
from train.diffusion import autocast
from train.gan import GAN
from train.objective import Objective

PENALISED = 0.125  # share of the real pictures that R1 is computed on: one costs as much as the rest of its step


@dataclass(kw_only=True)
class GANConfig:
    """Section ``train.gan``, of ``model.family=gan`` alone. Set ``train.optimizer.beta1=0.0 beta2=0.99`` with it, as is usual for
    GANs: momentum makes the two players circle each other."""

    r1_gamma: float = 1.0  # weight of the gradient penalty; 0: none, and training hardly ever stays stable

    diversity: float = 0.05  # weight of what pushes images of different latents apart; 0: none, and most modes are lost

    def __post_init__(self):
        for key, usual in (("r1_gamma", "0.1 to 10"), ("diversity", "0 to 0.1")):
            if getattr(self, key) < 0:
                raise UserError(f"train.gan.{key}", f"{getattr(self, key)} is negative", f"{usual} is usual")


def per_example_loss(model: GAN, batch: Batch, config: GANConfig) -> torch.Tensor:
    """Losses of both players, float32 [B]: a pure function of (weights, batch) whose gradient is that of simultaneous descent.

    Record i brings a picture x and, from its own random stream, two latents z, z' that share its label; per record

        discriminator: softplus(-D(x)) + softplus(D(G(z))) + gamma/2 |grad_x D(x)|^2
        generator:     softplus(-D(G(z))) + diversity / spread(z, z')

    (non-saturating loss, Goodfellow et al. 2014, section 3; R1, Mescheder et al. 2018, Eq. 9; `closeness`). The discriminator's terms see G(z) as a
    constant and the generator's term sees D as fixed, so that the sum has each player's gradient in that player's weights, both from
    the same weights. Its value means little by itself: 2.08 and
    the last term where the discriminator cannot tell.

    Defenses that change the batch change the real pictures alone, as for the other families: the generator learns what they made of
    them, rotations and all. Changing generated pictures in the same way (Zhao et al. 2020; Karras et al. 2020) would keep that from the
    generator and suit a GAN better, but it would be another defense than the one that the diffusion models have.
    """
    size, device = model.generator.config.latent, batch.images.device
    latents, others = (batch.random.normal(purpose, size).to(device) for purpose in ("latent", "other latent"))
    fakes = model.generator(latents, batch.labels)
    fixed = {name: weight.detach() for name, weight in model.discriminator.named_parameters()}
    fooled = functional_call(model.discriminator, fixed, (fakes, batch.labels))
    told_real = model.discriminator(batch.images, batch.labels)
    told_fake = model.discriminator(fakes.detach(), batch.labels)
    players = softplus(-told_real.float()) + softplus(told_fake.float()) + softplus(-fooled.float())
    if config.diversity:
        players = players + config.diversity * closeness(fakes, model.generator(others, batch.labels), latents, others)
    return players + config.r1_gamma / 2 * penalty(model.discriminator, batch)


def closeness(one: torch.Tensor, two: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Distance of two latents over the distance of their images, float32 [B] (Mao et al. 2019, Eq. 2, inverted as in their code).

    In place of statistics over a minibatch, which would mix records: without either the generator draws hardly more than one picture
    at the budgets of a workstation. It is a bias: images are spread a little more than the data are.

    Args:
        one, two: images, [B, C, S, S] in [-1, 1].
        first, second: their latents, float32 [B, L].
    """
    apart = (one.float() - two.float()).abs().flatten(1).mean(1)
    return (first - second).abs().mean(1) / (apart + 0.01)  # equal images stay finite


def penalty(discriminator: nn.Module, batch: Batch) -> torch.Tensor:
    """Squared l2 norm of the logit's gradient in the real picture, float32 [B], in float32 arithmetic.

    It is computed for a random share `PENALISED` of the records, each by its own coin, and divided by that share: unbiased, like the
    penalty at every n-th step (Karras et al. 2020), but a function of the record alone.
    """
    chosen = batch.random.uniform("penalised") < PENALISED
    result = torch.zeros(len(batch), device=batch.images.device)
    if not chosen.any():
        return result
    chosen = chosen.to(batch.images.device)
    images = batch.images[chosen].detach().requires_grad_()
    labels = None if batch.labels is None else batch.labels[chosen]
    with torch.enable_grad(), autocast(images.device, "fp32"):
        logits = discriminator(images, labels)
        # examples do not mix: the gradient of the sum has one line per example
        (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return result.masked_scatter(chosen, slopes.float().square().flatten(1).sum(1) / PENALISED)


def real_loss(model: GAN, batch: Batch) -> torch.Tensor:
    """``softplus(-D(x))`` of real pictures, float32 [B]: lower on training than on held-out pictures where the discriminator has
    learned the training pictures by heart."""
    return softplus(-model.discriminator(batch.images, batch.labels).float())


class PlayersGradient:
    """The mean over the global batch of both players' gradients, summed over ranks in one explicit reduction per parameter.

    Args:
        batch_size: records of a global batch, a constant.
        max_grad_norm: clips that mean to this l2 norm; "auto" or None: never, the penalty keeps gradients small.
        precision: "bf16" or "fp32" arithmetic of the forward pass.
    """

    prepares_model = False  # the loss uses the two networks several times each, which DDP's forward pass cannot follow

    def __init__(self, batch_size: int, max_grad_norm: float | str | None, precision: str):
        self.batch_size, self.precision = batch_size, precision
        self.max_grad_norm = None if max_grad_norm == "auto" else max_grad_norm

    def check(self, model: nn.Module, loss: LossFunction, example: Batch) -> None:
        """Our own networks always fit."""
        return None

    def memory(self, trained: int) -> int:
        """Nothing."""
        return 0

    def backward(
        self, model: nn.Module, loss: LossFunction, microbatches: Microbatches, step: int, accelerator: Any
    ) -> torch.Tensor:
        """See `defenses.base.GradientRule`."""
        losses = []
        for microbatch in microbatches:
            with autocast(microbatch.images.device, self.precision):
                examples = loss(model, microbatch)  # [b]
            (examples.sum() / self.batch_size).backward()
            losses.append(examples.detach())
        for parameter in model.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, "sum")
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
        return torch.cat(losses)


def objective(config: GANConfig) -> Objective:
    """The losses of both players; for held-out pictures the discriminator's verdict."""
    return Objective(loss=lambda model, batch: per_example_loss(model, batch, config), heldout_loss=real_loss)
