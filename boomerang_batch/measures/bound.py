"""The certified bound in numbers: what no attack on an output can do better than.

mu says how far apart two candidate sources are in all that an output shows of its noised source; `accounting`
in config/ derives it from the recipe. Then the two are as hard to tell apart as N(0, 1) and N(mu, 1), whatever
is done to the output (Gaussian differential privacy, arXiv 1905.02383): definition 4 there, and for delta of
epsilon its corollary 1. It is local: for a pair of sources at the distance that mu was taken for. And it holds
for secret noise alone, and a model that doesn't know the record.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr


def two_candidate_accuracy(mu: float) -> float:
    """Phi(mu / 2), in 1/2..1: how often the best attack tells which of two equally likely sources it was."""
    _check(mu)
    return float(ndtr(mu / 2))


def delta(mu: float, epsilon: float) -> float:
    """The least delta in 0..1 for which pairs at mu >= 0 are (epsilon, delta)-indistinguishable, epsilon >= 0.

    Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2): how much of one candidate's outputs is more
    than e^epsilon times as likely as under the other.
    """
    _check(mu)
    if not epsilon >= 0:
        raise ValueError(f"epsilon {epsilon} must be at least 0")
    if mu == 0 or math.isinf(epsilon):
        return 0.0 if mu < math.inf else 1.0
    if math.isinf(mu):
        return 1.0
    # In logarithms, where e^epsilon doesn't overflow and small deltas keep their digits.
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, second - first)))


def epsilon(mu: float, delta: float) -> float:
    """The least epsilon for which pairs at mu are (epsilon, delta)-indistinguishable; delta in 0..1."""
    _check(mu)
    if not 0 <= delta <= 1:
        raise ValueError(f"delta {delta} must be within 0 and 1")
    allowed = delta
    if _delta(mu, 0.0) <= allowed:
        return 0.0
    if math.isinf(mu) or allowed == 0:
        return math.inf
    # There delta is at most Phi(-sqrt(2 log(1 / allowed))) <= allowed.
    highest = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / allowed))
    found: float = brentq(lambda value: _delta(mu, value) - allowed, 0.0, highest, xtol=1e-12, rtol=1e-14)
    return found


_delta = delta  # `epsilon` has an argument of that name


def _check(mu: float) -> None:
    if not mu >= 0:
        raise ValueError(f"mu {mu} must be at least 0")
