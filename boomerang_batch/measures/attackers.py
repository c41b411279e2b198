"""An attacker who has seen some outputs with their sources, and learned from them what links the rest.

From pairs (output, source) of people who are in no pair to be attacked, a linear Gaussian model of an output
given its source is fitted in principal axes, y = B u + noise of covariance R; then sources are ranked by how
likely they make the output, (y - B u)^T R^-1 (y - B u). That is the best attack there is where features are
jointly Gaussian (the likelihood ratio, Neyman and Pearson 1933), which Boomerang's are for Gaussian data. Both
sides are sent through R^-1/2 so that `linkability`'s plain distances are these.

B and R have far more numbers than there are pairs, so they are drawn towards what one axis at a time says:
the strength of that is the one that ranks held-out training pairs best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, eigh, solve_triangular

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.distances import members, squared_distances, strips
from boomerang_batch.measures.linkability import Linkability, linkability

LEAST_PAIRS = 20
"""How few pairs nothing can be learned from."""

MOST_PAIRS = 5000
"""How many pairs are learned from: more teach little, and cost much."""

MOST_FOR_AXES = 1000
"""From how many of them the axes are taken in which all are seen: several for each of 256 axes."""

STRENGTHS = (0.0, 0.1, 0.4, 0.7, 0.9, 1.0)
"""How far B and R are drawn to one axis at a time: 0 not at all, 1 to there."""

_FOLDS = 5
_PAIRS_PER_AXIS = 5
_MOST_AXES = 256


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """What was learned: where groups lie, and a linear map for either side."""

    groups: NDArray[np.int64]
    """(g,), ascending: the groups whose means are known; others take the last."""
    output_means: NDArray[np.float64]
    """(g + 1, d)."""
    source_means: NDArray[np.float64]
    """(g + 1, d)."""
    of_outputs: NDArray[np.float64]
    """(d, q)."""
    of_sources: NDArray[np.float64]
    """(d, q)."""
    strength: float
    """The one of STRENGTHS that ranked held-out pairs best."""
    pairs: int
    """How many it was learned from."""

    def outputs(self, features: NDArray[Any], groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """Features (n, d) of outputs as the attacker sees them, (n, q); rows with NaN stay NaN."""
        return self._seen(features, groups, self.output_means, self.of_outputs)

    def sources(self, features: NDArray[Any], groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """Features (n, d) of sources as the outputs they would make, (n, q); rows with NaN stay NaN."""
        return self._seen(features, groups, self.source_means, self.of_sources)

    def _seen(
        self,
        features: NDArray[Any],
        groups: NDArray[np.int64],
        means: NDArray[np.float64],
        axes: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        seen = np.full((len(features), axes.shape[1]), np.nan)
        found = np.flatnonzero(~np.isnan(features).any(axis=1))
        seen[found] = _along(axes, features, found, groups[found], self.groups, means)
        return seen


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What an attacker reached on records it hadn't seen."""

    linkability: Linkability
    """On the other records, which alone are candidates: compare it with its own chance, and with the ceiling of
    these records (those not in `training_half`)."""
    trained_on: int
    strength: float


