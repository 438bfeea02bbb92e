"""What lies in a text-to-image pipeline's folder, found out before any of it is loaded: JSON and names of files alone."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from safetensors import safe_open

from defenses.errors import UserError
from train.pipelinefit import check_fit, one_line, refuse

INDEX = "model_index.json"
KINDS = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
# those with a schedule of betas
SCHEDULERS = tuple(name for name in KarrasDiffusionSchedulers.__members__ if name != "EDMEulerScheduler")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP, POOLED = ("transformers", ("CLIPTextModel",)), ("transformers", ("CLIPTextModelWithProjection",))
# kind -> part -> library and classes
STABLE_DIFFUSION = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "scheduler": ("diffusers", SCHEDULERS),
    "tokenizer": ("transformers", TOKENIZERS),
    "text_encoder": CLIP,
}
PARTS = {
    "sd": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION | {"tokenizer_2": ("transformers", TOKENIZERS), "text_encoder_2": POOLED},
    "sd3": {
        "transformer": ("diffusers", ("SD3Transformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL",)),
        "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
        "tokenizer": ("transformers", TOKENIZERS),
        "text_encoder": POOLED,
        "tokenizer_2": ("transformers", TOKENIZERS),
        "text_encoder_2": POOLED,
        "tokenizer_3": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "text_encoder_3": ("transformers", ("T5EncoderModel",)),
    },
}
OPTIONAL = {"tokenizer_3", "text_encoder_3"}  # both or neither
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # neither trained nor released
STEMS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# start of a class name -> why it is refused, and what to do; the first that fits
REFUSED = (
    ("GANPipeline", "a GAN, which does not start from released weights", "set model.family=gan model.pretrained=null"),
    (("DDIMPipeline", "DDPMPipeline"), "a pixel-space pipeline, without text", "set model.family=pixel"),
    (("Flux", "PixArt", "DiT"), "a transformer of a kind that is not offered", "give Stable Diffusion 1, 2, XL or 3"),
)
TASKS = {
    "Inpaint": "inpainting",
    "Img2Img": "image-to-image",
    "Upscale": "upscaling",
    "ControlNet": "controlled generation",
    "InstructPix2Pix": "editing",
    "Depth2Img": "image-to-image with depth",
}


@dataclass
class Layout:
    """A folder that was looked through.

    Attributes:
        classes: part -> name of its class.
        configs: part -> its JSON file, for all but the tokenizers.
        variants: part with weights -> variant of its file names, such as ``fp16``; None: plain names.
        force_zeros_for_empty_prompt: of XL: an empty negative prompt is embedded as zeros.
    """

    kind: str
    classes: dict[str, str]
    configs: dict[str, dict[str, Any]]
    variants: dict[str, str | None]
    force_zeros_for_empty_prompt: bool


def examine(folder: Path, source: str) -> Layout:
    """Checks the whole folder; opens JSON files and the headers of safetensors files, nothing else.

    Args:
        source: how the pipeline is called in errors.

    Raises:
        UserError: it is not a text-to-image pipeline of a known class, or a part is missing, of another class, has weights as
            pickles alone or damaged ones, or does not fit the others.
    """
    layout = examine_settings(folder, source)
    for part in layout.classes:
        if part in STEMS:
            layout.variants[part] = choose_variant(part, file_names(folder / part), source)
            _check_weights(folder / part, part, layout.variants[part], source)
    return layout


def examine_settings(folder: Path, source: str) -> Layout:
    """The checks that need no weights."""
    index = read_json(folder / INDEX, source)
    kind, classes = read_index(index, source)
    configs = {}
    for part in classes:
        if part.startswith("tokenizer"):
            names = file_names(folder / part)
            clip = part != "tokenizer_3"
            if "tokenizer.json" not in names and not (clip and {"vocab.json", "merges.txt"} <= set(names)):
                known = "neither tokenizer.json nor vocab.json and merges.txt" if clip else "no tokenizer.json"
                raise refuse(source, f"{part} holds {known}")
        else:
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            configs[part] = read_json(folder / part / name, source)
    check_fit(kind, classes, configs, source)
    return Layout(kind, classes, configs, {}, index.get("force_zeros_for_empty_prompt", True) is not False)


def file_names(folder: Path) -> list[str]:
    """Names of the files in a folder; none where there is no folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: there is none.
    """
    name = f"{path.parent.name}/{path.name}" if path.name != INDEX else INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse(source, f"{name} is missing or unreadable") from error
    except ValueError as error:
        raise refuse(source, f"{name} is not JSON") from error
    if not isinstance(found, dict):
        raise refuse(source, f"{name} is not a JSON object")
    return found


def read_index(index: dict[str, Any], source: str) -> tuple[str, dict[str, str]]:
    """Kind of pipeline, and the class of each part."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise _unknown_class(name, source)
    kind = KINDS[name]
    wanted = PARTS[kind]
    classes = {}
    for part, (library, known) in wanted.items():
        entry = index.get(part)
        if part in OPTIONAL and entry in (None, [None, None]):
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry == [None, None]:
            raise refuse(source, f"has no {part}")
        if entry[0] != library or entry[1] not in known:
            several = f"one of the {library} schedulers with betas" if known is SCHEDULERS else f"{library}.{known[0]}"
            raise refuse(source, f"its {part} is {entry[0]}.{entry[1]}, not {several}", "custom code is never run")
        classes[part] = entry[1]
    for part, entry in index.items():
        if part not in wanted and part not in LEFT_OUT and isinstance(entry, list) and entry != [None, None]:
            raise refuse(source, f"has a further part {part}, which {name} does not have", "custom code is never run")
    if len(OPTIONAL & classes.keys()) == 1:
        raise refuse(source, f"has {(OPTIONAL & classes.keys()).pop()} without {(OPTIONAL - classes.keys()).pop()}")
    return kind, classes


