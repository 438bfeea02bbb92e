"""MODEL_CARD.md: what a person who receives the model must know, in the format of the Hugging Face hub."""

import re
from typing import Any

import yaml

from eval import claims, wording
from eval.verdict import verdict

UNCONDITIONAL = """import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
images = pipeline(batch_size=4, num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images"""

CLASS_CONDITIONAL = """import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True)
unet = pipeline.unet
scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
scheduler.set_timesteps(50)

class_labels = torch.tensor([0, 0, 1, 1])  # one class index per image; the stock pipeline cannot pass them
shape = (len(class_labels), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
images = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
with torch.no_grad():
    for t in scheduler.timesteps:
        prediction = unet(scheduler.scale_model_input(images, t), t, class_labels=class_labels).sample
        images = scheduler.step(prediction, t, images).prev_sample
images = (images / 2 + 0.5).clamp(0, 1)  # [4, C, H, W] in [0, 1]"""

GAN = """import torch
from train.gan import GANPipeline  # of Deffuse, from its folder: diffusers alone cannot load a GAN

pipeline = GANPipeline.from_pretrained("model")
classes = pipeline.generator.config.num_class_embeds
class_labels = [i % classes for i in range(4)] if classes else None
images = pipeline(4, class_labels, generator=torch.Generator().manual_seed(0)).images"""

