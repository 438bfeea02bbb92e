"""Training few parameters of a large network: low-rank adapters (LoRA, through PEFT) and frozen parts.

What is frozen has ``requires_grad`` off, so optimizer, gradient rules (clipping, noise) and EMA see only what is trained.
PEFT takes seconds to import: it is imported where an adapter is used.
"""

import copy
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from defenses.errors import UserError

NAME = "default"  # PEFT's name of the one adapter
ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(kw_only=True)
class AdapterConfig:
    """Section ``model.adapter``: low-rank adapters (Hu et al. 2021), W x + (alpha / rank) B A x with B = 0 at the start."""

    rank: int = 8  # of B A; for a convolution the number of channels between A and B
    alpha: float | None = None  # scale of the update times rank; null: equal to rank, so that the factor is 1
    # how the names of adapted linear or convolution layers end, in whole parts between dots, e.g. conv1
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0  # probability on the input of A

    def __post_init__(self):
        if self.rank < 1:
            raise UserError("model.adapter.rank", f"{self.rank} is less than 1", "4 to 16 is usual")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError("model.adapter.alpha", f"{self.alpha} is not positive", "null takes the rank")
        if not self.targets:
            raise UserError("model.adapter.targets", "names no layer", "model.adapter=null switches the adapter off")
        if not 0 <= self.dropout < 1:
            raise UserError(
                "model.adapter.dropout", f"{self.dropout} is not a probability below 1", "choose 0 <= dropout < 1"
            )


def apply(model: nn.Module, adapter: AdapterConfig | None, trainable: list[str] | None) -> nn.Module:
    """Adds the adapter and freezes what is not trained, in place. Initial weights come from torch's global generator.

    Args:
        adapter: None trains the network's own parameters.
        trainable: shell-style patterns over the names of the network's own parameters, in upper and lower case as written.
            None: all of them, or none where there is an adapter, which is always trained.

    Returns:
        ``model``; adapted layers are PEFT's, so their own weight is now called ``<layer>.base_layer.weight``.

    Raises:
        UserError: a target or pattern fits nothing, or a target is neither linear nor a convolution.
    """
    if adapter is None and trainable is None:
        return model
    own = _matching(model, trainable or [])  # looked up before PEFT renames
    model.requires_grad_(False)
    if adapter is not None:
        _inject(model, adapter)
    for parameter in own:
        parameter.requires_grad_(True)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy without PEFT: W + (alpha / rank) B A under the original names, in the class that the model had.

    A model without an adapter is returned itself.
    """
    if not _adapted(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            copied.set_submodule(name, layer.get_base_layer())
    del copied.peft_config
    return copied


def save(folder: Path, model: nn.Module) -> bool:
    """Writes the adapter alone, so that ``peft.PeftModel.from_pretrained(base_model, folder)`` adds it to the same base.

    Returns:
        Whether it was written: not where there is none, nor where other parameters were trained beside it, since the adapter
        without them would be another model.
    """
    if not _adapted(model):
        return False
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    if len(weights) != sum(parameter.requires_grad for parameter in model.parameters()):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[NAME].save_pretrained(folder)
    prefixed = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return True


def _adapted(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def _matching(model: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    named, found = dict(model.named_parameters()), {}
    for pattern in patterns:
        names = [name for name in named if fnmatchcase(name, pattern)]
        if not names:
            raise UserError("model.trainable", f"{pattern!r} fits no parameter", _some(pattern.strip("*"), named))
        found.update({name: named[name] for name in names})
    return list(found.values())


def _inject(model: nn.Module, adapter: AdapterConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layers = dict(model.named_modules())
    adaptable = {_ending(name) for name, layer in layers.items() if isinstance(layer, ADAPTABLE)}
    for target in adapter.targets:
        kinds = [type(layer) for name, layer in layers.items() if name == target or name.endswith(f".{target}")]
        problem = None
        if not kinds:
            problem = f"{target!r} fits no layer of {type(model).__name__}"
        elif not all(issubclass(kind, ADAPTABLE) for kind in kinds):
            problem = f"{target!r} is not a linear layer or convolution but {kinds[0].__name__}"
        if problem:
            raise UserError("model.adapter.targets", problem, _some(target, adaptable))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        target_modules=adapter.targets,
        lora_dropout=adapter.dropout,
    )
    inject_adapter_in_model(config, model, adapter_name=NAME)


def _ending(name: str) -> str:
    """What to give as target: the last part of a layer's name, with the part before a number, as in ``to_out.0``."""
    return re.search(r"[^.]*(\.\d+)*$", name)[0]


def _some(wanted: str, names: Iterable[str]) -> str:
    """A remedy that lists real names, the nearest first."""
    return "there are for example " + ", ".join(difflib.get_close_matches(wanted, sorted(names), n=5, cutoff=0))
