"""report.json in words: numbers as people read them, the verdict, and what was not measured."""

from typing import Any

from eval.stratified import decisive

EVIDENCE_P = 0.05  # largest p-value of a control at which hits are told from chance, or from what captions bring back
THIN = "\N{NARROW NO-BREAK SPACE}"

# Generations that a tier needs (facts of Carlini et al. 2023, sections 4.2 and 5.1, scaled down): untargeted, prompted.
TIERS = {
    "smoke": ("256", "8 prompts with 16 each"),
    "small": ("8,192", "200 prompts with 64 each"),
    "standard": ("65,536", "1,000 prompts with 500 each"),
    "paper": ("16 models with 65,536 each", "350,000 prompts with 500 each"),
}

NOT_MEASURED = {
    "privacy.extraction": "Extraction was not measured: whether generating many pictures brings out training pictures.",
    "privacy.membership": "Membership was not measured: whether a holder of a picture can tell that it was trained on.",
    "privacy.inpainting": "Inpainting was not measured: whether a hidden part of a training picture can be reconstructed.",
    "privacy.canaries": "Canaries were not planted, or not looked at: how strongly planted pictures are memorised is unknown.",
    "privacy.audit": "No audit: there is no empirical lower bound on epsilon to hold against a claimed guarantee.",
    "utility": "Utility was not measured: how close the generations are to held-out pictures.",
    "utility.downstream": "Downstream use was not measured: whether the generations serve a task, such as a classifier.",
}

FEATURES = {
    "random-conv": "fixed random convolutions (offline; compares runs of this program only, not Inception)",
    "inception": "Inception-v3 (ImageNet)",
    "dinov2": "DINOv2 class token",
}


def number(value: Any, digits: int = 4) -> str:
    """A value for a table: thousands separated, floats to ``digits`` significant digits, None as "not measured"."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number(item, digits)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(number(item, digits) for item in value)
    return str(value)


def fixed(value: float | None) -> str:
    """A distance or score with three decimals; a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    """0.0204 as "2.0 %"; small shares keep two significant digits."""
    if share is None:
        return "not measured"
    value = 100 * share
    digits = 1 if value >= 0.95 or value == 0 else 2 if value >= 0.095 else 3
    return f"{value:.{digits}f}{THIN}%"


def duration(seconds: float | None) -> str:
    """Seconds as "45 s", "3 min 20 s" or "5 h 10 min"."""
    if seconds is None:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "not measured"
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every field of report.json as (dotted key, value); lists of plain values stay in one row."""
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [(f"{prefix}.{index}", item) for index, item in enumerate(value)]
    else:
        return [(prefix, value)]
    return [row for key, item in items for row in flatten(item, key)]


def distinct_pictures(report: dict[str, Any]) -> int:
    """Distinct training pictures: the denominator of the extraction rate."""
    by_copies = ((report["privacy"] or {}).get("extraction") or {}).get("by_copies")
    return sum(row["pictures"] for row in by_copies.values()) if by_copies else report["data"]["clusters"]


PROMPTED_CONTROL = (
    "Captions alone: prompts that describe training pictures draw images nearer to these than to held-out pictures, also from a model "
    "that has not seen either. The p-value against held-out pictures does not tell that from memorisation; a control with held-out "
    "captions does. There is none: {reason}."
)


def rate_sentence(extraction: dict[str, Any], pictures: int) -> str:
    """The count and its interval; zero hits as an upper bound (rule of three)."""
    verified = extraction["verified"]
    interval = extraction.get("rate_ci95")
    if not verified:
        return f"None of {pictures:,} distinct training pictures was extracted ({zero_hits(interval, pictures)})."
    method = extraction.get("rate_ci95_method")
    spread = f", 95 % interval {percent(interval[0])} to {percent(interval[1])}" if interval else ""
    spread += f", {method}" if interval and method else ""
    verb = "picture was" if pictures == 1 else "pictures was" if verified == 1 else "pictures were"
    return f"{verified:,} of {pictures:,} distinct training {verb} extracted ({percent(extraction['rate'])}{spread})."


def withheld_sentences(extraction: dict[str, Any]) -> list[str]:
    """What a defense between the model and its user kept from a prompted attack; none where it kept nothing."""
    withheld = extraction.get("withheld")
    if not withheld:
        return []
    silenced, prompts = withheld["prompts"], extraction["prompts"]
    text = f"A defense withheld {withheld['images']:,} images; of {silenced:,} of {prompts:,} prompts it left too few for a clique"
    return [f"{text}, and these count as not flagged" + (": there is no candidate." if withheld["reason"] else ".")]


def zero_hits(interval: list[float] | None, pictures: int) -> str:
    """The rate after zero hits in n trials, as "< 3/n (95 %)"; with patients as units the interval's n is theirs."""
    n = round(3 / interval[1]) if interval and interval[1] > 0 else pictures
    return f"rate < 3/{n:,} = {percent(min(1.0, 3 / n))}, 95 %" if n else "no trials"


