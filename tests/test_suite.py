"""The whole attack suite from the command line: own runs, foreign models, foreign images, and what is refused before any work."""

import json

import numpy as np
import pytest
from PIL import Image

from defenses.errors import UserError
from eval import run as evaluation
from tests.small import OVERRIDES
from tests.test_entry_points import SMALL_DATA, evaluate, folders, pictures, text_pipeline, write  # noqa: F401
from train import cli
from train import run as training
from train.diffusion import DiffusionConfig, noise_schedule
from train.models import ModelConfig, build, save_pipeline

MEMBERSHIP = "attack.membership={draws: 1, grid: [0.1, 0.5], gradient_timesteps: 1}"
INPAINTING = "attack.inpainting={pictures: 2, fills: 4, keep: 2, steps: 3, draws: 1, permutations: 99}"
WHITE_BOX = [MEMBERSHIP, INPAINTING, "attack.copy_metrics={}"]
ATTACKS = {"loss", "loss-strong", "loss-grid", "secmi", "pia", "pian", "sima", "gsa-norm"}


def table(path) -> list[str]:
    return path.read_text().splitlines()


def test_a_run_with_every_attack(tmp_path):
    """Canaries are planted, every part is reported, and report.html tells of each."""
    canaries = "data.canaries={copies: [1, 4], per_copies: 1, coins: 4, pool: 32}"
    small = ["data.phantom.pictures=26", "data.phantom.heldout=26"]
    arguments = [*OVERRIDES, *small, *WHITE_BOX, canaries, f"run.output_dir={tmp_path}"]
    assert training.main(cli.Arguments(None, False, arguments)) == 0
    folder = tmp_path / "quickstart"
    report = json.loads((folder / "report.json").read_text())
    privacy = report["privacy"]
    assert {entry["attack"] for entry in privacy["membership"]} == ATTACKS
    assert {entry["unit"] for entry in privacy["membership"]} == {"record", "group"}
    assert privacy["membership"][0]["members"] == 26 and len(table(folder / "attack" / "membership.csv")) == 1 + 52
    assert privacy["inpainting"]["members"] == privacy["inpainting"]["nonmembers"] == 2
    assert privacy["canaries"]["kinds"]["noise"]["pool"] == 32 and privacy["canaries"]["one_run"]["canaries"] == 4
    assert report["data"]["canaries"]["records"] == 5 and report["data"]["train"] == 26 + 2 * 2
    assert len(table(folder / "attack" / "copy_metrics.csv")) == len(table(folder / "attack" / "matches.csv"))
    assert privacy["risk"]["pictures"] == 26 == len(table(folder / "attack" / "risk.csv")) - 1
    page = (folder / "report.html").read_text()
    assert all(f'id="{name}"' in page for name in ("membership", "inpainting", "canaries", "copy-metrics", "risk"))
    # inpainting's own figure and the cost are one measurement, not two
    assert report["cost"]["inpainting_seconds"] == pytest.approx(privacy["inpainting"]["seconds"])


@pytest.mark.parametrize("classes", [0, 3])
def test_foreign_pixel_model(classes, folders, tmp_path):  # noqa: F811
    for name in ("model", "base"):
        network = build(ModelConfig(size="nano"), 16, 1, classes).eval()
        save_pipeline(tmp_path / name, network, noise_schedule(DiffusionConfig()))
    report = evaluate(
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}", *WHITE_BOX,
        "attack.membership.attacks=[loss]", f"run.output_dir={tmp_path}", "run.name=foreign",
        f"attack.finetuning={{base: {tmp_path / 'base'}, count: 6, steps: 2, permutations: 9}}",
    )  # fmt: skip
    (entry,) = report["privacy"]["membership"]
    assert (entry["members"], entry["nonmembers"]) == (80, 60)
    assert 0.3 < entry["auc"] < 0.7  # nobody trained it
    assert entry["settings"]["condition"] == ("class 0: which class is which is not known" if classes else "none")
    one, three = report["privacy"]["finetuning"]["weights"]
    assert (one["weight"], three["weight"], three["generations"]) == (1.0, 3.0, 6)
    assert three["control"]["p_value"] is None and three["versus_baseline"]["gain_p_value"] is None
    assert len(table(tmp_path / "foreign" / "attack" / "finetuning_pictures.csv")) == 1 + 2 * (80 + 60)
    assert 'id="finetuning"' in (tmp_path / "foreign" / "report.html").read_text()
    assert report["privacy"]["finetuning"]["seconds"] == pytest.approx(report["cost"]["finetuning_seconds"])
    # nobody knows whether these pictures were drawn alike: no evidence, and no p-value
    assert (
        report["privacy"]["membership_check"]["passed"] is False and report["privacy"]["inpainting"]["p_value"] is None
    )


def test_foreign_text_model(folders, tmp_path):  # noqa: F811
    """Without captions nothing that needs them is reported."""
    text_pipeline(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("an x-ray\n")
    report = evaluate(
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}",
        f"generate.prompts={tmp_path / 'prompts.txt'}", "generate.per_prompt=4", "attack.membership={draws: 1, records: 12}",
        f"run.output_dir={tmp_path}", "run.name=text",
    )  # fmt: skip
    found = {entry["attack"]: entry for entry in report["privacy"]["membership"]}
    assert set(found) == ATTACKS and found["loss"]["settings"]["condition"] == "empty: there are no captions"


