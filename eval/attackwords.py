"""The attacks beyond extraction in words, for the report and the model card."""

from typing import Any

from eval.entries import PRIMARY
from eval.wording import captions_sentence, percent

NAMES = {
    "loss": "loss, one draw of noise",
    "loss-strong": "loss, averaged",
    "loss-strong-null": "loss, averaged, without the caption",
    "loss-grid": "losses over the schedule",
    "secmi": "SecMI",
    "pia": "PIA",
    "pian": "PIAN",
    "sima": "SimA",
    "clid": "CLiD",
    "gsa-norm": "norm of the gradient",
    "gsa": "GSA (gradients, shadow models)",
    "lira": "LiRA, one draw of noise",
    "lira-strong": "Strong LiRA",
    "lira-offline": "LiRA, offline, one draw of noise",
    "lira-strong-offline": "Strong LiRA, offline",
}
KINDS = {"noise": "picture of noise", "heldout": "real picture"}
METRICS = {
    "adaptive_score": "adaptive score (the attack's own)",
    "nn_ratio": "nearest to second nearest picture",
    "tiled_l2": "l2, worst of 16 tiles",
    "ssim": "SSIM",
    "sscd": "SSCD",
}
DETECTORS = {
    "wen": "the difference that the caption makes to the predicted noise (Wen et al. 2024)",
    "webster": "the length of one step of the sampler (Webster 2023)",
}


def primary(privacy: dict[str, Any], unit: str = "record") -> dict[str, Any] | None:
    """The entry of ``privacy.membership`` that stands for all, with an area; None where there is none."""
    found = {
        entry["attack"]: entry
        for entry in privacy.get("membership") or []
        if entry.get("unit", "record") == unit and entry.get("auc") is not None
    }
    return next((found[name] for name in PRIMARY if name in found), next(iter(found.values()), None))


def membership_evidence(privacy: dict[str, Any]) -> bool | None:
    """Whether members can be told from non-members beyond chance; None: it was not shown either way.

    By the primary attack, on the whole (AUC) or for a few (more recognised at 1 % false alarms than the threshold's false alarms
    can be, Carlini et al. 2022); or by the set test. Never where the sides differ without the model (`eval.exchangeable`).
    """
    entry, check = primary(privacy), privacy.get("membership_check") or {}
    if entry is None or not check.get("passed"):
        return None
    caught, wrong = ((entry.get(name) or {}).get("0.01") for name in ("tpr_ci95", "fpr_upper95"))
    few = caught is not None and wrong is not None and caught[0] > wrong
    together = privacy.get("set_test") or {}
    return entry["auc_ci95"][0] > 0.5 or few or (together.get("p_value", 1.0) < together.get("alpha", 0.0))


def inpainting_evidence(privacy: dict[str, Any]) -> bool:
    """Whether training pictures were reconstructed better than held-out ones (p <= 0.05), with sides that were equally hard."""
    part = privacy.get("inpainting") or {}
    return part.get("p_value") is not None and part["p_value"] <= 0.05 and not _unequal(privacy)


def _unequal(privacy: dict[str, Any]) -> bool:
    """Whether members and non-members differ without the model: the check failed, or a fill that knows of no model differs too."""
    baseline = ((privacy.get("inpainting") or {}).get("baseline") or {}).values()
    easier = any(part["p_value"] is not None and part["p_value"] <= 0.05 for part in baseline)
    return easier or (privacy.get("membership_check") or {}).get("passed") is False


def finetuning_evidence(privacy: dict[str, Any]) -> bool:
    """Whether candidates of some weight are training pictures beyond what the control finds by chance (p <= 0.05, adjusted for the
    number of weights), and of the control by captions where there is one."""
    entries = (privacy.get("finetuning") or {}).get("weights") or []
    return any(
        entry["verified"] and entry["p_value_holm"] is not None and entry["p_value_holm"] <= 0.05 and _beyond(entry)
        for entry in entries
    )


def _beyond(entry: dict[str, Any]) -> bool:
    """Whether captions alone do not explain what came back: their control says so too, or there is none."""
    p_value = (entry.get("captions") or {}).get("p_value_holm")
    return p_value is None or p_value <= 0.05


def canary_evidence(privacy: dict[str, Any]) -> bool:
    """Whether planted pictures are remembered: the better the more often they were planted, and those planted most often better than
    pictures that were never shown (both p <= 0.05), for any kind."""
    return any(
        (figures.get("trend") or {}).get("p_value", 1.0) <= 0.05
        and figures["by_copies"][max(figures["by_copies"], key=int)]["p_value"] <= 0.05
        for figures in ((privacy.get("canaries") or {}).get("kinds") or {}).values()
    )