def control_sentences(control: dict[str, Any] | None) -> list[str]:
    """What the same rule finds in pictures that were never trained on."""
    if control is None:
        return [
            "Not evidence: no control. The same rule was not tried on pictures that the model never saw, so these "
            "counts cannot be told from chance resemblance. Set data.heldout_source to get a control."
        ]
    n, p_value = control["n"], control["p_value"]
    text = f"Control: with the same rule, {control['verified']:,} of {n:,} held-out pictures, which the model never saw"
    text += f", and {control['verified_train_m']:,} of {n:,} training pictures"
    if p_value is None:
        chance = "; no p-value, because the held-out pictures are not exchangeable with the training pictures."
    else:
        chance = f"; p = {number(p_value, 2)} (one-sided, by permutation)."
    sentences = [text + chance]
    if control.get("background") is not None:
        share = percent(control["background"])
        sentences.append(f"Background: {share} of real held-out pictures would pass the rule if they were generations.")
    if control.get("captions"):
        sentences.append(captions_sentence(control["captions"]))
    return sentences


def captions_sentence(captions: dict[str, Any]) -> str:
    """The control of a prompted attack: captions that the model never saw, against their own pictures."""
    training, units = captions["training"], "groups" if captions["unit"] == "group" else "pictures"
    text = (
        f"Control of the captions: of {training['tested']:,} training {units} with a caption of their own, {training['own']:,} came "
        f"back by it; of {captions['tested']:,} held-out {units}, which the model never saw, {captions['own']:,}"
    )
    if captions["p_value"] is None:
        return f"{text}; no p-value, because {captions['reason']}."
    return f"{text}; p = {number(captions['p_value'], 2)} (Fisher's test, one-sided).{_stratified(captions)}"


def _stratified(captions: dict[str, Any]) -> str:
    """The same among pictures with equally many copies; empty where all have as many, and for reports of before."""
    part = captions.get("stratified")
    if not part or len(part["strata"]) < 2:
        return ""
    text = ""
    if part["p_value"] is not None:
        text = (
            f" Among pictures with equally many copies: p = {number(part['p_value'], 2)} (exact, whatever copies do)."
        )
    alone = part["without_counterpart"]
    if alone["own"]:
        text += (
            f" {alone['own']:,} of those that came back have a number of copies that no tested held-out one has: of these Fisher's test alone "
            "speaks, which takes it that pictures were copied without regard to how easily their captions bring them back, as "
            "planted copies are."
        )
    return text


def beyond_caption(captions: dict[str, Any] | None) -> float | None:
    """p-value of a control by captions on which the verdict rests (`eval.stratified.decisive`); None: there is none."""
    captions = captions or {}
    part = captions.get("stratified") or {}
    return decisive(captions.get("p_value"), part.get("p_value"), _alone(captions))


def if_copied_at_random(captions: dict[str, Any]) -> bool:
    """Whether hits are beyond the caption only if pictures were copied without regard to how easily captions bring them back: the
    test that copies cannot mislead does not say so."""
    within = (captions.get("stratified") or {}).get("p_value")
    return bool(_alone(captions)) and (within is None or within > EVIDENCE_P)


def _alone(captions: dict[str, Any]) -> int | None:
    """Training pictures that came back and have a number of copies that no tested held-out one has."""
    return ((captions.get("stratified") or {}).get("without_counterpart") or {}).get("own")


def captions_lacking(extraction: dict[str, Any]) -> str | None:
    """Why a prompted attack has no p-value beyond the caption; None where it has one, or needs none."""
    control = extraction.get("control")
    if extraction.get("protocol") != "prompted" or control is None:
        return None
    captions = control.get("captions")
    if captions is None:
        return control.get("captions_reason") or "it was not run"
    return captions["reason"] if captions["p_value"] is None else None


def not_measured(report: dict[str, Any]) -> list[str]:
    """One line for every part of report.json that is null, and the limits of what was run."""
    missing = [text for key, text in NOT_MEASURED.items() if _lookup(report, key) is None]
    downstream, utility = NOT_MEASURED["utility.downstream"], report.get("utility")
    if utility is None:
        missing.remove(downstream)  # said by "utility"
    elif downstream in missing and utility.get("downstream_reason"):
        missing[missing.index(downstream)] = f"{downstream} The reason: {utility['downstream_reason']}."
    extraction = (report["privacy"] or {}).get("extraction")
    if extraction is None:
        return missing
    if extraction.get("control") is None:
        missing.append("No control: there were no held-out pictures, so chance resemblance was not measured.")
    elif extraction["control"]["p_value"] is None:
        missing.append("No p-value: the held-out pictures are not exchangeable with the training pictures.")
    lacking = captions_lacking(extraction)
    if lacking:
        missing.append(PROMPTED_CONTROL.format(reason=lacking))
    missing.append(tier_sentence(extraction))
    missing.append(
        f"Spread: the result holds for this one model and {extraction['generations']:,} generations. "
        "Other seeds, longer training or more generations can leak more."
    )
    return missing


def distance_name(features: str | None) -> str:
    """The name of the Fréchet distance; only Inception features make it FID."""
    return "FID" if features == "inception" else f"Fréchet distance ({features} features)"


def tier_sentence(extraction: dict[str, Any]) -> str:
    """How large the attack was, and what the next larger one means; ``extraction`` as in report.json."""
    tier, column = extraction.get("tier"), 1 if extraction["protocol"] == "prompted" else 0
    names = list(TIERS)
    if tier == names[-1]:
        return "Attack size: tier paper, as in Carlini et al. (2023); attacks that know the data better were not run."
    larger = names[names.index(tier) + 1] if tier in names else names[0]
    unit = "" if column else " generations"
    text = f"Attack size: tier {tier}. The next one, {larger}, means {TIERS[larger][column]}{unit}"
    return text + "; rarely generated copies only show there."


def _lookup(report: dict[str, Any], dotted: str) -> Any:
    value: Any = report
    for key in dotted.split("."):
        value = (value or {}).get(key)
    return value
