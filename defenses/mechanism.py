"""The Gaussian mechanism on per-unit gradients: clip, sum, one reduction, noise once, a constant divisor.

Abadi et al. 2016, algorithm 1, with the sum divided by a constant instead of the realised batch size.
"""

import secrets
from collections.abc import Callable

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import nn

from defenses.base import Batch, LossFunction, Microbatches
from defenses.errors import UserError
from defenses.gradcheck import check
from defenses.persample import Backend, group_views
from defenses.seeding import derive, derive_wide

EXACT = 1e-4  # largest error of a backend in float32, relative to the unit's whole gradient; 1e-6 is usual
CHECK_AFTER, CHECK_EVERY = (
    4,
    200,
)  # steps until the weights are compared with the first ones: a warm-up leaves them where they were once


def add_clipped(gradients: list[torch.Tensor], clip_norm: float, totals: list[torch.Tensor]) -> None:
    """Adds every unit's gradient, scaled to an l2 norm of at most ``clip_norm``, to ``totals``.

    Guarantee: whatever the gradients hold, a unit moves the totals by at most clip_norm (1 + 1e-5) in l2 norm. A unit whose
    norm is not finite in float32 adds exactly zero; its rows are selected away, because 0 * NaN is NaN.

    Args:
        gradients: per trainable tensor, float32 [u, *shape].
        totals: per trainable tensor, float32 [*shape]; changed in place.
    """
    squares = torch.stack([gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients]).sum(0)  # [u]
    finite = squares.isfinite()
    if not bool(finite.all()):
        gradients = [torch.where(_column(finite, gradient), gradient, 0.0) for gradient in gradients]
        squares = torch.where(finite, squares, 0.0)
    factors = (clip_norm / squares.sqrt().clamp(min=1e-30)).clamp(max=1.0)
    for gradient, total in zip(gradients, totals, strict=True):
        total += torch.tensordot(factors, gradient, dims=1)


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


