"""The Gaussian mechanism: what a record can change, what is added, what is left on disk.

The networks are real; expected sums are computed in float64 from one backward() per unit.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from defenses import dpclaim, dpsgd, mechanism, poisson, seeding
from defenses.base import Batch, Microbatches
from defenses.errors import UserError
from defenses.mechanism import CHECK_AFTER, NoisyClippedSum, add_clipped, shared_secret
from defenses.persample import Hooks, Loop, Vmap, backend
from tests.networks import NETWORKS, batch, trained
from tests.small import opened
from tests.smalldp import begun, quick
from train.models import ModelConfig, build
from train.stage import build_trainer, train_model

FORMATS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
BACKENDS = {
    "vmap": Vmap("fp32", chunk=3),
    "hooks": Hooks("fp32", chunk=3),
    "loop": Loop("fp32"),
    "vmap-bf16": Vmap("bf16"),
    "hooks-bf16": Hooks("bf16"),
}
DPSGD = (
    "defenses.dpsgd={noise_multiplier: 1.0, sample_rate: 0.3, batch_size: 6, delta: 1e-3, clip_norm: 0.1, units: 28%s}"
)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def rule(owners, chosen=BACKENDS["vmap"], clip=1.0, sigma=0.0, divisor=4.0, secret=11, book=lambda step: None):
    """The mechanism over rows of the given units; without noise unless told otherwise."""
    owners = np.asarray(owners)
    return NoisyClippedSum(chosen, Loop("fp32"), clip, sigma, divisor, owners, secret, book, False, 1e-4)


def release(sum_rule, model, loss, batches, accelerator, step=0) -> torch.Tensor:
    """What one step releases, float64 [parameters]."""
    microbatches = Microbatches([lambda b=b: b for b in batches])
    assert len(sum_rule.backward(model, loss, microbatches, step, accelerator)) == 0  # losses are private
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in parameters)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    found = torch.cat([p.grad.double().flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return found


def unit_gradients(model, loss, batches) -> torch.Tensor:
    """Gradient of the mean loss of each batch by backward() on a copy, float64 [batches, parameters]."""
    rows = []
    for one in batches:
        twin = copy.deepcopy(model)
        loss(twin, one).mean().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters() if p.requires_grad]
        rows.append(torch.cat([gradient.double().flatten() for gradient in gradients]))
    return torch.stack(rows)


def clipped(gradients: torch.Tensor, clip: float) -> torch.Tensor:
    return gradients * (clip / gradients.norm(dim=1)).clamp(max=1)[:, None]


def singles(examples: Batch) -> list[Batch]:
    return [examples[i : i + 1] for i in range(len(examples))]


def whole_with(loss, value):
    """The loss, times ``value`` for label 2 and times 0 for the others."""
    return lambda m, b: loss(m, b) * torch.where(b.labels == 2, value, 0.0)


# --- one unit's contribution ---------------------------------------------------------------------------------------------

ENTRIES = st.one_of(
    st.floats(-1e7, 1e7, width=32),
    st.sampled_from([0.0, 1e-30, -1e-42, 1e18, 3e38, math.inf, -math.inf, math.nan]),
)


@st.composite
def unit_tensors(draw):
    """Gradients of up to 4 units for up to 3 tensors of up to 3 dimensions, float32 [u, *shape] each."""
    count = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    size = sum(math.prod(shape) for shape in shapes)
    odd = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, size - 1), ENTRIES), max_size=6))
    scale = draw(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 1e6]))
    numbers = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32))))
    flat = torch.from_numpy((scale * numbers.standard_normal((count, size))).astype(np.float32))
    for unit, place, value in odd:
        flat[unit, place] = value
    parts = flat.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.reshape(count, *shape) for part, shape in zip(parts, shapes, strict=True)]


def contribution(gradients: list[torch.Tensor], clip: float) -> torch.Tensor:
    """Sum that `add_clipped` makes of the gradients, float64 [n]."""
    totals = [torch.zeros(gradient.shape[1:]) for gradient in gradients]
    add_clipped(gradients, clip, totals)
    return torch.cat([total.double().flatten() for total in totals])


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(unit_tensors(), st.sampled_from([1e-3, 1.0, 50.0]))
def test_no_unit_moves_the_sum_by_more_than_the_clip_norm(gradients, clip):
    """Each alone by at most C (1 + 1e-5); together they are the sum in float64, where a unit without a finite norm adds 0."""
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    finite = flat.square().sum(1).isfinite()
    right = torch.where(finite[:, None], flat, 0).double()
    norms = right.norm(dim=1, keepdim=True)
    right = right * (clip / norms.clamp(min=1e-300)).clamp(max=1)
    for unit in range(len(flat)):
        alone = contribution([gradient[unit : unit + 1] for gradient in gradients], clip)
        assert alone.norm() <= clip * (1 + 1e-5)
        torch.testing.assert_close(alone, right[unit], rtol=1e-5, atol=1e-6 * clip)
        assert finite[unit] or not alone.any()
    torch.testing.assert_close(contribution(gradients, clip), right.sum(0), rtol=1e-5, atol=1e-5 * clip)


def test_a_norm_over_many_tensors_is_one_norm():
    """3-4-12: l2 norm 13 over three tensors, scaled to 6.5. Clipping each tensor by itself would keep 3 and 4."""
    found = contribution([torch.tensor([[3.0]]), torch.tensor([[[4.0]]]), torch.tensor([[0.0, 12.0]])], 6.5)
    torch.testing.assert_close(found, torch.tensor([1.5, 2.0, 0.0, 6.0], dtype=torch.float64))


def test_long_gradients_keep_the_bound():
    """A million entries: rounding in the norm does not add up."""
    numbers = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 1_000_003, generator=numbers).exp() * 1e4, torch.randn(2, 7, 9, generator=numbers)]
    assert contribution([g[:1] for g in gradients], 1e-3).norm().item() == pytest.approx(1e-3, rel=1e-5)


def test_a_tensor_without_dimensions_is_clipped_like_the_others():
    found = contribution([torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [0.5]])], 1.0)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8 + 0.5], dtype=torch.float64), rtol=1e-6, atol=0)


# --- the sum over a batch, with real backends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
def test_without_noise_it_is_the_clipped_sum_however_it_is_cut(kind, accelerator):
    """Seven records in 1, 2 or 7 micro-batches, 1, 3 or all at once in memory: equal to the reference within 1e-5."""
    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    examples = batch(network, 7)
    gradients = unit_gradients(model, network.loss, singles(examples))
    clip = gradients.norm(dim=1).median().item()  # some are clipped, some are not
    right = clipped(gradients, clip).sum(0) / 4
    assert (gradients.norm(dim=1) < 0.95 * clip).any() and (gradients.norm(dim=1) > 1.05 * clip).any()
    for cuts, physical in [(1, 3), (2, None), (7, None)]:
        parts = np.array_split(np.arange(7), cuts)
        batches = [examples[part[0] : part[-1] + 1] for part in parts]
        chosen = backend(kind, "fp32", physical)
        found = release(rule(range(7), chosen, clip), model, network.loss, batches, accelerator)
        assert (found - right).norm() < 1e-5 * right.norm(), (cuts, physical)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("name", ["UNet2DModel", "LoRA"])
def test_a_canary_moves_the_sum_by_the_clip_norm(name, kind, memory_format, accelerator):
    """Among three records whose gradient is zero, one with a gradient of about 1e6 C: C (1 + 1e-5), in any arithmetic."""
    network, model = NETWORKS[name], trained(name, FORMATS[memory_format])
    examples = batch(network, 4)
    examples.labels = torch.tensor([0, 2, 1, 0])
    clip = 0.01
    loss = whole_with(network.loss, 1e4)
    if memory_format == "default" and kind == "loop":
        assert unit_gradients(model, loss, [examples[1:2]]).norm() > 1e5 * clip
    found = 4 * release(rule(range(4), BACKENDS[kind], clip), model, loss, [examples], accelerator)
    assert clip * (1 - 1e-4) < found.norm().item() <= clip * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
def test_twice_the_batch_is_twice_the_sum(kind, accelerator):
    """A sum over a constant: no mean over the realised batch. And half the divisor is twice the release."""
    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    three = batch(network, 3)
    six = Batch(*(torch.cat([v, v]) if torch.is_tensor(v) else v for v in vars(three).values()))
    six.rows = np.arange(6)
    chosen = backend(kind, "fp32")
    once = release(rule(range(3), chosen), model, network.loss, [three], accelerator)
    twice = release(rule(range(6), chosen), model, network.loss, [six], accelerator)
    half = release(rule(range(3), chosen, divisor=2.0), model, network.loss, [three], accelerator)
    assert (twice - 2 * once).norm() < 1e-5 * once.norm()
    assert (half - 2 * once).norm() < 1e-6 * once.norm()


@pytest.mark.parametrize("kind, bad", [*((kind, math.nan) for kind in BACKENDS), ("vmap", math.inf), ("vmap", 1e30)])
def test_a_broken_record_adds_exactly_nothing(kind, bad, accelerator):
    """Alone in a micro-batch it leaves the release as it is to the bit; between others these still count; the step is booked."""
    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    examples, booked = batch(network, 4), []
    examples.images[2, :, 2:4] = bad
    one = rule(range(4), BACKENDS[kind], sigma=1.0, book=booked.append)
    good = release(one, model, network.loss, [examples[0:2]], accelerator, step=2)
    beside = release(one, model, network.loss, [examples[0:2], examples[2:3]], accelerator, step=2)
    assert torch.equal(beside, good) and good.isfinite().all() and booked == [2, 2]
    quiet = rule(range(4), BACKENDS[kind])
    after = release(quiet, model, network.loss, [examples[2:4]], accelerator)
    right = release(quiet, model, network.loss, [examples[3:4]], accelerator)
    assert right.norm() > 0.1 and (after - right).norm() < (0.05 if "bf16" in kind else 1e-5) * right.norm()


@pytest.mark.parametrize("kind", ["vmap", "hooks", "loop"])
def test_views_of_a_unit_are_one_contribution(kind, accelerator):
    """Views are averaged, then clipped once: against float64; and a unit of 8 views, or of its first view 8 times, moves the
    sum by at most C. Clipping each view would let it move by up to 8 C."""
    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    examples = batch(network, 6)
    examples.rows = np.array([0, 0, 0, 1, 2, 2])
    gradients = unit_gradients(model, network.loss, [examples[0:3], examples[3:4], examples[4:6]])
    clip = 0.6 * gradients.norm(dim=1).min().item()
    sum_rule = rule([0, 1, 2], backend(kind, "fp32"), clip)
    found = 4 * release(sum_rule, model, network.loss, [examples], accelerator)
    right = clipped(gradients, clip).sum(0)
    assert (found - right).norm() < 1e-5 * right.norm()

    one = batch(network, 1)
    eight = Batch(*(v[:1].repeat(8, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v for v in vars(one).values()))
    eight.rows = np.zeros(8, dtype=np.int64)
    repeated = 4 * release(sum_rule, model, network.loss, [eight], accelerator)
    once = 4 * release(sum_rule, model, network.loss, [one], accelerator)
    assert repeated.norm().item() == pytest.approx(clip, rel=1e-5)
    assert (repeated - once).norm() < 1e-4 * clip


def test_an_empty_batch_is_noise_and_is_booked(accelerator):
    """No forward pass; the release is the noise of that step and nothing else."""
    model, booked = trained("UNet2DModel"), []

    def never(m, b):
        raise AssertionError("a forward pass of an empty batch")

    sum_rule = rule([0], sigma=2.0, clip=0.5, divisor=8.0, book=booked.append)
    found = release(sum_rule, model, never, [], accelerator, step=3)
    assert booked == [3]
    assert found.std().item() == pytest.approx(2.0 * 0.5 / 8, rel=5 / math.sqrt(2 * len(found)))
    torch.testing.assert_close(found, sum_rule.noise(torch.zeros(len(found)), 3).double() / 8)


def test_a_step_is_booked_before_anything_is_computed(accelerator):
    network, events = NETWORKS["UNet2DModel"], []

    def loss(m, b):
        events.append("forward")
        return network.loss(m, b)

    sum_rule = rule(range(2), book=lambda step: events.append(f"booked {step}"))
    release(sum_rule, trained("UNet2DModel"), loss, [batch(network, 2)], accelerator, step=1)
    assert events[0] == "booked 1" and "forward" in events


# --- noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [0, 1, 2, 7])
def test_noise_has_the_declared_scale_whatever_the_batch(microbatches, accelerator):
    """1.06 million weights without a gradient: sd sigma C / divisor within 1 %, mean 0, normal (Kolmogorov-Smirnov).

    Noise per micro-batch would be sqrt(7) times as large, a divisor of the realised batch 0.7 times.
    """
    model = build(ModelConfig(size="tiny"), image_size=8, channels=1, classes=0)
    examples = Batch(torch.zeros(7, 1, 8, 8), np.arange(7), None, None, torch.zeros(7, dtype=torch.int64), None)
    batches = [examples[part[0] : part[-1] + 1] for part in np.array_split(np.arange(7), microbatches or 1)]
    sum_rule = rule(range(7), clip=0.3, sigma=1.7, divisor=10.0)

    def flat(m, b):  # no gradient; the network itself would give the same zeros slowly
        return 0.0 * b.images.flatten(1).sum(1)

    found = release(sum_rule, model, flat, batches[:microbatches], accelerator).numpy()
    expected = 1.7 * 0.3 / 10
    assert found.std() == pytest.approx(expected, rel=0.01)
    assert abs(found.mean()) < 5 * expected / math.sqrt(len(found))
    assert stats.kstest(found[::10] / expected, "norm").pvalue > 1e-4
    halves = np.corrcoef(found[: len(found) // 2], found[len(found) // 2 : 2 * (len(found) // 2)])[0, 1]
    assert abs(halves) < 5 / math.sqrt(len(found) // 2)


def test_noise_is_fresh_in_every_step_tensor_and_run(accelerator):
    """Two steps, two starts of a run, two tensors of one step: uncorrelated, and no value occurs twice."""
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    first = rule([0], sigma=1.0, secret=shared_secret(accelerator, None))
    second = rule([0], sigma=1.0, secret=shared_secret(accelerator, None))
    drawn = [
        release(one, model, None, [], accelerator, step=step) for one, step in [(first, 0), (first, 1), (second, 0)]
    ]
    parts = torch.stack([part for found in drawn for part in found.split(40_000)])  # [6, 40000]
    correlations = parts.corrcoef() - torch.eye(6)
    assert correlations.abs().max() < 5 / math.sqrt(40_000)
    torch.testing.assert_close(
        release(first, model, None, [], accelerator), drawn[0], rtol=0, atol=0
    )  # a pure function


def test_the_secret_is_new_unless_it_is_given(accelerator):
    drawn = {shared_secret(accelerator, None) for _ in range(20)}
    assert len(drawn) == 20 and max(drawn).bit_length() > 240
    assert shared_secret(accelerator, 5) == 5


def test_noise_does_not_follow_the_seed_of_the_run(accelerator):
    """The trainer seeds torch's global generator with run.seed before every step."""
    model, found = nn.Linear(200, 200), []
    for secret in (1, 2):
        torch.manual_seed(0)
        found.append(release(rule([0], sigma=1.0, secret=secret), model, None, [], accelerator))
    assert abs(np.corrcoef(*found)[0, 1]) < 5 / 200