def attack(
    outputs: NDArray[Any],
    sources: NDArray[Any],
    *,
    groups: NDArray[np.int64],
    identities: NDArray[np.int64] | None = None,
    fars: Sequence[float] = (0.01, 0.001),
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> Attack:
    """Learn from the pairs of one half of the identities, drawn by `seed`, and link the others'.

    Arguments as of `linkability`, d up to a few thousand. Raises MeasureError as it does, and where the first
    half has too few records to learn from.
    """
    names = np.arange(len(sources)) if identities is None else np.asarray(identities)
    groups = np.asarray(groups)
    train = training_half(names, seed=seed)
    attacker = learn(outputs[train], sources[train], groups=groups[train], seed=seed)
    rest = ~train
    return Attack(
        linkability=linkability(
            attacker.outputs(outputs[rest], groups[rest]),
            attacker.sources(sources[rest], groups[rest]),
            groups=groups[rest],
            identities=names[rest],
            fars=fars,
            ks=ks,
            seed=seed,
        ),
        trained_on=attacker.pairs,
        strength=attacker.strength,
    )


def training_half(identities: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.bool_]:
    """Which records (n,) an attacker may learn from: those of half of the identities, drawn by `seed`."""
    people, person = np.unique(identities, return_inverse=True)
    chosen = np.zeros(len(people), dtype=np.bool_)
    chosen[np.random.default_rng(seed).permutation(len(people))[: len(people) // 2]] = True
    return chosen[person]


def learn(
    outputs: NDArray[Any], sources: NDArray[Any], *, groups: NDArray[np.int64], seed: int = 0
) -> Attacker:
    """An attacker from pairs (n, d) of features; rows with NaN teach nothing; of many, MOST_PAIRS are drawn.

    Pairs are centred by their group's means: what tells groups apart tells no candidates apart. Raises
    MeasureError with fewer than LEAST_PAIRS pairs.
    """
    generator = np.random.default_rng(seed)
    usable = np.flatnonzero(~(np.isnan(outputs).any(axis=1) | np.isnan(sources).any(axis=1)))
    if len(usable) < LEAST_PAIRS:
        raise MeasureError(
            f"{len(usable)} pairs are too few to train an attacker on, which takes {LEAST_PAIRS}; "
            "audit a larger sample"
        )
    # In an order of its own, which the folds below are cut from.
    usable = generator.permutation(usable)[:MOST_PAIRS]
    groups = np.asarray(groups)[usable]
    known = np.unique(groups)
    output_means, source_means = (_means(part, usable, groups, known) for part in (outputs, sources))
    sides = ((sources, source_means), (outputs, output_means))
    first = slice(MOST_FOR_AXES)
    shown = [_centred(part[usable[first]], groups[first], known, means) for part, means in sides]
    axes = _principal_axes(np.concatenate(shown), len(usable) // _PAIRS_PER_AXIS)
    if not axes.shape[1]:
        raise MeasureError("the features of all pairs are alike, so nothing can be learned from them")
    u, y = (_along(axes, part, usable, groups, known, means) for part, means in sides)

    # The strength, by how well pairs left out are ranked.
    fold = np.arange(len(usable)) % _FOLDS
    scores = np.zeros(len(STRENGTHS))
    for left_out in range(_FOLDS):
        kept = fold != left_out
        for index, strength in enumerate(STRENGTHS):
            whiten, forward = _fit(y[kept], u[kept], strength)
            scores[index] += _log_ranks(y[~kept] @ whiten, u[~kept] @ forward, groups[~kept])
    strength = STRENGTHS[int(np.argmin(scores))]
    whiten, forward = _fit(y, u, strength)
    return Attacker(
        groups=known,
        output_means=output_means,
        source_means=source_means,
        of_outputs=axes @ whiten,
        of_sources=axes @ forward,
        strength=strength,
        pairs=len(usable),
    )


def _fit(
    y: NDArray[np.float64], u: NDArray[np.float64], strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(q, q) maps of outputs y (n, q) and of sources u (n, q), both times R^-1/2, sources through B first."""
    size = len(y)
    spread, cross = u.T @ u / size, u.T @ y / size
    scale = np.diag(spread).max(initial=0.0)
    floor = 1e-6 * (scale or 1.0)
    full = np.linalg.solve(spread + floor * np.eye(len(spread)), cross)
    alone = np.diag(np.diag(cross) / (np.diag(spread) + floor))
    gain = (1 - strength) * full + strength * alone
    rest = y - u @ gain
    noise = rest.T @ rest / size
    noise = (1 - strength) * noise + strength * np.diag(np.diag(noise))
    noise += 1e-6 * max(float(np.trace(y.T @ y)) / size / len(noise), 1e-300) * np.eye(len(noise))
    root = cholesky(noise, lower=True)
    whiten: NDArray[np.float64] = solve_triangular(root, np.eye(len(noise)), lower=True).T
    return whiten, gain @ whiten


def _log_ranks(y: NDArray[np.float64], u: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """The sum of log ranks of the own source among the group's, ties in the middle."""
    total = 0.0
    for part in members(groups):
        distances = squared_distances(y[part], u[part])
        own = np.diag(distances)[:, None]
        rank = 0.5 + (distances < own).sum(axis=1) + (distances == own).sum(axis=1) / 2
        total += float(np.log(rank).sum())
    return total


def _principal_axes(rows: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """(d, q), the orthonormal directions in which centred rows (n, d) vary most; q at most `most`."""
    tall = len(rows) >= rows.shape[1]
    values, vectors = eigh(rows.T @ rows if tall else rows @ rows.T)
    kept = np.flatnonzero(values > 1e-10 * values[-1])[::-1][: max(1, min(most, _MOST_AXES))]
    axes = vectors[:, kept] if tall else rows.T @ vectors[:, kept] / np.sqrt(values[kept])
    return np.ascontiguousarray(axes)


def _means(
    features: NDArray[Any], rows: NDArray[np.int64], groups: NDArray[np.int64], known: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(g + 1, d): the mean of each of the `known` groups, drawn to that of all where unsure; then that.

    Of features[rows], whose groups (m,) are `groups`.
    """
    parts = members(groups)
    sizes = np.array([len(part) for part in parts])
    own = np.stack([np.mean(features[rows[part]], axis=0, dtype=np.float64) for part in parts])
    overall = np.asarray(np.average(own, axis=0, weights=sizes))

    # How far a mean is off by its records' spread, beside how far means differ (James and Stein).
    place = np.searchsorted(known, groups)
    apart = 0.0
    for strip in strips(len(rows), features.shape[1]):
        apart += float(((features[rows[strip]] - own[place[strip]]) ** 2).sum())
    spread = apart / max(len(groups) - len(known), 1)
    noise: NDArray[np.float64] = spread / sizes
    between = max(0.0, float(((own - overall) ** 2).sum(axis=1).mean() - noise.mean()))
    if between > 0 and len(groups) > len(known):
        trust = (between / (between + noise))[:, None]
        return np.concatenate([overall + trust * (own - overall), overall[None]])
    return np.tile(overall, (len(known) + 1, 1))


def _along(
    axes: NDArray[np.float64],
    features: NDArray[Any],
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    known: NDArray[np.int64],
    means: NDArray[np.float64],
) -> NDArray[np.float64]:
    """features[rows], less the means of their `groups` (m,), along axes (d, q): (m, q), made strip by strip."""
    seen = np.empty((len(rows), axes.shape[1]))
    for strip in strips(len(rows), features.shape[1]):
        seen[strip] = _centred(features[rows[strip]], groups[strip], known, means) @ axes
    return seen


def _centred(
    features: NDArray[Any], groups: NDArray[np.int64], known: NDArray[np.int64], means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Features (n, d) less the mean of their group."""
    place = np.minimum(np.searchsorted(known, groups), len(known) - 1)
    centred: NDArray[np.float64] = features - means[np.where(known[place] == groups, place, len(known))]
    return centred
