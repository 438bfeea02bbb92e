"""The commands as a user gives them: exit status, messages, and the three forms of eval/run.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from defenses.errors import UserError
from defenses.promptperturbation import PromptPerturbation
from eval import run as evaluation
from eval import stage
from tests.pipelines import stable_diffusion
from tests.small import OVERRIDES
from train import cli
from train import run as training
from train.diffusion import DiffusionConfig, noise_schedule
from train.models import ModelConfig, build, save_pipeline
from train.phantom import PhantomConfig, phantom_items

ROOT = Path(__file__).resolve().parent.parent
SMALL_DATA = [text for text in OVERRIDES if text.startswith(("data.image_size", "run.", "generate."))]


def evaluate(*overrides: str) -> dict:
    arguments = cli.Arguments(None, False, [*SMALL_DATA, *overrides])
    assert evaluation.main(arguments) == 0
    values = dict(text.split("=", 1) for text in overrides)
    folder = Path(values["run.output_dir"]) / values["run.name"]
    return json.loads((folder / "report.json").read_text())


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(path)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """80 training and 60 held-out phantoms, uint8 [n, 1, 32, 32], all different."""
    config = PhantomConfig(pictures=80, copied=0, outliers=0, heldout=60, calibration=0)
    drawn = {split: [] for split in ("train", "heldout")}
    for item in phantom_items(config):
        drawn[item.split].append(item.draw(32, 1))
    return np.stack(drawn["train"]), np.stack(drawn["heldout"])


@pytest.fixture(scope="module")
def folders(pictures, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pictures")
    for name, images in zip(("train", "heldout"), pictures, strict=True):
        for number, image in enumerate(images):
            write(root / name / f"{number:03d}.png", image)
    return root / "train", root / "heldout"


def test_fabricated_generations_give_the_planted_answer(folders, pictures, tmp_path):
    """Four pictures copied in four disguises, blends of three and noise: exactly those four are verified, nothing of the held-out."""
    train, heldout = pictures
    random = np.random.default_rng(0)
    noisy = np.clip(train[1] + random.normal(0, 0.01 * 255, train[1].shape), 0, 255).round().astype(np.uint8)
    lopsided = np.abs(train[40:].astype(float) - train[40:, :, :, ::-1]).mean((1, 2, 3)).argmax() + 40
    planted = [train[0], noisy, train[lopsided][:, :, ::-1], np.clip(train[3].astype(int) + 8, 0, 255).astype(np.uint8)]
    blends = [train[a : a + 3].mean(0).astype(np.uint8) for a in range(10, 30, 2)]
    noise = list(random.integers(0, 256, (10, 1, 32, 32), dtype=np.uint8))
    for number, image in enumerate([*planted, *blends, *noise]):
        write(tmp_path / "made" / f"g{number:02d}.png", image)
    report = evaluate(
        f"generations={tmp_path / 'made'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}",
        "data.image_size=32", f"run.output_dir={tmp_path}", "run.name=planted",
    )  # fmt: skip
    extraction = report["privacy"]["extraction"]
    assert (extraction["generations"], extraction["candidates"], extraction["verified"]) == (24, 4, 4)
    assert extraction["verified_identity_view"] == 3  # the mirrored copy needs a view
    assert extraction["control"]["verified"] == 0 and extraction["control"]["p_value"] is None
    assert report["model"] is None and report["utility"]["n_generated"] == 24


def test_never_trained_pictures_are_not_verified(folders, tmp_path):
    report = evaluate(
        f"generations={folders[1]}", f"data.source={folders[0]}", "data.image_size=32",
        f"run.output_dir={tmp_path}", "run.name=none",
    )  # fmt: skip
    assert report["privacy"]["extraction"]["verified"] == 0 and report["privacy"]["extraction"]["control"] is None
    assert report["utility"] is None


def test_prompted_generations(folders, pictures, tmp_path):
    """One folder per prompt: 16 noisy copies of picture 5 are a clique, 16 different pictures are not."""
    train, heldout = pictures
    random = np.random.default_rng(1)
    for number in range(16):
        copy = np.clip(train[5] + random.normal(0, 4, train[5].shape), 0, 255).astype(np.uint8)
        write(tmp_path / "made" / "memorised" / f"{number}.png", copy)
        write(tmp_path / "made" / "fresh" / f"{number}.png", heldout[number])
    report = evaluate(
        f"generations={tmp_path / 'made'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}",
        "data.image_size=32", f"run.output_dir={tmp_path}", "run.name=prompts",
    )  # fmt: skip
    extraction = report["privacy"]["extraction"]
    assert (extraction["protocol"], extraction["candidates"], extraction["verified"]) == ("prompted", 1, 1)
    rows = (tmp_path / "prompts" / "attack" / "cliques.csv").read_text().splitlines()
    assert len(rows) == 3 and any(row.startswith("memorised,16,120,16,true") for row in rows)


@pytest.mark.parametrize("classes", [0, 3])
def test_foreign_pixel_pipeline(classes, folders, tmp_path):
    model = build(ModelConfig(), 16, 1, classes).eval()
    save_pipeline(tmp_path / "model", model, noise_schedule(DiffusionConfig()))
    report = evaluate(
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"run.output_dir={tmp_path}", "run.name=foreign"
    )
    assert report["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["privacy"]["extraction"]["generations"] == 16 and report["defenses"] == []


def test_foreign_text_pipeline(folders, tmp_path):
    """A whole (random) Stable Diffusion of two thousand weights, attacked with prompts."""
    text_pipeline(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("an x-ray\na heart\n")
    report = evaluate(
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"generate.prompts={tmp_path / 'prompts.txt'}",
        "generate.per_prompt=4", f"run.output_dir={tmp_path}", "run.name=text",
    )  # fmt: skip
    extraction = report["privacy"]["extraction"]
    assert extraction["protocol"] == "prompted" and extraction["generations"] == 8
    assert len(list((tmp_path / "text" / "generations").glob("*/*.png"))) == 8


def text_pipeline(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["-"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=4, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(latent_channels=4, sample_size=16, **kinds, **blocks)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole small run, made by the entry point."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [*OVERRIDES, f"run.output_dir={folder}", "run.name=whole", "defenses.dedup={}", "data.label_key=label"]
    assert training.main(cli.Arguments(None, False, overrides)) == 0
    return folder / "whole"


def test_whole_run(finished):
    """Everything that the run directory promises is there, and its numbers agree with each other."""
    report = json.loads((finished / "report.json").read_text())
    assert report["schema"] == 1 and report["run"]["config_sha256"] and report["model"]["steps"] == 7
    data = report["data"]
    assert data["found"] == data["rejected"] + data["train"] + data["calibration"] + data["heldout"]
    assert (data["train"], data["clusters"], data["removed_by_dedup"]) == (24 + 2 * 2, 24, 4)
    assert report["defenses"][0]["claim"]["removed"]["exact"] + report["defenses"][0]["claim"]["removed"]["near"] == 4
    assert report["privacy"]["extraction"]["by_copies"]["3"]["pictures"] == 2
    rows = (finished / "manifest.csv").read_text().splitlines()
    assert len(rows) == data["found"] + 1 and sum(",false,dedup: " in row for row in rows) == 4
    assert oct(finished.stat().st_mode & 0o777) == "0o700"
    for name in ("report.html", "MODEL_CARD.md", "metrics.jsonl", "attack/matches.csv", "environment.json"):
        assert (finished / name).stat().st_size > 0
    names = sorted({item.label for item in phantom_items(PhantomConfig())})
    assert report["model"]["classes"] == names


def test_the_same_command_says_that_all_is_done(finished, capsys):
    before = (finished / "report.json").read_bytes()
    overrides = [
        *OVERRIDES, f"run.output_dir={finished.parent}", "run.name=whole", "defenses.dedup={}", "data.label_key=label"
    ]  # fmt: skip
    assert training.main(cli.Arguments(None, False, overrides)) == 0
    assert "all done" in capsys.readouterr().out and (finished / "report.json").read_bytes() == before


def test_evaluating_again_leaves_the_report_alone(finished):
    before = (finished / "report.json").read_bytes()
    evaluation.main(cli.Arguments(None, False, [f"run_dir={finished}", "run.name=more", "generate.count=20"]))
    again = json.loads((finished / "eval" / "more" / "report.json").read_text())
    assert (finished / "report.json").read_bytes() == before
    assert again["privacy"]["extraction"]["generations"] == 20 and again["data"]["removed_by_dedup"] == 4
    first = [(finished / "generations" / f"{i:06d}.png").read_bytes() for i in range(16)]
    same = [(finished / "eval" / "more" / "generations" / f"{i:06d}.png").read_bytes() for i in range(16)]
    assert first == same  # the same seed and whole blocks: more images begin with the same ones


def test_generation_resumes(finished, monkeypatch):
    """Images that are there are kept; only missing ones are drawn."""
    arguments = cli.Arguments(None, False, [f"run_dir={finished}", "run.name=resumed", "generate.batch_size=4"])
    evaluation.main(arguments)
    folder = finished / "eval" / "resumed"
    kept = {file.name: file.stat().st_mtime_ns for file in (folder / "generations").glob("*.png")}
    (folder / "generations" / "000005.png").unlink()
    (folder / "report.json").unlink()
    evaluation.main(arguments)
    now = {file.name: file.stat().st_mtime_ns for file in (folder / "generations").glob("*.png")}
    assert {name for name in kept if kept[name] != now[name]} == {f"{i:06d}.png" for i in range(4, 8)}


def test_restricted_run_shows_no_training_picture(finished):
    evaluation.main(cli.Arguments(None, False, [f"run_dir={finished}", "run.name=closed", "data.restricted=true"]))
    folder = finished / "eval" / "closed"
    report = json.loads((folder / "report.json").read_text())
    assert report["data"]["restricted"] is True
    assert "data:image/png" not in (folder / "report.html").read_text()  # plots are SVG
    with pytest.raises(UserError, match=r"data\.restricted: cannot be lifted"):
        evaluation.main(cli.Arguments(None, False, [f"run_dir={folder}", "data.restricted=false"]))


def test_push_uploads_the_model_and_its_card_only(finished, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, *args, **kwargs):
            calls.append(("create", args, kwargs["private"]))

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            assert ignore_patterns == ["output_filter/*"]  # holds training pictures
            calls.append(("folder", repo_id, folder_path))

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            calls.append(("file", path_in_repo, path_or_fileobj.name))

    monkeypatch.setattr(stage.huggingface_hub, "HfApi", Hub)
    evaluation.main(cli.Arguments(None, False, [f"run_dir={finished}", "run.name=up", "report.push_to_hub=me/model"]))
    assert calls == [
        ("create", ("me/model",), True),
        ("folder", "me/model", finished / "model"),
        ("file", "README.md", "MODEL_CARD.md"),
    ]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "run_dir"),
        (["run_dir=a", "pipeline=b"], "run_dir"),
        (["run_dir=nowhere"], "run_dir"),
        (["pipeline=nowhere", "data.source=phantom"], "pipeline"),
        (["pipeline=nowhere"], "data.source"),
        (["generations=nowhere", "data.source=phantom"], "generations"),
    ],
)
def test_mistakes_in_evaluation(overrides, key, tmp_path):
    small = [text for text in SMALL_DATA if not text.startswith("data.")]
    with pytest.raises(UserError) as caught:
        evaluation.main(cli.Arguments(None, False, [*small, *overrides, f"run.output_dir={tmp_path}"]))
    assert caught.value.key == key


@pytest.mark.parametrize("target", ["pipeline", "generations"])
def test_defenses_that_cannot_be_applied_are_refused_by_name(target, tmp_path):
    """Before anything is loaded: a report without them would be taken for one with them."""
    later = [
        "defenses.dedup={}",
        "defenses.early_stop={}",
        "defenses.prompt_perturbation={}",
        "defenses.output_filter={}",
    ]
    overrides = [*SMALL_DATA, f"{target}=nowhere", "data.source=phantom", f"run.output_dir={tmp_path}", *later]
    with pytest.raises(UserError) as caught:
        evaluation.main(cli.Arguments(None, False, overrides))
    named = {text.partition("=")[0] for text in later}
    named -= {"defenses.prompt_perturbation"} if target == "pipeline" else set()
    assert set(caught.value.key.split(", ")) == named and "leave them out" in caught.value.remedy
    assert ("prompt_perturbation" in caught.value.remedy) == (target == "pipeline")
    assert not list(tmp_path.iterdir())


def test_a_defense_that_also_trains_is_refused_with_a_model_of_others(monkeypatch):
    """Half of it would be applied, and its claim told in the report."""

    class Both(PromptPerturbation):
        name, after_training = "both", False

    monkeypatch.setitem(evaluation.CLASSES, "both", Both)
    given = SimpleNamespace(**dict.fromkeys(evaluation.CLASSES) | {"both": object()})
    with pytest.raises(UserError, match="^defenses.both: cannot be applied to a model of others"):
        evaluation.check_defenses(SimpleNamespace(defenses=given, pipeline="nowhere"), "pipeline")


def test_a_defense_of_prompts_needs_a_model_with_prompts(folders, tmp_path):
    save_pipeline(tmp_path / "model", build(ModelConfig(), 16, 1, 0), noise_schedule(DiffusionConfig()))
    with pytest.raises(UserError, match="defenses.prompt_perturbation: needs a text-to-image model"):
        evaluate(
            f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"run.output_dir={tmp_path}", "run.name=x",
            "defenses.prompt_perturbation={}",
        )  # fmt: skip


def test_a_foreign_text_pipeline_behind_a_defense_of_prompts(folders, tmp_path):
    """The images change, the bare model's are those without the defense, and the report names it."""
    stable_diffusion(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a chest\nleft lung\n")
    common = (
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"generate.prompts={tmp_path / 'prompts.txt'}",
        "generate.per_prompt=4", f"run.output_dir={tmp_path}", "data.channels=3", "generate.guidance_scale=100",
    )  # fmt: skip
    evaluate(*common, "run.name=plain")
    defense = "defenses.prompt_perturbation={target: 1e-6, steps: 5, learning_rate: 0.02}"
    report = evaluate(*common, defense, "run.name=guarded")
    (entry,) = report["defenses"]
    assert entry["name"] == "prompt_perturbation" and entry["settings"]["target"] == 1e-6
    assert entry["findings"]["generations"] == 8 and entry["findings"]["perturbed"] == 1.0
    files = sorted(
        path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain" / "generations").glob("*/*.png")
    )
    plain, other, bare = (
        [(tmp_path / name / file).read_bytes() for file in files]
        for name, files in (
            ("plain", files), ("guarded", files), ("guarded", [Path("generations_guard_off", *f.parts[1:]) for f in files]),
        )
    )  # fmt: skip
    assert len(plain) == 8 and plain == bare and plain != other
    assert report["privacy"]["extraction_guard_off"]["generations"] == 8
    assert "prompt_perturbation" in (tmp_path / "guarded" / "report.html").read_text()


def test_training_settings_are_fixed_after_training(finished):
    with pytest.raises(UserError, match=r"train\.steps: cannot be changed"):
        evaluation.main(cli.Arguments(None, False, [f"run_dir={finished}", "train.steps=3"]))
    given = ["defenses.dedup={}", "defenses.output_filter={}", "defenses.scrub={}"]
    with pytest.raises(UserError, match=r"^defenses\.dedup, defenses\.scrub: cannot be changed"):
        evaluation.main(cli.Arguments(None, False, [f"run_dir={finished}", *given]))


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["train.step=5", "data.source=/nowhere/at/all"])
def test_exit_status_2_and_no_traceback(argument, tmp_path):
    done = run("train/run.py", argument, f"run.output_dir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert not list(tmp_path.glob("*/model"))


@pytest.mark.slow
def test_dry_run_tells_the_plan_and_leaves_nothing(tmp_path):
    done = run("train/run.py", "--dry-run", *OVERRIDES, "defenses.dedup={}", f"run.output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for words in (
        "records 46 found, 0 rejected",
        "kept for training 24",
        "parameters 1062497",
        "micro-batch (6, 1, 16, 16)",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_mismatched_torchvision_is_one_clear_line(tmp_path):
    """A torchvision that does not import is named before diffusers stumbles over it."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "train" / "run.py"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "torchvision does not match torch" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
