"""What DP-SGD has spent: epsilon of a history of noisy steps, and the noise that a budget needs. Host floats only.

One step takes every unit with probability ``sample_rate`` (Poisson), adds vectors of norm at most 1 and Gaussian noise of
standard deviation ``noise_multiplier``. Neighbours differ by one unit, added or removed. Where a unit holds ``copies``
records that are sampled and clipped one by one, the pair that dominates a step is N(0, s^2) against the mixture of
N(j, s^2), j ~ Binomial(copies, sample_rate) (Choquette-Choo et al. 2023, arXiv 2310.15526, Corollary 4.7).

Three accountants, all of them upper bounds up to floating-point error:
- PRV, Opacus (Gopi, Lee, Wutschitz 2021): the headline for one record per unit;
- PLD, dp-accounting of Google (Doroshenko et al. 2022, pessimistic connect-the-dots): beside it, and headline for copies;
- RDP (Mironov 2017), by quadrature: looser by some 10 %, far more where few steps take few records; needs no library.
Where a library gives no usable number, the result is infinite or another bound under its own name, never a smaller number.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import binom, norm

from defenses.errors import UserError

DIGITS = 4  # significant digits of every reported epsilon and noise multiplier
SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e4  # range that is searched
PRV, PLD, RDP = "PRV (opacus)", "PLD (dp-accounting)", "RDP (quadrature)"
MIXTURE = "PLD mixture of Gaussians (dp-accounting)"
_TOTAL_POINTS, _GAUSSIAN_POINTS, _MIXTURE_POINTS = 2**21, 2**15, 2**13  # largest grids: a history; one step for PLD
_LARGEST_MIXTURE, _LARGEST_LOSS = 256, 600.0  # beyond them PLD takes minutes, or exp(loss) nears overflow


@dataclass(frozen=True)
class Spend:
    """One segment of the ledger: equal steps that were released."""

    noise_multiplier: float  # standard deviation of the noise over the clip norm; 0: no privacy
    sample_rate: float  # probability of every unit (with copies: record) to take part in a step, in [0, 1]
    steps: int

    def __post_init__(self):
        if not (0 <= self.noise_multiplier < math.inf and 0 <= self.sample_rate <= 1 and self.steps >= 0):
            raise UserError("defenses.dpsgd", f"impossible noise multiplier, sample rate or number of steps: {self}")


@dataclass(frozen=True)
class Bill:
    """Epsilon as it is reported, rounded up, and a second accountant's (None where there is none)."""

    epsilon: float
    accountant: str
    crosscheck: float | None
    crosscheck_accountant: str | None


def round_up(value: float, digits: int = DIGITS) -> float:
    """Smallest decimal of so many significant digits that is not below ``value``; 0 and infinity stay as they are."""
    if value == 0 or not math.isfinite(value):
        return value
    return float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value))))


def epsilon_prv(history: Sequence[Spend], delta: float) -> float:
    """Epsilon by the PRV accountant of Opacus: upper end of its interval, about 0.05 % above its estimate.

    Infinity where a step had no noise, and where the accountant fails or its grid is too large (epsilon in the hundreds).
    """
    if (segments := _merge(history, delta)) is None:
        return math.inf
    if not segments or not math.isfinite(error := _prv_error(segments, delta)):
        return math.inf if segments else 0.0
    from opacus.accountants import PRVAccountant  # slow to import

    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in segments]
    with _quiet():
        try:
            epsilon = float(accountant.get_epsilon(delta, eps_error=error))
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError):
            return math.inf
    return epsilon if epsilon >= error else math.inf  # a bound below its own error, or not a number, is none


def epsilon_pld(history: Sequence[Spend], delta: float, copies: int = 1, coarseness: int = 1) -> float:
    """Epsilon by the PLD accountant of Google, the larger of both directions (add, remove), rounded pessimistically.

    Infinity where a step had no noise, and beyond the reach of the library.

    Args:
        copies: records of one unit, each Poisson sampled; 1 is the ordinary Poisson-sampled Gaussian.
        coarseness: widens the grid of losses, which by itself adds less than about 0.1 %; faster, and only adds more.
    """
    if not (segments := _merge(history, delta)):
        return math.inf if segments is None else 0.0
    if copies > _LARGEST_MIXTURE or max(_loss_range(s, copies) for s in segments) > _LARGEST_LOSS:
        return math.inf
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=coarseness * _interval(segments, copies))
    with _quiet():
        try:
            for segment in segments:
                accountant.compose(_event(segment, copies), segment.steps)
            epsilon = float(accountant.get_epsilon(delta))
        except (ArithmeticError, MemoryError, ValueError):
            return math.inf
    return epsilon if epsilon >= 0 else math.inf  # also not a number


