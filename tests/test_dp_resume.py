"""A private run killed at any step and resumed: the budget holds, nothing that was spent is forgotten, noise is fresh."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from defenses import dpclaim, dpsgd
from defenses.errors import UserError
from defenses.ledger import Ledger, history
from defenses.mechanism import NoisyClippedSum
from defenses.poisson import PoissonPlan
from tests.small import opened
from tests.smalldp import finish, quick, refused
from train import checkpoint
from train.loop import Interrupted, Trainer
from train.stage import train_model

STEPS, EVERY = 7, 3  # of tests.small: checkpoints at 3, 6 and 7
FRESH = "defenses.dpsgd.noise_multiplier=2"
SEEDED = "defenses.dpsgd={noise_multiplier: 2.0, test_seed: 5}"
BUDGET = "defenses.dpsgd={epsilon: 3.0, delta: 1e-4}"


class Killed(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """The start-up check and the figures for several records at once have tests of their own."""
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisyClippedSum, "check", lambda *arguments: None)
        patch.setattr(dpclaim, "group_epsilon", lambda spent, delta, sizes: dict.fromkeys(sizes, 1.0))
        yield


def kill(path: Path, step: int, *overrides: str, method: str = "noise") -> None:
    """Runs until an exception at a step: in ``noise`` its line was booked, in ``watch`` not yet."""
    original = getattr(NoisyClippedSum, method)

    def dying(self, first, at, *rest):
        if at == step:
            raise Killed
        return original(self, first, at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisyClippedSum, method, dying)
        with pytest.raises(Killed):
            finish(path, *overrides)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "quickstart" / "ledger.jsonl").read_text().splitlines()]


def claim_of(facts: dict) -> dict:
    return facts["defenses"][0]["claim"]


def outcome(path: Path) -> dict:
    """Weights, averages and moments of the last checkpoint."""
    final = checkpoint.latest(path / "quickstart" / "checkpoints")
    return {part: load_file(final / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}


def same(one: dict, two: dict) -> bool:
    return all(torch.equal(tensor, two[part][name]) for part in one for name, tensor in one[part].items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Claim of the run that was never stopped."""
    return claim_of(finish(tmp_path_factory.mktemp("straight"), BUDGET)[1])


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """(last checkpoint, sidecar) of the run with known noise that was never stopped."""
    path = tmp_path_factory.mktemp("seeded")
    return outcome_and_facts(path)


def outcome_and_facts(path: Path) -> tuple[dict, dict]:
    facts = finish(path, SEEDED)[1]
    return outcome(path), facts


