"""The plan of a comparison: arms, what shares a training, what is refused before any work."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from defenses.errors import UserError
from launch.plan import plan, shown
from launch.settings import LauncherConfig, launcher

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


def write(folder: Path, **changes) -> Path:
    """A small comparison; keys given replace those of the file."""
    content = {
        "name": "c",
        "base": str(ROOT / "configs" / "smoke.yaml"),
        "overrides": ["train.keep_checkpoints=null"],
        "arms": {"none": [], "dedup": ["defenses.dedup={}"], "filter": ["defenses.output_filter={}"]},
        "seeds": [0, 7],
        "reference": "none",
    }
    file = folder / "compare.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create({**content, **changes})))
    return file


def test_arms_times_seeds_and_what_shares_a_training(tmp_path):
    arms = {
        "none": [],
        "dedup": ["defenses.dedup={}"],
        "both": ["defenses.dedup={}", "defenses.output_filter={attempts: 2}"],
        "early": ["defenses.early_stop={}"],
        "alone": ["defenses.augment={}", "defenses.output_filter={}"],  # nobody trains with augmentation alone
    }
    whole = plan(write(tmp_path, arms=arms), [f"output_dir={tmp_path / 'out'}"])
    parents = {job.label: job.parent.label if job.parent else None for job in whole.jobs}
    assert parents == {
        "none, seed 0": None, "none, seed 7": None, "dedup, seed 0": None, "dedup, seed 7": None,
        "alone, seed 0": None, "alone, seed 7": None,
        "both, seed 0": "dedup, seed 0", "both, seed 7": "dedup, seed 7",
        "early, seed 0": "none, seed 0", "early, seed 7": "none, seed 7",
    }  # fmt: skip
    positions = [job.label for job in whole.jobs]
    assert all(positions.index(parent) < positions.index(child) for child, parent in parents.items() if parent)
    both = whole.of("both")[1]
    assert both.directory == tmp_path / "out" / "c" / "dedup-s7" / "eval" / "both"
    assert both.command == [
        "eval/run.py", f"run_dir={tmp_path / 'out' / 'c' / 'dedup-s7'}", "run.name=both",
        "defenses.output_filter={attempts: 2}",
    ]  # fmt: skip
    assert whole.of("dedup")[1].config.run.seed == 7 and whole.of("dedup")[1].config.train.keep_checkpoints is None


def test_keys_of_a_run_go_to_every_arm(tmp_path):
    whole = plan(write(tmp_path), ["train.steps=12", "seeds=[3]", "launcher.parallel=2"])
    assert [job.config.train.steps for job in whole.jobs] == [12, 12, 12]
    assert whole.config.seeds == [3] and whole.config.launcher.parallel == 2
    assert shown(whole.config.launcher, whole.of("none")[0]).startswith(
        "accelerate launch --quiet --config_file launch/accelerate/cpu.yaml train/run.py --config configs/smoke.yaml "
    )


def test_a_factor_makes_an_arm_of_every_value(tmp_path):
    factor = {"key": "data.phantom.copies", "values": [1, 4]}
    whole = plan(write(tmp_path, arms={}, factor=factor, reference=None), [])
    assert list(whole.overrides) == ["copies-1", "copies-4"] and whole.levels == {"copies-1": 1, "copies-4": 4}
    assert [job.config.data.phantom.copies for job in whole.jobs] == [1, 1, 4, 4] and whole.reference == "copies-1"


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"arms": {"none": [], "bad": ["defenses.dedop={}"]}}, [], r"arms.bad: defenses.dedop"),
        ({"arms": {"none": [], "bad": ["defenses.dedup={threshold: 3}"]}}, [], r"arms.bad: defenses.dedup.threshold"),
        ({"arms": {"none": [], "more": ["generate.count=99"]}}, [], r"arms.more: generate.count: is 99, 32 in none"),
        ({"arms": {"none": [], "other": ["data.split_seed=1"]}}, [], r"arms.other: data.split_seed"),
        ({"arms": {"none": [], "longer": ["train.steps=40"]}}, [], r"arms.longer: train.steps: .* 640 images seen, 320"),
        ({"arms": {"../x": []}}, [], r"arms: '../x' is not a plain folder name"),
        ({"launcher": {"config_file": "launch/none.yaml"}}, [], r"launcher.config_file: launch/none.yaml does not exist"),
        ({"launcher": {"gpus": [0, 1, 2], "parallel": 2}}, [], r"launcher.gpus: 3 GPUs cannot be shared"),
        ({"reference": "nobody"}, [], r"reference: nobody is not an arm"),
        ({"seeds": [1, 1]}, [], r"seeds: \[1, 1\] are not distinct"),
        ({"arms": {}}, [], r"arms: and factor exclude each other"),
        ({"base": "none.yaml"}, [], r"base: none.yaml does not exist"),
        ({"nonsense": 1}, [], r"nonsense"),
        ({}, ["run.seed=3"], r"run.seed: is set by the comparison"),
        ({}, ["sedes=[1]"], r"sedes"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_work(tmp_path, changes, given, message):
    with pytest.raises(UserError, match=message):
        plan(write(tmp_path, **changes), given)


def test_two_arms_with_one_name(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: c\nbase: x.yaml\narms:\n  none: []\n  none: [train.steps=2]\n")
    with pytest.raises(UserError, match="twice.yaml"):
        plan(file, [])


def test_early_stop_needs_the_checkpoints(tmp_path):
    arms = {"none": [], "early": ["defenses.early_stop={}"]}
    with pytest.raises(UserError, match="arms.early: train.keep_checkpoints"):
        plan(write(tmp_path, arms=arms, overrides=["train.keep_checkpoints=2"]), [])


def test_one_budget_in_other_batches_and_another_family(tmp_path):
    arms = {"none": [], "gan": ["model.family=gan", "train.steps=40", "train.batch_size=8"]}
    whole = plan(write(tmp_path, arms=arms), [])
    assert [job.config.model.family for job in whole.jobs] == ["pixel", "pixel", "gan", "gan"]


def test_gpus_are_shared_out_and_cpus_get_torchrun():
    config = LauncherConfig(config_file="launch/accelerate/ddp.yaml", processes=2, parallel=2, gpus=[4, 5, 6, 7])
    words, environment = launcher(config, slot=1)
    assert environment == {"CUDA_VISIBLE_DEVICES": "6,7"} and words[-2:] == ["--main_process_port", "0"]
    words, environment = launcher(LauncherConfig(processes=2))
    assert words[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert environment == {"ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_comparison_can_be_planned(file):
    given = ["data.source=phantom", "data.group_key=patient"] if file.stem == "cxr" else []
    whole = plan(file, given)
    assert len(whole.jobs) == len(whole.overrides) * len(whole.config.seeds)
    if file.stem == "cxr":  # the pictures are the user's
        with pytest.raises(UserError, match="data.source: has no value"):
            plan(file, [])
