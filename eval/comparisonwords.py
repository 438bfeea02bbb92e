"""What a comparison did not measure, in sentences."""

from typing import Any

from eval.armfigures import Loaded, done_of
from eval.arms import Outcome, lookup
from eval.wording import NOT_MEASURED, number, tier_sentence

OTHER_ATTACKS = ("privacy.extraction", "privacy.membership", "privacy.inpainting", "privacy.canaries", "utility")
SAME_BUDGET = 0.01  # relative difference of images seen that is not worth a word (Poisson batches vary)


def not_measured(loaded: Loaded, comparison: dict[str, Any]) -> list[str]:
    """Sentences for the report: what was not run, what failed, and what the numbers do not say.

    Args:
        comparison: comparison.json so far.
    """
    done = [outcome for _, outcomes in loaded for outcome in done_of(outcomes)]
    reports = [outcome.report for outcome in done]
    found = [*_failures(loaded)]
    if not done:
        return found
    found += [NOT_MEASURED[path] for path in OTHER_ATTACKS if all(not lookup(report, path) for report in reports)]
    found += _attack_size(done)
    found += _seeds(len(comparison["design"]["seeds"]))
    if comparison["design"]["utility"]["at_most"] is None:
        found.append(
            "No utility floor was stated (utility.at_most), so every arm is ranked: one that only ruins its pictures "
            "looks private."
        )
    if not any(report.get("along") for report in reports):
        found.append(
            "Earlier checkpoints were not measured (report.along): matched utility rests on the final models alone."
        )
    found += _budgets(loaded, comparison["design"]["images_seen"])
    found += _withheld(loaded)
    if len({str(lookup(report, "run.hardware")) for report in reports}) > 1:
        found.append("The arms ran on different hardware: their costs cannot be held against each other.")
    found.append(
        "The Pareto front is drawn through means over seeds: arms whose intervals overlap may change places in another "
        "repetition."
    )
    return found


def _failures(loaded: Loaded) -> list[str]:
    return [
        f"Arm {arm.name}, seed {outcome.run.seed}: {outcome.run.status}, so it has no numbers"
        + (f" ({outcome.run.error})." if outcome.run.error else ".")
        for arm, outcomes in loaded
        for outcome in outcomes
        if outcome.report is None
    ]


def _attack_size(done: list[Outcome]) -> list[str]:
    """Size of the attack; where an output filter withheld images, that of the attack without it."""
    for outcome in done:
        extraction = lookup(outcome.report, "privacy.extraction")
        if extraction is not None and not outcome.guarded:
            return [tier_sentence(extraction)]
    return []


def _seeds(count: int) -> list[str]:
    if count == 1:
        return ["One seed: nothing is known of how much another training would change."]
    text = f"{count} seeds: intervals over seeds rest on {count} trainings of each arm"
    text += " and are very wide" if count == 2 else ""
    return [
        f"{text}. The paired test on pictures takes these trained models as they are; whether another training would "
        "differ likewise is for the signs and intervals over seeds to say."
    ]


def _budgets(loaded: Loaded, reference: int | None) -> list[str]:
    found = []
    for arm, outcomes in loaded:
        seen = {outcome.values.get("model.images_seen") for outcome in done_of(outcomes)} - {None}
        if reference and any(abs(count - reference) > SAME_BUDGET * reference for count in seen):
            counts = " and ".join(number(count) for count in sorted(seen))
            found.append(f"Arm {arm.name} saw {counts} images in training, the reference {number(reference)}.")
    return found


def _withheld(loaded: Loaded) -> list[str]:
    found = []
    for arm, outcomes in loaded:
        for outcome in outcomes:
            path = "generations"
            on, off = (
                lookup(outcome.report, f"privacy.{part}.{path}") for part in ("extraction", "extraction_guard_off")
            )
            if off is not None and on != off:
                found.append(
                    f"Arm {arm.name}, seed {outcome.run.seed}: {number(on)} of {number(off)} generations passed the output "
                    "filter; the others were not attacked."
                )
    return found