def membership_sentences(privacy: dict[str, Any]) -> list[str]:
    """What the primary attack found, for the verdict; empty where membership was not measured."""
    entry = primary(privacy)
    if entry is None:
        return []
    low, high = entry["auc_ci95"]
    found = [
        f"Membership: with the weights in hand, the attack “{NAMES.get(entry['attack'], entry['attack'])}” tells training pictures from "
        f"held-out ones with an area under the curve of {entry['auc']:.3f} (95 %: {low:.3f} to {high:.3f}; 0.5 is chance, 1 is certainty)"
    ]
    rate, interval = entry["tpr_at_fpr"].get("0.01"), (entry.get("tpr_ci95") or {}).get("0.01")
    if rate is not None:
        found[0] += (
            f"; at one false alarm in a hundred it recognises {percent(rate)} of the training pictures"
            f" ({percent(interval[0])} to {percent(interval[1])})"
        )
        upper = (entry.get("fpr_upper95") or {}).get("0.01")
        found[0] += (
            "."
            if upper is None
            else (
                f"; with {entry['nonmembers']:,} held-out pictures the false alarms of that threshold may really be up to {percent(upper)}."
            )
        )
    else:
        found[0] += (
            f". {entry['nonmembers']:,} held-out pictures are too few to state a rate at one false alarm in a hundred."
        )
    check = privacy.get("membership_check") or {}
    if check.get("passed") is False:
        found.append(f"Membership figures are no evidence: {check['note']}.")
    elif check.get("passed") is None and check.get("note"):
        found.append(f"Membership: {check['note']}.")
    return found


def inpainting_sentences(privacy: dict[str, Any]) -> list[str]:
    """What half of a picture brought back of the other, for the verdict."""
    part = privacy.get("inpainting")
    if not part or part.get("difference") is None:
        return []
    text = (
        f"Inpainting: reconstructed from their right halves, training pictures lie {abs(part['difference']):.3f} in l2 "
        f"{'nearer' if part['difference'] > 0 else 'farther'} than held-out ones"
    )
    found = [text + ("; no p-value." if part["p_value"] is None else f" (p = {part['p_value']:.2g}).")]
    if _unequal(privacy):
        found.append("Inpainting figures are no evidence: the two sides differ without the model, too.")
    return found


def finetuning_sentences(privacy: dict[str, Any]) -> list[str]:
    """What the step from the base to the fine-tuned model gave away, for the verdict."""
    part = privacy.get("finetuning")
    if not part:
        return []
    alone, found = part["weights"][0], []
    for entry in part["weights"][1:] or part["weights"]:
        low, high = entry["rate_ci95"]
        text = (
            f"Fine-tuning: from the difference to the base model (w = {entry['weight']:g}), {entry['verified']:,} of "
            f"{part['pictures']:,} distinct training pictures were extracted (95 %: {percent(low)} to {percent(high)})"
        )
        text += "" if entry is alone else f", from the fine-tuned model alone by the same steps {alone['verified']:,}"
        control, against = entry["control"], entry["versus_baseline"]
        if control is None:
            text += "; no control: not evidence."
        else:
            text += f"; control: {control['verified']:,} of {control['n']:,} held-out pictures"
            p_value = entry["p_value_holm"]
            text += ", no p-value." if p_value is None else f" (p = {p_value:.2g})."
        if entry.get("captions"):
            text += f" {captions_sentence(entry['captions'])}"
        if against is not None and against["gain_p_value"] is not None:
            way = "nearer to" if against["gain"] >= 0 else "farther from"
            text += (
                f" Set against the fine-tuned model alone, the nearest image comes {abs(against['gain']):.3f} in l2 {way} training pictures "
                f"than held-out ones (p = {against['gain_p_value']:.2g})."
            )
        found.append(text)
    return found


def canary_sentences(privacy: dict[str, Any]) -> list[str]:
    """How strongly planted pictures are remembered, for the verdict."""
    found = []
    for kind, figures in ((privacy.get("canaries") or {}).get("kinds") or {}).items():
        planted = [(int(copies), row) for copies, row in figures["by_copies"].items() if copies != "0"]
        if planted:
            copies, row = max(planted, key=lambda pair: pair[0])
            times = "once" if copies == 1 else f"{copies} times"
            found.append(
                f"Canaries: the median {KINDS.get(kind, kind)} planted {times} has an exposure of {row['median']:.1f} of at most "
                f"{figures['ceiling']:.1f} bits (1 bit: nothing learned)."
            )
    return found


def sentences(privacy: dict[str, Any]) -> list[str]:
    """All of the above, in the order of the page."""
    return [
        *membership_sentences(privacy),
        *inpainting_sentences(privacy),
        *finetuning_sentences(privacy),
        *canary_sentences(privacy),
    ]
