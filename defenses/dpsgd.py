"""DP-SGD (seams 1b and 4): Poisson sampling, per-unit clipping and Gaussian noise, with a ledger and two accountants.

Abadi et al. 2016; for diffusion models Dockhorn et al. 2022 (noise multiplicity) and Ghalebikesabi et al. 2023 (augmentation
multiplicity, public pre-training). Group units follow user-level sampling (Charles et al. 2024, "ULS") or example-level
sampling with capped contribution ("ELS").
"""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from defenses import canaries, dpclaim
from defenses.accounting import noise_for
from defenses.base import BatchPlan, Defense, GradientRule, Pool, Removal, RunContext
from defenses.errors import UserError
from defenses.ledger import Ledger, Mechanism, Segment, history
from defenses.mechanism import EXACT, NoisyClippedSum, shared_secret
from defenses.persample import backend, reference
from defenses.poisson import PoissonPlan
from defenses.ranks import on_main

DEFAULT_EPSILON = 8.0
# Largest error of a backend against one-by-one gradients of the same arithmetic, relative to the unit's whole gradient: twice the
# worst that rounding was seen to do (tests/test_persample.py).
TOLERANCE = {"fp32": EXACT, "bf16": 0.04}


@dataclass(kw_only=True)
class DPSGDConfig:
    """Settings of `DPSGD`. The number of steps is ``train.steps``; it is fixed in advance and all of it is accounted."""

    epsilon: float | None = None  # budget; the noise follows from it. null: 8, or what noise_multiplier gives
    noise_multiplier: float | None = None  # noise std in units of clip_norm; epsilon follows. 0: no noise, NOT PRIVATE
    delta: float = 1e-5  # probability with which the bound may fail; below 1 / units
    clip_norm: float = 1e-3  # largest l2 norm of one unit's gradient; small: the gradients are normalised
    sample_rate: float | None = None  # probability of a unit to be in a step; null: batch_size / units
    batch_size: int | None = None  # expected units (or records) in a step, and the divisor. null: train.batch_size
    units: int | None = None  # public number of units; null: counted, and treated as public
    unit: Literal["record", "group"] = "record"  # what the guarantee protects: one image, or all of one data.group_key
    group_sampling: Literal["groups", "records"] = (
        "groups"  # groups: drawn and clipped whole; records: one by one, capped
    )
    group_cap: int = 4  # images of a group in a step (groups), or in training at all (records)
    multiplicity: int = 1  # K: draws of (augmentation, timestep, noise) averaged inside a record's loss before the clip
    backend: Literal["vmap", "hooks", "loop"] = "vmap"  # how per-unit gradients are computed; the result is the same
    physical_batch: int = 32  # units whose gradients are held at once; changes memory and speed alone
    canaries: int = 0  # units, on average, that are left out by coin, for an audit of the trained run; 0: no audit
    test_seed: int | None = None  # known noise and sampling, for tests: the run is then NOT PRIVATE

    def __post_init__(self):
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise UserError("defenses.dpsgd.noise_multiplier", "is given beside epsilon", "set one of them to null")
        positive = ("epsilon", "clip_norm", "batch_size", "units", "group_cap", "multiplicity", "physical_batch")
        for key in positive:
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"defenses.dpsgd.{key}", f"{value} is not positive", "take a positive number")
        noise = self.noise_multiplier
        if noise is not None and (noise != 0 and not 0.01 <= noise < float("inf")):
            raise UserError("defenses.dpsgd.noise_multiplier", f"{noise} is below 0.01", "1 is usual; 0: none at all")
        if self.canaries < 0:
            raise UserError("defenses.dpsgd.canaries", f"{self.canaries} is negative", "0: no audit")
        if not 0 < self.delta < 1:
            raise UserError("defenses.dpsgd.delta", f"{self.delta} is not in (0, 1)", "1e-5 is usual")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise UserError(
                "defenses.dpsgd.sample_rate", f"{self.sample_rate} is not in (0, 1]", "0.01 to 0.3 is usual"
            )


