"""What a defense is: a class that fills some of six seams. Everything else in the trainer is the same with and without it.

A new defense is one file here with a config dataclass and a subclass of `Defense`, and one field in `registry.py`.
The training loop never names a defense.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from defenses.seeding import RecordRandom
from defenses.textmodel import TextModel


@dataclass(frozen=True)
class Pool:
    """The training split as a defense sees it before training (seam 1).

    Attributes:
        images: uint8 [N, C, H, W], indexable by row; may be a memory map, read it in blocks.
        rows: rows of ``images`` that are still kept in the training split, ascending.
        pixel_hash: digest of each row's decoded pixels at their original size (equal = exact copy), length N.
        group: group (patient) of each row or None, length N.
        record_id: stable name of each row's record, length N.
        seed: ``run.seed``, for choices that a defense draws.
        picture: number of the picture that each row shows, length N; copies share it, before any defense.
        caption: text of each row as it is trained on, or None, length N.
        more_captions: further captions of each row, length N; empty where there are none.
    """

    images: np.ndarray
    rows: np.ndarray
    pixel_hash: Sequence[str]
    group: Sequence[str | None]
    record_id: Sequence[str] = ()
    seed: int = 0
    picture: Sequence[int] = ()
    caption: Sequence[str | None] = ()
    more_captions: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class RunContext:
    """What a defense may know of the run, given to `Defense.begin` on every rank before the first step.

    Attributes:
        pool: the training records that are left after all defenses have selected.
        control: rows of the calibration split in ``pool.images``, int64; empty where there is none.
        steps, batch_size, accumulation, precision, seed, checkpoint_every: of the configuration.
        nonprivate_metrics: whether the user wants losses and held-out metrics even where a defense is `private`.
        folder: run directory, for records of the defense's own.
        accelerator: Accelerate's `Accelerator`: rank, device, collectives.
        planted: rows of the canaries that are trained on beside the pool's, int64, ascending; each is a record of its own, and
            those of one ``pool.group`` are a group.
        left_out: canaries, of one record each, that a coin kept out of training. Nothing about the run may depend on how many.
        timesteps: length of the noise schedule.
        quiet: whether what is measured on the records must not be kept, as in a private run; true unless the trainer says
            otherwise.
        flow: whether the model is a rectified flow instead of diffusion on a schedule of betas.
    """

    pool: Pool
    control: np.ndarray
    steps: int
    batch_size: int
    accumulation: int
    precision: str
    seed: int
    checkpoint_every: int
    nonprivate_metrics: bool
    folder: Path
    accelerator: Any
    planted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    left_out: int = 0
    timesteps: int = 1000
    quiet: bool = True
    flow: bool = False


@dataclass(frozen=True)
class Removal:
    """One record taken out of training, as written to the manifest."""

    row: int
    reason: str
    duplicate_of: int | None = None  # row of the record kept in its place
    distance: float | None = None  # to that record, as the defense measures it


class BatchPlan(Protocol):
    """Which records form the global batch of a step: a pure function of the step, the same on every rank.

    Attributes:
        seed: of the random numbers of every record: augmentation, timesteps, noise of the forward process.
        images_per_step: distinct records in a batch, or what may be told of it where that is private.
    """

    seed: int
    images_per_step: float

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch, int64 [b]; b may vary and may be 0 (Poisson sampling). A row that occurs several times
        is changed and noised independently each time."""
        ...

    def microbatches(self, rows: np.ndarray, rank: int, world_size: int) -> list[np.ndarray]:
        """Places in ``rows`` of each micro-batch of one rank; over all ranks every place once. Keeps together what must be."""
        ...