# --- kills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(STEPS))
def test_killed_between_ledger_line_and_checkpoint_at_every_step(step, tmp_path, straight):
    """Steps that were booked and lost are spent: training ends so much earlier, with the epsilon of the straight run."""
    saved = step // EVERY * EVERY
    kill(tmp_path, step, BUDGET)
    before = (tmp_path / "quickstart" / "ledger.jsonl").read_bytes()
    assert before.count(b"\n") == step + 1  # the step in which it died is booked
    facts = finish(tmp_path, BUDGET)[1]
    after = (tmp_path / "quickstart" / "ledger.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == STEPS
    claim = claim_of(facts)
    assert facts["steps"] == STEPS - (step + 1 - saved)
    assert (claim["steps"], claim["segments"], claim["resumes"]) == (STEPS, 1, 1 if step + 1 < STEPS else 0)
    assert claim["epsilon"] == straight["epsilon"] <= 3.0
    assert claim["noise_multiplier"] == straight["noise_multiplier"]


@pytest.mark.parametrize("step", [3, 5])
def test_killed_before_the_line(step, tmp_path, straight):
    """At 3 a checkpoint was just saved and nothing is lost: as many steps as the straight run. At 5 two are lost."""
    kill(tmp_path, step, BUDGET, method="watch")
    assert len(lines(tmp_path)) == step
    facts = finish(tmp_path, BUDGET)[1]
    assert facts["steps"] == STEPS - step % EVERY and claim_of(facts)["steps"] == STEPS == len(lines(tmp_path))
    assert claim_of(facts)["epsilon"] == straight["epsilon"]


def test_killed_again_and_again_the_budget_is_never_exceeded(tmp_path):
    """Every start dies in its second step; before the first checkpoint nothing is ever kept, and at the end nothing is left."""
    overrides = (FRESH, "train.checkpoint_every=4", "train.steps=6")
    for start in range(3):
        kill(tmp_path, 1, *overrides)
        assert len(lines(tmp_path)) == 2 * (start + 1)
    refused("defenses.dpsgd", lambda: finish(tmp_path, *overrides), "all 6 steps", "run.name")
    assert len(lines(tmp_path)) == 6 and len({line["process"] for line in lines(tmp_path)}) == 3
    assert not (tmp_path / "quickstart" / "model" / "deffuse.json").exists()


def test_everything_spent_after_a_checkpoint_releases_that_checkpoint(tmp_path):
    """Booked to the end, saved at 6: the weights of step 6 are released, with the epsilon of all 7."""
    kill(tmp_path, 6, FRESH)
    directory, facts = finish(tmp_path, FRESH)
    assert (facts["steps"], claim_of(facts)["steps"], len(lines(tmp_path))) == (6, 7, 7)
    released = load_file(directory.model / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(directory.checkpoints / "step-6" / "ema.safetensors")
    assert all(torch.equal(released[name], tensor) for name, tensor in saved.items())


def test_a_kill_while_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    """All steps are booked, none was saved: nothing may be trained again."""

    def dying(*arguments):
        raise Killed

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        finish(tmp_path, FRESH, "train.checkpoint_every=0")
    monkeypatch.undo()
    refused("defenses.dpsgd", lambda: finish(tmp_path, FRESH, "train.checkpoint_every=0"), "no checkpoint was saved")
    assert len(lines(tmp_path)) == STEPS


def test_a_signal_loses_nothing(tmp_path, monkeypatch, straight):
    original = Trainer.step

    def interrupting(self):
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupting)
    with pytest.raises(Interrupted):
        finish(tmp_path, BUDGET)
    monkeypatch.undo()
    assert len(lines(tmp_path)) == 5
    claim = claim_of(finish(tmp_path, BUDGET)[1])
    assert (claim["steps"], claim["resumes"], claim["epsilon"]) == (STEPS, 1, straight["epsilon"])


CHILD = """
import os, signal, sys
from pathlib import Path
from defenses.ledger import Ledger
from tests.smalldp import finish, quick
append = Ledger.append
def torn(self, mechanism, segment, step, process):
    append(self, mechanism, segment, step, process)
    if step == int(sys.argv[2]):
        os.truncate(self.file, self.file.stat().st_size - 40)
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.append = torn
with quick():
    finish(Path(sys.argv[1]), sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_a_process_killed_while_it_writes_a_line(step, tmp_path, straight):
    """SIGKILL leaves a torn line, the first or a later one: the whole file is still within the budget."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(step), BUDGET]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    claim = claim_of(finish(tmp_path, BUDGET)[1])
    assert claim["steps"] <= STEPS and claim["epsilon"] <= straight["epsilon"]
    assert len(Ledger(tmp_path / "quickstart" / "ledger.jsonl").lines()) == claim["steps"]


def test_a_torn_first_line_does_not_exceed_the_budget(tmp_path, straight):
    """Killed while it wrote its very first line: whether that counts or not, the file ends within the budget."""
    kill(tmp_path, 0, BUDGET)
    file = tmp_path / "quickstart" / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    claim = claim_of(finish(tmp_path, BUDGET)[1])
    assert claim["steps"] <= STEPS and claim["epsilon"] <= straight["epsilon"] <= 3.0


def test_a_torn_line_costs_a_step(tmp_path):
    kill(tmp_path, 4, FRESH)
    file = tmp_path / "quickstart" / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    facts = finish(tmp_path, FRESH)[1]
    assert claim_of(facts)["steps"] == STEPS and facts["steps"] == STEPS - 2


# --- noise ---------------------------------------------------------------------------------------------------------------


def test_noise_and_batches_are_fresh_after_a_resume(tmp_path, monkeypatch):
    """Step 0 is made twice: neither its noise nor its batch comes again. Whoever knew both could subtract them."""
    noises, batches, noise, batch = [], [], NoisyClippedSum.noise, PoissonPlan.batch

    def spied_noise(self, like, step):
        drawn = noise(self, like, step)
        noises.append((step, drawn.clone()))
        return drawn

    def spied_batch(self, step):
        rows = batch(self, step)
        batches.append((step, rows.tolist()))
        return rows

    monkeypatch.setattr(NoisyClippedSum, "noise", spied_noise)
    monkeypatch.setattr(PoissonPlan, "batch", spied_batch)
    kill(tmp_path, 2, FRESH)
    first = len(noises)
    assert [step for step, _ in noises] == [0, 1]
    finish(tmp_path, FRESH)
    assert [step for step, _ in noises[first:]] == [0, 1, 2, 3]  # three are spent
    for _, one in noises[:first]:
        for _, two in noises[first:]:
            assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 5 / len(one) ** 0.5
    assert [rows for _, rows in batches[:3]] != [rows for _, rows in batches[3:6]]
    assert len({line["process"] for line in lines(tmp_path)}) == 2


@pytest.mark.parametrize("step", [3, 6])
def test_under_a_test_seed_a_run_that_lost_nothing_is_equal_to_the_bit(step, tmp_path, seeded):
    kill(tmp_path, step, SEEDED, method="watch")
    tensors, facts = outcome_and_facts(tmp_path)
    assert same(tensors, seeded[0]) and facts["images_seen"] == seeded[1]["images_seen"]
    assert claim_of(facts)["not_private"] and claim_of(facts)["epsilon"] is None


def test_under_a_test_seed_a_signal_changes_nothing(tmp_path, monkeypatch, seeded):
    original = Trainer.step

    def interrupting(self):
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupting)
    with pytest.raises(Interrupted):
        finish(tmp_path, SEEDED)
    monkeypatch.undo()
    assert same(outcome_and_facts(tmp_path)[0], seeded[0])


