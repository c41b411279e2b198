"""Measured numbers that say how sure they are: rates by Wilson's interval, anything else by the bootstrap.

All intervals are at 95 %. Wilson's interval (Journal of the American Statistical Association 22, 1927) inverts
the score test, so unlike p +- 1.96 SE it holds for few trials and at rates of 0 and 1. It is for independent
trials, and cautious where these differ in their chances, or are credited with a part of a hit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""Phi^-1(.975)."""


@dataclass(frozen=True)
class Rate:
    """A share of trials that hit. Without trials all of it is nan."""

    hits: float
    """0..trials; not whole where ties are credited in expectation."""
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.trials:
            raise ValueError(f"{self.hits} hits in {self.trials} trials")

    @property
    def value(self) -> float:
        """hits / trials, in 0..1."""
        return self.hits / self.trials if self.trials else math.nan

    @property
    def low(self) -> float:
        """Lower end of Wilson's 95 % interval."""
        return wilson(self.hits, self.trials)[0]

    @property
    def high(self) -> float:
        """Upper end of Wilson's 95 % interval."""
        return wilson(self.hits, self.trials)[1]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, all nan where there was nothing to measure."""

    value: float
    low: float
    high: float


def rate(credits: NDArray[np.float64]) -> Rate:
    """The rate of trials that were credited (n,) in 0..1 each, exactly summed."""
    return Rate(hits=min(math.fsum(credits.tolist()), len(credits)), trials=len(credits))


def wilson(hits: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of hits / trials; neither need be whole. (nan, nan) without trials."""
    if trials == 0:
        return math.nan, math.nan
    share = hits / trials
    shrink = 1 + Z**2 / trials
    centre = (share + Z**2 / (2 * trials)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return low, 1.0 if hits == trials else min(1.0, centre + half)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of n records with its percentile interval (Efron, Annals of Statistics 7, 1979).

    statistic: from the indices of records (n,), some twice and some missing, to a number. Resamples on which
    it is nan don't count. The interval only knows the records at hand: where all resamples agree, as for a
    share of 1, it has no width, so take `Rate` for shares.
    """
    if n == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    value = float(statistic(np.arange(n)))
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.integers(n, size=n)) for _ in range(resamples)], dtype=np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Estimate(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