def epsilon_rdp(history: Sequence[Spend], delta: float, copies: int = 1) -> float:
    """Epsilon through Renyi differential privacy, the larger of both directions.

    Divergences of the dominating pair by the trapezoidal rule, which converges geometrically for these analytic
    integrands; conversion by Canonne, Kamath and Steinke 2020, Proposition 12, at the best order.
    """
    if not (segments := _merge(history, delta)):
        return math.inf if segments is None else 0.0
    low, high, epsilon = 0.01, max(1.0, 500 * min(s.noise_multiplier for s in segments) / copies), math.inf
    for _ in range(3):  # ever finer around the best order
        orders = 1 + np.geomspace(low, high, 40)
        with _quiet():
            divergence = sum(s.steps * _renyi(s, copies, orders) for s in segments)
            bounds = divergence + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
        bounds[~np.isfinite(bounds)] = math.inf
        best = int(np.argmin(bounds))
        low, high, epsilon = orders[max(best - 1, 0)] - 1, orders[min(best + 1, 39)] - 1, min(epsilon, bounds[best])
    return max(0.0, float(epsilon))


def bill(history: Sequence[Spend], delta: float, copies: int = 1) -> Bill:
    """Epsilon for the report, rounded up.

    One record per unit: PRV with PLD beside it; refused unless they agree within 2 % and twice PRV's error. With
    ``copies``: PLD with RDP beside it, a bound that is not tight; refused unless PLD lies between the figure of PRV for
    a single record, which cannot be larger, and RDP. Where PRV gives no number PLD stands in for it, compared with RDP.

    Raises:
        UserError: if delta is not in (0, 1) or the accountants contradict each other.
    """
    epsilon, name = _headline(history, delta, copies)
    if name == RDP:  # nothing to compare it with; also infinity for steps without noise
        return Bill(round_up(epsilon), name, None, None)
    least = epsilon_pld(history, delta) if name == PRV else epsilon_prv(history, delta)
    other, other_name = (least, PLD) if name == PRV else (epsilon_rdp(history, delta, copies), RDP)
    slack = 0.02 * epsilon + 2 * min(0.1, _prv_error(_merge(history, delta), delta))
    if (math.isfinite(least) and epsilon < least - slack) or epsilon > other + slack:
        problem = f"accountants contradict each other: {name} {epsilon:.4g}, {other_name} {other:.4g}"
        raise UserError("defenses.dpsgd", problem, "no epsilon can be claimed for this setting; choose a larger noise")
    return Bill(round_up(epsilon), name, round_up(other) if math.isfinite(other) else None, other_name)


def noise_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, spent: Sequence[Spend] = (), copies: int = 1
) -> float:
    """Smallest noise multiplier, rounded up to four digits, with which ``steps`` more steps keep within ``epsilon``.

    The search is by PLD on a coarse grid; the result itself was evaluated by the accountant that `bill` reports.

    Raises:
        UserError: if delta is not in (0, 1), no noise up to 10,000 is enough, or ``spent`` exceeds epsilon already.
    """
    key = "defenses.dpsgd.epsilon"
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise UserError(key, f"{epsilon} is not a positive number")
    if steps < 1 or sample_rate <= 0:
        raise UserError("train.steps", "no step is left that would need noise")
    if (already := round_up(_headline(spent, delta, copies)[0])) > epsilon:
        raise UserError(key, f"{epsilon:g} is less than the {already:g} already spent", "raise it, or train no further")

    def history(noise: float) -> list[Spend]:
        return [*spent, Spend(noise, sample_rate, steps)]

    def excess(log_noise: float) -> float:  # nearly linear
        cost = epsilon_pld(history(math.exp(log_noise)), delta, copies, 4)
        return min(50.0, math.log(max(cost, 1e-12) / epsilon))

    high = LARGEST_NOISE
    while high > SMALLEST_NOISE and epsilon_rdp(history(high / 2), delta, copies) <= epsilon:
        high /= 2
    while high > SMALLEST_NOISE and excess(math.log(high / 2)) <= 0:
        high /= 2
    low, start = math.log(high / 2), math.log(high)
    if excess(low) > 0 > excess(start):
        start = brentq(excess, low, start, xtol=1e-3)
    slope = min(-0.05, (excess(start + 0.02) - excess(start)) / 0.02)  # one secant step to the accountant that counts
    miss = max(_headline(history(math.exp(start)), delta, copies)[0], 1e-12) / epsilon
    noise = math.exp(start) * min(max(miss ** (-1 / slope), 0.9), 1.1)
    step = 10.0 ** (math.floor(math.log10(noise)) + 1 - DIGITS)
    while (noise := round_up(noise)) <= LARGEST_NOISE:
        if round_up(_headline(history(noise), delta, copies)[0]) <= epsilon:
            return noise
        noise, step = noise + step, 2 * step
    problem = f"{epsilon:g} is out of reach, even with a noise multiplier of {LARGEST_NOISE:g}"
    raise UserError(
        key, problem, "raise it, or take fewer train.steps, a smaller sample rate, a larger delta, more units"
    )


def group_epsilon(history: Sequence[Spend], delta: float, sizes: Sequence[int]) -> dict[int, float | None]:
    """Epsilon, at the same delta, for records that come and go together, where the mechanism counts single records.

    Args:
        sizes: how many records (copies of one picture, pictures of one person) are added or removed at once.

    Returns:
        An upper bound for every size, rounded up, by a coarse grid; None where there is none (steps without noise).
    """
    bounds = {m: min(epsilon_rdp(history, delta, m), epsilon_pld(history, delta, m, 4)) for m in sizes}
    return {size: round_up(bound) if math.isfinite(bound) else None for size, bound in bounds.items()}


