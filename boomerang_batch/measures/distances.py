"""Squared Euclidean distances in float64, in blocks: what is held at once is bounded, whatever is compared.

|a - b|^2 = |a|^2 + |b|^2 - 2 a b is one matrix product, and adds up over columns, so images of a million
numbers are taken a strip of columns at a time. It cancels where a and b are close beside their size: float64
of centred features leaves 1e-12 of that size, and `tolerance` is what may be called equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 21
"""How many numbers a block may have: 16 MB of float64."""

MOST_FOR_PAIRS = 1000
"""How many records of a group `pair_distances` compares with each other."""


@dataclass(frozen=True, kw_only=True)
class PairDistances:
    """How far apart records of one group are that differ, in the records' units; nan where none do."""

    least: float
    median: float
    largest: float
    pairs: int
    """Over how many pairs."""


def members(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The records of each group, ascending: groups (n,) -> index arrays, by ascending group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part for part in np.split(order, starts) if len(part)]


def strips(total: int, across: int) -> Iterator[slice]:
    """0..total cut so that a strip times `across` is at most BLOCK numbers, and never empty."""
    size = max(1, BLOCK // max(1, across))
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def squared_distances(queries: NDArray[np.float64], gallery: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every query (n, d) to every record of the gallery (m, d): (n, m), at least 0, and made whole."""
    total = queries @ gallery.T
    total *= -2
    total += np.einsum("ij,ij->i", queries, queries)[:, None]
    total += np.einsum("ij,ij->i", gallery, gallery)
    return np.maximum(total, 0, out=total)


def squared_between(
    queries: NDArray[Any],
    rows: NDArray[np.int64],
    gallery: NDArray[Any],
    columns: NDArray[np.int64],
    *,
    centre: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Squared distances (b, m) of queries[rows] to gallery[columns], which are (n, d) of any number type.

    `centre` (d,), somewhere among them, is taken off both, for what cancels. Made wide strip by strip.
    """
    total = np.zeros((len(rows), len(columns)))
    for part in strips(queries.shape[1], max(len(rows), len(columns))):
        total += squared_distances(queries[rows, part] - centre[part], gallery[columns, part] - centre[part])
    return total


def tolerance(*features: NDArray[Any], centre: NDArray[np.float64] | float = 0.0) -> float:
    """Below which two squared distances among `features` (n, d), which are finite, count as equal.

    2^-40 of the largest squared length from `centre`: a thousand times the rounding, so that duplicates tie,
    and too little to hide a difference that anything but rounding made.
    """
    return 2.0**-40 * sum(_longest(part, centre) for part in features)


def _longest(features: NDArray[Any], centre: NDArray[np.float64] | float) -> float:
    longest = 0.0
    for rows in strips(*features.shape):
        apart = features[rows].astype(np.float64) - centre
        longest = max(longest, float(np.einsum("ij,ij->i", apart, apart).max()))
    return longest


def pair_distances(records: NDArray[Any], *, groups: NDArray[np.int64], seed: int = 0) -> PairDistances:
    """The distances that a bound is stated for: between different records of one group, not squared.

    records: (n, d) of any number type and any d, np.memmap too, where noise is added (pixels in the model's
    range, or latents); groups (n,). Of a group with more than MOST_FOR_PAIRS records that many are drawn by
    `seed`; the least is then only the least among these.
    """
    generator = np.random.default_rng(seed)
    found = [np.zeros(0)]
    for group in members(groups):
        if len(group) > MOST_FOR_PAIRS:
            group = np.sort(generator.choice(group, MOST_FOR_PAIRS, replace=False))
        total = np.zeros((len(group), len(group)))
        for columns in strips(records.shape[1], len(group)):
            part = np.asarray(records[group, columns], dtype=np.float64)
            part -= part.mean(axis=0)
            total += squared_distances(part, part)
        found.append(np.sqrt(total[np.triu_indices(len(group), 1)]))
    every = np.concatenate(found)
    every = every[every > 1e-6 * every.max(initial=0.0)]  # equal ones are no two to decide between
    if not len(every):
        return PairDistances(least=np.nan, median=np.nan, largest=np.nan, pairs=0)
    least, median, largest = np.quantile(every, [0, 0.5, 1])
    return PairDistances(least=float(least), median=float(median), largest=float(largest), pairs=len(every))
