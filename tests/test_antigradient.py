"""Anti-gradient control against the published loop, written out record by record, and hand-worked averages."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import defenses.antigradient
from defenses.antigradient import AntiGradient, AntiGradientConfig
from defenses.base import Batch
from defenses.errors import UserError
from tests.test_captions import context


def batch_of(timesteps):
    count = len(timesteps)
    return Batch(torch.zeros(count, 1, 2, 2), np.arange(count), None, None, timesteps=torch.tensor(timesteps))


def begun(timesteps=1000, **settings):
    defense = AntiGradient(AntiGradientConfig(**settings))
    defense.begin(replace(context(["x"]), timesteps=timesteps))
    return defense


def after(defense, timesteps, losses):
    """The changed losses of a step of one micro-batch."""
    found = defense.change_loss(torch.tensor(losses), batch_of(timesteps))
    defense.end_step()
    return found


def published(steps, scale=2.0, decay=0.8, timesteps=1000):
    """Which records are kept, record by record as the authors' code does it: averages start at zero, a record is kept while
    scale x loss >= average."""
    mean, kept = np.zeros(timesteps), []
    for places, losses in steps:
        kept.append([scale * loss >= mean[place] for place, loss in zip(places, losses, strict=True)])
        for place, loss in zip(places, losses, strict=True):
            mean[place] = decay * mean[place] + (1 - decay) * loss
    return mean, kept


def test_it_is_the_published_rule():
    """One record of a timestep in each step: averages to rounding, and the very records."""
    random = np.random.default_rng(1)
    steps = [(random.permutation(10)[:6].tolist(), random.lognormal(0, 1.2, 6).tolist()) for _ in range(60)]
    mean, kept = published(steps, timesteps=10)
    defense = begun(timesteps=10)
    for (places, losses), expected in zip(steps, kept, strict=True):
        assert (after(defense, places, losses) > 0).tolist() == expected
    assert defense._mean.numpy() == pytest.approx(mean, rel=1e-6)
    dropped = sum(not each for step in kept for each in step)
    assert 30 < dropped < 200 and defense.findings() == {
        "seen": 360,
        "dropped": dropped,
        "share_dropped": dropped / 360,
    }


def test_equal_losses_of_one_step_move_an_average_as_one_after_the_other():
    defense = begun()
    after(defense, [7] * 3, [5.0] * 3)
    assert defense._mean[7].item() == pytest.approx(published([([7] * 3, [5.0] * 3)])[0][7])
    assert defense._mean[7].item() == pytest.approx(5 * (1 - 0.8**3))
    after(defense, [7] * 2, [1.0, 3.0])  # unequal ones: towards their mean, in whatever order
    assert defense._mean[7].item() == pytest.approx(0.8**2 * 5 * (1 - 0.8**3) + (1 - 0.8**2) * 2)
    assert defense._mean.count_nonzero() == 1


def test_what_a_step_compares_with_is_of_the_steps_before():
    defense = begun()
    assert after(defense, [3, 3], [100.0, 0.1]).tolist() == pytest.approx([100.0, 0.1])  # nothing is known yet
    assert after(defense, [3, 4], [0.1, 0.1]).tolist() == pytest.approx([0.0, 0.1])


def test_the_others_weigh_more_by_the_share_that_was_kept_before():
    defense = begun(decay=0.5)
    after(defense, [0] * 4, [8.0] * 4)  # average 7.5, all kept
    assert after(defense, [0] * 4, [8.0, 8.0, 8.0, 1.0]).tolist() == [8.0, 8.0, 8.0, 0.0]
    # share: 1, then half way to 3/4
    assert after(defense, [0] * 2, [8.0, 0.5]).tolist() == pytest.approx([8.0 / 0.875, 0.0])


def test_no_record_weighs_more_than_ten_times_as_much():
    defense = begun(decay=0.0)
    after(defense, [0] * 50, [100.0] * 50)
    after(defense, [0] * 50, [100.0] + [1.0] * 49)  # kept: 2 %; the average is now 2.98
    assert defense._share == pytest.approx(0.02)
    assert after(defense, [0], [5.0]).tolist() == pytest.approx([50.0])


def test_the_weight_reaches_the_gradient_and_the_average_does_not():
    defense = begun()
    after(defense, [5], [100.0])
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    defense.change_loss(weight * torch.tensor([40.0, 3.0]), batch_of([5, 5])).sum().backward()
    assert weight.grad.tolist() == pytest.approx([40.0, 0.0]) and not defense._step.requires_grad


def test_bins_share_an_average():
    defense = begun(bins=4)
    after(defense, [0, 249, 250, 999], [1.0, 1.0, 2.0, 3.0])
    assert defense._mean.tolist() == pytest.approx([0.36, 0.4, 0.0, 0.6])


def test_a_loss_that_is_no_number_is_seen():
    defense = begun()
    after(defense, [5], [100.0])
    assert after(defense, [5], [float("nan")]).isnan().all()


def steps_of(seed, count=12, size=8):
    random = np.random.default_rng(seed)
    return [(random.integers(0, 6, size).tolist(), random.lognormal(0, 1.5, size).tolist()) for _ in range(count)]


def test_one_and_two_processes_agree(monkeypatch):
    """And so do one and several micro-batches."""
    one, ranks = begun(timesteps=6), [begun(timesteps=6), begun(timesteps=6)]
    for places, losses in steps_of(2):
        whole = after(one, places, losses)
        parts = [
            rank.change_loss(torch.tensor(losses[start : start + 2]), batch_of(places[start : start + 2]))
            for rank, begin in zip(ranks, (0, 4), strict=True)
            for start in (begin, begin + 2)
        ]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-6)
        total = sum(rank._step for rank in ranks)
        with monkeypatch.context() as patched:
            patched.setattr(
                defenses.antigradient, "reduce", lambda tensor, how, total=total: {"sum": total}[how].clone()
            )
            for rank in ranks:
                rank.end_step()
        for rank in ranks:
            assert torch.allclose(rank._mean, one._mean, rtol=1e-12) and rank.findings() == one.findings()


def test_a_resumed_run_is_exact():
    straight, resumed = begun(timesteps=6), begun(timesteps=6)
    for places, losses in steps_of(3):
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = begun(timesteps=6)
        resumed.load_state_dict(state)
        assert torch.equal(after(straight, places, losses), after(resumed, places, losses))
        assert straight.state_dict() == resumed.state_dict()


def test_a_rank_without_records_takes_part():
    defense = begun(timesteps=6)
    defense.end_step()
    assert defense.findings() is None and not defense._mean.any() and defense._share == 1


def test_it_remembers_and_says_so():
    assert AntiGradient.remembers and AntiGradient(AntiGradientConfig()).claim()["kind"] == "heuristic"


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"defenses\.anti_gradient\.bins: 7 for 6"):
        begun(timesteps=6, bins=7)
    batch = batch_of([0])
    batch.timesteps = None
    with pytest.raises(UserError, match="no timesteps"):
        begun().change_loss(torch.ones(1), batch)


@pytest.mark.parametrize(
    "settings", [{"scale": 1.0}, {"scale": float("nan")}, {"decay": 1.0}, {"decay": -0.1}, {"bins": 0}]
)
def test_mistakes_name_their_key(settings):
    with pytest.raises(UserError, match=rf"defenses\.anti_gradient\.{next(iter(settings))}"):
        AntiGradientConfig(**settings)
