"""Audits: their statistics against published figures, closed forms and planted truth; and planted bugs that they must catch."""

import json
import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy.stats import binomtest

from defenses import canaries, mechanism
from defenses.base import Batch
from defenses.canaries import Canary, choose, draw, settle
from defenses.errors import UserError
from defenses.mechanism import NoisyClippedSum
from eval import audit_mechanism
from eval.audit import (
    _upper,
    audit_run,
    ceiling,
    gaussian_epsilon,
    gdp_lower_bound,
    guesses,
    one_run_lower_bound,
    p_value,
    released_losses,
    summary,
    unit_scores,
)
from eval.audit_mechanism import judge, statistics
from train.data import Dataset
from train.diffusion import DiffusionConfig, noise_schedule, per_example_loss
from train.models import ModelConfig, save_pipeline

# --- lower bound on mu


def gaussian_trials(mu, trials, seed):
    random = np.random.default_rng(seed)
    return random.normal(mu, 1, trials), random.normal(0, 1, trials)


@pytest.mark.parametrize(("mu", "found"), [(1.0, range(0, 3)), (1.5, range(36, 41)), (2.0, range(40, 41))])
def test_gdp_audit_has_the_power_and_the_false_alarms_of_the_table(mu, found):
    """facts/dp.md, section 7, at mu = 1 and 1000 trials a side: 0, 59 and 60 of 60."""
    above = sum(gdp_lower_bound(*gaussian_trials(mu, 1000, seed)) > 1.0 for seed in range(40))
    assert above in found


def test_gdp_bound_approaches_the_truth_from_below():
    assert 0.9 < gdp_lower_bound(*gaussian_trials(1.0, 100_000, 0)) <= 1.0


def test_gdp_bound_of_what_cannot_be_told_apart_is_near_zero_and_never_negative():
    bounds = [gdp_lower_bound(*gaussian_trials(0.0, 300, seed)) for seed in range(40)]
    assert min(bounds) == 0 and sum(bound > 0 for bound in bounds) <= 4


def test_gdp_bound_sees_the_direction_and_copes_with_perfect_separation():
    inside, outside = np.full(1000, 5.0), np.zeros(1000)
    rate = 1 - 0.025 ** (1 / 500)  # 0 errors in 500 trials
    assert gdp_lower_bound(inside, outside) == pytest.approx(-2 * NormalDist().inv_cdf(rate), rel=1e-6)
    assert gdp_lower_bound(outside, inside) == 0


def test_error_rates_are_bounded_by_clopper_pearson():
    exact = [binomtest(errors, 50).proportion_ci(0.95, "exact").high for errors in (0, 1, 17, 49, 50)]
    assert _upper(np.array([0, 1, 17, 49, 50]), 50) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_gaussian_epsilon_is_that_of_another_library(mu):
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_event.GaussianDpEvent(1 / mu))
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_gaussian_epsilon_of_nothing_is_zero():
    assert gaussian_epsilon(0.0, 1e-5) == 0 and gaussian_epsilon(1e-6, 1e-5) == 0


# --- the mechanism itself


def trials(count, **options):
    return judge(*statistics(Accelerator(cpu=True), count, seed=0, **options))


def noise_smaller(monkeypatch, factor):
    right = NoisyClippedSum.noise
    monkeypatch.setattr(NoisyClippedSum, "noise", lambda self, like, step: right(self, like, step) / factor)


def clip_looser(monkeypatch, factor):
    right = mechanism.add_clipped
    monkeypatch.setattr(
        mechanism, "add_clipped", lambda gradients, clip, totals: right(gradients, factor * clip, totals)
    )


def divide_by_realised_batch(monkeypatch, factor):
    right = NoisyClippedSum.backward

    def backward(self, model, loss, microbatches, step, accelerator):
        losses = right(self, model, loss, microbatches, step, accelerator)
        count = sum(len(batch) for batch in microbatches)
        for parameter in model.parameters():
            parameter.grad *= self.divisor / count
        return losses

    monkeypatch.setattr(NoisyClippedSum, "backward", backward)


def noise_repeated(monkeypatch, factor):
    right = NoisyClippedSum.noise

    def noise(self, like, step):
        self.secret = 1
        return right(self, like, step)

    monkeypatch.setattr(NoisyClippedSum, "noise", noise)


def test_the_mechanism_passes():
    audit = trials(120)
    assert audit.violations == [] and audit.claimed_mu == 1 and 0 < audit.bound <= 1
    assert audit.shift == pytest.approx(1, abs=0.4) and audit.spread == pytest.approx(1, abs=0.16)