TEXT_TO_IMAGE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True{absent})
images = pipeline("a prompt", num_inference_steps=50).images"""


INTRODUCTION = "A {kind} measured with Deffuse. Figures: `report.html`; all numbers: `report.json`."
INTENDED_USE = """Research on what generative models give away about their training pictures, and synthetic data within the
bounds that the measurements above support. Whoever passes the model or its images on decides, with the report at hand,
whether the leakage is acceptable for the people in the pictures."""
CLOSING = """Generations are not real pictures and must not be used to diagnose. Licence: not stated; the terms of the training
data apply."""


def model_card(report: dict[str, Any]) -> str:
    """Markdown with YAML front matter.

    Args:
        report: contents of report.json. ``model.classes`` (a number or a list of names), where there, makes the loading
            example class-conditional.
    """
    extraction = (report["privacy"] or {}).get("extraction")
    front = {"library_name": "deffuse" if _is_gan(report) else "diffusers", "tags": _tags(report, extraction)}
    limits = "\n".join(f"- {_text(line)}" for line in wording.not_measured(report))
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {_text(report['run']['name'])}",
        INTRODUCTION.format(kind="GAN" if _is_gan(report) else "diffusion model"),
        "## Training data\n\n" + _data(report["data"], report["model"] or {}),
        "## Defenses and what they claim\n\n" + _defenses(report),
        "## Leakage and quality\n\n" + _leakage(report, extraction),
        "## How to load\n\n" + _loading(report),
        "## Intended use\n\n" + INTENDED_USE,
        "## Limits\n\n" + limits,
        CLOSING,
    ]
    return "\n\n".join(parts) + "\n"


def _is_gan(report: dict[str, Any]) -> bool:
    return (report["model"] or {}).get("family") == "gan"


def _tags(report: dict[str, Any], extraction: dict[str, Any] | None) -> list[str]:
    kind = "text-to-image" if extraction and extraction["protocol"] == "prompted" else "unconditional-image-generation"
    if (report["model"] or {}).get("classes"):
        kind = "class-conditional-image-generation"
    names = [str(entry["name"]) for entry in report.get("defenses") or []]
    broken = ["not-private"] if claims.alarms(report) else []
    return ["deffuse", "privacy", kind, *(f"defense:{name}" for name in names), *broken]


def _data(data: dict[str, Any], model: dict[str, Any]) -> str:
    unit = f" from {data['units']:,} {_text(data['unit'])}s" if data.get("units") and data.get("unit") else ""
    lines = [
        f"- Source: {'restricted' if data.get('restricted') else '`' + _code(data['source']) + '`'}",
        f"- {data['train']:,} training records ({data['clusters']:,} distinct pictures){unit}; {data['heldout']:,} held "
        f"out, {data['calibration']:,} for calibration, {data['rejected']:,} of {data['found']:,} rejected",
        f"- Removed as copies before training: {wording.number(data['removed_by_dedup'])}",
    ]
    if model:
        steps, seen = wording.number(model["steps"]), wording.number(model["images_seen"])
        lines.append(
            f"- Model: `{_code(model['family'])}`, {wording.number(model['parameters'])} parameters; optimizer steps: {steps}, "
            f"images seen: {seen}"
        )
    return "\n".join(lines)


def _defenses(report: dict[str, Any]) -> str:
    defenses = report["defenses"]
    if not defenses:
        ours = (report["model"] or {}).get("steps") is not None
        return (
            "None: the model was trained without a defense." if ours else "None known: the model was trained elsewhere."
        )
    parts = [f"**{_text(text)}**" for text in claims.alarms(report)]
    heuristic = [
        f"- **{_text(entry['name'])}**: {_text(claim.get('statement', 'nothing stated'))} (heuristic, no guarantee)"
        for entry in defenses
        if (claim := entry.get("claim") or {}).get("kind") != "dp"
    ]
    parts += ["\n".join(heuristic)] if heuristic else []
    parts += [_private(name, words) for name, words in claims.of_report(report)]
    audited = claims.audit((report["privacy"] or {}).get("audit"))
    if audited:
        parts.append(f"Audit, {_text(audited['title'])}. {_text(audited['text'])}\n\n{_table(audited['rows'])}")
    return "\n\n".join(parts)


def _private(name: str, words: dict[str, Any]) -> str:
    """A claim of differential privacy: the sentence, the bound, the mechanism, and what it does not cover."""
    parts = [f"### {_text(name)}: " + ("differential privacy" if words["private"] else "NOT PRIVATE")]
    if words["private"]:
        parts += [_text(words["statement"])] if words["statement"] else []
        parts += [f"**{_text(words['short'])}**", *map(_text, words["meaning"])]
    parts.append(_table(words["accountants"] + words["mechanism"]))
    if words["group"]:
        heads = (f"{words['unit']}s at once", "epsilon", "odds change at most")
        parts.append(_table(words["group"], heads))
    parts += [_text(note) for note in words["notes"]]
    listed = words["not_covered"] or ["The claim names nothing: ask what it leaves out."]
    parts.append("Not covered:\n\n" + "\n".join(f"- {_text(line)}" for line in listed))
    return "\n\n".join(parts)


def _table(rows: list[tuple[str, ...]], heads: tuple[str, ...] = ("what", "value")) -> str:
    lines = [heads, tuple("---" for _ in heads), *(tuple(map(_text, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leakage(report: dict[str, Any], extraction: dict[str, Any] | None) -> str:
    lines = [f"- {_text(sentence)}" for sentence in verdict(report)["sentences"]]
    if extraction:
        lines.append(
            f"- Attack: {extraction['protocol']}, tier {extraction['tier']}, {extraction['generations']:,} generations"
        )
    utility = report.get("utility")
    if utility is None:
        lines.append("- Quality: not measured")
    else:
        lines.append(
            f"- Quality of the same checkpoint, against {utility['n_reference']:,} held-out pictures: "
            f"{wording.distance_name(utility['features'])} {wording.number(utility['fid'])}, "
            f"KID {wording.number(utility['kid'])}, precision {wording.number(utility['precision'])}, "
            f"recall {wording.number(utility['recall'])}"
        )
        downstream = utility.get("downstream")
        if downstream:
            lines.append(
                f"- A classifier trained on {downstream['n_train']:,} generations is right on "
                f"{wording.percent(downstream['accuracy'])} of {downstream['n']:,} real held-out pictures (macro AUC "
                f"{wording.fixed(downstream['macro_auc'])}); trained on as many real pictures on "
                f"{wording.percent(downstream['train_on_real']['accuracy'])}; the most frequent class is "
                f"{wording.percent(downstream['most_frequent'])}"
            )
    lines.append("- These figures are computed from private pictures: training and held-out ones.")
    return "\n".join(lines)


def _loading(report: dict[str, Any]) -> str:
    if report["model"] is None:
        return "There is no model here: only images that it generated were evaluated."
    return f"```python\n{loading_code(report)}\n```"


def loading_code(report: dict[str, Any]) -> str:
    """Python lines that load the model from the folder ``model`` and draw ``images``."""
    if _is_gan(report):
        return GAN
    if is_text_to_image(report):  # diffusers wants to hear what a pipeline does without
        parts = report["model"].get("absent_parts") or []
        return TEXT_TO_IMAGE.format(absent="".join(f", {part}=None" for part in parts))
    return CLASS_CONDITIONAL if report["model"].get("classes") else UNCONDITIONAL


def is_text_to_image(report: dict[str, Any]) -> bool:
    """Whether the model takes prompts, also where the attack by prompts was not run."""
    extraction = (report["privacy"] or {}).get("extraction")
    return (report["model"] or {}).get("family") == "latent" or bool(
        extraction and extraction["protocol"] == "prompted"
    )


def _text(value: Any) -> str:
    """Plain text inside Markdown: no markup, no HTML, no line breaks of its own."""
    text = re.sub(r"\s+", " ", str(value))
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", text).replace("<", "&lt;")


def _code(value: Any) -> str:
    """Text inside a Markdown code span."""
    return re.sub(r"\s+", " ", str(value)).replace("`", "'")