def _unknown_class(name: Any, source: str) -> UserError:
    if not isinstance(name, str):
        return refuse(source, f"its {INDEX} names no class of diffusers", "custom code is never run")
    for starts, what, remedy in REFUSED:
        if name.startswith(starts):
            return refuse(source, f"is a {name}: {what}", remedy)
    for task, what in TASKS.items():
        if task in name:
            return refuse(source, f"is a {name}, for {what}", "give the text-to-image pipeline of that model")
    return refuse(source, f"is a {name}", f"known are {', '.join(KINDS)}")


def choose_variant(part: str, names: Iterable[str], source: str) -> str | None:
    """Variant of the weights to load: plain names first, else ``fp16``, else the only one there is.

    Args:
        names: files of the part's folder.

    Raises:
        UserError: no safetensors, or several variants.
    """
    names = list(names)
    stem = STEMS[part]
    pattern = rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(\w+))?\.json"
    found = {match[1] or match[2] for name in names if (match := re.fullmatch(pattern, name))}
    if None in found:
        return None
    if "fp16" in found or len(found) == 1:
        return "fp16" if "fp16" in found else found.pop()
    if found:
        raise refuse(source, f"{part} has weights of the variants {', '.join(sorted(found))}", "keep one of them")
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles:
        raise refuse(
            source,
            f"{part} holds its weights as a pickle alone ({pickles[0]}), which can run code and is not opened",
            "convert it where you trust it: from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)",
        )
    raise refuse(source, f"{part} holds no {stem}.safetensors")


def weight_patterns(part: str, variant: str | None) -> list[str]:
    """Shell-style patterns of the files that hold these weights, whole or in shards (whose variant stands before their number, or
    after it where an older library wrote them)."""
    dot = f".{variant}" if variant else ""
    stem = f"{part}/{STEMS[part]}"
    shards = {f"{stem}{dot}-*-of-*.safetensors", f"{stem}-*-of-*{dot}.safetensors"}
    return [f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json", *sorted(shards)]


def _check_weights(folder: Path, part: str, variant: str | None, source: str) -> None:
    """Every file of the weights exists and has a sound header; no index leads to a pickle or out of the folder."""
    if (folder / "adapter_config.json").exists():  # transformers would load what it names
        raise refuse(
            source, f"{part} holds a PEFT adapter beside its weights", "merge it, or remove adapter_config.json"
        )
    dot = f".{variant}" if variant else ""
    whole, index = folder / f"{STEMS[part]}{dot}.safetensors", folder / f"{STEMS[part]}.safetensors.index{dot}.json"
    files = {whole.name} if whole.exists() else set()
    if index.exists():
        shards = read_json(index, source).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise refuse(source, f"{part}/{index.name} names files other than safetensors beside it")
        files |= names
    for name in sorted(files):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except Exception as error:  # SafetensorError is no subclass of OSError or ValueError
            raise refuse(
                source, f"{part}/{name} is damaged or missing: {one_line(error)}", "copy it again, or git lfs pull"
            ) from error