def test_without_a_test_seed_two_runs_differ(tmp_path, seeded):
    """Otherwise the equalities above would say nothing."""
    finish(tmp_path, FRESH)
    assert not same(outcome(tmp_path), seeded[0])


# --- changed settings ----------------------------------------------------------------------------------------------------


def budget(**changes: object) -> str:
    settings = {"epsilon": 3.0, "delta": 1e-4} | changes
    return "defenses.dpsgd={" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


def test_changed_settings_open_a_segment_within_the_budget(tmp_path):
    """Five steps at rate 6/28 are spent, two are left at 9/28: new noise, and the whole history keeps the budget."""
    kill(tmp_path, 4, BUDGET)
    old = lines(tmp_path)[0]["noise_multiplier"]
    facts = finish(tmp_path, budget(batch_size=9))[1]
    claim, found = claim_of(facts), lines(tmp_path)
    assert [line["segment"] for line in found] == [0] * 5 + [1] * 2
    assert (claim["segments"], claim["steps"], facts["steps"]) == (2, STEPS, STEPS - 2)
    assert found[5]["noise_multiplier"] != old and found[5]["sample_rate"] == pytest.approx(9 / 28)
    assert 2.9 < claim["epsilon"] <= 3.0
    true = google([(old, 6 / 28, 5), (found[5]["noise_multiplier"], 9 / 28, 2)], 1e-4)
    assert claim["epsilon"] == pytest.approx(true, rel=0.01)