class DPSGD(Defense):
    """Differentially private training. Everything that the guarantee rests on is in one `Mechanism`."""

    name = "dpsgd"
    private = True

    def __init__(self, config: DPSGDConfig):
        self.config = config
        self._released = 0  # steps that the current weights have seen
        self._canaries: list[canaries.Canary] = []  # known on the main process

    def select(self, pool: Pool) -> list[Removal]:
        """Leaves out the canaries whose coin says so."""
        names = pool.group if self.config.unit == "group" else pool.record_id
        self._canaries = canaries.draw(pool, names, self.config.canaries, self.config.units)
        return [Removal(canary.row, canaries.LEFT_OUT) for canary in self._canaries if not canary.included]

    def begin(self, context: RunContext) -> None:
        """Units, budget, noise; reads the ledger of a run that goes on.

        Raises:
            UserError: no groups, delta too large, a budget that cannot be kept or is spent, or contradicting settings.
        """
        config, self._context = self.config, context
        if context.accumulation != 1:
            raise UserError(
                "train.accumulation",
                "does not apply with dpsgd",
                "set it to 1; defenses.dpsgd.physical_batch cuts batches",
            )
        self._units = self._members(context)
        # canaries that are left out count: else sampling probability and noise would depend on their coins
        left_out = on_main(context.accelerator, lambda: canaries.settle(context.folder, self._canaries))
        self._count += len(left_out) + context.left_out
        if config.units is not None and self._count > config.units:
            raise UserError(
                "defenses.dpsgd.units",
                f"{config.units} is less than the {self._count} found",
                "declare the larger number",
            )
        self.units = config.units or self._count
        if config.delta >= 1 / self.units:
            raise UserError(
                "defenses.dpsgd.delta",
                f"{config.delta:g} is not below 1/{self.units} (one over the number of {config.unit}s): publishing a few at random would pass",
                f"at most {1 / (10 * self.units):.0e}",
            )
        self.sample_rate, self.divisor, self.adjacency = self._sampling(context)
        self._ledger = Ledger(context.folder / "ledger.jsonl")
        self._before: list[Segment] = on_main(context.accelerator, self._ledger.segments)
        self.spent = sum(segment.steps for segment in self._before)
        self.mechanism: Mechanism = on_main(context.accelerator, self._calibrated)
        last = self._before[-1] if self._before else None
        self._segment = 0 if last is None else len(self._before) - (last.mechanism == self.mechanism)
        on_main(
            context.accelerator, lambda: dpclaim.costs(self._plan_of_steps(), config.delta)
        )  # refused now, not later
        self._secret = shared_secret(context.accelerator, config.test_seed)
        self._process = secrets.token_hex(8)  # a name for this start of the run; says nothing about the secret

    def _members(self, context: RunContext) -> list[np.ndarray]:
        """Rows of everything that is drawn and clipped as one."""
        config, pool = self.config, context.pool
        rows = np.sort(np.concatenate([pool.rows, context.planted]))
        self._count = len(rows)
        # of people: canaries are none
        self._largest_group = max(map(len, _groups(pool, pool.rows).values()), default=0)
        groups = _groups(pool, rows)
        if config.unit == "record":
            return [np.array([row]) for row in rows.tolist()]
        without = len(rows) - sum(map(len, groups.values()))
        if without:
            raise UserError(
                "data.group_key",
                f"{without} of {len(rows)} training records have no group, and defenses.dpsgd.unit is group",
                "name the column that holds the patient, or protect single records with unit: record",
            )
        self._count = len(groups)
        whole = [np.array(members) for _, members in sorted(groups.items())]
        if config.group_sampling == "groups":
            return whole
        return [np.array([row]) for members in whole for row in members[: config.group_cap]]

    def _sampling(self, context: RunContext) -> tuple[float, float, str]:
        """Sampling probability, divisor, adjacency."""
        config = self.config
        free = config.sample_rate is not None and config.batch_size is not None  # nothing follows from the data's size
        if not free and self._drawn() != config.unit:
            raise UserError(
                "defenses.dpsgd.group_sampling",
                "records needs a sampling probability that does not follow from the number of records, which is private",
                "give both sample_rate and batch_size, or take group_sampling: groups",
            )
        if free and config.units is None and config.canaries:
            raise UserError(
                "defenses.dpsgd.units", "is needed with canaries, sample_rate and batch_size", "declare a public number"
            )
        drawn = self.units
        expected = config.batch_size or (None if config.sample_rate is not None else context.batch_size)
        rate = config.sample_rate if config.sample_rate is not None else expected / drawn
        if rate > 1:
            key = "defenses.dpsgd.batch_size" if config.batch_size else "train.batch_size"
            raise UserError(key, f"{expected} is more than the {drawn} that can be drawn", f"at most {drawn}")
        return rate, float(expected or rate * drawn), "add-remove" if free else "zero-out"

    def _calibrated(self) -> Mechanism:
        """The mechanism of the steps to come: the last segment's where nothing changed, else with fresh noise."""
        config = self.config
        steps = self._context.steps
        told = {k: v for k, v in asdict(config).items() if k not in ("backend", "physical_batch", "test_seed")}
        digest = hashlib.sha256(json.dumps([told, steps]).encode()).hexdigest()[:12]
        mechanism = Mechanism(
            unit=config.unit,
            copies=1 if self._drawn() == config.unit else config.group_cap,
            adjacency=self.adjacency,
            sample_rate=self.sample_rate,
            noise_multiplier=0.0,
            clip_norm=config.clip_norm,
            divisor=self.divisor,
            settings=digest,
            test=config.test_seed is not None,
        )
        if self._before:
            known = replace(mechanism, noise_multiplier=self._before[-1].mechanism.noise_multiplier)
            if known == self._before[-1].mechanism:
                return known
        noise = config.noise_multiplier
        left = steps - self.spent
        if noise is None and left > 0:
            target = config.epsilon or DEFAULT_EPSILON
            copies = max([mechanism.copies, *(segment.mechanism.copies for segment in self._before)])
            noise = noise_for(target, config.delta, self.sample_rate, left, spent=history(self._before), copies=copies)
        return replace(mechanism, noise_multiplier=noise or 0.0)

    def last_step(self, steps: int) -> int:
        """Steps that were booked and then lost with a kill are spent: they are not trained again.

        Raises:
            UserError: the ledger knows fewer steps than the checkpoint, or nothing is left to train a first checkpoint with.
        """
        if self.spent < self._released:
            raise UserError(
                str(self._ledger.file),
                f"has {self.spent} steps, the checkpoint {self._released}: lines are missing",
                "restore the ledger, or choose another run.name",
            )
        left = max(0, steps - self.spent)
        if not left and not self._released:
            raise UserError(
                "defenses.dpsgd",
                f"all {steps} steps of the budget are spent and no checkpoint was saved",
                "choose another run.name (its budget adds to this one's) and a smaller train.checkpoint_every",
            )
        return self._released + left

    def plan(self, rows: np.ndarray, batch_size: int, seed: int) -> BatchPlan:
        config = self.config
        cap = config.group_cap if config.unit == "group" else 1
        self._plan = PoissonPlan(
            self._units,
            self.sample_rate,
            cap,
            config.multiplicity,
            config.physical_batch,
            self._secret,
            self.divisor,
        )
        return self._plan

    def gradient_rule(self) -> GradientRule:
        config, precision, mechanism = self.config, self._context.precision, self.mechanism
        unit_of_row = np.full(max(int(unit.max()) for unit in self._units) + 1, -1, dtype=np.int64)
        for index, unit in enumerate(self._units):
            unit_of_row[unit] = index
        return NoisyClippedSum(
            backend(config.backend, precision),
            reference(config.backend, precision),
            clip_norm=mechanism.clip_norm,
            noise_multiplier=mechanism.noise_multiplier,
            divisor=mechanism.divisor,
            unit_of_row=unit_of_row,
            secret=self._secret,
            book=self._book,
            returns_losses=self._context.nonprivate_metrics,
            tolerance=TOLERANCE[precision],
            units_at_once=config.physical_batch,
            exact=None if precision == "fp32" else (backend(config.backend, "fp32"), reference(config.backend, "fp32")),
        )

    def _book(self, step: int) -> None:
        self._ledger.append(self.mechanism, self._segment, step, self._process)
        self._released = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"released": self._released}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._released = state["released"]

    def outlook(self) -> list[str]:
        """What the whole run will spend, and with how much noise."""
        segments = self._plan_of_steps()
        claim, left = self._claim(segments), segments[-1].steps
        lines = [f"epsilon {claim['epsilon']:g}" if claim["epsilon"] is not None else "epsilon none: NOT PRIVATE"]
        lines += [
            f"{key} {claim[key]}" for key in ("delta", "unit", "units", "adjacency", "noise_multiplier", "sample_rate")
        ]
        noise = self.mechanism.noise_multiplier * self.mechanism.clip_norm / self.divisor
        lines += [
            f"steps {left} left of {self._context.steps}, expected batch {self.sample_rate * len(self._units):.1f} {self._drawn()}s, divisor {self.divisor:g}"
        ]
        return [
            *lines,
            f"noise per weight and step {noise:.3g}, against a gradient of norm at most {self.mechanism.clip_norm:g}",
        ]

    def _plan_of_steps(self) -> list[Segment]:
        """What the ledger will hold if all goes as planned."""
        left = max(0, self._context.steps - self.spent)
        return [*self._before, Segment(self.mechanism, left)]

    def claim(self) -> dict[str, Any]:
        """Of the steps in the ledger, including those that a kill undid."""
        return self._claim(self._ledger.segments())

    def _claim(self, segments: list[Segment]) -> dict[str, Any]:
        config = self.config
        return dpclaim.build(
            segments,
            delta=config.delta,
            units=None if self.adjacency == "add-remove" and config.units is None else self.units,
            drawn=self._drawn(),
            planned_steps=self._context.steps,
            multiplicity=config.multiplicity,
            images_per_group=config.group_cap if config.unit == "group" else None,
            largest_group=self._largest_group,
            starts=self._ledger.processes(),
            nonprivate_metrics=self._context.nonprivate_metrics,
        )

    def _drawn(self) -> str:
        """What is sampled and clipped by itself."""
        return "record" if self.config.group_sampling == "records" else self.config.unit


def _groups(pool: Pool, rows: np.ndarray) -> dict[str, list[int]]:
    """Rows of every group; those without one are left out."""
    groups: dict[str, list[int]] = {}
    for row in rows.tolist():
        if pool.group[row] is not None:
            groups.setdefault(pool.group[row], []).append(row)
    return groups
