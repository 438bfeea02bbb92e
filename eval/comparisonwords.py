"""What a comparison did not measure, in sentences."""

from typing import Any

from eval.armfigures import Loaded, done_of
from eval.arms import Outcome, lookup
from eval.wording import NOT_MEASURED, PROMPTED_CONTROL, captions_lacking, number, tier_sentence

EARLY_STOP = "early_stop"  # name of the defense
OTHER_ATTACKS = ("privacy.extraction", "privacy.membership", "privacy.inpainting", "privacy.canaries", "utility")
ONE_DATA_SET = (
    "All seeds share one data set and one split into training and held-out pictures: intervals over seeds do not cover other data, "
    "or another split."
)
SIDE_BY_SIDE = (
    "Training times are wall-clock times of arms that ran side by side on one machine: differences of some tens of per cent mean "
    "nothing."
)
LOOKING = (
    "The cost of looking is not in the training time: early stop generates and compares images at every checkpoint."
)
GROUP_CAP = (
    "DP-SGD takes a bounded number of pictures per group in each step, so that a picture with many copies is seen less often than in "
    "the undefended arm, even without noise: part of the drop is that cap."
)
NOISY_METRIC = (
    "The {metric} of a checkpoint is itself noisy{spread}. The first crossing in matched utility takes a lucky checkpoint for a "
    "good one, so it comes too early, before leakage has grown."
)
CORRELATION = (
    "Counts by correlation have no p-value, and the rule is loose: held-out pictures pass it, too. Only what goes beyond the control "
    "counts."
)
P_VALUES = {
    "corrected": "versus_reference.verified.p_value_holm alone: Holm's correction over the comparable arms that were tested, for the "
    "difference in pictures that the main attack extracted; and p_value_holm of a fine-tuning attack, over its weights within one run",
    "descriptive": "all others: by_copies, the controls of each run, other_attacks, the utility figures, the trend. They describe one run, or one "
    "figure; nobody corrected for how many of them there are, so do not pick the smallest",
}
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
    found += [PROMPTED_CONTROL.format(reason=reason) for reason in _lacking(done)]
    found += _attack_size(done)
    found += _seeds(len(comparison["design"]["seeds"]))
    if comparison["design"]["utility"]["at_most"] is None:
        found.append(
            "No utility floor was stated (floor.at_most), so every arm is ranked: one that only ruins its pictures "
            "looks private."
        )
    found += _matching(reports, comparison["design"]["utility"]["metric"])
    found += _budgets(loaded, comparison["design"]["images_seen"])
    found += _withheld(loaded)
    found += _costs(loaded, comparison)
    if any(lookup(report, "privacy.extraction.by_correlation") for report in reports):
        found.append(CORRELATION)
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


def _lacking(done: list[Outcome]) -> list[str]:
    """Why prompted attacks have no p-value beyond the caption, each reason once."""
    extractions = [lookup(outcome.report, "privacy.extraction") for outcome in done]
    return list(dict.fromkeys(reason for each in extractions if each and (reason := captions_lacking(each))))


def _attack_size(done: list[Outcome]) -> list[str]:
    """Size of the attack; where an output filter withheld images, that of the attack without it."""
    for outcome in done:
        extraction = lookup(outcome.report, "privacy.extraction")
        if extraction is not None and not outcome.guarded:
            return [tier_sentence(extraction)]
    return []


def _matching(reports: list[dict[str, Any]], metric: str) -> list[str]:
    if any(report.get("along") for report in reports):
        return [NOISY_METRIC.format(metric=metric.upper(), spread=" (kid_std)" if metric == "kid" else "")]
    return ["Earlier checkpoints were not measured (report.along): matched utility rests on the final models alone."]


def _costs(loaded: Loaded, comparison: dict[str, Any]) -> list[str]:
    """What times leave out, and what part of a drop is not the noise's."""
    defenses = [each for _, outcomes in loaded for outcome in done_of(outcomes) for each in outcome.report["defenses"]]
    parallel = lookup(comparison, "comparison.config.launcher.parallel") or 1
    found = [SIDE_BY_SIDE] if parallel > 1 else []
    found += [LOOKING] if any(each["name"] == EARLY_STOP for each in defenses) else []
    return found + ([GROUP_CAP] if any(each["claim"].get("images_per_group") for each in defenses) else [])


def _seeds(count: int) -> list[str]:
    if count == 1:
        return ["One seed: nothing is known of how much another training would change.", ONE_DATA_SET]
    text = f"{count} seeds: intervals over seeds rest on {count} trainings of each arm"
    text += " and are very wide" if count == 2 else ""
    return [
        f"{text}. The paired test on pictures takes these trained models as they are; whether another training would "
        "differ likewise is for the signs and intervals over seeds to say.",
        ONE_DATA_SET,
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
                    "filter; the others were not attacked. FID, precision and recall are held against the reference only "
                    "where they come from as many images."
                )
    return found