def test_images_of_another_size_and_colour(folders, pictures, tmp_path):  # noqa: F811
    """Copies as coloured, larger, half transparent files are the copies that they show; a broken file is listed."""
    train, _ = pictures
    made = tmp_path / "made"
    made.mkdir()
    for number in range(6):
        grey = Image.fromarray(train[number][0]).resize((64, 64), Image.Resampling.BICUBIC)
        mode = ("RGB", "RGBA", "L", "LA", "P", "RGB")[number]
        grey.convert(mode).save(made / f"{number}.png")
    for number in range(10):
        write(made / f"noise{number}.png", np.random.default_rng(number).integers(0, 256, (1, 40, 20), dtype=np.uint8))
    (made / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    report = evaluate(
        f"generations={made}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}", "data.image_size=32",
        "attack.copy_metrics={}", f"run.output_dir={tmp_path}", "run.name=other",
    )  # fmt: skip
    assert report["privacy"]["extraction"]["verified"] == 6 and list(report["data"]["generations_rejected"]) == [
        "broken.png"
    ]
    ratio = next(row for row in report["privacy"]["copy_metrics"]["metrics"] if row["name"] == "nn_ratio")
    assert ratio["pictures"] == 6 and report["privacy"]["risk"]["pictures"] == 80
    assert report["privacy"]["membership"] is None and report["privacy"]["inpainting"] is None


GIVEN = ["data.source=phantom", "data.image_size=16"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["generations=a", *GIVEN, "attack.membership={}"], "attack.membership"),
        (["generations=a", *GIVEN, "attack.inpainting={}"], "attack.inpainting"),
        (["generations=a", *GIVEN, "attack.finetuning={}"], "attack.finetuning"),
        (["pipeline=a", *GIVEN, "attack.finetuning={}"], "attack.finetuning.base"),  # of what?
        (["pipeline=a", *GIVEN, "attack.membership={}"], "attack.membership"),  # without non-members
        (["pipeline=a", *GIVEN, "data.heldout_source=b", "attack.membership={lira: {}}"], "attack.membership.lira"),
        (["pipeline=a", *GIVEN, "attack.copy_metrics={threshold: dar}"], "attack.copy_metrics.threshold"),
        (["pipeline=a", *GIVEN, "attack.copy_metrics={sscd_weights: nowhere.pt}"], "attack.copy_metrics.sscd_weights"),
        (["pipeline=a", *GIVEN, "attack.extraction=null", "attack.copy_metrics={}"], "attack.copy_metrics"),
    ],
)  # fmt: skip
def test_refused_before_any_work(overrides, key, tmp_path):
    with pytest.raises(UserError) as caught:
        evaluation.main(cli.Arguments(None, False, [SMALL_DATA[-1], *overrides, f"run.output_dir={tmp_path}"]))
    assert caught.value.key == key and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.family=gan", "attack.membership={}"], "attack.membership"),
        (["model.family=gan", "data.canaries={}"], "attack.canaries"),
        (["data.phantom.heldout=0", "attack.membership={}"], "attack.membership"),
        (["attack.membership={lira: {shadows: 3}}"], "attack.membership.lira.shadows"),
        (["train.diffusion.timesteps=5", "generate.steps=2", "attack.inpainting={}"], "attack.inpainting.steps"),
        (["attack.inpainting={reference: nowhere}"], "attack.inpainting.reference"),
        (["model.family=gan", "attack.finetuning={}"], "attack.finetuning"),
        (["attack.finetuning={}"], "attack.finetuning.base"),  # trained from scratch
        (["model.pretrained=base", "attack.finetuning={steps: 1001}"], "attack.finetuning.steps"),
        (["attack.canaries.draws=0"], "attack.canaries.draws"),
    ],
)
def test_refused_before_training(overrides, key, tmp_path):
    with pytest.raises(UserError) as caught:
        training.main(cli.Arguments(None, False, [*OVERRIDES, *overrides, f"run.output_dir={tmp_path}"]))
    assert caught.value.key == key and not list(tmp_path.iterdir())


def test_attacks_may_be_switched_until_the_report_is_written(tmp_path):
    """A part that fails after hours of training can be switched off; a run of an earlier version knows nothing of it."""
    arguments = [*OVERRIDES, f"run.output_dir={tmp_path}"]
    folder = tmp_path / "quickstart"
    assert training.main(cli.Arguments(None, False, [*arguments, MEMBERSHIP])) == 0
    (folder / "report.json").unlink()
    assert training.main(cli.Arguments(None, False, arguments)) == 0
    assert json.loads((folder / "report.json").read_text())["privacy"]["membership"] is None
    with pytest.raises(UserError, match=r"attack\.membership\."):  # the report is there
        training.main(cli.Arguments(None, False, [*arguments, MEMBERSHIP]))
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(stored.replace("  risk: true\n", "").replace("  canaries:\n    draws: 2\n", ""))
    assert stored != (folder / "config.yaml").read_text()
    assert training.main(cli.Arguments(None, False, arguments)) == 0  # says that all is done
