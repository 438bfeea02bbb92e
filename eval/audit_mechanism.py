"""Audit of DP-SGD's mechanism (`make audit`): does one private step give away more than its noise allows?

Two records, a tiny real network, sampling probability 1, and a canary whose gradient is ten times the clip norm: it is
in the batch of half of the trials. A step is then a Gaussian mechanism of sensitivity 1 and noise sigma (in units of
the clip norm), which is exactly 1/sigma-GDP (Nasr et al. 2023 audit whole runs in this way). What is real:
`NoisyClippedSum` from the per-unit gradients to ``p.grad`` (clip, sum, reduction, noise, divisor), a new secret for
every trial, the default backend. The gradients themselves are computed once per batch and handed out again: weights and
records are the same in every trial.

python -m eval.audit_mechanism: exit status 1 on a violation.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from scipy.stats import norm
from torch import nn

from defenses.base import Batch, LossFunction, Microbatches
from defenses.mechanism import EXACT, NoisyClippedSum, shared_secret
from defenses.persample import Backend, Chunk, Units, backend, group_views, reference
from defenses.seeding import derive
from eval.audit import gaussian_epsilon, gdp_lower_bound

NOISE_MULTIPLIER = 1.0
TRIALS = 1000  # per side; at sigma 1 noise too small by 1.5 is then found in 59 of 60 audits, by 2 in all
DELTA = 1e-5
SATURATION = 10.0  # norm of the canary's gradient in units of the clip norm
# Largest deviation of mean shift and spread, in standard errors: 1 false alarm in 1000 audits.
DEVIATION = float(norm.isf(0.001 / 4))


@dataclass(frozen=True)
class MechanismAudit:
    """Result. Statistics are projections of the noisy sum on the canary's direction, in units of the clip norm.

    Attributes:
        claimed_mu, bound: of Gaussian differential privacy; ``bound`` is a lower bound, 95 % confidence.
        shift, shift_error: difference of the means, with its standard error; 1 where the clip is right.
        spread, spread_error: standard deviation within a side, with its standard error; sigma where the noise is right.
        violations: what is wrong, in words; empty where nothing is.
    """

    trials: int
    claimed_mu: float
    bound: float
    shift: float
    shift_error: float
    spread: float
    spread_error: float
    violations: list[str]


class Recalled:
    """A backend that computes the gradients of its one batch once, and hands out copies of them afterwards."""

    def __init__(self, computed: Backend):
        self.name, self._computed, self._chunks = computed.name, computed, None

    def __call__(self, model: nn.Module, loss: LossFunction, units: Units) -> Iterator[Chunk]:
        if self._chunks is None:
            self._chunks = list(self._computed(model, loss, units))
        for gradients, losses in self._chunks:
            yield [gradient.clone() for gradient in gradients], losses.clone()


def tiny_network() -> nn.Module:
    """A `UNet2DModel` for [B, 1, 8, 8], with attention in its middle, 2,600 parameters."""
    torch.manual_seed(derive(0, "audit"))
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
    ).train()


def two_records(device: torch.device) -> Batch:
    """The canary is the second."""
    numbers = torch.Generator().manual_seed(derive(0, "audit records"))
    images, noise = torch.randn((2, 2, 1, 8, 8), generator=numbers).to(device)
    return Batch(images, np.arange(2), None, None, torch.tensor([500, 100], device=device), noise)


def denoising_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Squared error of the predicted noise, float32 [B]."""
    return (model(batch.images, batch.timesteps, return_dict=False)[0] - batch.noise).square().flatten(1).mean(1)


