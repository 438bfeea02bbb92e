"""FineXtract (Wu et al. 2025): whoever publishes a fine-tuned model beside a public base publishes the difference.

Images are drawn with the step from base to fine-tuned model taken further (`eval.extrapolation`), those that agree are gathered
into clusters (`eval.clusters`), and one candidate of each is verified as any other, against a control (`eval.control`).
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from defenses.errors import UserError
from defenses.neighbours import VIEWS
from defenses.ranks import on_main, together
from eval import captions, finetuningcontrol
from eval.clusters import Clusters, find_clusters, medoid
from eval.denoiser import Denoiser
from eval.extrapolation import KEY, Guidance, Pair, draw, load_base
from eval.finetuningfigures import CANDIDATES, PICTURES, Arm, judged, per_picture
from eval.generations import Generations
from eval.prompted import tiled_l2
from eval.suite import Finding, Scene
from eval.target import pictures_of
from train.data import Dataset
from train.files import write_json

FOLDER = "finetuning"  # below the output: images of each weight
MOST = 8192  # images of one weight: all pairs of them are compared
_CONTENTS = "settings.json"  # of an image folder: what decides its images


@dataclass(kw_only=True)
class FinetuningConfig:
    """Section ``attack.finetuning``."""

    # folder of the model that was fine-tuned; null: model.pretrained of the run. For a model of others it must be given
    base: str | None = None
    # w, how far the step from base to fine-tuned model is taken; 1: the fine-tuned model alone, what the others are held against
    # (put first, added where it is missing); the paper: 3 to 5
    weights: list[float] = field(default_factory=lambda: [1.0, 3.0])
    correction: float = 0.0  # k, of a further term k eps_base; the paper: 0 for LoRA, -0.02 for full fine-tuning
    base_caption: Literal["empty", "same"] = "empty"  # captions: what the base is told; empty: the paper's
    guidance: float = 3.0  # captions: scale of classifier-free guidance at weight 1; 1: none; the paper: 3
    prompts: str | None = (
        None  # text file, a prompt a line; null: the training captions, which the attacker is taken to know
    )
    max_prompts: int = 8  # prompts, those whose picture occurs most often first
    per_prompt: int = 32  # images of each prompt; the paper: 500 of the one prompt of a data set of 10
    count: int = 256  # images without captions
    steps: int = 50  # of DDIM
    batch_size: int = 64  # images in one pass of the networks
    clusters: int | None = (
        None  # looked for; null: the distinct training pictures (the paper), at most images / clique_size
    )
    # largest tiled l2 of two images of a cluster, lowered until there are as many clusters as are looked for
    edge_threshold: float = 0.15
    clique_size: int = 2  # images in a cluster; the paper: 1
    clique_seconds: float = 30.0  # of the exact clique searches of one weight together; 0: greedy cliques alone
    verify_l2: float = 0.15  # largest l2 of a candidate to its nearest picture
    permutations: int = 9999  # of each test; its smallest p-value is 1 / (permutations + 1)

    def __post_init__(self):
        section = "attack.finetuning"
        for key in (
            "max_prompts", "per_prompt", "count", "steps", "batch_size", "clusters", "clique_size", "permutations",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{section}.{key}", f"{value} is less than 1", "take a positive number")
        for key in ("edge_threshold", "verify_l2"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"{section}.{key}", f"{getattr(self, key)} is not positive", "take a number above 0")
        if not 0 <= self.clique_seconds < math.inf:
            raise UserError(f"{section}.clique_seconds", f"{self.clique_seconds} is no time", "take 0 or more")
        for key in ("correction", "guidance"):
            if not math.isfinite(getattr(self, key)):
                raise UserError(f"{section}.{key}", "is no finite number", "leave it out")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UserError(f"{section}.weights", f"{self.weights} are not all positive", "e.g. [1.0, 3.0]")
        self.weights = list(dict.fromkeys([1.0, *self.weights]))
        if len({f"{weight:g}" for weight in self.weights}) < len(self.weights):  # names of folders
            raise UserError(f"{section}.weights", f"{self.weights} do not differ in six digits", "take them apart")
        for key, images in (("count", self.count), ("per_prompt", self.per_prompt * self.max_prompts)):
            if images > MOST:
                raise UserError(f"{section}.{key}", f"gives {images:,} images, of which all pairs are compared", f"at most {MOST:,}")  # fmt: skip
        if self.base is not None and not (Path(self.base) / "model_index.json").is_file():
            raise UserError(
                f"{section}.base", f"{self.base} holds no model_index.json", "give the folder of a whole pipeline"
            )

    def guided(self, weight: float) -> Guidance:
        """How both models are combined at this weight."""
        return Guidance(weight, self.correction, self.guidance, self.base_caption)


def check(config: Any, foreign: str | None) -> None:
    """Refuses the attack where nothing was fine-tuned, or where that cannot be known.

    Args:
        foreign: the pipeline of others that is evaluated; None: a run of ours.

    Raises:
        UserError: attack.finetuning.base or .steps.
    """
    settings = config.attack.finetuning
    if settings is None:
        return
    if foreign is not None and settings.base is None:
        raise UserError(
            KEY, "is not set, and nobody knows what this model was fine-tuned from", "give the folder of that model"
        )
    if foreign is None and config.model.pretrained is None:
        raise UserError(
            KEY, "nothing was fine-tuned: the run starts from scratch", "set attack.finetuning=null or model.pretrained"
        )
    if foreign is None and settings.steps > config.train.diffusion.timesteps:
        raise UserError(
            "attack.finetuning.steps",
            f"is more than train.diffusion.timesteps={config.train.diffusion.timesteps}",
            "lower it",
        )


def run(scene: Scene) -> Finding | None:
    """Draws images at each weight, gathers and verifies them, on all ranks; each returns the same.

    Returns:
        The part ``finetuning`` of the report, with the tables finetuning.csv and finetuning_pictures.csv; None where there is no
        model to ask.

    Raises:
        UserError: the base does not fit, or the settings do not fit the model.
    """
    if scene.denoiser is None:
        return None
    settings, config = scene.config.attack.finetuning, scene.config
    folder = base_folder(scene)
    shape = tuple(scene.target.dataset.images.shape[1:])
    pair = load_base(scene.denoiser, scene.target.pipeline, folder, shape)
    _refuse_misfit(settings, pair)
    told = captions.for_prompts(scene.target, config)
    prompts = prompts_of(settings, pair.tuned, told)
    drawn = [_images(scene, pair, prompts, weight, folder) for weight in settings.weights]
    control = finetuningcontrol.plan(config, told, prompts) if prompts else None
    asked = settings.weights if control and control.prompts else []
    others = [_images(scene, pair, control.prompts, weight, folder, finetuningcontrol.FOLDER) for weight in asked]
    training, heldout = (pictures_of(scene.target.dataset, split) for split in ("train", "heldout"))
    arms = _arms(scene, drawn, settings.clusters or len(training.ids))
    report, rows, near = judged(arms, training, heldout, scene)
    if control is not None:
        finetuningcontrol.add(report, control, drawn, others, told, scene)
    report = {
        "settings": _settings(settings, pair, prompts),
        "base": settings.base or config.model.pretrained,
        "pictures": len(training.ids),
        "prompts": len(prompts) or None,
        **report,
    }
    tables = {"finetuning.csv": (CANDIDATES, rows)}
    tables["finetuning_pictures.csv"] = (PICTURES, per_picture(near, training, heldout))
    return Finding(report, tables)


def _arms(scene: Scene, drawn: list[Generations], wanted: int) -> list[Arm]:
    """The images of every weight and their clusters; ranks share the weights."""
    settings, config, accelerator = scene.config.attack.finetuning, scene.config, scene.accelerator

    def cluster() -> list[tuple[int, Clusters, list[int], list[float]]]:
        found = []
        for place in range(accelerator.process_index, len(drawn), accelerator.num_processes):
            distance = tiled_l2(_read(drawn[place], config), accelerator.device)
            limits = settings.clique_size, settings.edge_threshold, settings.clique_seconds
            clusters = find_clusters(distance, bounded, *limits)
            chosen = [medoid(distance, nodes) for nodes in clusters.cliques]
            found.append((place, clusters, chosen, [_mean_distance(distance, nodes) for nodes in clusters.cliques]))
        return found

    bounded = max(1, min(wanted, len(drawn[0].groups[0][1]) // settings.clique_size))
    found = sorted(gather_object(together(accelerator, cluster)), key=lambda part: part[0])
    return [
        Arm(weight, images.groups[0][1], _read(images, config), bounded, *of_weight)
        for weight, images, (_, *of_weight) in zip(settings.weights, drawn, found, strict=True)
    ]


def base_folder(scene: Scene) -> Path:
    """Folder of the base; a model of the hub is fetched (safetensors, no code) where it is not there yet.

    Raises:
        UserError: it cannot be had.
    """
    settings, model = scene.config.attack.finetuning, scene.config.model
    source = settings.base or model.pretrained
    if Path(source).is_dir():
        return Path(source)

    def fetched() -> str:
        try:
            return str(DiffusionPipeline.download(source, revision=model.revision, use_safetensors=True))
        except Exception as error:  # network, rights, names: the hub has many
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise UserError(KEY, f"{source}: {reason}", "give the folder of the base model") from error

    on_main(scene.accelerator, fetched)
    return Path(together(scene.accelerator, fetched))  # from the cache, where ranks share it


def prompts_of(settings: FinetuningConfig, denoiser: Denoiser, dataset: Dataset) -> list[str]:
    """Prompts of a text-to-image model: a file's lines, else training captions, those of the most copied pictures first, else the
    empty one; none for other models."""
    if denoiser.kind != "caption":
        return []
    if settings.prompts is not None:
        try:
            found = [line.strip() for line in Path(settings.prompts).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "attack.finetuning.prompts", f"{settings.prompts}: {error}", "give a text file, a prompt a line"
            ) from error
    else:
        records = sorted(
            (dataset.records[row] for row in dataset.rows("train")), key=lambda record: (-record.copies, record.source)
        )
        found = [record.caption for record in records]
    distinct = list(dict.fromkeys(prompt for prompt in found if prompt))
    return distinct[: settings.max_prompts] or [""]


def _refuse_misfit(settings: FinetuningConfig, pair: Pair) -> None:
    if settings.steps > pair.tuned.timesteps:
        raise UserError(
            "attack.finetuning.steps", f"is more than the model's {pair.tuned.timesteps} timesteps", "lower it"
        )
    if settings.correction and float(pair.tuned.alphas_cumprod.min()) == 0:
        raise UserError(
            "attack.finetuning.correction", "has no meaning at the end of a schedule without signal", "set it to 0"
        )


def _images(
    scene: Scene, pair: Pair, prompts: list[str], weight: float, base: Path, where: str = FOLDER
) -> Generations:
    """Images of one weight in ``where``; those of an earlier run under the same settings are kept, others removed."""
    settings, accelerator = scene.config.attack.finetuning, scene.accelerator
    folder, seed = scene.target.output.path / where / f"w-{weight:g}", scene.config.run.seed
    guidance = settings.guided(weight)
    contents = {
        **asdict(guidance),
        "base": str(base),
        "prompts": prompts,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seed": seed,
    }

    def prepare() -> None:
        file = folder / _CONTENTS
        if not file.exists() or json.loads(file.read_text()) != contents:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            write_json(file, contents)

    on_main(accelerator, prepare)
    names = draw(
        pair, guidance, prompts, folder, accelerator, count=settings.per_prompt if prompts else settings.count,
        batch_size=settings.batch_size, steps=settings.steps, seed=seed,
    )  # fmt: skip
    return Generations(folder, [("", names)], {})


def _read(images: Generations, config: Any) -> np.ndarray:
    return images.read(images.groups[0][1], config.data.image_size, config.data.channels)


def _mean_distance(distance: np.ndarray, nodes: list[int]) -> float:
    """Between different members; 0 for a clique of one."""
    size = len(nodes)
    return float(distance[np.ix_(nodes, nodes)].sum() / (size * (size - 1))) if size > 1 else 0.0


def _settings(settings: FinetuningConfig, pair: Pair, prompts: list[str]) -> dict[str, Any]:
    """All that decides the figures."""
    left_out = {"base", "batch_size", "prompts", "weights"}
    left_out |= {"count"} if prompts else {"max_prompts", "per_prompt", "guidance", "base_caption"}
    return {key: value for key, value in asdict(settings).items() if key not in left_out} | {
        "sampler": "ddim",
        "space": "latents" if pair.tuned.latent else "pixels",
        "condition": pair.tuned.kind,
        "views": list(VIEWS),
    }
