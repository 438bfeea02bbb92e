"""A differential-privacy claim and its audit in words (facts after NIST SP 800-226, 2025): for the report and the model card."""

import math
from typing import Any

from defenses.accounting import round_up
from eval.wording import number, percent

FALSE_ALARMS = (0.01, 0.001)  # rates of a membership test at which its power is bounded
MANY = 1_000_000  # odds beyond which a bound is not spelled out

ADJACENCY = {
    "add-remove": "add-remove: with and without one {unit}",
    "zero-out": "zero-out: with one {unit}, and with nothing in its place; the number of {unit}s counts as public",
}
UPPER_BOUND = (
    "Epsilon is an upper bound on what the published weights give away about one {unit}, whatever an attacker knows or does; "
    "the attacks in this report are lower bounds. It is not a statement about the pictures: whether they count as personal "
    "data, and whether this bound is small enough, is for the people responsible to decide."
)
FOR_THE_HOLDER = (
    "The attack, quality and downstream figures, the pictures and the counts of this report are computed from the private "
    "pictures themselves, for the data holder. The claim does not cover them: publishing them gives away more."
)
NONPRIVATE_METRICS = (
    "Losses and held-out metrics of private data were logged (report.nonprivate_metrics: true); the claim does not cover "
    "them, nor any choice that was made by looking at them."
)

Rows = list[tuple[str, str]]


