"""The classifier on gradient norms: conditions of its optimum, and the AUC that theory gives in a Gaussian world."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import mannwhitneyu, norm

from eval.gsa import logistic, scores
from eval.shadows import halves


def test_logistic_regression_is_at_its_optimum():
    """Where the gradient of the penalised log loss is zero, by hand; a second penalty gives smaller weights."""
    random = np.random.default_rng(0)
    features = random.normal(size=(300, 4))
    labels = random.random(300) < expit(features @ [2.0, -1.0, 0.0, 0.5] - 0.7)
    weights, offset = logistic(features, labels, ridge=2.0)
    error = expit(features @ weights + offset) - labels
    assert np.abs(features.T @ error + 2.0 * weights).max() < 1e-5 and abs(error.sum()) < 1e-5
    assert np.abs(logistic(features, labels, ridge=200.0)[0]).sum() < 0.6 * np.abs(weights).sum()


def world(seed, records, shift, models=8):
    """Log norms N(m, covariance), lower by ``shift`` for members: target, shadows, halves, membership."""
    random = np.random.default_rng(seed)
    mixing = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 2.0]])
    trained = halves(np.arange(records), models, seed)
    member = random.random(records) < 0.5
    shadows = random.normal(size=(models, records, 3)) @ mixing.T + 4 - trained[:, :, None] * shift
    target = random.normal(size=(records, 3)) @ mixing.T + 4 - member[:, None] * shift
    return np.exp(target), np.exp(shadows), trained, member, mixing @ mixing.T


def auc(score, member):
    return mannwhitneyu(score[member], score[~member]).statistic / (member.sum() * (~member).sum())


def test_auc_is_that_of_the_linear_discriminant():
    """Two normal classes of one covariance: AUC Phi(d / sqrt 2), d the Mahalanobis distance of the means."""
    shift = np.array([0.9, 0.0, 0.5])
    target, shadows, trained, member, covariance = world(1, 8000, shift)
    distance = np.sqrt(shift @ np.linalg.solve(covariance, shift))
    expected = norm.cdf(distance / 2**0.5)
    assert auc(scores(target, shadows, trained), member) == pytest.approx(expected, abs=0.02)
    assert max(auc(-target[:, each], member) for each in range(3)) < expected - 0.05  # no norm alone reaches it


def test_nothing_learned_scores_one_half_and_labels_decide_the_sign():
    target, shadows, trained, member, _ = world(2, 4000, np.zeros(3))
    assert abs(auc(scores(target, shadows, trained), member) - 0.5) < 4 * np.sqrt(4001 / (12 * 2000 * 2000))
    target, shadows, trained, member, _ = world(3, 2000, np.array([1.0, 0.0, 0.0]))
    assert scores(target, shadows, ~trained) == pytest.approx(-scores(target, shadows, trained), abs=1e-5)


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_a_tensor_without_gradient_is_left_out(rounding):
    """Whether its norm is zero or the rounding of float32."""
    target, shadows, trained, _, _ = world(4, 200, np.ones(3))
    found, random = scores(target, shadows, trained), np.random.default_rng(0)
    padded = [
        np.concatenate([each, rounding * random.random((*each.shape[:-1], 1))], axis=-1) for each in (target, shadows)
    ]
    assert scores(padded[0], padded[1], trained) == pytest.approx(found, abs=1e-6)