@dataclass
class Batch:
    """One rank's part of a step, or a micro-batch of it.

    Attributes:
        images: float32 [B, C, H, W] in [-1, 1].
        rows: row of each record in the data set, int64 [B].
        labels: int64 [B] class indices, or None for unconditional models.
        random: this batch's random numbers, one stream per record and purpose.
        timesteps: int64 [B], drawn after the batch seam.
        noise: float32 [B, C, H, W], drawn after the batch seam; of the latents' shape where there are latents.
        captions: text of each record, length B; None for models without text. The batch seam may replace them.
        more_captions: further captions of each record, length B, of which a defense may choose; None as ``captions``.
        text_noise: standard deviation of the Gaussian noise that the objective adds to each record's text embedding, in units
            of the embedding's own standard deviation, float32 [B]; None: none. Set at the batch seam.
        moments: mean and log variance of the latents of the *unchanged* images, float32 [B, 2c, h, w], where they are cached.
        latents: scaled latents, float32 [B, c, h, w], drawn after the batch seam.
        tokens: int64 [B, encoders, length], where text encoders are trained.
        text, pooled, time_ids: what the network is conditioned on: float32 [B, length, width], [B, width], [B, 6].
        told: what the objective tells seam 3 beside the loss, each [B], by the names of `Defense.wants`; written by the loss.
    """

    images: torch.Tensor
    rows: np.ndarray
    labels: torch.Tensor | None
    random: RecordRandom
    timesteps: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    captions: list[str] | None = None
    more_captions: list[list[str]] | None = None
    text_noise: torch.Tensor | None = None
    moments: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    text: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    told: dict[str, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> "Batch":
        """Some of the records, with their own random streams."""
        cut = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "told"}
        return Batch(**{name: None if value is None else value[part] for name, value in cut.items()})

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in moved.items()})


class Microbatches:
    """A rank's part of a step: micro-batches that are built when they are reached, so that a large batch need not fit in memory."""

    def __init__(self, builders: Sequence[Callable[[], Batch]]):
        self._builders = builders

    def __len__(self) -> int:
        return len(self._builders)

    def __iter__(self) -> Iterator[Batch]:
        return (build() for build in self._builders)


LossFunction = Callable[[nn.Module, Batch], torch.Tensor]  # per-example losses, float32 [B]


class GradientRule(Protocol):
    """Turns per-example losses into ``p.grad`` (seam 4). At most one defense brings one; otherwise it is the mean.

    The rule owns the gradient whole, and the precision of the arithmetic: nothing clips or scales it afterwards. The global
    generator of torch is seeded from ``run.seed`` before every call (dropout): noise that protects must come from a generator
    of the rule's own.

    ``prepares_model`` says whether the trainer lets Accelerate wrap the model (DDP averages raw gradients, which a rule
    that clips must not have).
    """

    prepares_model: bool

    def check(self, model: nn.Module, loss: LossFunction, example: Batch) -> None:
        """Once before the first step, and in the dry run: may refuse a model that the rule cannot treat.

        Args:
            example: random images of the right shape, not records.

        Raises:
            UserError: the rule does not work on this model.
        """
        ...

    def memory(self, trained: int) -> int:
        """Bytes that the rule needs beside weights, optimizer and activations, for ``trained`` trained numbers."""
        ...

    def backward(
        self, model: nn.Module, loss: LossFunction, microbatches: Microbatches, step: int, accelerator: Any
    ) -> torch.Tensor:
        """Writes the gradient of the global batch into ``p.grad`` of every trainable parameter, equal on all ranks.

        Args:
            microbatches: this rank's records; may be empty.
            step: optimizer steps done before this one.

        Returns:
            This rank's per-example losses, detached, float32 [b], for the log.
        """
        ...


