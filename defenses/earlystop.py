"""Early stopping on memorisation (seam 5): training ends once generations copy training pictures, and the checkpoint before
that is released.

Bonnaire et al. (2025, "Why diffusion models don't memorize") find two times in training: good samples come at one that does
not depend on the size of the training set, copies of it at one that grows with it. Between them lies a window.

**What is a copy.** A generation with an adaptive score of at most 1 (Carlini et al. 2023, section 5.1) against distinct training
pictures. The share with d(NN1) < d(NN2) / 3 (Gu et al. 2023) is kept beside it and decides nothing: over the same neighbours,
n >= 2, it implies a score below 1, since the mean of the n nearest is then more than (1 + 3 (n - 1)) / n >= 2 times the nearest.
All distances are l2 over the fixed views of `defenses.neighbours`, as in the attack, so that mirroring the data hides nothing.

**What is chance.** All training pictures are looked at: a few that are repeated often are memorised first, and a draw would
miss them. The calibration pictures, fewer and never trained on, tell how often the same generations pass by chance. Score and
ratio compare the neighbours of one generation with each other; the distance to the k-th of N pictures grows like (k / N)^(1/D)
in a neighbourhood of dimension D, so N cancels to first order and the shares can be compared, with n the same on both sides.
What is compared picture for picture (nearest distance, which side is nearer) uses m of either side, one record of each, whole
groups drawn once from the seed: near copies and visits of one patient give no side more chances. The share that is nearer to training
is 0.5 without memorisation on average over that draw; samples that resemble each other can have one nearest picture in common.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from defenses.base import FIRST_PRIVATE_INDEX, CheckpointView, Defense, Pool, RunContext, Verdict
from defenses.errors import UserError
from defenses.neighbours import adaptive_score, search_sharded
from defenses.references import Rows, shuffled
from defenses.seeding import derive

ALPHA, NEIGHBOURS = 0.5, 50  # of the adaptive score: the paper's; fewer neighbours where the control has fewer pictures


@dataclass(kw_only=True)
class EarlyStopConfig:
    """Settings of `EarlyStop`."""

    images: int = 256  # generations looked at per checkpoint
    # share of generations that may copy beyond chance, in [0, 1). None among 256 is compatible with a true share of up to 1.2 %
    # (95 %): a lower limit would let single chance hits decide, a higher one would wait for what the batch already shows
    tolerance: float = 0.01
    patience: int = 1  # checkpoints in a row above the tolerance that end training

    def __post_init__(self) -> None:
        for key in ("images", "patience"):
            if getattr(self, key) < 1:
                raise UserError(f"defenses.early_stop.{key}", f"{getattr(self, key)} is less than 1", "at least 1")
        if not 0 <= self.tolerance < 1:
            raise UserError("defenses.early_stop.tolerance", f"{self.tolerance} is no share in [0, 1)", "e.g. 0.01")


@dataclass(frozen=True)
class Choice:
    """What a curve says so far.

    Attributes:
        released_step: the last checkpoint within the tolerance before the onset; the first one where there is none.
        onset_step: the first of the checkpoints in a row that ended training; None: not seen.
        clean: whether the released checkpoint is within the tolerance.
    """

    released_step: int
    onset_step: int | None
    clean: bool


def choose(curve: list[dict[str, Any]], tolerance: float, patience: int) -> Choice:
    """The decision, a pure function of the curve (at least one point): what comes after an onset changes nothing."""
    released, clean, above = curve[0]["step"], False, []
    for point in curve:
        excess = round(point["copies"] - point["copies_control"], 9)  # shares of one batch: no less than 1e-9 apart
        above = [*above, point["step"]] if excess > tolerance else []
        if not above:
            released, clean = point["step"], True
        if len(above) == patience:
            return Choice(released, above[0], clean)
    return Choice(released, None, clean)


class EarlyStop(Defense):
    """Watches a batch of generations at every checkpoint. All that it remembers is the curve.

    The batch has the same start noise every time, and sample indices that the evaluation never attacks: the choice of the
    checkpoint cannot lean on the images that are counted later.
    """

    name = "early_stop"
    after_training = True

    def __init__(self, config: EarlyStopConfig):
        self.config = config
        self._curve: list[dict[str, Any]] = []
        self._training = self._drawn = self._control = np.arange(0)  # rows of the pool

    def begin(self, context: RunContext) -> None:
        """Draws the m pictures of either side.

        Raises:
            UserError: fewer than two pictures on either side, or fewer than two checkpoints to choose from.
        """
        every = context.checkpoint_every
        if every == 0 or every >= context.steps:
            raise UserError(
                "train.checkpoint_every",
                f"{every} leaves one checkpoint in {context.steps} steps, and defenses.early_stop nothing to choose from",
                f"e.g. {max(1, context.steps // 8)}",
            )
        pool, rows = context.pool, {"training": context.pool.rows, "control": context.control}
        m = min(len(set(np.asarray(pool.picture)[side])) for side in rows.values())
        if m < 2:
            raise UserError(
                "data.calibration_fraction",
                f"{len(context.control)} calibration pictures: defenses.early_stop cannot tell copies from chance",
                "give at least two different ones (with a split of your own: in the data), or switch it off",
            )
        self._training = pool.rows
        self._drawn, self._control = (
            _draw(pool, side, m, derive(context.seed, "early_stop", name)) for name, side in rows.items()
        )
        self._accelerator = context.accelerator

    def after_checkpoint(self, checkpoint: CheckpointView) -> Verdict:
        """One more point of the curve, and what follows. On all ranks, with the same answer."""
        images = checkpoint.sample(range(FIRST_PRIVATE_INDEX, FIRST_PRIVATE_INDEX + self.config.images))
        generations = (images * 255).round().to("cpu").numpy().astype(np.uint8)  # [images, C, H, W]
        point: dict[str, Any] = {"step": checkpoint.step}
        if checkpoint.images_seen is not None:
            point["images_seen"] = checkpoint.images_seen
        nearest = {}
        for side, rows in (("", self._training), ("_drawn", self._drawn), ("_control", self._control)):
            distance = self._distances(generations, checkpoint.pool, rows)
            nearest[side] = distance[:, 0]
            point |= {f"{name}{side}": float(values.mean()) for name, values in _measured(distance).items()}
        closer = np.sign(nearest["_control"] - nearest["_drawn"])  # 1: a training picture; 0, a tie, is half of either
        point["share_nearer_training"] = float((closer + 1).mean() / 2)
        self._curve.append(point)
        choice = self._choice()
        return Verdict(stop=choice.onset_step is not None, release_step=choice.released_step)

    def _distances(self, generations: np.ndarray, pool: Pool, rows: np.ndarray) -> np.ndarray:
        """Distances to the nearest distinct pictures among ``rows``, float32 [images, n], ascending."""
        picture = np.asarray(pool.picture)[rows]
        n = min(NEIGHBOURS, len(self._control))
        found = search_sharded(generations, Rows(pool.images, rows), picture, n, accelerator=self._accelerator)
        return found.distinct.distance

    def _choice(self) -> Choice:
        return choose(self._curve, self.config.tolerance, self.config.patience)

    def claim(self) -> dict[str, Any]:
        """Heuristic: what was looked at, on what it rests, what it does not see."""
        statement = (
            f"Training ends, and the checkpoint before is released, once more than {self.config.tolerance:.2%} of "
            f"{self.config.images} images drawn at a checkpoint copy training pictures beyond chance. Rests on the observation "
            "that copies come later the larger the training set is, while good samples come at a time that does not depend on "
            "it (Bonnaire et al. 2025). No guarantee: copies too rare for so few images are missed, and so is what only a "
            "targeted prompt brings out; whether a record was trained on may show long before it is copied (membership); "
            "the released weights were trained on the records."
        )
        if self._curve and not self._choice().clean:
            statement += " No checkpoint without copies was seen: the released one, the first, copies already."
        return {"kind": "heuristic", "statement": statement}

    def findings(self) -> dict[str, Any] | None:
        """The curve and the choice; None before the first checkpoint.

        Each point has ``step``, ``images_seen`` (where known), ``share_nearer_training`` (see the module), and against
        all training pictures, m drawn ones (``_drawn``) and m calibration pictures (``_control``): ``copies`` and ``ratio``,
        shares of the generations in [0, 1], and ``nearest``, mean l2 to the nearest picture.
        """
        if not self._curve:
            return None
        choice, m, config = self._choice(), len(self._control), self.config
        return {
            "curve": list(self._curve),
            "released_step": choice.released_step,
            "onset_step": choice.onset_step,
            "released_is_clean": choice.clean,
            "images": config.images,
            "pictures": m,
            "neighbours": min(NEIGHBOURS, m),
            "rule": f"Memorisation has set in when the share of {config.images} generations whose adaptive score against any of "
            f"the training pictures is at most 1 exceeds the share against {m} calibration pictures by more than "
            f"{config.tolerance:.2%}, at {config.patience} checkpoint{'s in a row' if config.patience > 1 else ''}; released is "
            "the last checkpoint before.",
        }

    def state_dict(self) -> dict[str, Any]:
        return {"curve": list(self._curve)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._curve = list(state["curve"])


def _measured(distance: np.ndarray) -> dict[str, np.ndarray]:
    """Per generation, [images]: whether it is a copy, whether NN1 / NN2 < 1/3, and the distance to the nearest picture."""
    return {
        "copies": adaptive_score(distance, ALPHA, NEIGHBOURS) <= 1,
        "ratio": 3.0 * distance[:, 0] < distance[:, 1],
        "nearest": distance[:, 0].astype(np.float64),
    }


def _draw(pool: Pool, rows: np.ndarray, m: int, seed: int) -> np.ndarray:
    """One row of each of ``m`` distinct pictures among ``rows``, whole groups in random order, the last one cut, int64 [m]."""
    first = rows[np.unique(np.asarray(pool.picture)[rows], return_index=True)[1]]
    groups: dict[Any, int] = {}
    block = [
        groups.setdefault(pool.group[row] or int(row), len(groups)) for row in first
    ]  # no group: a unit of its own
    return np.sort(first[shuffled(np.array(block), np.random.default_rng(seed))[:m]])
