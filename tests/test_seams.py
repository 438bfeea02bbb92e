"""All six seams, filled by defenses that the loop has never heard of."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defenses import registry
from defenses.base import Batch, Defense, Removal, Verdict
from defenses.errors import UserError
from defenses.seeding import RecordRandom
from tests.small import opened
from train.stage import train_model


@dataclass(kw_only=True)
class NothingConfig:
    """No settings."""


class Base(Defense):
    def __init__(self, config):
        self.name = type(self).__name__.lower()

    def claim(self):
        return {"kind": "heuristic", "statement": "for a test"}


def run(tmp_path, monkeypatch, *kinds, overrides=()):
    """Trains the small run with instances of the given classes as its defenses; returns (directory, instances, facts)."""
    made = [kind(NothingConfig()) for kind in kinds]
    monkeypatch.setattr(registry, "build", lambda config: made)
    arguments = opened(tmp_path, *overrides)
    facts = train_model(*arguments)
    return arguments[2], made, facts, arguments[1]


def weights(directory, step=7, part="model"):
    return load_file(directory.checkpoints / f"step-{step}" / f"{part}.safetensors")


def test_select_removes_records_from_every_batch(tmp_path, monkeypatch):
    class Halve(Base):
        def select(self, pool):
            return [Removal(int(row), "odd row", int(pool.rows[0]), 0.25) for row in pool.rows[1::2]]

    _, _, _, dataset = run(tmp_path, monkeypatch, Halve)
    removed = [r for r in dataset.records if r.reason.startswith("halve: odd row")]
    assert removed and all(not r.kept and r.distance == 0.25 and r.duplicate_of for r in removed)
    assert len(dataset.rows("train", kept=True)) == len(dataset.rows("train")) - len(removed)


def test_plan_draws_the_batches_even_empty_ones(tmp_path, monkeypatch):
    class Poisson(Base):
        prepares_model = False

        def plan(self, rows, batch_size, seed):
            self.drawn = []

            class Plan:
                seed, images_per_step = 0, 3.5

                def batch(_, step):
                    self.drawn.append(step)
                    return rows[:0] if step == 2 else rows[: step + 1]

                def microbatches(_, rows, rank, world_size):
                    return [np.arange(len(rows))] if len(rows) else []

            return Plan()

        def gradient_rule(self):
            return SumOfClipped()

    _, (defense,), facts, _ = run(tmp_path, monkeypatch, Poisson)
    assert defense.drawn == list(range(7))
    assert facts["images_seen"] == round(7 * 3.5)  # the planned number: the drawn one may be private


class SumOfClipped:
    """The shape of DP-SGD at seam 4: per-example gradients of the bare model, clipped, summed, one reduction, constant divisor."""

    prepares_model = False
    clip_norm, divisor = 0.5, 6

    def memory(self, trained):
        return 0

    def check(self, model, loss, example):
        assert loss(model, example).shape == (4,)

    def backward(self, model, loss, microbatches, step, accelerator):
        parameters = list(model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        losses = [torch.zeros(0)]
        for microbatch in microbatches:
            for i in range(len(microbatch)):
                one = microbatch[i : i + 1]
                value = loss(model, one)
                gradients = torch.autograd.grad(value.sum(), parameters)
                norm = torch.stack([g.norm() for g in gradients]).norm()
                for t, g in zip(total, gradients, strict=True):
                    t += g * min(1.0, self.clip_norm / norm)
                losses.append(value.detach())
        for p, t in zip(parameters, total, strict=True):
            p.grad = accelerator.reduce(t, "sum") / self.divisor
        return torch.cat(losses)


def test_gradient_rule_owns_the_update(tmp_path, monkeypatch):
    """What the rule wrote is what the optimizer sees, element by element: nothing clips or averages it afterwards."""

    class Clip(Base):
        def gradient_rule(self):
            return Recording()

    class Recording(SumOfClipped):
        def backward(self, model, *arguments):
            losses = super().backward(model, *arguments)
            for parameter in model.parameters():
                parameter.grad *= 50  # far beyond the trainer's own max_grad_norm
            written.append([parameter.grad.clone() for parameter in model.parameters()])
            return losses

    written, seen = [], []
    original = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(tmp_path, monkeypatch, Clip)
    assert len(seen) == 7
    for one, two in zip(seen, written, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_begin_and_last_step(tmp_path, monkeypatch):
    """A defense learns of the run before its first step, and may end it early where a budget is partly spent."""

    class Budget(Base):
        def begin(self, context):
            self.context = context

        def last_step(self, steps):
            return steps - 2

    directory, (defense,), facts, dataset = run(tmp_path, monkeypatch, Budget)
    assert (defense.context.steps, defense.context.batch_size) == (7, 6) and facts["steps"] == 5
    assert defense.context.folder == directory.path and len(defense.context.pool.rows) == 28
    assert (directory.checkpoints / "step-5").is_dir()


def test_a_plan_without_a_rule_is_refused(tmp_path, monkeypatch):
    class Planless(Base):
        def plan(self, rows, batch_size, seed):
            return object()

    with pytest.raises(UserError, match="none of them owns the gradient"):
        run(tmp_path, monkeypatch, Planless)


def test_batches_are_cut_with_their_random_streams():
    random = RecordRandom(0, 0, [3, 4, 5], [0, 0, 0])
    batch = Batch(torch.arange(3.0)[:, None], np.array([3, 4, 5]), None, random, torch.arange(3), torch.zeros(3, 1))
    part = batch[1:3]
    assert part.rows.tolist() == [4, 5] and part.images.flatten().tolist() == [1, 2] and part.labels is None
    torch.testing.assert_close(part.random.normal("x", 4), random.normal("x", 4)[1:3], rtol=0, atol=0)


def test_two_owners_of_the_gradient_are_refused(tmp_path, monkeypatch):
    class One(Base):
        def gradient_rule(self):
            return SumOfClipped()

    class Two(One):
        pass

    with pytest.raises(UserError, match="one and two"):
        run(tmp_path, monkeypatch, One, Two)


def test_batch_and_loss_seams_change_training(tmp_path, monkeypatch):
    class Zero(Base):
        def change_loss(self, losses, batch):
            assert losses.shape == (len(batch),)
            return losses * 0

    class Invert(Base):
        def change_batch(self, batch):
            batch.images = -batch.images
            return batch

    plain, *_ = run(tmp_path, monkeypatch, overrides=["run.name=plain"])
    inverted, *_ = run(tmp_path, monkeypatch, Invert, overrides=["run.name=inverted"])
    still, *_ = run(tmp_path, monkeypatch, Zero, overrides=["run.name=still", "train.keep_checkpoints=null"])
    name = "conv_in.weight"
    assert not torch.equal(weights(plain)[name], weights(inverted)[name])
    torch.testing.assert_close(weights(still)[name], weights(still, 3)[name], rtol=0, atol=0)  # no gradient, no decay


def test_checkpoint_seam_stops_and_releases(tmp_path, monkeypatch):
    class Early(Base):
        def __init__(self, config):
            super().__init__(config)
            self.asked = []

        def after_checkpoint(self, view):
            images = view.sample([0, 1])
            assert images.shape == (2, 1, 16, 16) and 0 <= images.min() and images.max() <= 1
            assert len(view.control) and len(view.pool.rows)
            self.asked.append(view.step)
            return Verdict(stop=view.step == 6, release_step=3)

        def state_dict(self):
            return {"asked": self.asked}

    directory, (defense,), facts, _ = run(tmp_path, monkeypatch, Early)
    assert defense.asked == [3, 6] and facts["steps"] == 6 and facts["stopped_by"] == "early"
    assert facts["released_step"] == 3
    released = load_file(directory.model / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(
        released["conv_in.weight"], weights(directory, 3, "ema")["conv_in.weight"], rtol=0, atol=0
    )


def test_sampler_seam_wraps_generation():
    from eval.samples import wrap
    from eval.source import Source

    class Darken(Base):
        def wrap_sampler(self, sampler, context):
            return lambda indices, conditions: sampler(indices, conditions) / 2

    source = Source("untargeted", lambda indices, conditions: torch.ones(len(indices), 1, 2, 2), np.zeros(0), {})
    wrap(source, [Darken(NothingConfig()), Darken(NothingConfig())], context=None)
    assert source.draw([1, 2], None).unique().tolist() == [0.25]
