"""Whether reports can be compared: the same data, split, attack, sampler and features, or a refusal that names the field."""

from collections.abc import Iterable, Sequence
from typing import Any

from defenses.errors import UserError
from eval.arms import Arm, Outcome, lookup

# Field of report.json -> section of the configuration that decides it: a comparison that varies a key of that section may
# differ in it. Where the data lie (data.source) may differ; that they are the same is seen in the manifests.
FIELDS = {
    **{f"data.{name}": "data" for name in "found rejected train calibration heldout clusters units unit".split()},
    "privacy.extraction.protocol": "attack",
    "privacy.extraction.settings": "attack",
    "privacy.extraction.tier": "generate",
    "privacy.extraction.generations": "generate",
    "privacy.extraction.sampler": "generate",
    **{f"privacy.captions.{name}": "attack" for name in ("losses", "prompts")},
    **{f"utility.{name}": "utility" for name in "features features_dim weights_sha256 reference".split()},
    "utility.n_reference": "data",
    "utility.downstream.settings": "utility",
}
FOLLOWS_FROM_DATA = "privacy.extraction.settings.n_effective"  # neighbours that there are
# what the attack met, not what it was told
MEASURED = {f"privacy.extraction.settings.{name}" for name in ("inexact_cliques", "generations_per_prompt")}
# of a prompted attack: what followed from the captions that there were. Arms that differ in it are not comparable (`asked_otherwise`)
FOLLOWS_FROM_PROMPTS = (
    "privacy.extraction.generations",
    "privacy.extraction.tier",
    "privacy.extraction.settings.clique_size",
)
# compared only where both have it: other families have no sampler, and a classifier can fail in one arm
OPTIONAL = ("privacy.extraction.sampler", "privacy.captions", "utility.downstream.settings")

GAN = "gan"
ASKED = {  # what makes counts of a prompted attack differ whatever the model, and how it is told
    "prompts": "it was asked {} prompts, the reference {}",
    "generations": "it was asked for {} images, the reference for {}",
    "digest": "it was asked other prompts than the reference",
    "rewritten": "it was asked with captions as {} rewrote them, the reference as {} did",
}


def check_alike(arms: list[tuple[Arm, list[Outcome]]], factor: str | None) -> None:
    """Refuses a comparison of things that were not measured alike.

    Args:
        arms: every arm with its outcomes; the first one that is done, and has images, is what the others are held against.
        factor: dotted key that the comparison varies: what its section decides may differ between arms, not within one.

    Raises:
        UserError: names the field, and the two arms with their values.
    """
    done = [(arm, outcome) for arm, outcomes in arms for outcome in outcomes if outcome.report is not None]
    done.sort(key=lambda pair: pair[1].silenced)  # stable: one without quality is nothing to hold others against
    varied = factor.partition(".")[0] if factor else None
    first: dict[str, tuple[Arm, Outcome]] = {}
    for arm, outcome in done:
        own = first.setdefault(arm.name, (arm, outcome))
        _compare(done[0], (arm, outcome), varied)
        _compare(own, (arm, outcome), None)


def is_prompted(outcome: Outcome) -> bool:
    """Whether the images of a run were asked for by prompts."""
    return lookup(outcome.report, "privacy.extraction.protocol") == "prompted"


def nothing_left(outcomes: Sequence[Outcome]) -> str | None:
    """Why an arm cannot be held against others: in a run its guard let no image out, so that neither leakage nor quality was measured.
    None: every finished run has images."""
    seed = next((outcome.run.seed for outcome in outcomes if outcome.report is not None and outcome.silenced), None)
    return None if seed is None else f"seed {seed}: its guard withheld every image, so there is nothing to measure"


