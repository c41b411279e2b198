"""Are these two of one source? Every output against every source of its group, by one threshold for all pairs.

Genuine pairs are an output and a source of its own identity, impostor pairs all others of the group. Both areas
and rates are over pairs, exact, and in bounded memory: impostors are only counted between the genuine pairs'
distances, as these come in strips of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.measures.intervals import Estimate, Rate, rate, wilson

LEAST_FALSE_ACCEPTS = 10
"""How many impostors a false-accept rate must let through for a threshold to be calibrated on them."""


def false_accepts(far: float, impostors: int) -> int:
    """How many impostor pairs a false-accept rate lets through."""
    return math.floor(far * impostors + 1e-9)


@dataclass(frozen=True, kw_only=True)
class TrueAccepts:
    """Genuine pairs accepted at a false-accept rate."""

    rate: Rate
    """Over genuine pairs. No trials, so nan, where the set has too few impostor pairs for the rate asked for:
    fewer than LEAST_FALSE_ACCEPTS of them would pass."""
    threshold: float
    """Pairs at a smaller Euclidean distance are accepted; nan with the rate."""


class Verification:
    """Counts of impostor pairs about the genuine pairs' distances, fed strip by strip."""

    def __init__(
        self,
        genuine: NDArray[np.float64],
        rows: NDArray[np.int64],
        *,
        records: int,
        impostors: int,
        tolerance: float,
        fars: Sequence[float],
    ) -> None:
        """genuine (g,): squared distances of the genuine pairs, whose outputs are `rows` (g,) of the records.

        impostors: how many are to come; distances within `tolerance` are equal; fars: the false-accept rates
        that will be asked for, above 0 and at most .1.
        """
        if not all(0 < far <= 0.1 for far in fars):
            raise ValueError(f"false-accept rates {list(fars)} must be above 0 and at most .1")
        self.impostors = impostors
        step = tolerance if tolerance > 0 else 1.0
        levels, self._level = np.unique(np.rint(genuine / step), return_inverse=True)
        # Two edges about each level: between them an impostor is equal, at odd places of the counts.
        edges = ((levels[:, None] + [-0.5, 0.5]) * step).ravel()
        self._places = _Places(edges)
        self._counts = np.zeros(len(edges) + 1, dtype=np.int64)
        nearer = np.zeros(len(self._counts))
        nearer[2::2] = np.cumsum(np.bincount(self._level, minlength=len(levels)))
        nearer[1::2] = (nearer[:-1:2] + nearer[2::2]) / 2
        self._share_nearer = nearer / max(len(genuine), 1)
        self._rows = rows
        self._by_row, self._by_column = np.zeros(records), np.zeros(records)
        self._pairs_by_record = np.zeros(records)
        self._passing = [false_accepts(far, impostors) for far in fars]
        self._nearest = _Smallest(1 + max(self._passing, default=0))

    def add(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        distances: NDArray[np.float64],
        own: NDArray[np.bool_],
    ) -> None:
        """Squared distances (n, m) of output records `rows` (n,) to source records `columns` (m,).

        own (n, m) marks the genuine pairs, which are left out here.
        """
        place = self._places.of(distances)
        self._counts += np.bincount(place.ravel(), minlength=len(self._counts))
        self._counts -= np.bincount(place[own], minlength=len(self._counts))
        share = self._share_nearer[place]
        share[own] = 0.0
        self._by_row[rows] += share.sum(axis=1)
        self._by_column[columns] += share.sum(axis=0)
        self._pairs_by_record[rows] += len(columns) - own.sum(axis=1)
        self._pairs_by_record[columns] += len(rows) - own.sum(axis=0)
        self._nearest.add(distances, own)

    def auc(self, identities: NDArray[np.int64]) -> Estimate:
        """How often a genuine pair is nearer than an impostor pair, ties half; nan without either kind.

        identities (records,): what is drawn independently. The interval is Wilson's for as many trials as
        would vary as much, by the statistic's derivative for the weight of each identity (the infinitesimal
        jackknife), which knows that pairs share records; without any variance it is for as many trials as
        there are identities.
        """
        if not self.impostors or not len(self._level):
            return Estimate(value=math.nan, low=math.nan, high=math.nan)
        nearer, equal = self._impostors_about()
        farther = 1 - (nearer + equal / 2) / self.impostors
        value = float(np.clip(farther.mean(), 0, 1))

        # d AUC / d weight: of the genuine pairs, within one identity, and of impostor pairs, between two.
        of_genuine = (farther - value) / len(farther)
        slope = np.zeros(len(self._by_row))
        np.add.at(slope, self._rows, of_genuine)
        slope += (self._by_row + self._by_column - value * self._pairs_by_record) / self.impostors
        _, person = np.unique(identities, return_inverse=True)
        by_person = np.bincount(person, weights=slope)
        people = len(by_person)
        variance = float(((by_person - by_person.mean()) ** 2).sum()) * people / max(people - 1, 1)
        trials = value * (1 - value) / variance if variance > 0 else 0.0
        low, high = wilson(value * (trials or people), trials or people)
        return Estimate(value=value, low=low, high=high)

    def true_accepts(self) -> list[TrueAccepts]:
        """For each of the false-accept rates."""
        nearer, equal = self._impostors_about()
        found = []
        for passing in self._passing:
            if passing < LEAST_FALSE_ACCEPTS:
                found.append(TrueAccepts(rate=Rate(0, 0), threshold=math.nan))
                continue
            # A genuine pair that ties with the last impostors to pass does so as often as they do.
            by_share = (passing - nearer) / np.maximum(equal, 1)
            accepted = np.where(equal > 0, np.clip(by_share, 0, 1), nearer <= passing)
            threshold = math.sqrt(float(self._nearest.sorted()[passing]))
            found.append(TrueAccepts(rate=rate(accepted), threshold=threshold))
        return found

    def _impostors_about(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each genuine pair, how many impostors are nearer, and how many equal."""
        up_to = np.cumsum(self._counts)
        nearer = up_to[0::2][self._level].astype(np.float64)
        return nearer, self._counts[1::2][self._level].astype(np.float64)


class _Places:
    """`searchsorted` in ascending edges, but faster for many values: a table knows most of their places."""

    def __init__(self, edges: NDArray[np.float64]) -> None:
        self._edges = edges
        top = float(edges[-1]) * (1 + 1e-6) if len(edges) else 1.0
        self._bins = min(1 << 20, 64 * len(edges) + 1)
        self._per_unit = self._bins / top
        bounds = np.arange(self._bins + 2) / self._per_unit
        slack = 1e-9 * top  # more than rounding can move a value into the next bin
        low = np.searchsorted(edges, bounds[:-1] - slack)
        high = np.searchsorted(edges, bounds[1:] + slack)
        self._known = np.where(low == high, low, -1)

    def of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The place of each of the values >= 0, of their shape."""
        bins = np.minimum(values * self._per_unit, self._bins).astype(np.int64)
        place = self._known[bins]
        unsure = np.nonzero(place < 0)
        place[unsure] = np.searchsorted(self._edges, values[unsure])
        return place


class _Smallest:
    """The `count` smallest of all numbers shown."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._limit = math.inf
        self._parts: list[NDArray[np.float64]] = []
        self._held = 0

    def add(self, values: NDArray[np.float64], but: NDArray[np.bool_]) -> None:
        part = values[(values < self._limit) & ~but]
        self._parts.append(part)
        self._held += len(part)
        if self._held > 2 * self._count + (1 << 18):
            self._parts = [self._shrunk()]
            self._held = len(self._parts[0])
            self._limit = float(self._parts[0].max())

    def sorted(self) -> NDArray[np.float64]:
        """Ascending, at most `count`."""
        return np.sort(self._shrunk())

    def _shrunk(self) -> NDArray[np.float64]:
        whole = np.concatenate([np.zeros(0), *self._parts])
        if len(whole) <= self._count:
            return whole
        return np.partition(whole, self._count - 1)[: self._count]