@pytest.mark.parametrize(
    ("plant", "factor", "word"),
    [
        (noise_smaller, 1.5, "standard deviation"),
        (clip_looser, 2.0, "moves the sum"),
        (divide_by_realised_batch, 1.0, "standard deviation"),
        (noise_repeated, 1.0, "standard deviation"),
    ],
)
def test_planted_bugs_are_caught_with_few_trials(monkeypatch, plant, factor, word):
    plant(monkeypatch, factor)
    assert any(word in violation for violation in trials(80).violations)


def test_gradients_handed_out_again_are_those_computed_anew():
    accelerator = Accelerator(cpu=True)
    again = statistics(accelerator, 3, seed=0)
    anew = statistics(accelerator, 3, seed=0, prepare=lambda backend: backend)
    assert np.allclose(again, anew, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "factor"), [(noise_smaller, 1.0), (noise_smaller, 1.5), (noise_smaller, 2.0), (clip_looser, 2.0)]
)
def test_full_audit_by_its_lower_bound(monkeypatch, plant, factor):
    plant(monkeypatch, factor)
    audit = trials(audit_mechanism.TRIALS)
    assert (audit.bound > audit.claimed_mu) == (factor > 1) == bool(audit.violations)
    assert audit.bound < 1.15 * factor


def test_command_line_says_what_was_found(monkeypatch, capsys):
    monkeypatch.setattr(audit_mechanism, "Accelerator", lambda: Accelerator(cpu=True))
    monkeypatch.setattr(audit_mechanism, "TRIALS", 40)
    monkeypatch.setattr(audit_mechanism, "statistics", lambda *_: gaussian_trials(1.0, 1000, 3))
    assert audit_mechanism.main() == 0
    text = capsys.readouterr().out
    assert "mu 1.000  (epsilon 4.38 at delta 1e-05)" in text and "no violation found" in text
    monkeypatch.setattr(audit_mechanism, "statistics", lambda *_: gaussian_trials(2.0, 1000, 3))
    assert audit_mechanism.main() == 1
    assert "not 1-GDP" in capsys.readouterr().out


# --- one run