def google(history: list[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of (noise, rate, steps) by Google's accountant, asked without our code."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for noise, rate, steps in history:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


def test_a_larger_clip_norm_is_another_segment_with_its_own_noise(tmp_path):
    kill(tmp_path, 3, FRESH)
    finish(tmp_path, "defenses.dpsgd={noise_multiplier: 2.0, clip_norm: 0.01}")
    assert [(line["segment"], line["clip_norm"]) for line in lines(tmp_path)] == [(0, 1e-3)] * 4 + [(1, 1e-2)] * 3


def test_less_noise_after_a_resume_is_accounted(tmp_path):
    """Noise 2 for four steps, then 1 for three: epsilon of the whole history."""
    kill(tmp_path, 3, FRESH)
    claim = claim_of(finish(tmp_path, "defenses.dpsgd.noise_multiplier=1")[1])
    segments = Ledger(tmp_path / "quickstart" / "ledger.jsonl").segments()
    assert [(s.noise_multiplier, s.steps) for s in history(segments)] == [(2.0, 4), (1.0, 3)]
    assert claim["epsilon"] == pytest.approx(google([(2, 6 / 28, 4), (1, 6 / 28, 3)], 1e-5), rel=0.01)


@pytest.mark.parametrize("setting", ["physical_batch: 2", "backend: loop"])
def test_speed_and_memory_settings_open_no_segment(setting, tmp_path):
    kill(tmp_path, 3, FRESH)
    claim = claim_of(finish(tmp_path, f"defenses.dpsgd={{noise_multiplier: 2.0, {setting}}}")[1])
    assert claim["segments"] == 1 and {line["segment"] for line in lines(tmp_path)} == {0}


def test_a_budget_below_what_is_spent_is_refused(tmp_path):
    kill(tmp_path, 4, BUDGET)
    before = lines(tmp_path)
    refused("defenses.dpsgd.epsilon", lambda: finish(tmp_path, budget(epsilon=0.5)), "already spent")
    assert lines(tmp_path) == before


def test_a_test_seed_in_the_middle_makes_the_whole_run_not_private(tmp_path):
    kill(tmp_path, 3, FRESH)
    claim = claim_of(finish(tmp_path, SEEDED)[1])
    assert claim["epsilon"] is None and claim["not_private"] and claim["segments"] == 2


def test_settings_are_fixed_once_training_is_finished(tmp_path):
    finish(tmp_path, FRESH)
    refused("defenses.dpsgd.clip_norm", lambda: opened(tmp_path, FRESH, "defenses.dpsgd.clip_norm=1"), "run.name")
    refused("defenses.dpsgd.noise_multiplier", lambda: opened(tmp_path, "defenses.dpsgd.noise_multiplier=9"))


@pytest.mark.parametrize(
    "key",
    ["train.steps=9", "train.learning_rate=1e-4", "report.nonprivate_metrics=true", "defenses.dpsgd.unit=group"],
)
def test_other_settings_are_fixed_from_the_start(key, tmp_path):
    kill(tmp_path, 1, FRESH)
    refused(key.split("=")[0], lambda: opened(tmp_path, FRESH, key), "run.name")


def test_privacy_cannot_be_switched_on_in_the_middle(tmp_path, monkeypatch):
    """The first steps had no noise: an epsilon of the others would be a false claim."""
    original = Trainer.step

    def dying(self):
        if self.state.step == 4:
            raise Killed
        return original(self)

    monkeypatch.setattr(Trainer, "step", dying)
    with pytest.raises(Killed):
        finish(tmp_path, "train.heldout_every=0")
    monkeypatch.undo()
    with pytest.raises(UserError, match="^defenses.dpsgd.*run.name"):
        finish(tmp_path, FRESH, "train.heldout_every=0")


def test_privacy_cannot_be_switched_off_in_the_middle(tmp_path):
    """Nor off and on again: the steps between would be in the weights and not in the ledger."""
    kill(tmp_path, 4, FRESH)
    with pytest.raises(UserError, match="^defenses.dpsgd.*run.name"):
        finish(tmp_path)


# --- the ledger and the checkpoint contradict each other -----------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 2])
def test_a_ledger_shorter_than_the_checkpoint_is_refused(left, tmp_path):
    kill(tmp_path, 4, FRESH)
    file = tmp_path / "quickstart" / "ledger.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:left]))
    refused(str(file), lambda: finish(tmp_path, FRESH), f"has {left} steps, the checkpoint 3", "restore")
    assert len(lines(tmp_path)) == left


def test_a_ledger_that_was_removed_is_missed(tmp_path):
    kill(tmp_path, 4, FRESH)
    (tmp_path / "quickstart" / "ledger.jsonl").unlink()
    refused(str(tmp_path / "quickstart" / "ledger.jsonl"), lambda: finish(tmp_path, FRESH), "lines are missing")


def test_a_removed_checkpoint_is_not_trained_again(tmp_path):
    """Without its newest checkpoint a run goes on from the one before, and the steps between stay spent."""
    kill(tmp_path, 6, FRESH)
    for name in ("model", "ema", "optimizer"):
        (tmp_path / "quickstart" / "checkpoints" / "step-6" / f"{name}.safetensors").unlink()
    (tmp_path / "quickstart" / "checkpoints" / "step-6").rename(tmp_path / "gone")
    facts = finish(tmp_path, FRESH)[1]
    assert (facts["steps"], claim_of(facts)["steps"], len(lines(tmp_path))) == (3, 7, 7)


def test_a_finished_run_is_neither_trained_nor_booked_again(tmp_path, monkeypatch):
    directory, facts = finish(tmp_path, FRESH)
    before = (directory.path / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(dpsgd.DPSGD, "begin", lambda *arguments: pytest.fail("began again"))
    assert train_model(*opened(tmp_path, FRESH)) == facts
    assert (directory.path / "ledger.jsonl").read_bytes() == before
