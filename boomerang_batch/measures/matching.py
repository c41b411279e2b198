"""Who is picked when every output names its nearest sources: ranks, chance, and one-to-one matching.

Ties are credited in expectation over a coin: among equally near candidates the own one is as likely to come
first as any other. So a distance that says nothing scores chance and not 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

MOST_ASSIGNED = 2000
"""How many records of a group are matched one to one: time grows with the cube."""


def drawn(total: NDArray[np.int64], own: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """How likely `draws` of `total` things, drawn without replacement, hold at least one of the `own`; (n,)."""
    missed = np.ones(len(total))
    for draw in range(int(draws.max(initial=0))):
        left = np.maximum(total - own - draw, 0) / np.maximum(total - draw, 1)
        missed *= np.where(draw < draws, left, 1.0)
    return 1.0 - missed


def rank_credits(
    distances: NDArray[np.float64], own: NDArray[np.bool_], ks: Sequence[int], tolerance: float
) -> NDArray[np.float64]:
    """For each query and k, how much of a hit its own candidate is among the k nearest: (n, len(ks)), 0..1.

    distances (n, m); own (n, m) marks each query's own candidates, of which it has at least one, and the
    nearest counts. Distances within `tolerance` of that one tie with it.
    """
    best = np.where(own, distances, np.inf).min(axis=1)[:, None]
    within = distances <= best + tolerance
    nearer = (distances < best - tolerance).sum(axis=1)
    tied = within.sum(axis=1) - nearer
    own_tied = (within & own).sum(axis=1)
    credits = [drawn(tied, own_tied, np.clip(k - nearer, 0, tied)) for k in ks]
    return np.stack(credits, axis=1)


class OneToOne:
    """Matching of a group's outputs to its sources that makes the sum of costs least (the Hungarian method).

    Collects the costs as they come in strips of rows. Of more than MOST_ASSIGNED records that many are drawn,
    and their sources are the only candidates.
    """

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self.cut = size > MOST_ASSIGNED
        kept = min(size, MOST_ASSIGNED)
        # In an order that knows nothing: among equal sums the method prefers what stands first.
        self._rows = np.sort(generator.choice(size, kept, replace=False))
        self._columns = generator.permutation(self._rows)
        self._costs = np.zeros((kept, kept))

    def add(self, rows: slice, costs: NDArray[np.float64]) -> None:
        """Costs (len(rows), size) of the outputs in `rows` of the group; a row may be off by a constant."""
        first, last = np.searchsorted(self._rows, [rows.start, rows.stop])
        part = costs[np.ix_(self._rows[first:last] - rows.start, self._columns)]
        self._costs[first:last] = part - part.min(axis=1, keepdims=True, initial=np.inf)

    def hits(self, names: NDArray[np.int64]) -> NDArray[np.float64]:
        """1.0 for each matched output whose source has its own name, else 0.0; names (size,) of the group."""
        rows, columns = linear_sum_assignment(self._costs)
        own: NDArray[np.float64] = (names[self._rows[rows]] == names[self._columns[columns]]).astype(np.float64)
        return own