@pytest.mark.parametrize(
    ("count", "guessed", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_bound_is_the_published_one(count, guessed, correct, delta, published):
    """Steinke, Nasr and Jagielski 2023, appendix D and figure 11 (printed with three digits, one of them cut off)."""
    assert p_value(count, guessed, correct, published - 0.001, delta) < 0.05
    assert p_value(count, guessed, correct, published + 0.002, delta) > 0.05


def test_tail_without_delta_is_binomial_and_delta_adds_to_it():
    exact = binomtest(75, 100, 0.75, alternative="greater").pvalue
    assert p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(exact, rel=1e-9)
    masses = [math.comb(100, k) * 0.75**k * 0.25 ** (100 - k) for k in range(74, -1, -1)]
    steepest = max(sum(masses[:i]) / i for i in range(1, 76))
    assert p_value(100, 100, 75, math.log(3), 1e-3) == pytest.approx(exact + 2 * 100 * 1e-3 * steepest, rel=1e-9)
    assert p_value(10, 10, 0, 1.0, 0.0) == 1


def test_ceiling_is_every_guess_right():
    for count in (50, 1000):
        guessed = guesses(count)
        assert guessed == count / 5
        assert ceiling(count, 0.0) == pytest.approx(-math.log(20 ** (1 / guessed) - 1), abs=1e-6)
        included = np.arange(count) % 2 == 0
        assert one_run_lower_bound(included.astype(float), included, 0.0).epsilon == ceiling(count, 0.0)
    assert [guesses(count) for count in (2, 3, 20, 30)] == [2, 2, 4, 6]
    assert ceiling(1000, 1e-3) < ceiling(1000, 1e-5) < ceiling(1000, 0.0)


def randomised_response(epsilon, count, seed):
    """Coins, and scores from the worst mechanism that is epsilon-DP: each coin is told, and wrong with 1 / (1 + e^epsilon)."""
    random = np.random.default_rng(seed)
    included = random.random(count) < 0.5
    told = included ^ (random.random(count) < 1 / (1 + math.exp(epsilon)))
    return told + 0.1 * random.random(count), included


def test_false_alarms_at_the_truth_are_at_most_five_percent():
    bounds = [one_run_lower_bound(*randomised_response(1.0, 200, seed), 0.0).epsilon for seed in range(200)]
    assert sum(bound > 1.0 for bound in bounds) <= 18  # 5 % are 10; more than 18 have a probability of 0.3 %
    assert 0.3 < np.median(bounds) < 0.9


def test_a_claim_that_is_too_small_by_half_is_refuted():
    bounds = [one_run_lower_bound(*randomised_response(1.5, 2000, seed), 1e-5).epsilon for seed in range(20)]
    assert sum(bound > 1.0 for bound in bounds) >= 16


@pytest.mark.parametrize(("mu", "least", "most"), [(0.5, 0.39, 1.0), (1.0, 1.24, 2.0), (np.inf, 4.1, 4.3)])
def test_one_run_is_no_weaker_than_the_table(mu, least, most):
    """facts/dp.md, section 7: 1000 ideal canaries, claimed epsilon 2 (mu 0.5): medians 0.39, with a bug of 2x 1.24, no noise 4.3."""
    bounds = []
    for seed in range(15):
        random = np.random.default_rng(seed)
        included = random.random(1000) < 0.5
        scores = (1e9 if mu == np.inf else mu) * included + random.normal(size=1000)
        bounds.append(one_run_lower_bound(scores, included, 1e-5).epsilon)
    assert least <= np.median(bounds) <= most


def test_guesses_are_taken_from_both_ends_and_the_rest_abstains():
    scores = np.array([9.0, 8, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 1, 2])
    included = np.array([True] * 2 + [False] * 16 + [True, False])
    assert one_run_lower_bound(scores, included, 0.0)[1:] == (4, 3)
    with pytest.raises(ValueError, match="too few"):
        one_run_lower_bound(scores[:1], included[:1], 0.0)


def test_scores_standardise_timesteps_and_average_over_a_group():
    losses = np.array([[1.0, 100.0], [3.0, 300.0], [2.0, 200.0], [2.0, 200.0]])
    scores = unit_scores(losses, ["a", "b", "b", "c"])
    spread = math.sqrt(0.5)  # of 1, 3, 2, 2
    assert scores == pytest.approx({"a": 1 / spread, "b": -0.5 / spread, "c": 0.0})
    assert unit_scores(np.ones((2, 3)), ["a", "b"]) == {"a": 0.0, "b": 0.0}


def test_report_states_the_limits_of_its_power():
    random = np.random.default_rng(0)
    included = random.random(100) < 0.5
    claim = {"epsilon": 10.0, "delta": 1e-5, "unit": "record"}
    report = summary(random.normal(size=100), included, claim)
    assert report["canaries"] == 100 and report["guesses"] == 20 and report["included"] == included.sum()
    assert report["epsilon_lower_bound"] < report["ceiling"] == pytest.approx(1.82, abs=0.02)
    assert "even a model trained without any noise could show at most 1.82" in report["note"]
    assert "no proof" in report["note"] and "beyond what this audit can refute" in report["note"]
    assert "beyond" not in summary(random.normal(size=100), included, claim | {"epsilon": 1.0})["note"]
    few = summary(np.zeros(1), np.array([True]), claim)
    assert few["epsilon_lower_bound"] is None and few["ceiling"] is None and "too few" in few["note"]
    assert summary(np.zeros(4), np.ones(4, bool), claim | {"epsilon": None})["claimed_epsilon"] is None
    json.dumps([report, few], allow_nan=False)


# --- canaries


def pool(count, groups=None):
    return SimpleNamespace(
        rows=np.arange(count), record_id=[f"id{row}" for row in range(count)], group=groups or [None] * count, seed=7
    )


def test_canaries_are_as_many_as_asked_for_on_average_and_half_of_them_in():
    names = [f"{row:06}" for row in range(20_000)]
    chosen = choose(names, 5000, 20_000, seed=1)
    assert abs(len(chosen) - 5000) < 4 * math.sqrt(20_000 * 0.25 * 0.75)
    assert abs(sum(chosen.values()) - len(chosen) / 2) < 2 * math.sqrt(len(chosen))
    other = choose(names, 5000, 20_000, seed=2)
    common = chosen.keys() & other.keys()
    assert abs(len(common) - 1250) < 150
    assert abs(sum(chosen[name] == other[name] for name in common) - len(common) / 2) < 2 * math.sqrt(len(common))
    assert list(choose(names, 20_000, 20_000, seed=1)) == names and choose(names, 0, 20_000, seed=1) == {}


def test_one_more_unit_changes_the_fate_of_no_other():
    names = [f"{row:06}" for row in range(300)]
    before = choose(names, 100, 300, seed=1)
    after = choose(["another", *reversed(names)], 100, 300, seed=1)
    assert before == {name: after[name] for name in before} and after.keys() - before.keys() <= {"another"}


def test_a_group_is_drawn_whole_and_a_record_without_group_never():
    groups = [None if row % 5 == 0 else f"p{row // 3}" for row in range(60)]
    drawn = draw(pool(60, groups), groups, 10, None)
    members = {canary.unit: [row for row, group in enumerate(groups) if group == canary.unit] for canary in drawn}
    assert drawn and all(
        [canary.row for canary in drawn if canary.unit == unit] == rows for unit, rows in members.items()
    )
    assert all(len({canary.included for canary in drawn if canary.unit == unit}) == 1 for unit in members)
    assert draw(pool(60), groups, 0, None) == []
    with pytest.raises(UserError, match="defenses.dpsgd.canaries"):
        draw(pool(60), pool(60).record_id, 61, None)


def test_canaries_are_kept_and_other_ones_are_refused(tmp_path):
    groups = [f"p{row // 3}" for row in range(60)]
    drawn = draw(pool(60, groups), groups, 12, None)
    left_out = settle(tmp_path, drawn)
    assert left_out == [3] * len({canary.unit for canary in drawn if not canary.included})
    assert canaries.read(tmp_path / canaries.FILE) == drawn and settle(tmp_path, drawn) == left_out
    for others in ([], drawn[1:], [*drawn[:-1], Canary(*list(vars(drawn[-1]).values())[:3], not drawn[-1].included)]):
        with pytest.raises(UserError, match=r"defenses.dpsgd.canaries.*other canaries"):
            settle(tmp_path, others)
    (tmp_path / canaries.FILE).write_text("row,record_id\n1,x\n")
    with pytest.raises(UserError, match="cannot be read"):
        canaries.read(tmp_path / canaries.FILE)


def test_no_canaries_leave_no_trace(tmp_path):
    assert settle(tmp_path, []) == [] and list(tmp_path.iterdir()) == []
    assert audit_run(tmp_path, SimpleNamespace(), None, None) is None


# --- a trained run


def fabricated_run(folder, count, steps, epsilon):
    """Noise pictures, half of them trained on without any privacy; returns (dataset, coins)."""
    random = np.random.default_rng(0)
    images, included = random.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8), random.random(count) < 0.5
    settle(folder, [Canary(row, f"id{row}", f"id{row}", bool(coin)) for row, coin in enumerate(included)])
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    schedule, optimizer = noise_schedule(DiffusionConfig()), torch.optim.Adam(model.parameters(), 2e-3)
    pictures = torch.from_numpy(images[included]).float() / 127.5 - 1
    for _ in range(steps):
        times = torch.randint(0, 1000, (len(pictures),))
        batch = Batch(pictures, np.arange(len(pictures)), None, None, times, torch.randn_like(pictures))
        optimizer.zero_grad()
        per_example_loss(model, batch, schedule, None).mean().backward()
        optimizer.step()
    save_pipeline(folder / "model", model, schedule)
    claim = {"epsilon": epsilon, "delta": 1e-5, "unit": "record"}
    sidecar = {"classes": [], "defenses": [{"name": "dedup", "claim": {}}, {"name": "dpsgd", "claim": claim}]}
    (folder / "training.json").write_text(json.dumps(sidecar))
    return Dataset([], images), included


FROM_SCRATCH = SimpleNamespace(model=SimpleNamespace(pretrained=None))


def test_an_untrained_model_tells_nothing(tmp_path):
    dataset, included = fabricated_run(tmp_path, count=60, steps=0, epsilon=0.5)
    audit = audit_run(tmp_path, FROM_SCRATCH, dataset, Accelerator(cpu=True))
    assert audit.report["epsilon_lower_bound"] < 0.5 == audit.report["claimed_epsilon"]
    assert [line["included"] for line in audit.table] == included.tolist()
    assert 2 <= audit.report["correct"] <= 10 and audit.report["guesses"] == 12


def test_losses_are_compared_with_those_of_the_public_weights(tmp_path):
    dataset, _ = fabricated_run(tmp_path, count=4, steps=0, epsilon=0.5)
    shape = SimpleNamespace(image_size=8, channels=1)
    rows, accelerator, found = np.arange(4), Accelerator(cpu=True), {}
    for name, start in (("alone", None), ("itself", str(tmp_path / "model"))):
        config = SimpleNamespace(model=ModelConfig(pretrained=start), data=shape)
        found[name] = released_losses(tmp_path / "model", config, dataset, rows, [], accelerator)
    assert found["alone"].shape == found["itself"].shape == (4, 8)
    assert (found["alone"] > 0.1).all() and (found["itself"] == 0).all()


@pytest.mark.slow
def test_a_run_without_noise_refutes_a_small_claim(tmp_path):
    dataset, _ = fabricated_run(tmp_path, count=80, steps=300, epsilon=0.5)
    report = audit_run(tmp_path, FROM_SCRATCH, dataset, Accelerator(cpu=True)).report
    assert report["correct"] >= 15 and report["claimed_epsilon"] < report["epsilon_lower_bound"] <= report["ceiling"]
