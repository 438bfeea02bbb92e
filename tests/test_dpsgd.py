"""DP-SGD as a defense: what is refused, what is drawn, what is claimed, and which doors are closed."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from defenses import dpclaim, registry
from defenses.base import Defense
from defenses.dpsgd import DPSGD, DPSGDConfig
from defenses.ledger import Mechanism, Segment
from tests.small import OVERRIDES, opened, small_config
from tests.smalldp import RECORDS, begun, finish, quick, refused
from train import cli, release, stage
from train import run as training
from train.dryrun import dry_run
from train.release import build_model
from train.stage import build_trainer, train_model

ROOT = Path(__file__).resolve().parent.parent
NOISE = "defenses.dpsgd.noise_multiplier=2"


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with quick():
        yield


def epsilon_of(noise: float, rate: float, steps: int, delta: float = 1e-5) -> float:
    """Google's accountant on a fine grid, asked without our code."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=2e-4)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


# --- settings that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("defenses.dpsgd={epsilon: 3, noise_multiplier: 1}", "defenses.dpsgd.noise_multiplier"),
        ("defenses.dpsgd.epsilon=-1", "defenses.dpsgd.epsilon"),
        ("defenses.dpsgd.epsilon=0", "defenses.dpsgd.epsilon"),
        ("defenses.dpsgd.epsilon=.inf", "defenses.dpsgd.epsilon"),
        ("defenses.dpsgd.epsilon=.nan", "defenses.dpsgd.epsilon"),
        ("defenses.dpsgd.noise_multiplier=-0.5", "defenses.dpsgd.noise_multiplier"),
        ("defenses.dpsgd.noise_multiplier=.nan", "defenses.dpsgd.noise_multiplier"),
        ("defenses.dpsgd.delta=0", "defenses.dpsgd.delta"),
        ("defenses.dpsgd.delta=1", "defenses.dpsgd.delta"),
        ("defenses.dpsgd.clip_norm=0", "defenses.dpsgd.clip_norm"),
        ("defenses.dpsgd.sample_rate=1.01", "defenses.dpsgd.sample_rate"),
        ("defenses.dpsgd.sample_rate=0", "defenses.dpsgd.sample_rate"),
        ("defenses.dpsgd.batch_size=0", "defenses.dpsgd.batch_size"),
        ("defenses.dpsgd.units=-5", "defenses.dpsgd.units"),
        ("defenses.dpsgd.group_cap=0", "defenses.dpsgd.group_cap"),
        ("defenses.dpsgd.multiplicity=0", "defenses.dpsgd.multiplicity"),
        ("defenses.dpsgd.physical_batch=0", "defenses.dpsgd.physical_batch"),
        ("defenses.dpsgd.canaries=-1", "defenses.dpsgd.canaries"),
        ("defenses.dpsgd.unit=patient", "defenses.dpsgd.unit"),
        ("defenses.dpsgd.backend=ghost", "defenses.dpsgd.backend"),
        ("defenses.dpsgd.group_sampling=images", "defenses.dpsgd.group_sampling"),
        ("defenses.dpsgd.max_grad_norm=1", "defenses.dpsgd.max_grad_norm"),
        ("train.precision=fp16", "train.precision"),
    ],
)
def test_values_that_cannot_be_name_their_key(override, key, tmp_path):
    refused(key, lambda: small_config(tmp_path, override))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"delta": 1 / 40}, "defenses.dpsgd.delta"),
        ({"delta": 1 / 20, "groups": ["a", "b", "c", "d"] * 10, "unit": "group"}, "train.batch_size"),
        ({"delta": 1 / 4, "groups": ["a", "b", "c", "d"] * 10, "unit": "group"}, "defenses.dpsgd.delta"),
        ({"batch_size": 41}, "train.batch_size"),
        ({"expected": 41}, "defenses.dpsgd.batch_size"),
        ({"accumulation": 2}, "train.accumulation"),
        ({"unit": "group"}, "data.group_key"),
        ({"unit": "group", "groups": ["a"] * 39 + [None]}, "data.group_key"),
        ({"unit": "group", "group_sampling": "records", "groups": ["a"] * 39 + [None]}, "data.group_key"),
        ({"epsilon": 1e-6, "noise_multiplier": None}, "defenses.dpsgd.epsilon"),
    ],
)
def test_what_the_data_do_not_allow_names_its_key(settings, key, tmp_path):
    settings = {"noise_multiplier": 2.0, **settings}
    if "expected" in settings:  # dpsgd's own batch size, beside train.batch_size
        expected = settings.pop("expected")
        defense = DPSGD(DPSGDConfig(batch_size=expected, **settings))
        context = begun(tmp_path, noise_multiplier=2.0)._context
        refused(key, lambda: defense.begin(context), "40")
    else:
        refused(key, lambda: begun(tmp_path, **settings))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_delta_just_below_one_over_the_units_is_accepted(tmp_path):
    assert begun(tmp_path, noise_multiplier=2.0, delta=1 / 41).units == 40