def of_report(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name of the defense, its claim in words) for every defense that claims differential privacy."""
    entries = ((str(entry["name"]), entry.get("claim") or {}) for entry in report.get("defenses") or [])
    return [(name, in_words(claim)) for name, claim in entries if claim.get("kind") == "dp"]


def in_words(claim: dict[str, Any]) -> dict[str, Any]:
    """A claim of kind "dp" in the parts that a page shows.

    Returns:
        ``private`` (False: no epsilon may be shown, and ``reasons`` says why), ``statement``, ``epsilon``, ``delta``,
        ``unit``, ``adjacency``, ``short`` (the four in one line), ``meaning`` (sentences), ``accountants`` and
        ``mechanism`` (rows of label and text), ``group`` (rows of number of {unit}s, epsilon, largest odds), ``largest``
        (size of the largest group, or None), ``notes`` and ``not_covered`` (lists of sentences).
    """
    reasons = _lines(claim.get("not_private"))
    epsilon, delta, unit = claim.get("epsilon"), claim.get("delta"), str(claim.get("unit") or "unit")
    if epsilon is None and not reasons:
        reasons = ["no epsilon could be computed"]
    private = not reasons
    adjacency = str(claim.get("adjacency") or "not stated")
    words = {
        "private": private,
        "reasons": reasons,
        "statement": claim.get("statement"),
        "epsilon": upward(epsilon) if private else None,
        "delta": number(delta),
        "unit": unit,
        "adjacency": ADJACENCY.get(adjacency, adjacency).format(unit=unit),
        "short": None,
        "meaning": [],
        "accountants": [],
        "mechanism": _mechanism(claim, unit),
        "group": [],
        "largest": claim.get("largest_group"),
        "notes": [NONPRIVATE_METRICS] if claim.get("nonprivate_metrics") else [],
        "not_covered": _lines(claim.get("not_covered")),
    }
    words["notes"].append(FOR_THE_HOLDER)
    if private:
        words["short"] = f"epsilon {upward(epsilon)} at delta {number(delta)} per {unit}, {adjacency} adjacency"
        words["meaning"] = [membership_sentence(epsilon, delta or 0.0, unit), UPPER_BOUND.format(unit=unit)]
        words["accountants"] = _accountants(claim)
        words["group"] = _group(claim)
    return words


def membership_bound(epsilon: float, delta: float, false_alarms: float) -> float:
    """Largest share of members that any test recognises at this share of false alarms (Kairouz et al. 2015, Theorem 2.1)."""
    growth = math.exp(min(epsilon, 700.0))
    return min(1.0, growth * false_alarms + delta, 1 - (1 - delta - false_alarms) / growth)


def membership_sentence(epsilon: float, delta: float, unit: str) -> str:
    """What epsilon and delta allow an attacker who asks whether one unit was trained on."""
    at_most = " and ".join(
        f"{percent(membership_bound(epsilon, delta, rate))} where it wrongly accuses {percent(rate)} of outsiders"
        for rate in FALSE_ALARMS
    )
    return (
        f"The bound allows a test for membership to recognise at most this share of the {unit}s trained on: {at_most}."
    )


def audit(block: dict[str, Any] | None) -> dict[str, Any] | None:
    """``privacy.audit`` in words: ``title``, ``rows``, ``text``, ``contradicts`` (the claimed epsilon is refuted)."""
    if block is None:
        return None
    rows = [(key.replace("_", " "), number(value, 6)) for key, value in block.items() if key not in ("kind", "note")]
    found, claimed = block.get("epsilon_lower_bound"), block.get("claimed_epsilon")
    text = "A lower bound can show a mistake in the mechanism; it never proves privacy."
    return {
        "title": str(block.get("kind") or "audit"),
        "rows": rows,
        "text": f"{text} {block.get('note') or ''}".strip(),
        "contradicts": found is not None and claimed is not None and found > claimed,
    }


def alarms(report: dict[str, Any]) -> list[str]:
    """What nobody may overlook: claims that do not hold."""
    found = [
        f"NOT PRIVATE. The defense {name} gives no guarantee in this run: {'; '.join(words['reasons'])}."
        for name, words in of_report(report)
        if not words["private"]
    ]
    privacy = report.get("privacy") or {}
    for block in (privacy.get("audit"), (privacy.get("canaries") or {}).get("one_run")):
        audited = audit(block)
        if audited and audited["contradicts"]:
            found.append(
                f"NOT PRIVATE as claimed. The lower bound of an audit ({audited['title']}) lies above the claimed epsilon: unless chance "
                "deceived it, there is a mistake in the mechanism or in its accounting."
            )
    return found


def upward(epsilon: float | None) -> str:
    """Epsilon with four significant digits, never below its value."""
    return "not computed" if epsilon is None or not math.isfinite(epsilon) else f"{round_up(epsilon, 4):g}"


def _accountants(claim: dict[str, Any]) -> Rows:
    rows = []
    if claim.get("accountant") is not None:
        rows.append((f"epsilon by {claim['accountant']}", upward(claim["epsilon"])))
    if claim.get("epsilon_crosscheck") is not None:
        name = claim.get("crosscheck_accountant") or "a second accountant"
        rows.append((f"recomputed by {name}", upward(claim["epsilon_crosscheck"])))
    return rows


def _mechanism(claim: dict[str, Any], unit: str) -> Rows:
    """The table of what the guarantee rests on; a field that the claim lacks is left out."""
    units, images = claim.get("units"), claim.get("images_per_group")
    steps, planned = claim.get("steps"), claim.get("planned_steps")
    rows = [
        ("sampling", claim.get("sampling")),
        (f"sampling probability of a {claim.get('drawn') or unit} per step", claim.get("sample_rate")),
        ("noise multiplier (standard deviation / clip norm)", claim.get("noise_multiplier")),
        (f"clip norm (l2) of a {claim.get('drawn') or unit}", claim.get("clip_norm")),
        ("divisor of the noisy sum (constant)", claim.get("batch_size")),
        ("draws averaged per record", claim.get("multiplicity")),
        (f"pictures used per {unit}, at most", images),
        ("steps in the ledger", steps if planned in (None, steps) else f"{number(steps)} of {number(planned)} planned"),
        (f"{unit}s", _units(units, claim.get("units_public"))),
        ("segments of the ledger; resumes", _pair(claim.get("segments"), claim.get("resumes"))),
        ("queries that were composed", claim.get("queries")),
        ("trust model", claim.get("trust_model")),
        ("libraries", claim.get("libraries")),
    ]
    return [(label, number(value, 6)) for label, value in rows if value not in (None, [], {})]


def _units(units: int | None, public: bool | None) -> str | None:
    if units is None or public is None:
        return (
            "withheld: their number was not declared public"
            if public is False
            else None
            if units is None
            else number(units)
        )
    return f"{number(units)}, taken as public" if public else "withheld: their number was not declared public"


def _pair(first: int | None, second: int | None) -> str | None:
    return None if first is None or second is None else f"{number(first)}; {number(second)}"


def _group(claim: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (number of units, epsilon, e^epsilon) from one unit up."""
    several = claim.get("group_epsilon") or {}
    if not several:
        return []
    rows = [(1, claim["epsilon"]), *((int(size), epsilon) for size, epsilon in several.items())]
    return [(number(size), upward(epsilon), _odds(epsilon)) for size, epsilon in sorted(rows, key=lambda row: row[0])]


def _odds(epsilon: float | None) -> str:
    if epsilon is None or epsilon > math.log(MANY):
        return f"over {MANY:,}: no protection"
    factor = round_up(math.exp(epsilon), 3)
    return f"{factor:,.0f}" if factor >= 1000 else f"{factor:g}"


def _lines(value: Any) -> list[str]:
    return [str(value)] if isinstance(value, str) else [str(line) for line in value or []]
