"""The plan of a comparison: arms, what shares a training, what is refused before any work."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from defenses.errors import UserError
from eval.config import GenerateConfig
from launch import preview
from launch.compare import training_picture
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
        str(ROOT / "eval" / "run.py"), f"run_dir={tmp_path / 'out' / 'c' / 'dedup-s7'}", "run.name=both",
        "defenses.output_filter={attempts: 2}",
    ]  # fmt: skip
    assert whole.of("dedup")[1].config.run.seed == 7 and whole.of("dedup")[1].config.train.keep_checkpoints is None


@pytest.mark.parametrize("written", ["defenses={output_filter: {attempts: 2}}", "defenses.output_filter.attempts=2"])
def test_a_shared_arm_keeps_its_defense_however_it_was_written(tmp_path, written):
    whole = plan(write(tmp_path, arms={"none": [], "filter": [written, "report.pairs=3"]}), [])
    assert whole.of("filter")[0].command[-2:] == ["defenses.output_filter={attempts: 2}", "report.pairs=3"]


def test_a_defense_of_the_base_is_switched_off_by_the_arm_without_it(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text((ROOT / "configs" / "smoke.yaml").read_text() + "defenses: {output_filter: {}}\n")
    whole = plan(write(tmp_path, base=str(base), arms={"filter": [], "none": ["defenses.output_filter=null"]}), [])
    assert whole.of("filter")[0].parent is whole.of("none")[0]
    assert whole.of("filter")[0].command[-1] == "defenses.output_filter={}"


def test_secrets_of_the_environment_stay_names(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_PLACE", "phantom")
    whole = plan(write(tmp_path, overrides=["data.source=${oc.env:SECRET_PLACE}"]), [])
    assert whole.jobs[0].config.data.source == "phantom"
    assert "data.source=${oc.env:SECRET_PLACE}" in whole.jobs[0].command


def finished(folder: Path, whole) -> None:
    """Stored as a run of ours would: its configuration, then its report."""
    for job in whole.jobs:
        job.directory.mkdir(parents=True)
        (job.directory / "config.yaml").write_text(OmegaConf.to_yaml(job.tree))
        (job.directory / "report.json").write_text("{}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.learning_rate=0.5"], "arms.none: train.learning_rate: .* was made with 0.001, now 0.5"),
        (["generate.count=99"], "arms.none: generate.count: .* was made with 32, now 99"),
        (["defenses.augment={}"], "arms.none: defenses.augment"),
    ],
)
def test_finished_arms_are_not_kept_under_other_settings(tmp_path, given, message):
    out = f"output_dir={tmp_path / 'out'}"
    finished(tmp_path, plan(write(tmp_path), [out]))
    plan(write(tmp_path), [out, "data.source=phantom", "run.cpu_threads=1"])  # these change no number
    plan(write(tmp_path, seeds=[0, 7, 8]), [out])  # seeds may be added
    with pytest.raises(UserError, match=message):
        plan(write(tmp_path), [out, *given])


def test_a_shared_arm_is_not_kept_under_other_settings(tmp_path):
    out = f"output_dir={tmp_path / 'out'}"
    finished(tmp_path, plan(write(tmp_path), [out]))
    arms = {"none": [], "dedup": ["defenses.dedup={}"], "filter": ["defenses.output_filter={attempts: 3}"]}
    with pytest.raises(UserError, match="arms.filter: defenses.output_filter.attempts: .* with 8, now 3"):
        plan(write(tmp_path, arms=arms), [out])


def test_the_preview_tells_what_will_run(tmp_path, capsys):
    """Every family is timed; what shares a training costs no training."""
    arms = {"none": [], "gan": ["model.family=gan"], "filter": ["defenses.output_filter={}"]}
    small = ["train.keep_checkpoints=null", "train.trackers=[]", "run.cpu_threads=1", "data.label_key=label"]
    whole = plan(write(tmp_path, arms=arms, seeds=[0], overrides=small), [f"output_dir={tmp_path}"])
    assert preview.show(whole) == 0
    told = capsys.readouterr().out
    assert "none, seed 0: trains, to do, about " in told and "gan, seed 0: trains, to do" in told
    assert "filter, seed 0: uses the training of none, seed 0, to do" in told
    assert "3 arms x 1 seeds: 3 results from 2 trainings" in told and f"GiB in {tmp_path / 'c'}" in told


def test_expected_time_by_hand(tmp_path):
    """20 steps of 2 s, 32 images of 4 steps of 0.5 s at the end and at one earlier checkpoint; the filter draws once more."""
    whole = plan(write(tmp_path, overrides=["train.keep_checkpoints=null", "report.along=[10]"]), [])
    cost = preview.Cost(step_seconds=2.0, forward_seconds=0.5, disk_bytes=0)
    assert preview.expected_seconds(whole.of("none")[0], cost) == 40 + 2 * 32 * 4 * 0.5
    assert preview.expected_seconds(whole.of("filter")[0], cost) == 32 * 4 * 0.5


@pytest.mark.parametrize(("captions", "prompts"), [((2, 0), 2), ((9, 1), 5 + 1), ((9, 9), 5 + 5)])
def test_expected_seconds_of_prompts(captions, prompts):
    """Prompts and their control by held-out captions, not `generate.count`, which is of other models."""
    generate = GenerateConfig(count=1000, max_prompts=5, per_prompt=3, steps=4)
    config = SimpleNamespace(
        generate=generate,
        model=SimpleNamespace(family="latent"),
        report=SimpleNamespace(along=[]),
        train=SimpleNamespace(steps=20),
    )
    cost = preview.Cost(step_seconds=2.0, forward_seconds=0.5, disk_bytes=0, captions=captions)
    assert preview.expected_seconds(SimpleNamespace(config=config, parent=None), cost) == 40 + prompts * 3 * 4 * 0.5


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
        ({"arms": {"none": [], "off": []}}, [], r"arms: 'off' is not a plain folder name"),  # YAML's false
        ({"arms": {"none": [], "x": ["run.seed=3"]}}, [], r"arms.x: run.seed: is set by the comparison"),
        ({"arms": {}, "factor": {"key": "run.seed", "values": [1, 2]}, "reference": None}, [], r"run.seed: is set by"),
        ({"arms": {}, "factor": {"key": "size", "values": [1, 2]}, "reference": None}, [], r"factor.key: size is no"),
        ({}, ["report.push_to_hub=me/x"], r"report.push_to_hub: would upload every arm"),
        ({}, ["select=nobody"], r"select: nobody is not an arm"),
        ({"launcher": {"gpus": [0, 1], "processes": 1}}, [], r"launcher.processes: 1 for 2 GPUs per arm"),
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
    config = LauncherConfig(config_file="launch/accelerate/ddp.yaml", parallel=2, gpus=[4, 5, 6, 7])
    words, environment = launcher(config, slot=1)
    assert environment == {"CUDA_VISIBLE_DEVICES": "6,7"} and words[-2:] == ["--main_process_port", "0"]
    assert words[words.index("--num_processes") + 1] == "2" and words[words.index("--gpu_ids") + 1] == "all"
    words, environment = launcher(LauncherConfig(processes=2))
    assert words[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert environment == {"ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_comparison_can_be_planned(file):
    mine = {"cxr": ["data.source=phantom", "data.group_key=patient"], "emoji": ["data.source=emoji-planted"]}
    whole = plan(file, mine.get(file.stem, []))
    assert len(whole.jobs) == len(whole.overrides) * len(whole.config.seeds)
    if file.stem in mine:  # the pictures are the user's
        with pytest.raises(UserError, match="data.source: has no value"):
            plan(file, [])


def test_the_comparison_on_emoji_trains_what_differs_in_training(tmp_path):
    """Prompts are perturbed before the sampler of a trained model; each other arm is a training. All are asked the same."""
    whole = plan(ROOT / "configs" / "compare" / "emoji.yaml", ["data.source=x", f"output_dir={tmp_path}"])
    parents = {job.arm: job.parent and job.parent.arm for job in whole.jobs}
    assert [arm for arm, parent in parents.items() if parent is None] == [
        "none", "dedup", "random-captions", "random-tokens", "text-filter", "anti-gradient",
    ]  # fmt: skip
    assert parents["prompt-perturbation"] == "none"
    kept = tmp_path / "compare-emoji" / "autoencoders"
    assert all(job.config.model.scratch.autoencoders == str(kept) for job in whole.jobs)
    assert f"model.scratch.autoencoders={kept}" in whole.of("none")[0].command
    job = whole.of("prompt-perturbation")[1]
    assert job.directory == tmp_path / "compare-emoji" / "none-s1" / "eval" / "prompt-perturbation"
    assert job.command[-1] == "defenses.prompt_perturbation={target: 0.00045}" and job.command[0].endswith(
        "eval/run.py"
    )
    on = {job.arm: [name for name, value in vars(job.config.defenses).items() if value] for job in whole.jobs}
    assert on == {
        "none": [], "dedup": ["dedup"], "random-captions": ["captions"], "random-tokens": ["captions"],
        "text-filter": ["text_filter"], "anti-gradient": ["anti_gradient"], "prompt-perturbation": ["prompt_perturbation"],
    }  # fmt: skip
    chances = ("several", "replace", "repeat", "insert", "noise")
    for arm, one in (("random-captions", "replace"), ("random-tokens", "insert")):
        settings = whole.of(arm)[0].config.defenses.captions
        assert [name for name in chances if getattr(settings, f"{name}_probability")] == [one]


def test_guards_of_one_training_share_it_alone_and_together(tmp_path):
    arms = {
        "none": [],
        "perturbed": ["defenses.prompt_perturbation={}"],
        "filter": ["defenses.output_filter={}"],
        "both": ["defenses.prompt_perturbation={}", "defenses.output_filter={}"],
        "dedup-perturbed": ["defenses.dedup={}", "defenses.prompt_perturbation={}"],
    }
    base = str(ROOT / "configs" / "emoji64.yaml")
    given = [f"output_dir={tmp_path}", "data.source=x"]
    whole = plan(write(tmp_path, base=base, arms=arms, seeds=[0], overrides=[]), given)
    parents = {job.arm: job.parent and job.parent.arm for job in whole.jobs}
    assert parents == {
        "none": None, "perturbed": "none", "filter": "none", "both": "none", "dedup-perturbed": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], []),
        (["attack.captions=original"], []),
        (["attack.captions=trained"], ["scrub"]),
        (["attack.captions=trained", "generate.prompts=PROMPTS"], []),
        (["generate.order=prefilter"], ["scrub", "dedup"]),
    ],
)
def test_arms_that_will_be_asked_otherwise_are_told_before_any_work(tmp_path, given, told):
    """Scores follow the weights: of "perturbed", which shares the training of "none", they are the reference's."""
    (tmp_path / "prompts.txt").write_text("a cat")
    arms = {
        "none": [],
        "scrub": ["defenses.scrub={}"],
        "dedup": ["defenses.dedup={}"],
        "perturbed": ["defenses.prompt_perturbation={}"],
    }
    base = str(ROOT / "configs" / "emoji64.yaml")
    given = [text.replace("PROMPTS", str(tmp_path / "prompts.txt")) for text in given]
    whole = plan(write(tmp_path, base=base, arms=arms, seeds=[0], overrides=[]), ["data.source=x", *given])
    notes = preview.not_comparable(whole)
    assert [note.split(" will not be comparable: ")[0] for note in notes] == told


def test_a_record_of_every_run_is_its_own_picture(tmp_path):
    """With another factor value the same record id is another picture: each arm's evidence comes from its own data."""
    for name, level in (("one", 10), ("two", 200)):
        folder = tmp_path / name / "prepared"
        folder.mkdir(parents=True)
        np.save(folder / "pixels.npy", np.full((1, 1, 8, 8), level, dtype=np.uint8))
        (folder / "records.jsonl").write_text(json.dumps({"record_id": "r", "source": "s"}) + "\n")
        (folder / "prepared.json").write_text(json.dumps({"ignored": 0, "notes": {}}))
    assert [int(training_picture(tmp_path / name, "r").mean()) for name in ("one", "two")] == [10, 200]
