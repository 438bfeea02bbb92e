"""Prompt perturbation as a defense at seam 6: the sampler is told a changed embedding where a prompt pulls too hard.

The method is in `defenses.perturbation`, which also serves any pipeline of diffusers without this trainer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defenses.base import Defense, RunContext, Sampler, SamplingContext
from defenses.blocklog import BlockLog
from defenses.errors import UserError
from defenses.perturbation import LEARNING_RATE, STEPS, Perturbed, perturb
from defenses.seeding import derive
from defenses.textmodel import TextCondition, TextModel

FOLDER = "prompt_perturbation"  # of the log, in the folder of the evaluation


@dataclass(kw_only=True)
class PromptPerturbationConfig:
    """Settings of `PromptPerturbation`."""

    # magnitude (l2 norm of what the prompt adds to the predicted noise) that is let through. It depends on the model and the
    # size of the latents: take what ordinary prompts have (attack/prompt_scores.csv); 3 is that of Wen et al. for SD 1.4
    target: float = 3.0
    steps: int = STEPS  # updates of an embedding at most
    learning_rate: float = LEARNING_RATE  # of AdamW, in the embedding's own units
    batch_size: int = 8  # images whose embeddings are optimised in one pass, with gradients

    def __post_init__(self) -> None:
        for key, low, high in (("target", 0.0, 1e6), ("learning_rate", 0.0, 10.0)):
            if not low < getattr(self, key) <= high:
                raise UserError(
                    f"defenses.{FOLDER}.{key}",
                    f"{getattr(self, key)} is out of range",
                    f"above {low:g}, up to {high:g}",
                )
        for key, most in (("steps", 1000), ("batch_size", 10_000)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"defenses.{FOLDER}.{key}", f"{getattr(self, key)} is not in 1..{most}", "lower it")


class PromptPerturbation(Defense):
    """Stands between the prompts and the saved model; see `defenses.perturbation` for the method."""

    name = FOLDER
    after_training = True
    needs_captions = True

    def __init__(self, config: PromptPerturbationConfig):
        self.config = config
        self._log: _Log | None = None

    def begin(self, context: RunContext) -> None:
        """Refuses a flow before it is trained.

        Raises:
            UserError: the model is one.
        """
        if context.flow:
            raise self._not_for_flows()

    def _not_for_flows(self) -> UserError:
        problem = (
            "a flow begins where its predicted noise does not depend on the prompt: there is no magnitude to lower"
        )
        return UserError(f"defenses.{self.name}", problem, "switch it off")

    def wrap_sampler(self, sampler: Sampler, context: SamplingContext) -> Sampler:
        """The sampler that is told a `TextCondition` in place of every prompt whose magnitude is above the target.

        It is a function of (seed, prompt, sample index), as the start noise of the image is. Prompts below the target go
        through as they are.

        Raises:
            UserError: the model takes no prompts, or is a flow.
        """
        model = context.text_model
        if model is None:
            raise UserError(f"defenses.{self.name}", "needs a text-to-image model", "switch it off")
        if model.first_timestep is None:
            raise self._not_for_flows()
        records = (context.folder if context.records is None else context.records) / FOLDER
        log = self._log = _Log(records, context.accelerator.process_index)

        def perturbing(indices: Sequence[int], conditions: Sequence[str | TextCondition]) -> torch.Tensor:
            changed: list[str | TextCondition] = []
            for start in range(0, len(indices), self.config.batch_size):
                part = slice(start, start + self.config.batch_size)
                changed += self._changed(model, log, list(indices[part]), list(conditions[part]))
            return sampler(indices, changed)

        return perturbing

    def _changed(
        self, model: TextModel, log: "_Log", indices: list[int], conditions: list[str | TextCondition]
    ) -> list[str | TextCondition]:
        """What the sampler is told in place of the conditions of some images."""
        began = time.perf_counter()
        prompts = [each.prompt if isinstance(each, TextCondition) else each for each in conditions]
        text, pooled = _embeddings(model, conditions, prompts)
        null, null_pooled = model.null()
        found = perturb(
            model.predict, text, null, model.start(prompts, indices), model.first_timestep,
            target=self.config.target, steps=self.config.steps, learning_rate=self.config.learning_rate,
            pooled=pooled, null_pooled=null_pooled,
        )  # fmt: skip
        log.add(indices, prompts, found, time.perf_counter() - began)
        return [
            TextCondition(prompts[row], found.text[row], None if pooled is None else pooled[row])
            if updates
            else conditions[row]
            for row, updates in enumerate(found.updates.tolist())
        ]

    def claim(self) -> dict[str, Any]:
        """Heuristic: what is changed, and who is not held up by it."""
        return {
            "kind": "heuristic",
            "protects": "outputs",
            "uses_attack_score": False,  # the attack on these images is a measurement
            "statement": "Changes what the model is told where a prompt pulls the first step of sampling harder than the "
            "target, which memorised prompts do (Wen et al. 2024). Protects the images that are drawn in this way, not the "
            "weights: whoever holds the model can sample without it, and what comes at a later step or from a prompt below "
            "the target is not touched. Images may fit their prompts less well. No guarantee.",
            "target": self.config.target,
            "steps": self.config.steps,
        }

    def findings(self) -> dict[str, Any] | None:
        """What happened to all generations so far, over all ranks and stops; None before sampling.

        ``generations``; ``perturbed``: share of them whose embedding was changed; ``reached``: share at most at the target in
        the end; ``magnitude_before_mean``, ``magnitude_after_mean``; ``updates_mean`` of those changed; ``seconds_per_image``.
        """
        return None if self._log is None else self._log.findings(self.config.target)


def _embeddings(
    model: TextModel, conditions: Sequence[str | TextCondition], prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text [B, L, D] and pooled [B, P] of prompts, and of what other defenses have made of them already."""
    distinct = list(dict.fromkeys(prompts))  # the images of a prompt come together
    place = [distinct.index(prompt) for prompt in prompts]
    text, pooled = (each if each is None else each[place] for each in model.encode(distinct))
    for row, each in enumerate(conditions):
        if isinstance(each, TextCondition):
            text[row] = each.text
            if pooled is not None:
                pooled[row] = each.pooled
    return text, pooled


class _Log:
    """Magnitudes of every image, a line per block (`defenses.blocklog`); a prompt is stored as a hash."""

    def __init__(self, folder: Path, rank: int):
        self._log = BlockLog(folder, "images", rank)

    def add(self, indices: Sequence[int], prompts: Sequence[str], found: Perturbed, seconds: float) -> None:
        columns = [found.before.tolist(), found.after.tolist(), found.updates.tolist()]
        keys = [derive(0, prompt) for prompt in prompts]
        self._log.add({"images": list(zip(map(int, indices), keys, *columns, strict=True)), "seconds": seconds})

    def findings(self, target: float) -> dict[str, Any] | None:
        """Part of `PromptPerturbation.findings`."""
        images = {
            (index, key): (before, after, updates, line["seconds"] / len(line["images"]))
            for line in self._log.lines()
            for index, key, before, after, updates in line["images"]
        }
        if not images:
            return None
        before, after, updates, seconds = torch.tensor(list(images.values()), dtype=torch.float64).T
        changed = updates > 0
        return {
            "generations": len(images),
            "perturbed": float(changed.double().mean()),
            "reached": float((after <= target).double().mean()),
            "magnitude_before_mean": float(before.mean()),
            "magnitude_after_mean": float(after.mean()),
            "updates_mean": float(updates[changed].mean()) if changed.any() else None,
            "seconds_per_image": float(seconds.mean()),
        }