def test_the_number_of_records_without_a_group_is_told(tmp_path):
    refused(
        "data.group_key", lambda: begun(tmp_path, ["a", None, "b", None, "c"], batch_size=1, unit="group"), "2 of 5"
    )


@pytest.mark.parametrize("norm", ["1.0", "1e9"])
def test_clipping_in_the_trainer_is_refused(norm, tmp_path):
    config, dataset, directory, defenses, accelerator = opened(tmp_path, NOISE, f"train.optimizer.max_grad_norm={norm}")
    arguments = (config, dataset, directory, accelerator, defenses, [])
    refused("train.optimizer.max_grad_norm", lambda: build_trainer(*arguments))


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm2d(8), torch.nn.InstanceNorm2d(8, track_running_stats=True)])
def test_models_that_couple_records_are_refused(layer, tmp_path, monkeypatch):
    original = release.build

    def coupled(*arguments):
        model = original(*arguments)
        model.conv_norm_out = layer
        return model

    monkeypatch.setattr(release, "build", coupled)
    refused("model", lambda: finish(tmp_path, NOISE), type(layer).__name__)
    assert not (tmp_path / "quickstart" / "ledger.jsonl").exists()


class Early(Defense):
    """Looks at checkpoints, as early stopping does."""

    name = "early"
    asked = 0

    def after_checkpoint(self, checkpoint):
        self.asked += 1

    def claim(self):
        return {"kind": "heuristic", "statement": "for a test"}


def test_a_defense_that_looks_at_records_is_refused_beside_it(tmp_path, monkeypatch):
    early = Early()
    monkeypatch.setattr(registry, "build", lambda config: [early, DPSGD(config.dpsgd)])
    refused("defenses.early", lambda: finish(tmp_path, NOISE), "report.nonprivate_metrics=true")
    assert early.asked == 0 and not (tmp_path / "quickstart" / "ledger.jsonl").exists()
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, NOISE, "run.name=open", "report.nonprivate_metrics=true"
    )
    assert not build_trainer(config, dataset, directory, accelerator, defenses, []).quiet


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train" / "run.py", *OVERRIDES, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["defenses.dpsgd={epsilon: 3, noise_multiplier: 1}"], "defenses.dpsgd.noise_multiplier"),
        (["defenses.dpsgd.unit=group", "data.group_key=null"], "data.group_key"),
    ],
)
def test_the_command_ends_with_one_line_and_status_2(overrides, key, tmp_path):
    done = run_script(*overrides, f"run.output_dir={tmp_path}")
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(f"error: {key}: "), done.stderr
    assert not list(tmp_path.glob("*/model")) and not list(tmp_path.glob("*/ledger.jsonl"))


# --- budget, sampling, units ---------------------------------------------------------------------------------------------


def test_switched_on_without_settings_it_is_epsilon_8(tmp_path):
    """The noise for 7 steps at rate 10/40: Google's accountant finds 8, and a hundredth less noise exceeds it."""
    noise = begun(tmp_path).mechanism.noise_multiplier
    assert 7.9 < epsilon_of(noise, 0.25, 7) <= 8 < epsilon_of(0.99 * noise, 0.25, 7)


