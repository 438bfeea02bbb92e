"""Images from what fine-tuning changed: the step from a base model to the fine-tuned one, taken further (Wu et al. 2025).

Fine-tuning moves the model's distribution p_base towards q, the distribution of the fine-tuning pictures: p_tuned is about
p_base^(1 - 1/w) q^(1/w). Then the noise that a model of q would predict is eps_base + w (eps_tuned - eps_base).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from tqdm import tqdm

from defenses.errors import UserError
from defenses.ranks import together
from defenses.seeding import derive, generator
from eval.denoiser import Condition, Denoiser, load
from eval.generations import file_of, save
from eval.repaint import timesteps_of
from train.sampling import blocks

KEY = "attack.finetuning.base"
_OTHER = "give the model that this one was fine-tuned from"
_ROUNDING = 2**-8  # relative; weights that were once stored in half precision


@dataclass
class Pair:
    """A fine-tuned model and the one that it was fine-tuned from, with one space and one schedule.

    Attributes:
        shape: of x_0, without the batch.
    """

    tuned: Denoiser
    base: Denoiser
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Guidance:
    """How both models are combined.

    Attributes:
        weight: w; 1 is the fine-tuned model alone, 0 the base.
        correction: k, of a further term k eps_base (Wu et al. 2025, correction term); no part of the fine-tuned model alone.
        scale: of classifier-free guidance where the weight is 1 (Ho and Salimans 2021), eps = eps(empty) + scale (eps(caption) -
            eps(empty)); 1: none. With captions only.
        base_caption: what the base is told beside the caption of the fine-tuned model: "empty", the paper's guidance, which is
            classifier-free at once, or "same".
    """

    weight: float
    correction: float = 0.0
    scale: float = 1.0
    base_caption: str = "empty"


@dataclass
class _Told:
    """Conditions of one batch; ``null`` None where there is no classifier-free guidance."""

    tuned: Condition
    base: Condition
    null: Condition | None


def load_base(tuned: Denoiser, tuned_folder: Path, base_folder: Path, image_shape: tuple[int, int, int]) -> Pair:
    """Loads the base beside the fine-tuned model.

    Args:
        image_shape: (C, H, W) of the data.

    Raises:
        UserError: it cannot be loaded, or does not fit.
    """
    try:
        # a base is asked at the size of the fine-tuned model, which may have been trained at another than its own
        base = load(base_folder, image_shape, tuned.device, tuned.shape[-1] if tuned.latent else None)
    except UserError as error:
        raise UserError(KEY, error.problem, _OTHER) from error
    if tuned.latent and base.latent:
        _refuse_other_autoencoder(tuned_folder, base_folder)
    return pair_of(tuned, base, image_shape)


def pair_of(tuned: Denoiser, base: Denoiser, image_shape: tuple[int, int, int]) -> Pair:
    """The two as a pair.

    Raises:
        UserError: the one cannot have been fine-tuned from the other, or nothing was.
    """
    blank = np.zeros((1, *image_shape), np.uint8)
    shapes = [tuple(each.encode(blank).shape[1:]) for each in (tuned, base)]
    facts = {
        "is conditioned on": [each.kind for each in (tuned, base)],
        "works in": ["latents" if each.latent else "pixels" for each in (tuned, base)],
        "has x_0 of": shapes,
        "predicts": [each.prediction for each in (tuned, base)],
        "has a condition of": [_width(each.network) for each in (tuned, base)],
        "has timesteps": [each.timesteps for each in (tuned, base)],
    }
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise UserError(KEY, f"{what} {theirs}, the fine-tuned model {ours}", _OTHER)
    if not torch.allclose(tuned.alphas_cumprod, base.alphas_cumprod, rtol=1e-4, atol=1e-7):
        raise UserError(KEY, "has another noise schedule than the fine-tuned model", _OTHER)
    pair = Pair(tuned, base, shapes[0])
    _refuse_equal(pair)
    return pair


def _width(network: torch.nn.Module) -> Any:
    """Width of the text embedding, or number of classes; None where there is neither."""
    config = getattr(network, "config", {})
    names = ("cross_attention_dim", "joint_attention_dim", "num_class_embeds")
    return next((config[name] for name in names if config.get(name)), None)


def _refuse_other_autoencoder(tuned_folder: Path, base_folder: Path) -> None:
    """Latents of another autoencoder are another space: a difference of predictions means nothing there."""
    try:
        ours, theirs = (
            AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, local_files_only=True)
            for folder in (tuned_folder, base_folder)
        )
    except (OSError, ValueError) as error:
        raise UserError(KEY, str(error).splitlines()[0][:300], _OTHER) from error
    for name in ("scaling_factor", "shift_factor"):
        if ours.config.get(name) != theirs.config.get(name):
            raise UserError(
                KEY, f"has {name} {theirs.config.get(name)}, the fine-tuned model {ours.config.get(name)}", _OTHER
            )
    left, right = ours.state_dict(), theirs.state_dict()
    same = left.keys() == right.keys() and all(
        left[name].shape == right[name].shape
        and torch.allclose(left[name].float(), right[name].float(), rtol=_ROUNDING, atol=1e-6)
        for name in left
    )
    if not same:
        raise UserError(KEY, "has another autoencoder than the fine-tuned model", _OTHER)


@torch.no_grad()
def _refuse_equal(pair: Pair) -> None:
    device = pair.tuned.device
    x = torch.randn((1, *pair.shape), generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([pair.tuned.timestep(0.5)], device=device)
    value = {"caption": "a picture", "class": 0, "none": None}[pair.tuned.kind]
    ours, theirs = (each.predict_clean(x, t, each.condition([value])) for each in (pair.tuned, pair.base))
    if torch.equal(ours, theirs):
        raise UserError(KEY, "predicts the same as the fine-tuned model: nothing was fine-tuned", _OTHER)


def clean_of(pair: Pair, x: torch.Tensor, t: torch.Tensor, guidance: Guidance, told: _Told) -> torch.Tensor:
    """x_0 in x_t = ``x`` [B, ...] as the combined prediction has it.

    eps = eps_base + w (eps_tuned - eps_base) + k eps_base, in terms of x_0: without k its weights sum up to 1, so the same
    combination holds for x_0 and there is no division by sqrt(a_t), which some schedules let end at 0.
    """
    tuned = pair.tuned.predict_clean(x, t, told.tuned)
    if guidance.weight == 1:
        if told.null is None:
            return tuned
        null = pair.tuned.predict_clean(x, t, told.null)
        return null + guidance.scale * (tuned - null)
    base = pair.base.predict_clean(x, t, told.base)
    clean = base + guidance.weight * (tuned - base)
    if guidance.correction:
        signal, _ = pair.base.rates(t, x)
        clean = clean - guidance.correction * (x - signal * base) / signal  # spread * eps_base = x - signal * base
    return clean


@torch.no_grad()
def sample(
    pair: Pair, guidance: Guidance, conditions: Sequence[Any], indices: Sequence[int], *, steps: int, seed: int
) -> torch.Tensor:
    """x_0 by DDIM with eta = 0 (Song et al. 2021, equation 12), float32 [n, *pair.shape]; of a flow that is Euler's method.

    Pixels are clipped to [-1, 1] at every step, and the noise follows the clipped x_0: an extrapolated prediction leaves the
    range often. Latents are not clipped.

    Args:
        conditions: class index, caption or None of each image.
        indices: sample index of each; the start noise is a function of (seed, caption, index), whatever the weight.
        steps: of the sampler, the timesteps evenly spread up to the last.
    """
    device, tuned = pair.tuned.device, pair.tuned
    start = [
        torch.randn(pair.shape, generator=generator(seed, "attack/finetuning", derive(0, str(condition)), int(index)))
        for condition, index in zip(conditions, indices, strict=True)
    ]
    x, told = torch.stack(start).to(device), _told(pair, guidance, conditions)
    timesteps = timesteps_of(tuned.timesteps, steps)
    signals, spreads = tuned.shares(timesteps)
    for level in range(steps, 0, -1):
        t = torch.full((len(x),), int(timesteps[level - 1]), dtype=torch.int64, device=device)
        clean = clean_of(pair, x, t, guidance, told)
        if not tuned.latent:
            clean = clean.clamp(-1, 1)
        noise = (x - signals[level] * clean) / spreads[level]
        x = signals[level - 1] * clean + spreads[level - 1] * noise
    return x


def _told(pair: Pair, guidance: Guidance, conditions: Sequence[Any]) -> _Told:
    captions, count = pair.tuned.kind == "caption", len(conditions)
    empty = captions and guidance.base_caption == "empty"
    base = pair.base.null(count) if empty else pair.base.condition(conditions)
    null = pair.tuned.null(count) if captions and guidance.scale != 1 and guidance.weight == 1 else None
    return _Told(pair.tuned.condition(conditions), base, null)


def draw(
    pair: Pair,
    guidance: Guidance,
    prompts: Sequence[str],
    folder: Path,
    accelerator: Accelerator,
    *,
    count: int,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[str]:
    """Writes ``count`` images of each prompt (none: of the model itself, classes in turn) as PNG; what is there is not drawn again.

    Blocks of ``batch_size`` are whole forward passes and the same for any number of processes, which share them.

    Returns:
        Names of all images below ``folder``.

    Raises:
        UserError: the images are no numbers.
    """
    groups = list(prompts) or [None]
    work = [(number, block) for number in range(len(groups)) for block in blocks(count, batch_size, 0, 1)]
    mine = work[accelerator.process_index :: accelerator.num_processes]
    classes = getattr(pair.tuned.network, "config", {}).get("num_class_embeds") if pair.tuned.kind == "class" else None

    def files_of(number: int, block: range) -> list[Path]:
        return [file_of(folder, number if prompts else None, index) for index in block]

    def some() -> None:
        name = f"fine-tuning, w = {guidance.weight:g}"
        for number, block in tqdm(mine, desc=name, unit="batch", disable=not accelerator.is_main_process):
            files = files_of(number, block)
            if all(file.exists() for file in files):
                continue
            conditions = [index % classes if classes else groups[number] for index in block]
            images = pair.tuned.decode(sample(pair, guidance, conditions, list(block), steps=steps, seed=seed)).cpu()
            if not torch.isfinite(images).all():
                problem = f"images at weight {guidance.weight:g} are no numbers"
                raise UserError("attack.finetuning.weights", problem, "take smaller ones, or set the attack to null")
            for file, image in zip(files, images, strict=True):
                save(file, image)

    together(accelerator, some)
    accelerator.wait_for_everyone()
    return [str(file.relative_to(folder)) for number, block in work for file in files_of(number, block)]