def _headline(history: Sequence[Spend], delta: float, copies: int) -> tuple[float, str]:
    """Epsilon, not rounded, by the first accountant that gives a number, and its name."""
    if copies == 1 and math.isfinite(epsilon := epsilon_prv(history, delta)):
        return epsilon, PRV
    if math.isfinite(epsilon := epsilon_pld(history, delta, copies)):
        return epsilon, PLD if copies == 1 else MIXTURE
    return epsilon_rdp(history, delta, copies), RDP


def _merge(history: Sequence[Spend], delta: float) -> list[Spend] | None:
    """Segments that cost anything, equal ones added up (order does not matter); None if one of them has no noise."""
    if not 0 < delta < 1:
        raise UserError("defenses.dpsgd.delta", f"{delta} is not between 0 and 1", "choose it below 1 / units")
    steps: dict[tuple[float, float], int] = {}
    for spend in history:
        if spend.steps and spend.sample_rate:
            key = (spend.noise_multiplier, spend.sample_rate)
            steps[key] = steps.get(key, 0) + spend.steps
    return None if any(noise == 0 for noise, _ in steps) else [Spend(*key, count) for key, count in steps.items()]


def _log_ratio(spend: Spend, copies: int, x: np.ndarray) -> np.ndarray:
    """Privacy loss at output x: log of the mixture's density over that of N(0, s^2), increasing in x."""
    j = np.arange(copies + 1)
    weights = binom.logpmf(j, copies, spend.sample_rate)
    return logsumexp(weights + (np.multiply.outer(x, j) - j**2 / 2) / spend.noise_multiplier**2, axis=-1)


def _renyi(spend: Spend, copies: int, orders: np.ndarray) -> np.ndarray:
    """Renyi divergence of one step for every order, the larger of both directions."""
    noise = spend.noise_multiplier
    spacing = min(noise, noise**2) / 2  # the densities' ratio has its singularities pi * noise^2 off the real line
    reach = copies * orders.max() + 12 * noise
    x = np.arange(-reach, reach, spacing)
    loss, log_weight = _log_ratio(spend, copies, x), norm.logpdf(x, scale=noise) + math.log(spacing)
    moments = [max(logsumexp(a * loss + log_weight), logsumexp((1 - a) * loss + log_weight)) for a in orders]
    return np.maximum(0.0, moments) / (orders - 1)


def _loss_range(spend: Spend, copies: int) -> float:
    """Width of the losses of one step, but for a probability of about e^-50, as dp-accounting truncates them."""
    reach = 10 * spend.noise_multiplier
    return float(np.diff(_log_ratio(spend, copies, np.array([-reach, copies + reach])))[0])


def _interval(segments: Sequence[Spend], copies: int) -> float:
    """Grid for PLD: 1/32 of the spread of one step's loss (rounding adds 1/6000 to its variance), bounded by size."""
    j = np.arange(copies + 1)
    variance, steps = 0.0, sum(s.steps for s in segments)
    for s in segments:
        weights = binom.pmf(j, copies, s.sample_rate)
        growth = np.expm1(np.minimum(np.multiply.outer(j, j) / s.noise_multiplier**2, 50))
        variance += s.steps / steps * float(weights @ growth @ weights)  # chi-square divergence
    points = _GAUSSIAN_POINTS if copies == 1 else _MIXTURE_POINTS
    widest = max(_loss_range(s, copies) for s in segments) / points
    total = 4 * epsilon_rdp(segments, 1e-10, copies) / _TOTAL_POINTS
    return max(min(math.sqrt(variance) / 32, 0.01), widest, total)


def _event(spend: Spend, copies: int) -> object:
    """One step as an event of dp-accounting."""
    from dp_accounting import dp_event

    if spend.sample_rate == 1:  # many Gaussians are one, in closed form
        return dp_event.GaussianDpEvent(spend.noise_multiplier / copies)
    if copies == 1:
        return dp_event.PoissonSampledDpEvent(spend.sample_rate, dp_event.GaussianDpEvent(spend.noise_multiplier))
    j = np.arange(copies + 1)
    return dp_event.MixtureOfGaussiansDpEvent(spend.noise_multiplier, j, binom.pmf(j, copies, spend.sample_rate))


def _prv_error(segments: Sequence[Spend], delta: float) -> float:
    """Error to ask of PRV: 0.05 % of epsilon, more where its grid would become large; infinite if that is hopeless."""
    reach = 2 * (epsilon_rdp(segments, delta / 4000) + 3)
    width = reach * math.sqrt(sum(s.steps for s in segments) * math.log(12e3 / delta) / 2)  # grid points times error
    error = min(0.1, max(1e-4, 5e-4 * epsilon_rdp(segments, delta), width / _TOTAL_POINTS))
    return error if width / error <= 2 * _TOTAL_POINTS and reach < 500 else math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Overflow and the like at the edges is expected and ends as an infinite bound."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
