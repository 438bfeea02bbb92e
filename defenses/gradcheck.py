"""Start-up check of the per-unit gradients, on the very model, dtype and memory format that will be trained.

Wrong gradients are silent: training goes on, the guarantee may hold, and the model is useless; or it does not hold.
"""

import copy

import torch
from torch import nn

from defenses.base import LossFunction
from defenses.errors import UserError
from defenses.persample import Backend, Units, trainable
from defenses.seeding import generator

KEY = "defenses.dpsgd.backend"
REMEDY = "backend: loop is slower and always right"
LOSS_REMEDY = "switch off defenses whose loss reads more of a batch than its tensors"
NOISE = 0.02  # standard deviation, of the order of ordinary initial weights
# Names of dropout rates outside nn.Dropout: functional, of labels (diffusers), of depth.
DROPOUT_FIELDS = ("dropout", "attention_dropout", "dropout_prob", "drop_prob")


def check(
    chosen: Backend, reference: Backend, model: nn.Module, loss: LossFunction, units: Units, tolerance: float
) -> float:
    """Compares a backend with the reference on a copy of the model; tries that units do not influence each other.

    Tensors that are all zero (lora_B, zero convolutions) get small noise first: behind them every gradient would be zero and
    nothing would be tested. Dropout is off. Errors are measured against the norm of the unit's whole gradient: some tensors
    (key biases) have a gradient that is zero but for rounding.

    Args:
        units: at least two, since one alone hides wrong memory layouts; public or synthetic.
        tolerance: largest l2 error of one tensor of one unit, as a share of the norm of that unit's gradient. Another unit may
            change a gradient by a hundredth of it (1e-6 for the usual 1e-4 in float32). At the tolerance of bf16 a small
            tensor may be wrong altogether: check the same backend in fp32 as well.

    Returns:
        The largest error found.

    Raises:
        UserError: the backend fails or disagrees, a gradient depends on other units, something that is not trained changes
            (spectral norm), or no trainable tensor has a gradient.
        ValueError: fewer than two units.
    """
    if len(units) < 2:
        raise ValueError("one unit alone would hide wrong memory layouts; give at least two")
    refuse_coupled(model)
    model_copy = _prepared(model)
    names = list(trainable(model_copy))
    right = _tried(reference, model_copy, loss, units, LOSS_REMEDY)
    _refuse_changed(model_copy, model)
    norms = torch.stack([_norm(gradient) for gradient in right]).square().sum(0).sqrt()  # [U]
    if not norms.isfinite().all() or not norms.any():
        raise UserError(
            "model",
            "the gradients of its trainable parameters are zero or not finite",
            "check the weights, and that no defense leaves all examples out (defenses.text_filter.threshold)",
        )
    found = _tried(chosen, model_copy, loss, units, REMEDY)
    worst, place = _worst(found, right, norms)
    if not worst <= tolerance:  # also refuses NaN
        raise UserError(
            KEY, f"{chosen.name} disagrees with one-by-one gradients by {worst:.1e} in {names[place]}", REMEDY
        )
    # first unit: unchanged, whatever the others are
    again = _tried(chosen, model_copy, loss, _others_replaced(units), REMEDY)
    change, place = _worst([g[:1] for g in again], [g[:1] for g in found], norms[:1])
    if not change <= tolerance / 100:
        raise UserError(
            KEY,
            f"with {chosen.name}, other examples change the gradient of an example by {change:.1e} in {names[place]}",
            REMEDY,
        )
    _refuse_changed(model_copy, model)
    return worst


def refuse_coupled(model: nn.Module) -> None:
    """Refuses layers that mix the examples of a batch or keep statistics of the data outside the weights.

    Raises:
        UserError: a normalisation over the batch, or with running statistics.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = f"normalises over the batch ({kind}): one record would change the gradients of others"
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            reason = f"keeps running statistics of private data ({kind}), to which no noise is added"
        else:
            continue
        raise UserError("model", f"{name or 'the model'} {reason}", "DP-SGD needs GroupNorm or LayerNorm instead")


def _prepared(model: nn.Module) -> nn.Module:
    """A copy with nothing random in its forward pass and no trainable tensor that is all zero."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for field in ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else DROPOUT_FIELDS:
            if isinstance(vars(module).get(field), float):
                setattr(module, field, 0.0)
    with torch.no_grad():
        for name, value in trainable(copied).items():
            value.grad = None
            if not value.any():
                noise = NOISE * torch.randn(value.shape, generator=generator(0, "gradcheck", name))
                value.copy_(noise)
    return copied


def _tried(backend: Backend, model: nn.Module, loss: LossFunction, units: Units, remedy: str) -> list[torch.Tensor]:
    """Gradients of all units, [U, *shape] per trainable tensor."""
    try:
        chunks = [gradients for gradients, _ in backend(model, loss, units)]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    except Exception as error:  # a backend may fail in any way on a model that it does not support
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(KEY, f"{backend.name} fails on this model: {reason}", remedy) from error


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.reshape(len(gradient), -1).norm(dim=1)  # [U]


def _worst(found: list[torch.Tensor], right: list[torch.Tensor], norms: torch.Tensor) -> tuple[float, int]:
    """Largest error over tensors and units, and the place of that tensor; NaN counts as largest."""
    errors = torch.stack([_norm(a - b) / norms.clamp(min=1e-30) for a, b in zip(found, right, strict=True)])
    errors = errors.amax(1).nan_to_num(nan=torch.inf)  # [tensors]
    return errors.max().item(), int(errors.argmax())


def _others_replaced(units: Units) -> Units:
    """The first unit as it is; all others get its timesteps and labels, and its images and noise negated. In the memory layout that the
    units have: another one would round otherwise, which is no influence."""
    tensors = {name: value.clone() for name, value in units.tensors.items()}
    for value in tensors.values():
        value[1:] = -value[:1] if value.is_floating_point() else value[:1]
    return Units(tensors, units.weights)


def _refuse_changed(used: nn.Module, original: nn.Module) -> None:
    """What is not trained must be as it was."""
    state = [*original.named_buffers(), *((n, p) for n, p in original.named_parameters() if not p.requires_grad)]
    now = dict([*used.named_buffers(), *used.named_parameters()])
    for name, value in state:
        if not torch.equal(value, now[name]):
            raise UserError("model", f"its forward pass changes {name}, which is not trained", "DP-SGD cannot cover it")
