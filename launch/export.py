"""`select=ARM`: the chosen arm of a finished comparison as a folder that can be handed over."""

import json
import shutil
from pathlib import Path
from typing import Any

from defenses.errors import UserError
from defenses.outputfilter import FOLDER as INDEX_FOLDER
from defenses.promptperturbation import FOLDER as PERTURBATION
from eval.card import is_text_to_image, loading_code
from launch.plan import Job, Plan
from train.files import atomic, write_json

HOLDER = "for-the-holder"  # sub-folder with what shows training pictures or figures that only their holder may see
CARD = "MODEL_CARD.md"
KEEP = f"`{HOLDER}/` is for the holder of the training pictures: it shows some of them. Do not pass it on."
PRIVATE = (
    "The model is differentially private; what was measured on the records is not. The model card with its figures therefore lies in "
    f"`{HOLDER}/`: publishing it gives away more than the claim covers."
)
OUTPUTS_ONLY = (
    "This arm protects the outputs, not the weights: whoever gets `model/` can leave out what stands before or behind the sampler. "
    "Serve the model; do not hand this folder out."
)
INDEX = "`model/output_filter/` holds small training pictures."
PERTURBED = """from diffusers import DiffusionPipeline
from defenses.perturbation import perturbed  # of Deffuse, from its folder

pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True)
told = perturbed(pipeline, ["a prompt"], {settings}, num_inference_steps=50)
images = pipeline(**told, num_inference_steps=50).images"""
GUARDED = """from diffusers import DiffusionPipeline
from defenses.outputfilter import load_filter  # of Deffuse, from its folder

pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True)
guard = load_filter("model/output_filter")
images = guard(pipeline, batch_size=4, num_inference_steps=50).images  # None in place of an image that is withheld"""
# where the stock pipeline cannot draw the images, the filter is asked about those that were drawn otherwise
ASKED = """

import numpy
from defenses.outputfilter import load_filter  # of Deffuse, from its folder

guard = load_filter("model/output_filter")
pixels = {pixels}  # uint8 [n, C, H, W]
withhold = guard.flagged(pixels)  # bool [n]: these must not leave"""
TENSOR = "(images * 255).round().to(torch.uint8).numpy()"
PILLOW = "numpy.stack([numpy.atleast_3d(image).transpose(2, 0, 1) for image in images])"


def export(whole: Plan) -> int:
    """Copies model, filter, card and claims of the arm's first seed to ``COMPARISON/selected/ARM/``, its report for the holder.

    The first seed, so that no seed is chosen by its result.

    Raises:
        UserError: the arm is not finished, or not in the comparison's report yet.
    """
    name, source = whole.config.select, whole.folder / "comparison.json"
    job = whole.of(name)[0]
    arms = json.loads(source.read_text())["arms"] if source.exists() else []
    entry = next((arm for arm in arms if arm["name"] == name), None)
    if not job.done or entry is None:
        raise UserError(
            "select", f"{job.label} is not finished", "run the comparison first: the same command without select"
        )
    folder, made = whole.folder / "selected" / name, whole.folder / "selected" / f".{name}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    (made / HOLDER).mkdir(parents=True, mode=0o700)
    _fill(made, job, entry)
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    print(f"selected: {folder}")
    if entry["comparable"] is False:
        print(f"note: {name} is not comparable: {entry['why']}")
    return 0


def _fill(made: Path, job: Job, entry: dict[str, Any]) -> None:
    report = json.loads((job.directory / "report.json").read_text())
    private = entry["kind"] == "dp"
    shutil.copytree(job.directory / "model", made / "model")
    shutil.copy2(job.directory / CARD, made / HOLDER / CARD if private else made / CARD)
    for file in ("report.json", "report.html"):
        shutil.copy2(job.directory / file, made / HOLDER / file)
    claims = [{"defense": each["name"], **each["claim"]} for each in report["defenses"]]
    write_json(made / "claim.json", {"arm": job.arm, "seed": job.seed, "protects": entry["protects"], "claims": claims})
    with atomic(made / "README.md") as file:
        file.write(_readme(job, entry, report, private))


def _readme(job: Job, entry: dict[str, Any], report: dict[str, Any], private: bool) -> str:
    filtered = (job.directory / "model" / INDEX_FOLDER).is_dir()
    notes = [OUTPUTS_ONLY] if entry["protects"] == "outputs" else []
    notes += [INDEX] if filtered else []
    notes += [PRIVATE] if private else []
    code = _code(report, filtered)
    parts = [
        f"# {job.arm}, seed {job.seed}",
        f"What is claimed: `claim.json`; what was measured: `{HOLDER + '/' if private else ''}{CARD}`.",
        *notes,
        KEEP,
        f"```python\n{code}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _code(report: dict[str, Any], filtered: bool) -> str:
    """Lines that draw images as the arm would: with the embeddings that it would change, and held against its filter.

    Args:
        filtered: whether the model has an output filter.
    """
    code, gan = loading_code(report), report["model"]["family"] == "gan"
    by_prompts, plain = is_text_to_image(report), not report["model"].get("classes") and not gan
    perturbation = next((each["settings"] for each in report["defenses"] if each["name"] == PERTURBATION), None)
    if perturbation is not None:
        told = {key: perturbation[key] for key in ("target", "steps", "learning_rate")}
        code = PERTURBED.format(settings=", ".join(f"{key}={value}" for key, value in told.items()))
    if filtered and plain and not by_prompts:
        return GUARDED
    return code + ASKED.format(pixels=PILLOW if gan or by_prompts else TENSOR) if filtered else code
