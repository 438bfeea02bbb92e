"""`select=ARM`: the chosen arm of a finished comparison as a folder that can be handed over."""

import json
import shutil

from defenses.errors import UserError
from launch.plan import Plan
from train.files import atomic, write_json

OUTPUTS_ONLY = (
    "This arm protects the outputs, not the weights: whoever gets `model/` can switch the filter off, and `model/output_filter/` "
    "holds small training pictures. Serve the model; do not hand this folder out."
)


def export(whole: Plan) -> int:
    """Copies model, filter, card, claims and report of the arm's first seed to ``COMPARISON/selected/ARM/``.

    The first seed, so that no seed is chosen by its result.

    Raises:
        UserError: no such arm, or it is not finished.
    """
    name = whole.config.select
    if name not in whole.overrides:
        raise UserError("select", f"{name} is not an arm", f"one of {', '.join(whole.overrides)}")
    job, source = whole.of(name)[0], whole.folder / "comparison.json"
    if not job.done or not source.exists():
        raise UserError(
            "select", f"{job.label} is not finished", "run the comparison first: the same command without select"
        )
    entry = next(arm for arm in json.loads(source.read_text())["arms"] if arm["name"] == name)
    report = json.loads((job.directory / "report.json").read_text())
    folder, made = whole.folder / "selected" / name, whole.folder / "selected" / f".{name}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    model = job.directory / "model"
    shutil.copytree(model if model.is_dir() else job.parent.directory / "model", made / "model")
    for file in ("MODEL_CARD.md", "report.json", "report.html"):
        shutil.copy2(job.directory / file, made / file)
    claims = [{"defense": each["name"], **each["claim"]} for each in report["defenses"]]
    write_json(made / "claim.json", {"arm": name, "seed": job.seed, "protects": entry["protects"], "claims": claims})
    with atomic(made / "README.md") as file:
        file.write(_readme(name, job.seed, entry, (made / "model" / "output_filter").is_dir()))
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    print(f"selected: {folder}")
    if entry["comparable"] is False:
        print(f"note: {name} is not comparable: {entry['why']}")
    return 0


def _readme(name: str, seed: int, entry: dict, filtered: bool) -> str:
    lines = [
        f"# {name}, seed {seed}",
        "",
        "What it leaks and what is claimed: `MODEL_CARD.md`, `report.html`, `claim.json`.",
        "",
    ]
    if entry["protects"] == "outputs":
        lines += [OUTPUTS_ONLY, ""]
    code = [
        "from diffusers import DiffusionPipeline",
        'pipeline = DiffusionPipeline.from_pretrained("model", use_safetensors=True)',
    ]
    if filtered:
        code = ["from defenses.outputfilter import load_filter", *code, 'guard = load_filter("model/output_filter")']
    code.append(
        f"images = {'guard(pipeline, ' if filtered else 'pipeline('}batch_size=4, num_inference_steps=50).images"
    )
    return "\n".join([*lines, "```python", *code, "```", ""])
