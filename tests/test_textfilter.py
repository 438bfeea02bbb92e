"""Filtering by text-conditional noise magnitude, against hand-made magnitudes, order statistics and gradients taken one by one."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import defenses.textfilter
from defenses.base import Batch
from defenses.errors import UserError
from defenses.persample import backend, group_views
from defenses.textfilter import TextFilter, TextFilterConfig
from tests.test_captions import context


def batch_of(magnitude, shape=(4, 64, 64), rows=True):
    magnitude = torch.as_tensor(magnitude, dtype=torch.float32)
    count = len(magnitude)
    told = {"text_magnitude": magnitude}
    rows = np.arange(count) if rows else None
    return Batch(torch.zeros(count, 1, 2, 2), rows, None, None, latents=torch.zeros(count, *shape), told=told)


def begun(quiet=False, **settings):
    defense = TextFilter(TextFilterConfig(**settings))
    defense.begin(replace(context(["x"]), quiet=quiet))
    return defense


def test_records_beyond_the_threshold_count_zero_and_the_others_as_before():
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = begun(threshold=2.0).change_loss(losses, batch_of([0.0, 1.99, 2.0, 50.0, math.nan]))
    assert found.tolist() == [1.0, 2.0, 0.0, 0.0, 5.0]  # what is no number must be seen


def test_the_gradient_is_that_of_the_kept_records_over_the_whole_batch():
    weight = torch.tensor(3.0, requires_grad=True)
    losses = weight * torch.tensor([1.0, 10.0, 100.0])
    begun().change_loss(losses, batch_of([1.0, 3.0, 0.5])).mean().backward()
    assert weight.grad.item() == pytest.approx((1 + 100) / 3)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 8, 8), (16, 32, 32)])
def test_the_threshold_means_the_same_per_latent_value(shape):
    """2 for 16,384 values is a root mean square of 2 / 128 = 1 / 64 per value."""
    limit = math.sqrt(math.prod(shape)) / 64
    losses = begun(threshold=2.0).change_loss(torch.ones(2), batch_of([0.99 * limit, 1.01 * limit], shape))
    assert losses.tolist() == [1.0, 0.0]


def test_findings_count_over_steps_and_survive_a_stop():
    magnitudes = np.random.default_rng(0).lognormal(0.0, 1.0, 4000).astype(np.float32)
    defense = begun(threshold=2.0)
    for part in np.split(magnitudes, 20):
        for half in np.split(part, 2):  # two micro-batches a step
            defense.change_loss(torch.ones(len(half)), batch_of(half))
        defense.end_step()
        state = json.loads(json.dumps(defense.state_dict()))
        defense = begun(threshold=2.0)
        defense.load_state_dict(state)
    found = defense.findings()
    assert found["seen"] == 4000 and found["dropped"] == int((magnitudes >= 2).sum())
    assert found["share_dropped"] == found["dropped"] / 4000
    ranks = {"50.0%": 2000, "90.0%": 3600, "99.0%": 3960, "99.9%": 3996}
    assert list(found["magnitude"]) == list(ranks)
    for name, value in found["magnitude"].items():
        exact = np.sort(magnitudes)[ranks[name] - 1]
        assert exact <= value <= exact * 2 ** (1 / 8) * 1.0001


def test_counts_of_several_ranks_are_added(monkeypatch):
    ranks = [begun(), begun()]
    for rank, magnitude in zip(ranks, ([1.0, 3.0], [3.0, 3.0]), strict=True):
        rank.change_loss(torch.ones(2), batch_of(magnitude))
    total = sum(rank._step for rank in ranks)
    monkeypatch.setattr(defenses.textfilter, "reduce", lambda tensor, how: {"sum": total}[how].clone())
    for rank in ranks:
        rank.end_step()
        assert (rank.findings()["seen"], rank.findings()["dropped"]) == (4, 3)


def test_a_rank_without_records_takes_part():
    defense = begun()
    defense.end_step()
    assert defense.findings() is None


def test_a_private_run_counts_nothing():
    for defense, rows in ((begun(quiet=True), True), (begun(), False), (TextFilter(TextFilterConfig()), True)):
        assert defense.change_loss(torch.ones(2), batch_of([1.0, 3.0], rows=rows)).tolist() == [1.0, 0.0]
        defense.end_step()
        assert defense.findings() is None and not any(defense.state_dict()["counts"])


def test_it_works_under_per_record_gradients():
    """vmap over single records gives each the gradient that it has alone, and zero if it is dropped."""
    model, defense = nn.Linear(4, 1), begun(threshold=2.0)
    batch = batch_of([0.0] * 6, shape=(4,))
    batch.images = torch.randn(6, 4)
    batch.latents = batch.images

    def loss(network, part):
        part.told = {"text_magnitude": part.latents.norm(dim=1) / 64}
        return defense.change_loss(network(part.images).square().flatten(), part)

    kept = batch.images.norm(dim=1) / 64 * math.sqrt(16384 / 4) < 2.0
    assert 0 < int(kept.sum()) < 6
    for name in ("vmap", "loop"):
        found = torch.cat(
            [chunk[0][0] for chunk in backend(name, "fp32")(model, loss, group_views(batch, np.arange(6)))]
        )
        for row in range(6):
            alone = torch.autograd.grad(model(batch.images[row]).square().sum(), model.weight)[0]
            assert torch.allclose(found[row], alone * kept[row], atol=1e-6)


def test_a_model_without_text_is_refused():
    batch = batch_of([1.0])
    batch.told = None
    with pytest.raises(UserError, match=r"defenses\.text_filter"):
        begun().change_loss(torch.ones(1), batch)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_mistakes_name_their_key(threshold):
    with pytest.raises(UserError, match=r"defenses\.text_filter\.threshold"):
        TextFilterConfig(threshold=threshold)