@dataclass(frozen=True)
class CheckpointView:
    """What a defense may look at after a checkpoint (seam 5), on all ranks.

    Attributes:
        step: optimizer steps done.
        sample: images from the EMA weights of this step by sample index, float32 [len, C, H, W] in [0, 1]; all ranks call it
            together. Indices from `FIRST_PRIVATE_INDEX` on are never among the images that the evaluation attacks.
        pool: the training records; ``control`` the rows of the calibration split in ``pool.images``.
        images_seen: training images that the model has seen by then, repeats counted; None: not known.
    """

    step: int
    sample: Callable[[Sequence[int]], torch.Tensor]
    pool: Pool
    control: np.ndarray
    images_seen: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Answer of seam 5: end training now, or name the checkpoint (its step) that is to be released."""

    stop: bool = False
    release_step: int | None = None


# (sample indices, classes or prompts or None) -> float32 [n, C, H, W] in [0, 1]; an image that is NaN was withheld. Where there
# is a `TextModel`, a prompt may be a `defenses.textmodel.TextCondition`.
Sampler = Callable[..., torch.Tensor]
FIRST_PRIVATE_INDEX = 2**40  # sample indices that defenses draw for themselves begin here


@dataclass(frozen=True)
class SamplingContext:
    """What a defense may use when it wraps the sampling of the saved model (seam 6), on all ranks.

    Attributes:
        pool: the training split; ``rows`` are all its records, those that a defense removed among them.
        control: rows of the calibration split in ``pool.images``, int64.
        folder: the saved pipeline's; what a user of the defended model needs is kept in a sub-folder of it.
        accelerator: Accelerate's `Accelerator`.
        records: folder of this evaluation, for records of the defense's own that must survive a stop; null: ``folder``.
        text_model: the model behind the sampler; None where it takes no prompts.
    """

    pool: Pool
    control: np.ndarray
    folder: Path
    accelerator: Any
    records: Path | None = None
    text_model: TextModel | None = None


class Defense(ABC):
    """Six seams, all of which do nothing unless a subclass fills them. ``name`` is the key in ``defenses``.

    ``private``: what is measured on the records of a run with this defense (losses, realised batch sizes, label frequencies,
    held-out losses) is neither logged nor saved nor used, unless ``report.nonprivate_metrics`` is true.

    ``after_training``: seams 5 and 6 alone are filled, so that a finished run can be given this defense later, without training
    again (``eval/run.py run_dir=… defenses.NAME={}``).

    ``remembers``: what it does to one record depends on records seen before or beside it. Refused in a private run, whose
    guarantee cannot cover it.

    ``needs_captions``: it works on captions, or on what they do to the prediction. Refused with a model that has no text.

    ``needs_calibration``: seam 6 looks at calibration pictures. Refused with a model of others, of which there are none.

    ``wants``: names of what the objective is to write into ``batch.told`` beside the loss, for seam 3: ``text_magnitude``, the
    l2 norm over all latent dimensions of the difference that the caption makes to the predicted noise, float32 [B].
    """

    name: str
    private = False
    after_training = False
    remembers = False
    needs_captions = False
    needs_calibration = False
    wants: tuple[str, ...] = ()

    def select(self, pool: Pool) -> list[Removal]:
        """Seam 1a: records to take out of training."""
        return []

    def rewrite(self, captions: list[str]) -> list[str]:
        """Seam 1c: the captions of all training records, once, before anything is made of them (vocabulary, embeddings, previews);
        must treat each by itself. Evaluation knows the original ones."""
        return captions

    def begin(self, context: RunContext) -> None:
        """Before the first step, on every rank: what depends on the whole run. May refuse it with a `UserError`."""
        return None

    def last_step(self, steps: int) -> int:
        """Step at which training ends, asked after a resume; fewer than ``steps`` where a budget is partly spent."""
        return steps

    def plan(self, rows: np.ndarray, batch_size: int, seed: int) -> BatchPlan | None:
        """Seam 1b: how batches are drawn; None leaves it to the trainer (shuffled epochs).

        A plan of its own needs a gradient rule of its own: the ordinary mean expects full batches.
        """
        return None

    def change_batch(self, batch: Batch) -> Batch:
        """Seam 2: the images and conditions that the model is trained on; must keep examples independent of each other."""
        return batch

    def change_loss(self, losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Seam 3: the per-example losses, float32 [B]; must keep examples independent of each other unless it `remembers`.
        ``batch.told`` has what the defense `wants`."""
        return losses

    def gradient_rule(self) -> GradientRule | None:
        """Seam 4: how per-example losses become a gradient."""
        return None

    def end_step(self) -> None:
        """After every optimizer step, on all ranks together: what seam 3 has gathered over the step's micro-batches can be
        joined here. Called before a checkpoint is saved."""
        return None

    def after_checkpoint(self, checkpoint: CheckpointView) -> Verdict | None:
        """Seam 5: stop, or choose the checkpoint to release."""
        return None

    def wrap_sampler(self, sampler: Sampler, context: SamplingContext) -> Sampler:
        """Seam 6: sampling of the saved model."""
        return sampler

    def outlook(self) -> list[str]:
        """Lines of the dry run, after `begin`."""
        return [f"defense {self.name}: {self.claim()}"]

    @abstractmethod
    def claim(self) -> dict[str, Any]:
        """What is promised, as in report.json: ``{"kind": "heuristic", "statement": ...}`` or ``{"kind": "dp", ...}``."""

    def findings(self) -> dict[str, Any] | None:
        """What the defense measured while it worked, for report.json (JSON values); None: nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a stop: JSON values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        return None