class NoisyClippedSum:
    """The gradient rule of DP-SGD (`defenses.base.GradientRule`).

    Args:
        backend, reference: per-unit gradients, and the one-by-one gradients that they are checked against, within ``tolerance``
            of a unit's whole gradient.
        units_at_once: of a micro-batch, for `memory`.
        exact: the same pair in float32 where ``backend`` has less precision: rounding would hide a tensor that is missing.
        clip_norm, noise_multiplier, divisor: the mechanism's constants.
        unit_of_row: unit of each row of the data set, int64.
        secret: entropy shared by the ranks; noise and dropout come from it and from the step.
        book: books a step in the ledger, called on the main process before anything is computed.
        returns_losses: whether losses, which are private, may be returned for the log.
    """

    prepares_model = False  # DDP would average raw gradients

    def __init__(
        self,
        backend: Backend,
        reference: Backend,
        clip_norm: float,
        noise_multiplier: float,
        divisor: float,
        unit_of_row: np.ndarray,
        secret: int,
        book: Callable[[int], None],
        returns_losses: bool,
        tolerance: float,
        exact: tuple[Backend, Backend] | None = None,
        units_at_once: int = 1,
    ):
        self.backend, self.reference, self.tolerance, self.exact = backend, reference, tolerance, exact
        self.clip_norm, self.noise_multiplier, self.divisor = clip_norm, noise_multiplier, divisor
        self.unit_of_row, self.secret, self.book, self.returns_losses = unit_of_row, secret, book, returns_losses
        self.units_at_once = units_at_once
        self._first: tuple[int, dict[str, float]] | None = None  # step of the first call, weights before it

    def check(self, model: nn.Module, loss: LossFunction, example: Batch) -> None:
        """Refuses models that couple examples, and a backend whose gradients are not those of one record at a time."""
        units = group_views(example, np.arange(len(example)) // 2)
        if self.exact is not None:
            check(*self.exact, model, loss, units, EXACT)
        check(self.backend, self.reference, model, loss, units, self.tolerance)

    def memory(self, trained: int) -> int:
        """Gradients of the units that are held at once, twice while they are squared, and the noisy sum."""
        return 4 * trained * (2 * self.units_at_once + 2)

    def backward(
        self, model: nn.Module, loss: LossFunction, microbatches: Microbatches, step: int, accelerator
    ) -> torch.Tensor:
        """See `defenses.base.GradientRule`. Returns no losses unless it was allowed to."""
        self.watch(model, step, accelerator)
        if accelerator.is_main_process:
            self.book(step)
        accelerator.wait_for_everyone()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.grad is not None for parameter in parameters):
            raise RuntimeError("a gradient was left from elsewhere: it would be released without noise")
        device = parameters[0].device
        torch.manual_seed(derive(self.secret, "dropout", step, accelerator.process_index))
        flat = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float32, device=device)
        totals = [
            part.view(parameter.shape)
            for part, parameter in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        losses = [torch.zeros(0, device=device)]
        for batch in microbatches:
            units = group_views(batch, self.unit_of_row[batch.rows])
            for gradients, values in self.backend(model, loss, units):
                add_clipped(gradients, self.clip_norm, totals)
                losses.append(values[values.isfinite()])
        if accelerator.is_main_process:
            flat += self.noise(flat, step)
        flat = reduce(flat, "sum") / self.divisor
        parts = flat.split([parameter.numel() for parameter in parameters])
        for part, parameter in zip(parts, parameters, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
        return torch.cat(losses) if self.returns_losses else losses[0]

    def noise(self, like: torch.Tensor, step: int) -> torch.Tensor:
        """Gaussian noise of standard deviation noise_multiplier x clip_norm, float32, one draw for all parameters."""
        seed = derive_wide(self.secret, "noise", step)
        if like.device.type == "cuda":
            generator = torch.Generator(like.device).manual_seed(seed >> 63)  # Philox uses all 64 bits of a seed
            drawn = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
        else:  # torch's generator on CPUs keeps 32 bits of a seed, which can be searched in hours
            random = np.random.Generator(np.random.Philox(seed))
            drawn = (
                torch.from_numpy(random.standard_normal(like.numel(), dtype=np.float32))
                .view(like.shape)
                .to(like.device)
            )
        return drawn * (self.noise_multiplier * self.clip_norm)

    def watch(self, model: nn.Module, step: int, accelerator) -> None:
        """Every now and then: trained weights have moved, no others have, and all ranks hold the same.

        Raises:
            UserError: nothing moves.
            RuntimeError: a frozen tensor or a buffer moved, or ranks differ.
        """
        if self._first is None:
            self._first = step, _fingerprints(model)
        if (step - self._first[0]) % CHECK_EVERY != CHECK_AFTER:
            return
        before, now = self._first[1], _fingerprints(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        moved = sorted(name for name in now if now[name] != before[name])
        frozen = [name for name in moved if name not in trained]
        if frozen:
            raise RuntimeError(f"{frozen[0]} changed though it is not trained: it may hold what no noise was added to")
        if not moved:  # one tensor alone may stand still at a small rate
            raise UserError(
                "train.learning_rate",
                f"no weight has moved after {CHECK_AFTER} private steps, which are spent",
                "raise it, or shorten train.optimizer.warmup_steps",
            )
        if any(other != now for other in gather_object([now])):
            raise RuntimeError("the ranks hold different weights")


def _fingerprints(model: nn.Module) -> dict[str, float]:
    """A number per tensor that changes when the tensor does (weights and buffers)."""
    tensors = [*model.named_parameters(), *model.named_buffers()]  # a tied one once
    return {name: float(tensor.detach().double().square().sum()) for name, tensor in tensors}


def shared_secret(accelerator, test_seed: int | None) -> int:
    """256 bits of the operating system's entropy, drawn on the main process and sent to the others, or the test seed."""
    drawn = secrets.randbits(256) if test_seed is None else test_seed
    return broadcast_object_list([drawn])[0]