def asked_otherwise(mine: Sequence[Outcome], base: Sequence[Outcome]) -> str | None:
    """Why counts of a prompted attack cannot be held against the reference's: it was given other prompts, or drew another number of
    images. None: they can, or the attack was not prompted.

    A model that is asked for fewer pictures gives fewer away. Prompts differ where they follow the arm itself: captions that a
    defense rewrote (``attack.captions=trained``), prompts in the order of a score (``generate.order=prefilter``).

    Args:
        mine, base: runs of the arm and of the reference, seed by seed.
    """
    for one, other in zip(mine, base, strict=True):
        if None in (one.asked, other.asked) or not is_prompted(one):
            continue
        sides = [_asked(one), _asked(other)]
        if None not in [side["digest"] for side in sides]:  # otherwise by name: a report is of an older version
            sides = [side | {"rewritten": None} for side in sides]
        for key, text in ASKED.items():
            values = [side[key] for side in sides]
            if None not in values and values[0] != values[1]:
                remedy = "; attack.captions=original asks all arms alike" if sides[0]["trained"] else ""
                return f"seed {one.run.seed}: {text.format(*values)}, so their counts say nothing of the models{remedy}"
    return None


def _asked(outcome: Outcome) -> dict[str, Any]:
    """What a prompted attack was given; None what its report does not tell."""
    captions = lookup(outcome.report, "privacy.captions") or {}
    trained, rewriters = captions.get("prompts") == "trained", captions.get("rewritten_by")
    return {
        "prompts": outcome.asked.get("prompts"),
        "generations": outcome.asked["generations"],
        "digest": captions.get("asked_sha256"),
        "rewritten": (", ".join(rewriters) or "no defense") if trained and rewriters is not None else None,
        "trained": trained,
    }


def _compare(one: tuple[Arm, Outcome], other: tuple[Arm, Outcome], varied: str | None) -> None:
    mine, theirs = (_facts(outcome, varied) for _, outcome in (one, other))
    for path in [*mine, *(path for path in theirs if path not in mine)]:
        values = mine.get(path), theirs.get(path)
        unmeasured = path.startswith("utility.") and (one[1].silenced or other[1].silenced)
        if values[0] != values[1] and not unmeasured and not (path.startswith(OPTIONAL) and None in values):
            raise _refusal(path, one, other, values)
    records = one[1].training.records, other[1].training.records
    if varied != "data" and records[0] is not records[1] and records[0] != records[1]:
        record = min(key for key in records[0].keys() | records[1].keys() if records[0].get(key) != records[1].get(key))
        raise _refusal(f"manifest.csv, record {record}", one, other, [each.get(record) for each in records])


def _facts(outcome: Outcome, varied: str | None) -> dict[str, Any]:
    """Fields that must agree, settings one by one. Where an output filter withheld images, the attack without it counts."""
    report, ignored = outcome.report, MEASURED | ({FOLLOWS_FROM_DATA} if varied == "data" else set())
    if is_prompted(outcome):
        ignored |= set(FOLLOWS_FROM_PROMPTS)
    if outcome.guarded:
        report = report | {"privacy": report["privacy"] | {"extraction": outcome.asked}}
    if lookup(report, "privacy.extraction.sampler.name") == GAN:  # one forward pass: there is nothing to sample with
        privacy = report["privacy"]
        report = report | {"privacy": privacy | {"extraction": privacy["extraction"] | {"sampler": None}}}
    found = {}
    for path, section in FIELDS.items():
        if section != varied:
            value = lookup(report, path)
            found |= (
                {f"{path}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {path: value}
            )
    return {path: value for path, value in found.items() if path not in ignored}


def _refusal(field: str, one: tuple[Arm, Outcome], other: tuple[Arm, Outcome], values: Iterable[Any]) -> UserError:
    sides = [f"arm {arm.name} (seed {outcome.run.seed})" for arm, outcome in (one, other)]
    had = [f"{side} has {value!r}" for side, value in zip(sides, values, strict=True)]
    return UserError(field, ", ".join(had), "only what was measured alike can be compared: run one of them again")
