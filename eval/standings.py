"""What comparison.json says about each arm, for its page: who leaks, who is compared, what is claimed."""

from typing import Any

from eval import claims
from eval.claims import FOR_THE_HOLDER
from eval.otherattacks import beyond_captions
from eval.verdict import EVIDENCE_P

VERIFIED = "privacy.extraction.verified"
P_VALUE = "privacy.extraction.control.p_value"
CONTROL = "privacy.extraction.control.verified"
CONTROL_N = "privacy.extraction.control.n"

CORRELATED = "privacy.extraction.by_correlation"
OUTPUTS_ONLY = "the guarantee holds for the weights, not for images that passed the filter"

TITLES = {
    "leak": "Training pictures can be pulled out of some of these models",
    "unclear": "Some models bring out training pictures, but the control does not tell that from chance",
    "none": "This attack pulled no training picture out of any model",
    "unfinished": "No arm was measured",
}
SIGNS = {
    "less": "fewer in every seed",
    "more": "more in every seed",
    "equal": "equal in every seed",
    "mixed": "the seeds disagree",
    None: "no seed in common",
}


def standing(arm: dict[str, Any]) -> str:
    """What the attack found in an arm as it is used: "leak", "unclear", "none" or "unfinished".

    "leak": in at least one seed pictures were verified, and every control that there is tells them from chance: of a prompted attack
    that by captions of held-out pictures, too (`eval.verdict`). One seed is enough: whoever trains once gets one seed. "none" needs
    every finished seed.
    """
    return _standing([_hits(run, "values", VERIFIED, P_VALUE, "captions") for run in arm["runs"] if run["values"]])


def standing_guard_off(arm: dict[str, Any]) -> str:
    """The same for the weights alone, without the filter that wraps the sampling; "unfinished" where there is no filter."""
    runs = [run for run in arm["runs"] if run["guard_off"]]
    return _standing([_hits(run, "guard_off", "verified", "p_value", "captions_guard_off") for run in runs])


Hits = tuple[
    int | None, float | None, float | None
]  # pictures, p-values of the control by chance and of that by captions


def _hits(run: dict[str, Any], part: str, verified: str, p_value: str, captions: str) -> Hits:
    return run[part].get(verified), run[part].get(p_value), beyond_captions(run["other_attacks"][captions])


def _standing(found: list[Hits]) -> str:
    if not found:
        return "unfinished"
    hits = [each for each in found if each[0] is not None]
    if any(count and beyond_controls(*p_values) for count, *p_values in hits):
        return "leak"
    return "unclear" if any(count for count, *_ in hits) or not hits else "none"


def beyond_controls(chance: float | None, captions: float | None) -> bool:
    """Whether the hits of a run are told from chance, and where held-out captions were tried, from what captions bring back."""
    return chance is not None and chance <= EVIDENCE_P and (captions is None or captions <= EVIDENCE_P)


def by_construction(arm: dict[str, Any]) -> str | None:
    """Why the count behind an output filter is no measurement; None where it is one."""
    if not arm["by_construction"]:
        return None
    counts = [(run["values"] or {}).get(VERIFIED) for run in arm["runs"]]
    return f"{'few' if any(counts) else '0'} by construction: the filter uses the attack's own score"


def statements(arm: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(place among the claims, claim) of every statement of a heuristic; seeds may differ in what they say."""
    claims = enumerate(arm["claims"])
    return [(place, claim) for place, claim in claims if claim.get("kind") != "dp" and claim.get("statement")]


def claim_notes(arm: dict[str, Any]) -> list[str]:
    """What must be read beside the guarantees of an arm, but for `FOR_THE_HOLDER`, which all have; each once."""
    private = [entry["dp"] for entry in claim_entries(arm) if entry["dp"]]
    notes = [OUTPUTS_ONLY] if private and arm["protects"] == "outputs" else []
    return [*notes, *dict.fromkeys(note for dp in private for note in dp["notes"] if note != FOR_THE_HOLDER)]


def groups(arms: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Arms by what the verdict says of them: "leak", "unclear", "none", "below" (stated utility), "otherwise" (not asked like the
    reference), "empty" (no image left) and "unfinished".

    An arm that is not comparable stands in "below", "otherwise" or "empty" alone unless it leaks: a defense that ruins the pictures looks
    private, and a model that ruins them and leaks all the same is a leak first.
    """
    found: dict[str, list[int]] = {
        name: [] for name in ("leak", "unclear", "none", "below", "otherwise", "empty", "unfinished")
    }
    for index, arm in enumerate(arms):
        name = standing(arm)
        if arm["comparable"] is False:
            found[_why(arm)].append(index)
        if arm["comparable"] is not False or name == "leak":
            found[name].append(index)
    return found


def _why(arm: dict[str, Any]) -> str:
    return "empty" if arm["nothing_left"] else "otherwise" if arm["asked_otherwise"] else "below"


def level(arms: list[dict[str, Any]]) -> str:
    """The verdict on all arms together. Of an arm behind a filter the weights count too."""
    worst = {standing(arm) for arm in arms} | {standing_guard_off(arm) for arm in arms}
    return next((name for name in ("leak", "unclear", "none") if name in worst), "unfinished")


def errors(arm: dict[str, Any]) -> list[str]:
    """What the failed runs of an arm said last, each once."""
    return list(dict.fromkeys(run["error"] for run in arm["runs"] if run["error"]))


def guarantees(arms: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """(index of the arm, of its claim, the claim in words) of every claim of differential privacy, broken ones too."""
    return [
        (index, place, entry["dp"])
        for index, arm in enumerate(arms)
        for place, entry in enumerate(claim_entries(arm))
        if entry["dp"]
    ]


def claim_entries(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of an arm: ``name``, ``statement`` and for differential privacy ``dp`` (see `claims.in_words`), else None."""
    return [
        {
            "name": entry["name"],
            "statement": entry.get("statement"),
            "dp": claims.in_words(entry) if entry.get("kind") == "dp" else None,
        }
        for entry in arm["claims"]
    ]