@pytest.mark.parametrize(
    ("settings", "rate", "divisor", "adjacency"),
    [
        ({}, 10 / 40, 10, "zero-out"),  # train.batch_size is 10
        ({"batch_size": 8}, 8 / 40, 8, "zero-out"),
        ({"sample_rate": 0.3}, 0.3, 12, "zero-out"),
        ({"units": 50}, 10 / 50, 10, "zero-out"),
        ({"units": 50, "sample_rate": 0.1}, 0.1, 5, "zero-out"),
        ({"units": 50, "batch_size": 20}, 20 / 50, 20, "zero-out"),
        ({"sample_rate": 0.3, "batch_size": 8}, 0.3, 8, "add-remove"),
        ({"sample_rate": 1.0}, 1.0, 40, "zero-out"),
    ],
)
def test_rate_divisor_and_adjacency(settings, rate, divisor, adjacency, tmp_path):
    """What is accounted is what samples and divides; where both are given, nothing follows from the data's size."""
    context = begun(tmp_path, noise_multiplier=2.0)._context
    defense = DPSGD(DPSGDConfig(noise_multiplier=2.0, **settings))
    defense.begin(context)
    mechanism, plan, rule = defense.mechanism, defense.plan(context.pool.rows, 10, 0), defense.gradient_rule()
    assert (mechanism.sample_rate, mechanism.divisor, mechanism.adjacency) == (pytest.approx(rate), divisor, adjacency)
    assert plan.sample_rate == mechanism.sample_rate
    assert (rule.divisor, rule.clip_norm, rule.noise_multiplier) == (divisor, 1e-3, 2.0)
    drawn = np.mean([len(plan.selected(step)) for step in range(2000)])
    assert drawn == pytest.approx(rate * 40, abs=5 * np.sqrt(40 * 0.25 / 2000))


def test_a_size_declared_as_public_replaces_the_counted_one(tmp_path):
    """With add-remove adjacency two data sets that differ by a record train with the same constants."""
    settings = {"sample_rate": 0.3, "batch_size": 8, "units": 40, "noise_multiplier": 2.0}
    found = []
    for records in (40, 39):
        context = begun(tmp_path, records, noise_multiplier=2.0)._context
        defense = DPSGD(DPSGDConfig(**settings))
        defense.begin(context)
        mechanism = {**vars(defense.mechanism)}
        mechanism.pop("settings")  # a digest, of the data set's size too: the folder is for its holder
        found.append((mechanism, defense.claim()["units"]))
    assert found[0] == found[1]


GROUPS = list("eabacadaabcceeee")  # a 5, b 2, c 3, d 1, e 5


def test_groups_are_drawn_whole_and_clipped_as_one(tmp_path):
    defense = begun(tmp_path, GROUPS, batch_size=2, unit="group", group_cap=3, noise_multiplier=2.0)
    assert (defense.units, defense.mechanism.sample_rate, defense.mechanism.copies) == (5, 2 / 5, 1)
    plan, rule = defense.plan(np.arange(16), 2, 0), defense.gradient_rule()
    for group in "abcde":
        owners = {int(rule.unit_of_row[row]) for row, name in enumerate(GROUPS) if name == group}
        assert len(owners) == 1
    assert len(set(rule.unit_of_row.tolist())) == 5
    seen = set()
    for step in range(200):
        names, counts = np.unique([GROUPS[row] for row in plan.batch(step)], return_counts=True)
        assert dict(zip(names, counts, strict=True)) == {name: min(3, GROUPS.count(name)) for name in names}
        seen |= set(plan.batch(step).tolist())
    assert seen == set(range(16))  # over time every image takes part


def test_records_of_groups_are_capped_and_clipped_one_by_one(tmp_path):
    """At most 3 images of each group are ever used, 3 + 2 + 3 + 1 + 3 = 12; all of them may meet in one step."""
    settings = {"unit": "group", "group_sampling": "records", "group_cap": 3, "noise_multiplier": 2.0}
    refused("defenses.dpsgd.group_sampling", lambda: begun(tmp_path, GROUPS, **settings), "private")
    defense = begun(tmp_path, GROUPS, sample_rate=1 / 3, expected=4, **settings)
    assert (defense.units, defense.mechanism.copies) == (5, 3)
    assert defense.mechanism.sample_rate == pytest.approx(4 / 12) and defense.mechanism.divisor == 4
    plan, rule = defense.plan(np.arange(16), 4, 0), defense.gradient_rule()
    used = sorted({row for step in range(300) for row in plan.batch(step).tolist()})
    names, counts = np.unique([GROUPS[row] for row in used], return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"a": 3, "b": 2, "c": 3, "d": 1, "e": 3}
    assert len({int(rule.unit_of_row[row]) for row in used}) == 12 and (rule.unit_of_row[used] >= 0).all()


