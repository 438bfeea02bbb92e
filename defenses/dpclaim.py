"""What a private run promises, in the fields of report.json (after NIST SP 800-226, 2025, section on claims)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from defenses.accounting import Bill, bill, group_epsilon
from defenses.ledger import Mechanism, Segment, history

GROUP_SIZES = (2, 8, 32)
LIBRARIES = ("opacus", "dp-accounting", "torch")
TRUST = (
    "central: whoever runs the training sees all records and is trusted; the weights of every step may be published, "
    "and nothing else of the run directory"
)
QUERIES = "noisy sums of clipped gradients, one per step; "
CLOSED, OPEN = (
    "nothing else of the records was released",
    "losses and held-out metrics of records were logged beside them",
)
NOT_COVERED = (
    "choosing settings by looking at results: every further run on the same records spends a budget of its own",
    "copies of the pictures of one {unit} among the other {unit}s: see the figures for several at once",
    "deduplication, filtering, and the division into training and held-out records, which look at copies and groups: the bound "
    "holds for the training set as it then was",
    "the data on which the starting weights were trained",
    "this report and its model card with their attack and quality figures, and the folder of the run: they are computed from the "
    "records and are for their holder",
    "the names and the number of the classes, the number of {unit}s, and when, for how long and with how much memory training ran",
    "attacks on floating-point arithmetic, and on the generator of the random numbers, which is not a cryptographic one",
)


def build(
    segments: Sequence[Segment],
    *,
    delta: float,
    units: int | None,
    drawn: str,
    planned_steps: int,
    multiplicity: int,
    images_per_group: int | None,
    largest_group: int,
    starts: int,
    nonprivate_metrics: bool,
) -> dict[str, Any]:
    """The claim over all segments; JSON values only.

    Args:
        units: public number of units; None where it is withheld.
        drawn: "record" or "group", what is sampled and clipped by itself.
        largest_group: records of the largest group (0 without groups); stated rounded up to a power of two.
        starts: how often training was started.
    """
    last = segments[-1].mechanism if segments else None
    spent, steps = history(list(segments)), sum(segment.steps for segment in segments)
    reasons = not_private(segments)
    copies, found = _copies(segments), costs(segments, delta)
    if found is not None and not math.isfinite(found.epsilon):
        reasons, found = ["no accountant can bound what so little noise gives away"], None
    unit = last.unit if last else "record"
    records = _power_of_two(largest_group) if unit == "record" and largest_group > 1 else None
    several = None
    if found is not None:
        sizes = sorted({*GROUP_SIZES, *([records] if records else [])})
        bounds = group_epsilon(spent, delta, [size * copies for size in sizes])
        several = {str(size): bounds[size * copies] for size in sizes}
    return {
        "kind": "dp",
        "statement": _statement(found.epsilon if found else None, delta, unit, reasons, steps),
        "epsilon": 0.0 if not steps and not reasons else (found.epsilon if found else None),
        "delta": delta,
        "unit": unit,
        "units": units,
        "units_public": units is not None,
        "adjacency": last.adjacency if last else None,
        "accountant": found.accountant if found else None,
        "epsilon_crosscheck": found.crosscheck if found else None,
        "crosscheck_accountant": found.crosscheck_accountant if found else None,
        "sampling": f"Poisson over {drawn}s",
        "drawn": drawn,
        "sample_rate": last.sample_rate if last else None,
        "noise_multiplier": last.noise_multiplier if last else None,
        "clip_norm": last.clip_norm if last else None,
        "batch_size": last.divisor if last else None,
        "multiplicity": multiplicity,
        "images_per_group": images_per_group,
        "largest_group": records,
        "steps": steps,
        "planned_steps": planned_steps,
        "segments": len(segments),
        "history": [asdict(segment.mechanism) | {"steps": segment.steps} for segment in segments],
        "resumes": max(0, starts - 1),
        "group_epsilon": several,
        "queries": QUERIES + (OPEN if nonprivate_metrics else CLOSED),
        "trust_model": TRUST,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "not_private": reasons,
        "nonprivate_metrics": nonprivate_metrics,
        "not_covered": [text.format(unit=unit) for text in NOT_COVERED],
    }


def costs(segments: Sequence[Segment], delta: float) -> Bill | None:
    """Epsilon of all segments; None where nothing was done, or nothing is private.

    Raises:
        UserError: the accountants contradict each other.
    """
    if not_private(segments) or not any(segment.steps for segment in segments):
        return None
    return bill(history(list(segments)), delta, _copies(segments))


def _copies(segments: Sequence[Segment]) -> int:
    return max((segment.mechanism.copies for segment in segments), default=1)


def not_private(segments: Sequence[Segment]) -> list[str]:
    """Why these steps protect nothing; empty where they do."""
    mechanisms: list[Mechanism] = [segment.mechanism for segment in segments if segment.steps]
    reasons = []
    if any(mechanism.test for mechanism in mechanisms):
        reasons.append("noise and sampling came from defenses.dpsgd.test_seed, which is known")
    if any(mechanism.noise_multiplier == 0 for mechanism in mechanisms):
        reasons.append("no noise was added (defenses.dpsgd.noise_multiplier is 0)")
    if len({mechanism.unit for mechanism in mechanisms}) > 1:
        reasons.append("steps of one run protected different units")
    return reasons


def _statement(epsilon: float | None, delta: float, unit: str, reasons: list[str], steps: int) -> str:
    if reasons:
        return f"NOT PRIVATE: {'; '.join(reasons)}."
    if not steps:
        return "No step was taken: the weights do not depend on the records."
    return (
        f"Whether any one {'picture' if unit == 'record' else 'group (all pictures of one person)'} was in the training data "
        f"makes no outcome of training more than e^{epsilon:g} times as likely, plus {delta:g}: an upper bound of what can be learnt "
        "of it from the released weights."
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