def statistics(
    accelerator: Accelerator,
    trials: int,
    noise_multiplier: float = NOISE_MULTIPLIER,
    seed: int | None = None,
    prepare: Callable[[Backend], Backend] = Recalled,
) -> tuple[np.ndarray, np.ndarray]:
    """Released sums of many first steps, projected on the canary's gradient, in units of the clip norm.

    Args:
        seed: of the secrets, for tests; None: the operating system's entropy, as in a run.
        prepare: what is done with the backend; the identity computes every gradient anew (much slower).

    Returns:
        Trials with the canary, trials without it, float64 [trials] each.
    """
    model, batch = tiny_network().to(accelerator.device), two_records(accelerator.device)
    parameters = list(model.parameters())
    one_by_one = reference("loop", "fp32")
    ((gradients, _),) = one_by_one(model, denoising_loss, group_views(batch[1:2], batch.rows[1:2]))
    canary = torch.cat([gradient.flatten() for gradient in gradients]).double()
    clip_norm, direction = float(canary.norm()) / SATURATION, canary / canary.norm()
    sides = []
    for name, rows in (("inside", slice(0, 2)), ("outside", slice(0, 1))):
        part, computed = batch[rows], prepare(backend("vmap", "fp32"))
        found = np.empty(trials)
        for trial in range(trials):
            rule = NoisyClippedSum(
                computed,
                one_by_one,
                clip_norm=clip_norm,
                noise_multiplier=noise_multiplier,
                divisor=2.0,
                unit_of_row=batch.rows,
                secret=shared_secret(accelerator, None if seed is None else derive(seed, name, trial)),
                book=lambda step: None,
                returns_losses=False,
                tolerance=EXACT,
            )
            rule.backward(model, denoising_loss, Microbatches([lambda part=part: part]), 0, accelerator)
            released = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
            found[trial] = float(released @ direction) * rule.divisor / clip_norm
            for parameter in parameters:
                parameter.grad = None
        sides.append(found)
    return sides[0], sides[1]


def judge(inside: np.ndarray, outside: np.ndarray, noise_multiplier: float = NOISE_MULTIPLIER) -> MechanismAudit:
    """Holds the trials against what the mechanism claims.

    A lower bound above the claim is a violation of privacy, found with at most 5 % false alarms (simulated: none in
    60). Mean shift and spread are compared with their exact values, so that smaller errors, and errors to the other
    side, are found, too.
    """
    trials, claimed = len(inside), 1 / noise_multiplier
    bound = gdp_lower_bound(inside, outside)
    shift = float(inside.mean() - outside.mean())
    spread = float(np.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2))
    shift_error = noise_multiplier * float(np.sqrt(2 / trials))
    spread_error = noise_multiplier / float(np.sqrt(4 * (trials - 1)))
    violations = []
    if bound > claimed:
        violations.append(f"the step is not {claimed:g}-GDP: at least {bound:.3f} was measured")
    if abs(shift - 1) > DEVIATION * shift_error:
        violations.append(f"the canary moves the sum by {shift:.3f} clip norms, not by 1")
    if abs(spread - noise_multiplier) > DEVIATION * spread_error:
        violations.append(f"the noise has a standard deviation of {spread:.3f} clip norms, not {noise_multiplier:g}")
    return MechanismAudit(trials, claimed, bound, shift, shift_error, spread, spread_error, violations)


def describe(audit: MechanismAudit) -> list[str]:
    """Lines of text."""
    epsilons = [gaussian_epsilon(mu, DELTA) for mu in (audit.claimed_mu, audit.bound)]
    return [
        f"mechanism audit: {audit.trials} trials with the canary, {audit.trials} without",
        f"claimed      mu {audit.claimed_mu:.3f}  (epsilon {epsilons[0]:.2f} at delta {DELTA:g})",
        f"lower bound  mu {audit.bound:.3f}  (epsilon {epsilons[1]:.2f}), 95 % confidence",
        f"mean shift   {audit.shift:.3f} clip norms, expected 1 +- {DEVIATION * audit.shift_error:.3f}",
        f"noise std    {audit.spread:.3f} clip norms, expected {1 / audit.claimed_mu:g} +- {DEVIATION * audit.spread_error:.3f}",
        *(f"VIOLATION    {violation}" for violation in audit.violations),
        "verdict      " + ("violated" if audit.violations else "no violation found (which is no proof)"),
    ]


def main() -> int:
    """Prints the audit; returns the exit status."""
    audit = judge(*statistics(Accelerator(), TRIALS))
    print("\n".join(describe(audit)))
    return int(bool(audit.violations))


if __name__ == "__main__":
    sys.exit(main())
