"""The nearest rows of a set of features, in bounded memory: what copies and neighbourhoods rest on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.measures.distances import squared_distances, strips

Features = NDArray[np.float32]
Distances = NDArray[np.float64]
Indices = NDArray[np.int64]


def was_found(features: Features) -> NDArray[np.bool_]:
    """Whether each row (n,) of features is one, and not NaN for nothing found."""
    return np.asarray(~np.isnan(features).any(axis=1))


def tiles(queries: Features, keys: Features) -> Iterator[tuple[slice, slice, Distances]]:
    """Squared distances of `queries` (n, d) to `keys` (m, d), tile by tile: its rows, its columns, its values.

    The tiles of a row come one after the other. Both sets are centred first: distances between rows that are
    small beside their common mean would cancel away.
    """
    mean = keys.mean(axis=0, dtype=np.float64)
    for rows in strips(len(queries), queries.shape[1]):
        left = queries[rows] - mean
        for columns in strips(len(keys), max(queries.shape[1], len(left))):
            yield rows, columns, squared_distances(left, keys[columns] - mean)


def nearest_rows(
    queries: Features,
    keys: Features,
    *,
    count: int = 1,
    apart: tuple[Indices, Indices] | None = None,
) -> tuple[Indices, Distances]:
    """For each query (n, d) the `count` nearest of `keys` (m, d): rows and distances (n, count), ascending.

    `apart` names every query and every key, and a query's namesakes are passed over. Where fewer than `count`
    are left, the distances are infinite and the rows -1. No row may have a NaN.
    """
    found = np.full((len(queries), count), -1, np.int64)
    squared = np.full((len(queries), count), np.inf)
    for rows, columns, tile in tiles(queries, keys):
        if apart is not None:
            tile[apart[0][rows, None] == apart[1][columns]] = np.inf
        place, nearest = _least(tile, min(count, tile.shape[1]))
        values = np.concatenate([squared[rows], nearest], axis=1)
        names = np.concatenate([found[rows], place + columns.start], axis=1)
        order = np.argsort(values, axis=1, kind="stable")[:, :count]
        squared[rows] = np.take_along_axis(values, order, axis=1)
        found[rows] = np.take_along_axis(names, order, axis=1)
    found[np.isinf(squared)] = -1

    # Products leave a rest where equal rows have distance 0: those found are measured once more, by
    # subtraction.
    exact = np.stack([row_distances(queries, keys[found[:, rank]]) for rank in range(count)], axis=1)
    exact[found < 0] = np.inf
    order = np.argsort(exact, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(exact, order, axis=1)


def _least(tile: Distances, count: int) -> tuple[Indices, Distances]:
    """The columns and values (n, count) of each row's least ones, ascending; writes over them.

    For the few that are asked for, looking for the least again and again is faster than any sorting.
    """
    places, values = np.empty((len(tile), count), np.int64), np.empty((len(tile), count))
    every = np.arange(len(tile))
    for rank in range(count):
        places[:, rank] = place = tile.argmin(axis=1)
        values[:, rank] = tile[every, place]
        tile[every, place] = np.inf
    return places, values


def row_distances(first: Features, second: Features) -> Distances:
    """The distance (n,) of each row of `first` (n, d) to the same row of `second`."""
    apart = np.empty(len(first))
    for rows in strips(len(first), first.shape[1]):
        apart[rows] = np.linalg.norm(first[rows].astype(np.float64) - second[rows], axis=1)
    return apart