# --- the claim -----------------------------------------------------------------------------------------------------------

FIELDS = {
    "kind", "statement", "epsilon", "delta", "unit", "units", "adjacency", "accountant", "epsilon_crosscheck", "sampling",
    "sample_rate", "noise_multiplier", "clip_norm", "steps", "group_epsilon", "not_covered", "batch_size", "multiplicity",
    "segments", "resumes", "queries", "trust_model", "libraries", "not_private", "nonprivate_metrics",
}  # fmt: skip


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory):
    """A finished run with a budget of 3: (directory, sidecar)."""
    return finish(tmp_path_factory.mktemp("budgeted"), "defenses.dpsgd={epsilon: 3.0, delta: 1e-4}")


def test_the_claim_of_a_finished_run(budgeted):
    directory, facts = budgeted
    claim = facts["defenses"][0]["claim"]
    lines = [json.loads(line) for line in (directory.path / "ledger.jsonl").read_text().splitlines()]
    assert claim == json.loads(json.dumps(claim, allow_nan=False)) and claim.keys() >= FIELDS
    assert claim["steps"] == len(lines) == facts["steps"] == 7
    assert (claim["unit"], claim["units"], claim["delta"], claim["adjacency"]) == ("record", 28, 1e-4, "zero-out")
    assert (claim["sample_rate"], claim["batch_size"]) == (pytest.approx(6 / 28), 6)
    assert {line["noise_multiplier"] for line in lines} == {claim["noise_multiplier"]}
    assert (claim["segments"], claim["resumes"], claim["not_private"]) == (1, 0, [])
    assert "Poisson" in claim["sampling"] and "PRV" in claim["accountant"]
    assert claim["libraries"].keys() >= {"opacus", "dp-accounting", "torch"}
    covered = " ".join(claim["not_covered"])
    assert all(word in covered for word in ("settings", "deduplication", "record"))


def test_the_claimed_epsilon_is_within_the_budget_and_rounded_up(budgeted):
    claim = budgeted[1]["defenses"][0]["claim"]
    true = epsilon_of(claim["noise_multiplier"], 6 / 28, 7, 1e-4)
    assert true <= claim["epsilon"] <= 3.0 and claim["epsilon"] > 2.9
    assert claim["epsilon_crosscheck"] == pytest.approx(true, rel=0.01)
    assert len(f"{claim['epsilon']:g}".replace(".", "")) <= 4


def test_the_statement_says_what_is_promised_in_the_claims_own_figures(budgeted):
    claim = budgeted[1]["defenses"][0]["claim"]
    assert f"e^{claim['epsilon']:g}" in claim["statement"] and "0.0001" in claim["statement"]
    assert "one picture" in claim["statement"] and "NOT PRIVATE" not in claim["statement"]


def claimed(mechanisms: list[tuple[Mechanism, int]], **changes) -> dict:
    settings = {
        "delta": 1e-5, "units": 1000, "planned_steps": 2000, "multiplicity": 1, "images_per_group": None,
        "drawn": "record", "largest_group": 0, "starts": 1, "nonprivate_metrics": False,
    } | changes  # fmt: skip
    return dpclaim.build([Segment(*pair) for pair in mechanisms], **settings)


def mechanism(**changes) -> Mechanism:
    values = {"unit": "record", "copies": 1, "adjacency": "zero-out", "sample_rate": 0.02, "noise_multiplier": 4.0}
    values |= {"clip_norm": 1.0, "divisor": 20.0, "settings": "", "test": False}
    return Mechanism(**values | changes)