# --- what must not happen ------------------------------------------------------------------------------------------------


def test_a_gradient_left_from_elsewhere_is_refused(accelerator):
    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    network.loss(model, batch(network, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="left from elsewhere"):
        release(rule(range(2)), model, network.loss, [batch(network, 2)], accelerator)


def test_models_that_couple_examples_are_refused_by_the_rule():
    network = NETWORKS["UNet2DModel"]
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
    with pytest.raises(UserError, match="BatchNorm2d"):
        rule(range(4)).check(model, lambda m, b: m(b.images).flatten(1).mean(1), batch(network, 4))


def test_the_rule_checks_its_backend_against_one_by_one_gradients():
    """A backend that computes 1.5 times the gradient is refused; the right one is not."""

    class Wrong:
        name = "wrong"

        def __call__(self, model, loss, units):
            for gradients, losses in Vmap("fp32")(model, loss, units):
                yield [1.5 * gradient for gradient in gradients], losses

    network, model = NETWORKS["UNet2DModel"], trained("UNet2DModel")
    rule(range(4)).check(model, network.loss, batch(network, 4))
    with pytest.raises(UserError, match="wrong disagrees"):
        rule(range(4), Wrong()).check(model, network.loss, batch(network, 4))


class Two(nn.Module):
    """One trained and one frozen layer, and a buffer."""

    def __init__(self):
        super().__init__()
        self.trained, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("scale", torch.ones(2))


def move(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor += 0.01


def watched(model, moved, accelerator, steps=CHECK_AFTER):
    """Eleven steps into a run the rule sees the model for the first time; then ``moved`` changes."""
    sum_rule = rule([0])
    sum_rule.watch(model, 10, accelerator)
    for tensor in moved:
        move(tensor)
    for step in range(11, 10 + steps + 1):
        sum_rule.watch(model, step, accelerator)


def test_watch_accepts_what_should_move_and_refuses_what_should_not(accelerator):
    model = Two()
    watched(model, model.trained.parameters(), accelerator)
    for tensor, name in [(model.frozen.weight, "frozen.weight"), (model.scale, "scale")]:
        with pytest.raises(RuntimeError, match=f"{name} changed though it is not trained"):
            watched(model, [*model.trained.parameters(), tensor], accelerator)
    with pytest.raises(UserError, match="no weight has moved"):
        watched(model, [], accelerator)
    watched(model, [], accelerator, steps=CHECK_AFTER - 1)  # a warm-up leaves the weights where they were once


def test_watch_accepts_a_tied_weight(accelerator):
    """Its second name is in the state, but not among the parameters."""
    model = Two()
    model.tied = nn.Linear(3, 3, bias=False)
    model.tied.weight = model.trained.weight
    watched(model, model.trained.parameters(), accelerator)


def test_watch_refuses_ranks_that_drifted_apart(accelerator, monkeypatch):
    model = Two()
    other = {name: value + 1e-9 for name, value in mechanism._fingerprints(model).items()}
    monkeypatch.setattr(mechanism, "gather_object", lambda own: [*own, other])
    with pytest.raises(RuntimeError, match="ranks hold different weights"):
        watched(model, model.trained.parameters(), accelerator)


# --- in the trainer ------------------------------------------------------------------------------------------------------


def trainer_of(folder, *overrides, without_last=False):
    """The small run's trainer, its defense, and its directory; perhaps without its last training record."""
    config, dataset, directory, (defense,), accelerator = opened(folder, *overrides)
    if without_last:
        dataset.records[dataset.rows("train", kept=True)[-1]].kept = False
    return build_trainer(config, dataset, directory, accelerator, [defense], []), defense, directory


def ledger_of(directory) -> list[dict]:
    return [json.loads(line) for line in (directory.path / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture
def unchecked(monkeypatch):
    """A narrow network, and no start-up check, which other tests cover."""
    monkeypatch.setattr(NoisyClippedSum, "check", lambda self, model, loss, example: None)
    with quick():
        yield


@pytest.fixture
def unclaimed(monkeypatch):
    """No accountant is asked: it would take most of the time."""
    monkeypatch.setattr(dpclaim, "build", lambda *arguments, **settings: {})


def test_neighbours_differ_by_one_clipped_contribution_and_nothing_else(tmp_path, monkeypatch, unchecked, unclaimed):
    """D and D without its last record, same randomness, same released gradients (re:cord-play).

    Sums before noise differ by at most C (1 + 1e-5), by C where that record was drawn, and by nothing where it was not. All
    that is told to the outside is equal: steps, constants of the ledger, learning rates, checkpoint.
    """
    steps, clip, drawn, sums, releases, told = 4, 1e-3, [], {}, [], {}
    original_noise, original_backward = NoisyClippedSum.noise, NoisyClippedSum.backward

    def noise(self, like, step):
        sums[run].append(like.double().clone())
        return original_noise(self, like, step)

    def backward(self, model, loss, microbatches, step, accelerator):
        """In the second run the released gradient is that of the first, so that the weights stay equal to the bit."""
        losses = original_backward(self, model, loss, microbatches, step, accelerator)
        if run == "whole":
            releases.append([parameter.grad.clone() for parameter in model.parameters()])
        else:
            for parameter, released in zip(model.parameters(), releases[step], strict=True):
                parameter.grad = released.clone()
        return losses

    monkeypatch.setattr(NoisyClippedSum, "noise", noise)
    monkeypatch.setattr(NoisyClippedSum, "backward", backward)
    for run in ("whole", "without"):
        small = (DPSGD % ", test_seed: 5").replace("clip_norm: 0.1", f"clip_norm: {clip}")
        settings_ = [small, f"train.steps={steps}", f"run.name={run}"]
        trainer, defense, directory = trainer_of(tmp_path, *settings_, without_last=run == "without")
        sums[run] = []
        if run == "whole":
            last = len(defense._units) - 1
            drawn = [last in trainer.plan.selected(step) for step in range(steps)]
        trainer.train()
        state = json.loads((directory.checkpoints / f"step-{steps}" / "state.json").read_text())
        told[run] = {
            "ledger": [{k: v for k, v in line.items() if k != "process"} for line in ledger_of(directory)],
            "metrics": directory.metrics.read_text(),
            "state": {key: value for key, value in state.items() if key != "seconds"},
            "scales": (trainer.rule.clip_norm, trainer.rule.noise_multiplier, trainer.rule.divisor),
        }
    assert any(drawn) and not all(drawn)
    for was_drawn, whole, without in zip(drawn, sums["whole"], sums["without"], strict=True):
        distance = (whole - without).norm().item()
        assert distance <= clip * (1 + 1e-4)  # also the rounding of the others' gradients in a batch of another size
        assert distance == pytest.approx(clip if was_drawn else 0.0, abs=1e-4 * clip)
        assert whole.norm() > 1.5 * clip  # there were others in the batch
    assert told["whole"] == told["without"]
    assert [line["step"] for line in told["whole"]["ledger"]] == list(range(steps))


def test_without_any_record_training_goes_on_as_noise(tmp_path, monkeypatch, unchecked, unclaimed):
    """A rate so small that every batch is empty: no forward pass, yet every step is booked, moves weights and EMA, and
    advances the learning rate."""
    never = []
    monkeypatch.setattr("train.diffusion.per_example_loss", lambda *arguments: never.append(1))
    rare = (DPSGD % "").replace("sample_rate: 0.3", "sample_rate: 1e-12")
    trainer, _, directory = trainer_of(tmp_path, rare, "train.keep_checkpoints=null", "train.preview_every=0")
    before = copy.deepcopy(trainer.state.model.state_dict())
    optimized = [id(tensor) for group in trainer.state.optimizer.param_groups for tensor in group["params"]]
    assert optimized == [id(tensor) for tensor in trainer.state.model.parameters()]
    trainer.train()
    assert never == [] and len(ledger_of(directory)) == 7
    files = [directory.checkpoints / f"step-{step}" for step in (3, 6, 7)]
    for part in ("model", "ema"):
        states = [before] + [load_file(file / f"{part}.safetensors") for file in files]
        for one, two in zip(states, states[1:], strict=False):
            assert all((one[name] != two[name]).any() for name in two)
    rates = [json.loads(line)["learning_rate"] for line in directory.metrics.read_text().splitlines()]
    assert rates == pytest.approx([2e-3 / 3, 1e-3, 1e-3, 1e-3])  # warm-up over 3 steps to 1e-3
    assert trainer.state.ema.optimization_step == 7


def test_every_view_of_every_record_has_its_own_timestep_and_noise(tmp_path, unchecked, unclaimed):
    trainer, defense, _ = trainer_of(
        tmp_path, (DPSGD % ", multiplicity: 3").replace("sample_rate: 0.3", "sample_rate: 1")
    )
    rows = trainer.plan.batch(0)
    assert len(rows) == 84 and np.array_equal(rows[:3], rows[:1].repeat(3))
    parts = list(trainer.microbatches(rows))
    timesteps, noise = torch.cat([p.timesteps for p in parts]), torch.cat([p.noise.flatten(1) for p in parts])
    assert len(timesteps.unique()) > 65  # 84 draws of 1000: 80.6 distinct on average, sd 1.8
    assert stats.kstest(timesteps.numpy() / 1000, "uniform").pvalue > 1e-4
    assert (noise.corrcoef() - torch.eye(84)).abs().max() < 6 / math.sqrt(256)
    again = torch.cat([p.timesteps for p in trainer.microbatches(trainer.plan.batch(0))])
    trainer.state.step = 1
    other = torch.cat([p.timesteps for p in trainer.microbatches(trainer.plan.batch(0))])
    assert torch.equal(again, timesteps) and (other != timesteps).sum() > 75


def test_sampling_clipping_noise_and_ledger_have_one_set_of_constants(tmp_path, unclaimed):
    defense = begun(tmp_path, noise_multiplier=1.3, clip_norm=0.2, sample_rate=0.25, delta=1e-3)
    plan, sum_rule = defense.plan(np.arange(40), 10, 0), defense.gradient_rule()
    defense._book(0)
    line = json.loads((tmp_path / "ledger.jsonl").read_text())
    used = (plan.sample_rate, sum_rule.clip_norm, sum_rule.noise_multiplier, sum_rule.divisor)
    assert used == (0.25, 0.2, 1.3, 10.0)
    assert used == tuple(line[key] for key in ("sample_rate", "clip_norm", "noise_multiplier", "divisor"))
    noise = sum_rule.noise(torch.zeros(200_000), 0)
    assert noise.std().item() == pytest.approx(1.3 * 0.2, rel=0.01)


def test_a_new_start_counts_what_was_booked_and_draws_anew(tmp_path, unclaimed):
    """Three steps booked, a checkpoint after two: three are spent, four are left. Masks and noise are new; with a test seed
    they are the old ones."""

    def start(folder, **settings):
        defense = begun(folder, noise_multiplier=1.0, sample_rate=0.5, batch_size=20, delta=1e-3, **settings)
        plan, sum_rule = defense.plan(np.arange(40), 20, 0), defense.gradient_rule()
        masks = np.stack([np.isin(np.arange(40), plan.selected(step)) for step in range(100)])
        return defense, masks.ravel(), sum_rule.noise(torch.zeros(20_000), 3).numpy(), plan.seed

    first = start(tmp_path)
    for step in range(3):
        first[0]._book(step)
    second = start(tmp_path)
    second[0].load_state_dict({"released": 2})
    assert second[0].spent == 3 and second[0].last_step(7) == 2 + 4
    second[0]._book(2)
    assert [segment.steps for segment in second[0]._ledger.segments()] == [4]
    assert second[0]._ledger.processes() == 2
    assert abs(np.corrcoef(first[1], second[1])[0, 1]) < 5 / math.sqrt(4000)
    assert abs(np.corrcoef(first[2], second[2])[0, 1]) < 5 / math.sqrt(20_000)
    assert first[3] != second[3]
    known = [
        start(tmp_path / "known", test_seed=9) for _ in range(2) if (tmp_path / "known").mkdir(exist_ok=True) is None
    ]
    assert all(np.array_equal(*pair) for pair in zip(*(one[1:] for one in known), strict=True))


def encodings(value: int) -> list[bytes]:
    """How a number may lie in a file: decimal, hexadecimal, as bytes of either order."""
    size = max(8, -(-value.bit_length() // 8))
    binary = [value.to_bytes(size, order) for order in ("big", "little")]
    return [str(value).encode(), b"%x" % value, b"%X" % value, *binary]


def test_nothing_secret_is_on_disk_after_a_private_run(tmp_path, monkeypatch, unchecked):
    """Neither the secret nor a seed that follows from it, in any file; no loss, no mask, no generator, no raw gradient."""
    secret = int("b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef", 16)
    derived, original = {secret}, seeding.derive

    def recording(seed, *parts):
        value = original(seed, *parts)
        if seed in derived:
            derived.add(value)
        return value

    def wide(seed, *parts):
        value = original_wide(seed, *parts)
        derived.add(value)
        return value

    original_wide = seeding.derive_wide
    for module in (seeding, mechanism):
        monkeypatch.setattr(module, "derive", recording)
    for module in (poisson, mechanism):
        monkeypatch.setattr(module, "derive_wide", wide)
    monkeypatch.setattr(dpsgd, "shared_secret", lambda accelerator, test_seed: secret)
    config, dataset, directory, defenses, accelerator = opened(
        tmp_path, DPSGD % "", "train.steps=3", "train.heldout_every=1"
    )
    train_model(config, dataset, directory, defenses, accelerator)
    assert len(derived) > 20  # plan, masks, noise, dropout, and those of the records

    files = [file for file in directory.path.rglob("*") if file.is_file()]
    assert {"ledger.jsonl", "metrics.jsonl", "state.json", "deffuse.json", "model.safetensors"} <= {
        file.name for file in files
    }
    codes = [code for value in derived for code in encodings(value)]
    for file in files:
        content = file.read_bytes()
        assert not [code for code in codes if code in content], file

    for line in ledger_of(directory):
        assert line.keys() == {
            *("segment", "step", "unit", "copies", "adjacency", "sample_rate", "noise_multiplier", "clip_norm"),
            *("divisor", "settings", "test", "process"),
        }
    for line in directory.metrics.read_text().splitlines():
        assert json.loads(line).keys() == {"step", "learning_rate"}
    folder = directory.checkpoints / "step-3"
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    state = json.loads((folder / "state.json").read_text())
    assert state["loss_sum"] == 0 and state["loss_count"] == 0
    assert state.keys() == {
        *("step", "images_seen", "seconds", "stopped_by", "release_step", "loss_sum", "loss_count", "ema_steps"),
        *("defenses", "optimizer", "frozen"),
    }
    assert state["defenses"] == {"dpsgd": {"released": 3}}
    parts = {name.split(".", 1)[1] for name in load_file(folder / "optimizer.safetensors")}
    assert parts == {"exp_avg", "exp_avg_sq", "step"}
