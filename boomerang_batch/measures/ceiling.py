"""The noise ceiling: how often x_t alone, the forward jump before any network, is matched to its source.

An output is made of x_t, and x_t / alpha_t = x_0 + sigma eps. Under Gaussian noise the nearest sources are the
likeliest, so no attack on an output, however made, can have its source among k guesses more often than the k
nearest of that do (data-processing inequality). This bounds the rank-k of any attack that looks at one output
at a time, where the source is one of the group's records, each as likely as any other. Among fewer candidates
it is higher, so it is the ceiling of those who have these for candidates. It does **not** bound:

- one-to-one matching of all outputs together, which is why that of the forward jump is measured beside it;
- the area under the ROC curve, or true accepts at a false-accept rate;
- matches to other photographs of the same person: compare it with ranks of exact sources alone;
- several outputs of one source taken together: for K variants give sigma / sqrt(K);
- who knows the noise, or its seed;
- who has fewer candidates than the group, or knows some to be likelier, as a model may tell that was trained on
  some of them: each attacker's ceiling is that among his own candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from boomerang_batch.measures.distances import members, squared_distances, strips, tolerance
from boomerang_batch.measures.intervals import Rate, rate
from boomerang_batch.measures.linkability import chance
from boomerang_batch.measures.matching import OneToOne, rank_credits

_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """How well the noised sources alone are matched; trials are records times draws."""

    rank: Mapping[int, Rate]
    """By k: a bound for the rank-k of any attack on single outputs."""
    chance: Mapping[int, float]
    one_to_one: Rate
    """By the likeliest matching of all records of a group at once. No bound; to stand beside the outputs'."""
    cut_groups: int
    """Groups too large for that: `matching.MOST_ASSIGNED` records of each, drawn by the seed, were matched."""
    records: int


@dataclass(frozen=True, kw_only=True)
class Excess:
    """Whether a measured rate is above a ceiling by more than chance."""

    exceeds: bool
    p_value: float
    """How likely counts so far apart or farther are if both rates are the same; nan where one has no trials."""
    level: float
    test: str


def noise_ceiling(
    sources: NDArray[Any],
    sigmas: NDArray[np.float64],
    *,
    groups: NDArray[np.int64],
    ks: Sequence[int] = (1, 5, 10),
    draws: int = 1,
    seed: int = 0,
) -> Ceiling:
    """Match x_0 + sigma eps to the x_0 of the group.

    sources: (n, d) of any number type, where noise is added (pixels or latents). An np.memmap is read in strips
    of columns, so any d will do; a group of more than 2,000 records is read several times. sigmas (n,): each
    record's noise in the sources' units, that is, relative to the clean signal: for uint8 pixels and a model of
    range -1..1, 127.5 times the model's. Infinite leaves chance. groups (n,): only records of equal group are
    candidates; take in them all that is released with an output or told to the model. draws: how often each
    record is noised; seed: of the noise. Raises ValueError where shapes don't agree.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if sources.ndim != 2 or not len(sources) == len(sigmas) == len(groups):
        raise ValueError(
            f"sources {sources.shape}, {len(sigmas)} sigmas and {len(groups)} groups must be of the same "
            "records"
        )
    if not (sigmas >= 0).all() or draws < 1 or min(ks, default=1) < 1:
        raise ValueError("sigmas must be at least 0, and draws and ranks at least 1")
    generator = np.random.default_rng(seed)
    parts = members(np.asarray(groups))
    credits, assigned, cut_groups = [np.zeros((0, len(ks)))], [np.zeros(0)], 0
    for part in parts:
        for draw in range(draws):
            one_to_one = OneToOne(len(part), generator)
            cut_groups += one_to_one.cut and draw == 0
            # Each strip of records reads all sources anew, so it may be several blocks large.
            for strip in strips(len(part), len(part) // _BLOCKS):
                distances, equal = _noised_distances(sources, part, strip, sigmas[part[strip]], generator)
                own = np.arange(len(part))[strip, None] == np.arange(len(part))
                credits.append(rank_credits(distances, own, ks, equal))
                one_to_one.add(strip, distances * _precision(sigmas[part])[strip, None])
            assigned.append(one_to_one.hits(part))
    every = np.concatenate(credits)
    return Ceiling(
        rank={k: rate(every[:, index]) for index, k in enumerate(ks)},
        chance=chance(parts, np.arange(len(sources)), ks),
        one_to_one=rate(np.concatenate(assigned)),
        cut_groups=cut_groups,
        records=len(sources),
    )


def exceeds(measured: Rate, ceiling: Rate, *, level: float = 0.01) -> Excess:
    """Whether outputs were matched more often than the ceiling allows: then more than x_t is in them.

    measured: rank-k of exact sources by any attack; ceiling: rank-k of `noise_ceiling` for the same records,
    groups and k. Fisher's exact test, one-sided, at `level`; parts of hits count against an excess. Trials of
    one set differ in their chances, which makes it cautious.
    """
    test = "Fisher's exact test, one-sided"
    if not (measured.trials and ceiling.trials):
        return Excess(exceeds=False, p_value=math.nan, level=level, test=test)
    hits, allowed = math.floor(measured.hits + 1e-9), math.ceil(ceiling.hits - 1e-9)
    p_value = float(hypergeom.sf(hits - 1, measured.trials + ceiling.trials, hits + allowed, measured.trials))
    return Excess(exceeds=p_value < level, p_value=p_value, level=level, test=test)


def _noised_distances(
    sources: NDArray[Any],
    part: NDArray[np.int64],
    strip: slice,
    sigmas: NDArray[np.float64],
    generator: np.random.Generator,
) -> tuple[NDArray[np.float64], float]:
    """Squared distances (b, n) of the noised records part[strip] to all of part (n,), and what counts as equal.

    sigmas (b,). A row of infinite noise is all equal.
    """
    known = np.isfinite(sigmas)
    finite = np.where(known, sigmas, 0.0)[:, None]
    total, lengths = np.zeros((len(sigmas), len(part))), 0.0
    for columns in strips(sources.shape[1], len(part)):
        x_0 = np.asarray(sources[part, columns], dtype=np.float64)
        x_0 -= x_0.mean(axis=0)
        noised = finite * generator.standard_normal((len(sigmas), x_0.shape[1]))
        noised += x_0[strip]
        total += squared_distances(noised, x_0)
        lengths += tolerance(noised, x_0)
    total[~known] = 0.0
    return total, lengths


def _precision(sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """What squared distances weigh in the likelihood of a matching, 1 / sigma^2 to a factor; (n,), finite."""
    finite = sigmas[np.isfinite(sigmas)]
    if not finite.max(initial=0.0) > 0:
        return np.ones(len(sigmas))
    # Beside noise a million times larger none is as good as none, and still a number.
    least = max(float(finite.min()), 1e-6 * float(finite.max()))
    weights: NDArray[np.float64] = (least / np.maximum(sigmas, least)) ** 2
    return weights
