"""Can an output be told to be of its source? By the features of one embedder, for everyone released with it.

Ranks: each output names the nearest sources of its group. Pairs: the area under the ROC curve, and true accepts
at a false-accept rate calibrated on the set's own impostor pairs. One to one: all outputs of a group are named
at once, which can tell more than one at a time. Chance stands beside the ranks; of the area it is 1/2, of true
accepts the false-accept rate. Intervals of rates take trials for independent: with several photos of a person
they are too narrow, and that of the area, which goes by person, is the one to trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.distances import members, squared_between, strips, tolerance
from boomerang_batch.measures.intervals import Estimate, Rate, rate
from boomerang_batch.measures.matching import OneToOne, drawn, rank_credits
from boomerang_batch.measures.verification import TrueAccepts, Verification

_NO_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Linkability:
    """How well outputs link to their sources; rates have no trials, so are nan, where nothing was measured."""

    rank: Mapping[int, Rate]
    """By k: outputs with a source of their own identity among the k nearest of the group."""
    chance: Mapping[int, float]
    """What guessing scores there: with one source each, the mean of min(k, size) / size over records."""
    auc: Estimate
    tar: Mapping[float, TrueAccepts]
    """By false-accept rate."""
    one_to_one: Rate
    """Outputs that are given a source of their own identity when each of the group's sources is given once."""
    cut_groups: int
    """Groups too large for that: `matching.MOST_ASSIGNED` records of each, drawn by the seed, were matched."""
    misses: int
    """Records in which the embedder found nothing, in the output or the source. They are in no rate, and no
    candidates: an embedder that often misses says little, not that outputs are anonymous."""
    records: int
    """Measured: without misses."""


def linkability(
    outputs: NDArray[Any],
    sources: NDArray[Any],
    *,
    groups: NDArray[np.int64],
    identities: NDArray[np.int64] | None = None,
    fars: Sequence[float] = (0.01, 0.001),
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> Linkability:
    """Link outputs to sources by squared Euclidean distance of their features.

    outputs, sources: (n, d), row i of both is record i; a row with NaN is a miss. groups (n,): only records of
    equal group are candidates for each other. identities (n,): records of one person; default each its own.
    fars: false-accept rates above 0 and at most .1; ks: ranks, at least 1. seed: breaks ties of the one-to-one
    matching, and draws from groups too large for it.

    Raises MeasureError where features are infinite, or the sources of no group differ: an embedder that sees
    the same in all of them finds everything anonymous. ValueError where shapes don't agree.
    """
    names = np.arange(len(sources)) if identities is None else np.asarray(identities)
    if outputs.ndim != 2 or not len(outputs) == len(sources) == len(groups) == len(names):
        raise ValueError(
            f"outputs {outputs.shape}, sources {sources.shape}, {len(groups)} groups and {len(names)} "
            "identities must be of the same records"
        )
    if min(ks, default=1) < 1:
        raise ValueError(f"ranks {list(ks)} must be at least 1")
    found = ~(np.isnan(outputs).any(axis=1) | np.isnan(sources).any(axis=1))
    # Features may be most of the memory there is: where nothing is missed they are not copied.
    queries, gallery = (part if found.all() else part[found] for part in (outputs, sources))
    names, parts = names[found], members(np.asarray(groups)[found])
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise MeasureError("the embedder gave infinite features; have it give NaN rows for what it can't see")
    _refuse_constant(gallery, parts)
    centre = gallery.mean(axis=0, dtype=np.float64) if len(gallery) else np.zeros(gallery.shape[1])
    equal = tolerance(queries, gallery, centre=centre)
    rows, columns = _genuine_pairs(parts, names)
    genuine = _paired_distances(queries, gallery, rows, columns)
    impostors = sum(len(part) ** 2 for part in parts) - len(rows)
    pairs = Verification(genuine, rows, records=len(names), impostors=impostors, tolerance=equal, fars=fars)
    credits = np.zeros((len(names), len(ks)))
    generator = np.random.default_rng(seed)
    assigned, cut_groups = [np.zeros(0)], 0
    for part in parts:
        one_to_one = OneToOne(len(part), generator)
        cut_groups += one_to_one.cut
        for strip in strips(len(part), len(part)):
            block = part[strip]
            distances = squared_between(queries, block, gallery, part, centre=centre)
            own = names[block][:, None] == names[part]
            credits[block] = rank_credits(distances, own, ks, equal)
            pairs.add(block, part, distances, own)
            one_to_one.add(strip, distances)
        assigned.append(one_to_one.hits(names[part]))
    return Linkability(
        rank={k: rate(credits[:, index]) for index, k in enumerate(ks)},
        chance=chance(parts, names, ks),
        auc=pairs.auc(names),
        tar=dict(zip(fars, pairs.true_accepts(), strict=True)),
        one_to_one=rate(np.concatenate(assigned)),
        cut_groups=cut_groups,
        misses=int((~found).sum()),
        records=len(names),
    )


def chance(parts: Sequence[NDArray[np.int64]], names: NDArray[np.int64], ks: Sequence[int]) -> dict[int, float]:
    """By k, the mean chance that k candidates drawn blindly hold one of the record's own; nan without records.

    parts: the records of each group; names (n,): whose they are.
    """
    sizes, own = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in parts:
        _, person, photos = np.unique(names[part], return_inverse=True, return_counts=True)
        own.append(photos[person])
        sizes.append(np.full(len(part), len(part)))
    size, mine = np.concatenate(sizes), np.concatenate(own)
    if not len(size):
        return dict.fromkeys(ks, float("nan"))
    return {k: float(drawn(size, mine, np.minimum(k, size)).mean()) for k in ks}


def _refuse_constant(gallery: NDArray[Any], parts: Sequence[NDArray[np.int64]]) -> None:
    compared = [part for part in parts if len(part) > 1]
    size = max(float(gallery.max(initial=0)), -float(gallery.min(initial=0)))
    if compared and all(float(np.ptp(gallery[part], axis=0).max()) <= _NO_SPREAD * size for part in compared):
        raise MeasureError(
            f"the embedder gives all {sum(map(len, compared))} sources that are compared the same features: it "
            "tells none of them apart, and would call any output anonymous; use another embedder"
        )


def _genuine_pairs(
    parts: Sequence[NDArray[np.int64]], names: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(output, source) of every pair of one group and one identity, each record with itself among them."""
    rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in parts:
        for photos in members(names[part]):
            own = part[photos]
            rows.append(np.repeat(own, len(own)))
            columns.append(np.tile(own, len(own)))
    return np.concatenate(rows), np.concatenate(columns)


def _paired_distances(
    queries: NDArray[Any],
    gallery: NDArray[Any],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Squared distance of queries[rows[i]] to gallery[columns[i]], (n,)."""
    found = np.empty(len(rows))
    for strip in strips(len(rows), queries.shape[1]):
        apart = queries[rows[strip]].astype(np.float64) - gallery[columns[strip]]
        found[strip] = np.einsum("ij,ij->i", apart, apart)
    return found