def test_several_records_of_one_picture_cost_more():
    """q .02, T 2000, noise 4: 0.85 for one, 1.81, 3.97, 9.00 for two, four, eight (measured: facts/dp.md, section 1).

    The largest group of 3 is stated as 4, and its figure stands beside the fixed ones.
    """
    claim = claimed([(mechanism(), 2000)], largest_group=3)
    group = claim["group_epsilon"]
    assert claim["largest_group"] == 4 and group["4"] == pytest.approx(3.97, rel=0.01)
    assert claim["epsilon"] == pytest.approx(0.85, rel=0.01)
    assert group["2"] == pytest.approx(1.81, rel=0.01) and group["8"] == pytest.approx(9.00, rel=0.01)
    assert claim["epsilon"] < group["2"] < group["4"] < group["8"] < group["32"] and set(group) == {"2", "4", "8", "32"}


def test_a_group_sampled_by_records_is_accounted_as_a_mixture():
    """At most 4 images of a patient, noise 4: 3.97 instead of the 0.85 of an image (facts/dp.md, section 1)."""
    claim = claimed([(mechanism(unit="group", copies=4), 2000)])
    assert claim["epsilon"] == pytest.approx(3.97, rel=0.01) and "one group" in claim["statement"]
    assert claim["group_epsilon"]["2"] == pytest.approx(9.00, rel=0.01)  # two patients: eight images


@pytest.mark.parametrize(("changes", "word"), [({"noise_multiplier": 0.0}, "noise"), ({"test": True}, "test_seed")])
def test_what_is_not_private_says_so_and_has_no_epsilon(changes, word):
    """One such step among private ones is enough."""
    claim = claimed([(mechanism(), 10), (mechanism(**changes), 1), (mechanism(), 10)])
    assert claim["epsilon"] is claim["group_epsilon"] is claim["epsilon_crosscheck"] is None
    assert claim["statement"].startswith("NOT PRIVATE") and word in claim["statement"]
    assert len(claim["not_private"]) == 1 and claim["steps"] == 21


def test_units_that_changed_are_not_claimed():
    claim = claimed([(mechanism(), 10), (mechanism(unit="group"), 10)])
    assert claim["epsilon"] is None and "different units" in claim["statement"]


def test_without_a_step_nothing_was_spent(tmp_path):
    claim = begun(tmp_path, noise_multiplier=2.0).claim()
    assert (claim["epsilon"], claim["steps"]) == (0.0, 0) and "No step was taken" in claim["statement"]


def test_a_run_without_noise_claims_nothing(tmp_path):
    claim = finish(tmp_path, "defenses.dpsgd.noise_multiplier=0")[1]["defenses"][0]["claim"]
    assert claim["epsilon"] is None and claim["not_private"] and claim["statement"].startswith("NOT PRIVATE")


# --- the dry run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"), [("epsilon: 3.0, delta: 1e-4", r"epsilon 2\.9\d+|epsilon 3"), ("noise_multiplier: 0", "none")]
)
def test_the_dry_run_prints_epsilon_and_spends_nothing(settings, line, tmp_path, capsys):
    tree, config = small_config(tmp_path, f"defenses.dpsgd={{{settings}}}")
    assert dry_run(tree, config, Accelerator(cpu=True)) == 0
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("epsilon ")]
    assert len(lines) == 1 and (re.fullmatch(line, lines[0]) or line in lines[0])
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_tells_the_noise_the_units_and_the_batch(tmp_path, capsys):
    tree, config = small_config(tmp_path, "defenses.dpsgd={noise_multiplier: 2.0, clip_norm: 3.0}")
    dry_run(tree, config, Accelerator(cpu=True))
    text = capsys.readouterr().out
    for words in ("noise_multiplier 2.0", "units 28", "adjacency zero-out", "steps 7 left of 7", "expected batch 6.0"):
        assert words in text
    assert "noise per weight and step 1, against" in text  # 2 x 3 / 6


# --- side doors ----------------------------------------------------------------------------------------------------------


