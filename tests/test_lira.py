"""The likelihood ratio against scipy's densities and against the AUC that theory gives."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from defenses.errors import UserError
from eval.denoiser import load
from eval.gradients import gradient_features
from eval.lira import LiraConfig, likelihood_ratio, one_sided, scores, shadow_attacks
from eval.members import candidates
from eval.roc import paired_delong
from eval.scores import loss_values
from eval.shadows import halves
from eval.suite import Scene
from tests.test_shadows import run
from train.loop import Trainer


def auc(score, member):
    """Mann-Whitney."""
    count = member.sum() * (~member).sum()
    return mannwhitneyu(score[member], score[~member]).statistic / count


def simulated(seed, records, shadows, *, gain, chance, spread, unequal=False):
    """Losses of shadows and target where training lowers the mean of a record's normal loss by ``gain``.

    Args:
        chance: standard deviation over models; spread: of the records' own means.
    """
    random = np.random.default_rng(seed)
    base = random.normal(0, spread, records)
    trained = halves(np.arange(records), shadows, seed)
    deviation = chance * (random.choice([0.25, 4], records) if unequal else np.ones(records))
    models = base - gain * trained + deviation * random.normal(size=(shadows, records))
    member = np.arange(records) % 2 == 0
    target = base - gain * member + deviation * random.normal(size=records)
    return target, models, trained, member


def test_ratio_of_densities_by_hand():
    """Own variances, Bessel's correction: scipy's log densities of the hand-picked columns."""
    shadows = np.array([[1.0, 5.0], [2.0, 9.0], [4.0, 6.0], [7.0, 3.0], [3.0, 8.0], [9.0, 1.0]])
    trained = np.array([[1, 0], [1, 1], [1, 0], [0, 1], [0, 1], [0, 0]], dtype=bool)
    target = np.array([2.5, 4.0])
    sides = [([1, 2, 4], [7, 3, 9]), ([9, 3, 8], [5, 6, 1])]
    expected = [
        norm.logpdf(x, np.mean(inside), np.std(inside, ddof=1))
        - norm.logpdf(x, np.mean(outside), np.std(outside, ddof=1))
        for x, (inside, outside) in zip(target, sides, strict=True)
    ]
    assert likelihood_ratio(target, shadows, trained, True) == pytest.approx(expected, rel=1e-12)
    tail = [
        norm.sf(x, np.mean(outside), np.std(outside, ddof=1)) for x, (_, outside) in zip(target, sides, strict=True)
    ]
    assert norm.cdf(one_sided(target, shadows, trained, True)) == pytest.approx(tail, rel=1e-12)


def test_common_variance_is_around_each_records_own_mean():
    shadows = np.array([[1.0, 101.0], [3.0, 103.0], [0.0, 200.0], [2.0, 204.0]])
    trained = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], dtype=bool)
    deviation_in, deviation_out = np.sqrt((2 + 2) / 2), np.sqrt((2 + 8) / 2)
    target = np.array([1.5, 150.0])
    expected = norm.logpdf(target, [2, 102], deviation_in) - norm.logpdf(target, [1, 202], deviation_out)
    assert likelihood_ratio(target, shadows, trained, False) == pytest.approx(expected, rel=1e-12)
    assert one_sided(target, shadows, trained, False) == pytest.approx((np.array([1, 202]) - target) / deviation_out)


def test_auc_of_a_gaussian_world_is_what_theory_says():
    """With losses N(b - gain [member], chance^2), b ~ N(0, spread^2), the likelihood ratio has AUC Phi(gain / (chance sqrt 2)),
    the loss itself only Phi(gain / sqrt(2 (chance^2 + spread^2))). 64 shadows leave an error of the means of 1/32 of the
    variance, which lowers the AUC by less than 0.005."""
    gain, chance, spread = 1.0, 1.0, 2.0
    target, models, trained, member = simulated(1, 20_000, 64, gain=gain, chance=chance, spread=spread)
    optimal, plain = norm.cdf(gain / (chance * 2**0.5)), norm.cdf(gain / (2 * (chance**2 + spread**2)) ** 0.5)
    assert auc(likelihood_ratio(target, models, trained, False), member) == pytest.approx(optimal, abs=0.012)
    assert auc(one_sided(target, models, trained, False), member) == pytest.approx(optimal, abs=0.012)
    assert auc(-target, member) == pytest.approx(plain, abs=0.012)
    assert optimal - plain > 0.13


def test_few_shadows_want_one_variance_and_many_their_own():
    """Figure 9 of Carlini et al. 2022, in the world of each: equal variances and 8 shadows, unequal ones and 128."""
    few = simulated(2, 20_000, 8, gain=1.0, chance=1.0, spread=2.0)
    many = simulated(3, 20_000, 128, gain=1.0, chance=1.0, spread=2.0, unequal=True)
    common, own = (auc(likelihood_ratio(*few[:3], variance), few[3]) for variance in (False, True))
    assert common > own + 0.03
    common, own = (auc(likelihood_ratio(*many[:3], variance), many[3]) for variance in (False, True))
    assert own > common + 0.03


def test_permuted_labels_score_one_half():
    target, models, trained, member = simulated(4, 4000, 16, gain=1.0, chance=0.5, spread=1.0)
    found = likelihood_ratio(target, models, trained, False)
    assert auc(found, member) > 0.85
    random = np.random.default_rng(0)
    permuted = [auc(found, random.permutation(member)) for _ in range(200)]
    error = np.sqrt(4001 / (12 * 2000 * 2000))  # of an AUC of 0.5, Mann and Whitney 1947
    assert abs(np.mean(permuted) - 0.5) < 4 * error / np.sqrt(200)
    assert np.std(permuted) == pytest.approx(error, rel=0.25)


def test_a_model_that_learned_nothing_scores_one_half():
    target, models, trained, member = simulated(5, 4000, 8, gain=0.0, chance=1.0, spread=1.0)
    error = np.sqrt(4001 / (12 * 2000 * 2000))
    for found in (likelihood_ratio(target, models, trained, False), one_sided(target, models, trained, True)):
        assert abs(auc(found, member) - 0.5) < 4 * error


def test_variants_use_the_draws_they_name():
    """Plain: the first draw of the picture itself. Strong: the mean over draws and views, logarithm after it."""
    random = np.random.default_rng(6)
    target, models = random.uniform(1, 2, (5, 3, 2)), random.uniform(1, 2, (8, 5, 3, 2))
    trained = halves(np.arange(5), 8, 6)
    found = scores(target, models, trained, LiraConfig(shadows=8, statistic="log-loss"))
    assert list(found) == ["lira", "lira-offline", "lira-strong", "lira-strong-offline"]
    first, mean = (np.log(target[:, 0, 0]), np.log(models[:, :, 0, 0])), (target.mean((1, 2)), models.mean((2, 3)))
    assert found["lira"] == pytest.approx(likelihood_ratio(*first, trained, False))
    assert found["lira-strong-offline"] == pytest.approx(one_sided(np.log(mean[0]), np.log(mean[1]), trained, False))
    plain = scores(target, models, trained, LiraConfig(shadows=8))
    assert plain["lira-strong"] == pytest.approx(likelihood_ratio(*mean, trained, False))


def test_models_that_agree_to_the_last_digit_give_finite_scores():
    shadows, trained = np.ones((4, 3)), halves(np.arange(3), 4, 0)
    for own_variance in (False, True):
        assert np.isfinite(likelihood_ratio(np.array([1.0, 0.5, 2.0]), shadows, trained, own_variance)).all()


def test_settings():
    assert not LiraConfig(shadows=62).own_variance and LiraConfig(shadows=64).own_variance
    assert LiraConfig(variance="per-record").own_variance
    assert not LiraConfig(shadows=64, variance="global").own_variance
    for wrong in (2, 5, 0, -4):
        with pytest.raises(UserError, match=r"attack\.membership\.lira\.shadows: is .*even"):
            LiraConfig(shadows=wrong)


@pytest.mark.slow
def test_shadows_of_a_run_answer_for_its_records(tmp_path, monkeypatch):
    """Scores from the saved models, read back one by one; the second time nothing is trained and no shadow asked again."""
    target, config, accelerator = run(tmp_path)
    who = candidates(target.dataset, 4, 0)
    model = load(target.pipeline, (1, 16, 16), accelerator.device)
    scene = Scene(target, config, accelerator, model, None, None)
    told = {"draws": 2, "flips": True, "batch": 8}
    found = shadow_attacks(scene, model, who, LiraConfig(shadows=4), **told)

    pictures, single = target.dataset.images[who.rows], {"accelerator": accelerator, "seed": 0, "batch": 8}
    folders = [target.run.path / "shadows" / f"0{number}" / "model" for number in range(4)]
    models = [load(folder, (1, 16, 16), accelerator.device) for folder in folders]
    nothing = [None] * len(who)
    losses = [
        loss_values(each, pictures, nothing, who.rows, timesteps=[100], draws=2, flips=True, **single)[:, 0]
        for each in [model, *models]
    ]
    pool = np.array([row for row, record in enumerate(target.dataset.records) if record.split in ("train", "heldout")])
    block = np.array([target.dataset.records[row].block for row in pool])
    trained = halves(block, 4, 0)[:, np.searchsorted(pool, who.rows)]
    expected = scores(losses[0], np.stack(losses[1:]), trained, LiraConfig(shadows=4))
    assert list(found.scores) == [*expected, "gsa"]
    for name, values in expected.items():
        assert found.scores[name] == pytest.approx(values), name
    test = paired_delong(
        *(
            values[side]
            for values in (found.scores["lira-strong"], -losses[0].mean((1, 2)))
            for side in (who.member, ~who.member)
        ),
        (who.block[who.member], who.block[~who.member]),
    )
    assert (
        found.vs_loss["lira-strong"] == {"attack": "loss-strong", **test} and found.vs_loss["lira"]["attack"] == "loss"
    )
    assert (
        found.settings["shadows"] == 4
        and found.settings["variance"] == "global"
        and found.settings["timesteps"] == [100]
    )
    spaced = [50 + 100 * place for place in range(10)]
    norms = gradient_features(models[3], pictures, nothing, who.rows, timesteps=spaced, **single)
    with np.load(folders[3].parent / "gradients.npz") as kept:
        assert kept["values"] == pytest.approx(norms)

    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr("eval.shadows.load", lambda *rest: pytest.fail("asked again"))
    again = shadow_attacks(scene, model, who, LiraConfig(shadows=4), **told)
    assert all((again.scores[name] == values).all() for name, values in found.scores.items())
