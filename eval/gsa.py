"""GSA: a classifier on gradient norms that was trained where the truth is known, on shadow models.

Pang et al. 2023 ("White-box membership inference attacks against diffusion models"): one row per shadow and record, the norms
of the loss gradient with respect to every tensor of weights, labelled by whether that shadow was trained on that record; what
the classifier says of the attacked model's rows is the score. The paper trains gradient-boosted trees or a multi-layer
perceptron on shadows that share no record with the attacked model. Here it is a logistic regression, which needs no further
library and is the same on every machine, and the shadows see the same records: each is in half of them, so that a record
alone tells nothing of its label.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

ROUNDING = 1e-5  # share of the whole gradient's norm below which float32 arithmetic leaves nothing that can be trusted
RIDGE = 1.0  # half the squared weights count this much against the summed log loss


def scores(target: np.ndarray, shadows: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Log-odds of membership, float64 [N].

    Args:
        target: gradient norms of the attacked model, float64 [N, F], not negative.
        shadows: of the shadow models, float64 [S, N, F].
        trained: whether each shadow was trained on each record, bool [S, N].
    """
    norms = shadows.reshape(-1, shadows.shape[-1])
    # a tensor without influence, as the bias of attention's keys, has rounding alone for a gradient
    usable = np.median(norms, axis=0) > ROUNDING * np.median(np.linalg.norm(norms, axis=1))
    rows, own = _logarithm(norms[:, usable]), _logarithm(target[:, usable])
    mean, deviation = rows.mean(0), rows.std(0)
    weights, offset = logistic((rows - mean) / deviation, trained.reshape(-1))
    return (own - mean) / deviation @ weights + offset


def _logarithm(norms: np.ndarray) -> np.ndarray:
    """Norms spread over decades, and their ratio says more than their difference."""
    return np.log(norms + np.finfo(np.float32).tiny)


def logistic(features: np.ndarray, labels: np.ndarray, ridge: float = RIDGE) -> tuple[np.ndarray, float]:
    """Weights float64 [F] and offset that minimise the log loss plus ``ridge`` / 2 times the squared weights.

    Args:
        features: float64 [n, F], standardised.
        labels: bool [n].
    """
    sign = np.where(labels, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (features @ parameters[:-1] + parameters[-1])
        slope = -sign * expit(-margin)
        gradient = np.append(features.T @ slope + ridge * parameters[:-1], slope.sum())
        return np.logaddexp(0, -margin).sum() + ridge / 2 * (parameters[:-1] ** 2).sum(), gradient

    start, exact = np.zeros(features.shape[1] + 1), {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=exact).x
    return found[:-1], float(found[-1])