def watched(folder: Path, *overrides: str) -> SimpleNamespace:
    """A class-conditional run with a tracker and everything that is logged without DP."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        config, dataset, directory, defenses, _ = opened(
            folder,
            NOISE,
            "data.label_key=label",
            "train.trackers=[tensorboard]",
            "train.keep_checkpoints=null",
            *overrides,
        )
        files = ProjectConfiguration(project_dir=str(directory.path), logging_dir=str(directory.path / "trackers"))
        accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=files)
        facts = train_model(config, dataset, directory, defenses, accelerator)
    tags = set()
    for file in directory.path.glob("trackers/**/events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    return SimpleNamespace(
        directory=directory,
        facts=facts,
        claim=facts["defenses"][0]["claim"],
        metrics=[json.loads(line) for line in directory.metrics.read_text().splitlines()],
        states=[json.loads(file.read_text()) for file in directory.checkpoints.glob("step-*/state.json")],
        tags=tags,
        shown=shown.getvalue(),
    )


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "heldout_batches", lambda *arguments: reads.append("batches") or {})
        patch.setattr(stage, "heldout_losses", lambda *arguments: reads.append("losses") or {"heldout_loss": 0.5})
        run = watched(tmp_path_factory.mktemp("closed"))
    run.reads = reads
    return run


@pytest.fixture(scope="module")
def ajar(tmp_path_factory):
    return watched(tmp_path_factory.mktemp("ajar"), "report.nonprivate_metrics=true")


def test_the_log_holds_public_values_only(closed):
    assert [row["step"] for row in closed.metrics] == [2, 4, 6, 7]
    assert set().union(*closed.metrics) == {"step", "learning_rate"}


def test_held_out_records_are_not_looked_at(closed):
    assert closed.reads == []


def test_trackers_get_public_values_only(closed):
    assert closed.tags == {"learning_rate"}


def test_the_progress_bar_shows_no_loss(closed):
    assert "7/7" in closed.shown and not re.search(r"loss|images_per_s", closed.shown)


def test_checkpoints_hold_no_loss(closed):
    assert len(closed.states) == 3
    for state in closed.states:
        assert (state["loss_sum"], state["loss_count"]) == (0.0, 0)
        assert state["defenses"] == {"dpsgd": {"released": state["step"]}}
        assert not re.search("heldout|images_per_second|batch_size|secret|seed", json.dumps(state))


def test_images_seen_is_the_expected_number_not_the_drawn_one(closed):
    """7 steps of 6 expected records; the drawn batches vary."""
    assert closed.facts["images_seen"] == 42
    assert sorted(state["images_seen"] for state in closed.states) == [18, 36, 42]


def test_the_sidecar_holds_no_measurement_of_the_records(closed):
    assert set(closed.facts["class_frequency"]) == {1} and len(closed.facts["class_frequency"]) == 4
    facts = {key: value for key, value in closed.facts.items() if key != "defenses"}
    assert not re.search("loss|images_per_second|heldout", json.dumps(facts))
    told = json.loads((closed.directory.model / "deffuse.json").read_text())
    assert told.items() <= closed.facts.items()
    assert closed.facts.keys() - told.keys() == {"train_seconds", "peak_memory_bytes", "defense_states"}


def test_doors_that_the_user_opens_are_open(ajar):
    keys = set().union(*ajar.metrics)
    assert keys == {"step", "learning_rate", "loss", "images_per_second", "heldout_loss", "train_loss"}
    assert ajar.tags == keys - {"step"}
    assert all(0 < row["loss"] < 10 for row in ajar.metrics if row.get("loss") is not None)
    assert sum(ajar.facts["class_frequency"]) == RECORDS


def test_the_claim_says_which_doors_are_open(ajar, closed):
    assert ajar.claim["nonprivate_metrics"] is True and closed.claim["nonprivate_metrics"] is False
    assert "nothing else of the records was released" in closed.claim["queries"]
    assert "nothing else" not in ajar.claim["queries"]  # losses were
    assert ajar.claim["epsilon"] == closed.claim["epsilon"]


# --- with other parts ----------------------------------------------------------------------------------------------------


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_only_trained_tensors_change(tmp_path):
    """Frozen weights stay to the bit, in the model and in its average; every trained one is released."""
    overrides = (NOISE, "model.trainable=['*norm*', 'conv_out.bias']")
    _, config = small_config(tmp_path, *overrides)
    initial = {name: tensor.clone() for name, tensor in build_model(config, []).state_dict().items()}
    directory, facts = finish(tmp_path, *overrides)
    trained = {name for name in initial if "norm" in name} | {"conv_out.bias"}
    for part in ("model", "ema"):
        saved = load_file(directory.checkpoints / "step-7" / f"{part}.safetensors")
        assert saved.keys() == trained  # what is frozen is not in a checkpoint
        assert changed({name: initial[name] for name in trained}, saved) == trained
    assert changed(initial, load_file(directory.model / "unet" / "diffusion_pytorch_model.safetensors")) == trained
    assert facts["trainable_parameters"] == sum(initial[name].numel() for name in trained)


def test_public_training_then_private_adapters_with_other_defenses(tmp_path):
    """Two configs: train on public pictures; adapt privately, deduplicated and augmented. All but the adapted layers stay."""
    public, _ = finish(tmp_path, "run.name=public", "data.phantom.seed=1")
    private, facts = finish(
        tmp_path, "run.name=private", f"model.pretrained={public.model}", "model.adapter.rank=2", "train.ema_decay=0",
        "defenses.dedup={}", "defenses.augment={}", "defenses.dpsgd={noise_multiplier: 2.0, multiplicity: 2}",
    )  # fmt: skip
    claims = {each["name"]: each["claim"] for each in facts["defenses"]}
    assert list(claims) == ["dedup", "augment", "dpsgd"] and claims["dpsgd"]["steps"] == 7
    assert claims["dpsgd"]["units"] == 24 and claims["dpsgd"]["sample_rate"] == pytest.approx(6 / 24)  # without copies
    assert claims["dpsgd"]["multiplicity"] == 2
    weights = [load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors") for run in (public, private)]
    assert changed(*weights) == {
        f"mid_block.attentions.0.{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert (private.model / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_private_fine_tuning_of_all_weights(tmp_path):
    public, _ = finish(tmp_path, "run.name=public", "data.phantom.seed=1")
    private, facts = finish(tmp_path, "run.name=private", f"model.pretrained={public.model}", NOISE)
    weights = [load_file(run.model / "unet" / "diffusion_pytorch_model.safetensors") for run in (public, private)]
    assert changed(*weights) == set(weights[0]) and facts["defenses"][0]["claim"]["epsilon"] > 0


def test_slow_learning_is_not_mistaken_for_a_frozen_tensor(tmp_path):
    """At the start of the default warm-up a rate of 5e-7 moves no weight of 1.0 in float32: no reason to end a run."""
    finish(tmp_path, NOISE, "train.learning_rate=5e-7", "train.optimizer.warmup_steps=100")


def test_patients_are_the_units_of_a_run(tmp_path):
    """Sampling, clip, delta and claim count patients; images_seen counts them, too: their images would be private."""
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, "train.batch_size=3", "defenses.dpsgd={noise_multiplier: 2.0, unit: group, group_cap: 2}"
    )
    facts = train_model(config, dataset, directory, defenses, accelerator)
    patients = [dataset.records[row].group for row in dataset.rows("train", kept=True)]
    sizes = set(patients)
    claim = facts["defenses"][0]["claim"]
    assert (claim["unit"], claim["units"], claim["images_per_group"]) == ("group", len(sizes), 2)
    assert claim["sample_rate"] == pytest.approx(3 / len(sizes)) and claim["largest_group"] is None
    assert facts["images_seen"] == 7 * 3


@pytest.mark.slow
def test_the_whole_job_with_a_report(tmp_path):
    """Training, attack and report by the entry point; the claim of the report is that of the ledger."""
    overrides = [
        *OVERRIDES,
        "defenses.dpsgd={epsilon: 3.0, delta: 1e-4}",
        f"run.output_dir={tmp_path}",
        "run.name=whole",
    ]
    assert training.main(cli.Arguments(None, False, overrides)) == 0
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    claim = report["defenses"][0]["claim"]
    lines = (tmp_path / "whole" / "ledger.jsonl").read_text().splitlines()
    assert claim["steps"] == len(lines) == 7 and 2.9 < claim["epsilon"] <= 3.0
    assert f"{claim['epsilon']:g}" in (tmp_path / "whole" / "report.html").read_text()
