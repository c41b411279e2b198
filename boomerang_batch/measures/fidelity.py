"""Do the outputs, taken together, look like the real images? Distances of two sets of named features.

Frechet distance (arXiv 1706.08500) between Gaussians of the two sets' means and covariances; the unbiased
kernel distance with k(x, y) = (x.y / d + 1)^3 (KID, arXiv 1801.01401); precision and recall (arXiv 1904.06991),
density and coverage (arXiv 2002.09797) from the balls that reach to each image's k-th neighbour in its own set.
They go by their features, FD-pca or KD-efficientnet-lite0: FID and KID are names for Inception's features
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.distances import tolerance
from boomerang_batch.measures.neighbours import nearest_rows, tiles, was_found

NEIGHBOURS = 5
WIDEST = 4096
"""Numbers per image up to which a Frechet distance is computed: its matrices are this number squared."""
_SUBSETS, _SUBSET_SIZE = 10, 1000
_BLOCK_ROWS = 1024

Features = NDArray[np.float32]
Wide = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """The mean over disjoint subsets, and its standard error; NaN where one subset is all there is."""

    value: float
    error: float
    subsets: int


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """Shares of `made` within reach of the real ones (precision), the reverse (recall), and their successors.

    Density counts the reals' balls around an output, over k: 1 is as dense as the reals, and more is possible.
    Coverage is the share of the reals that have an output within their own ball.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Everything about one kind of features. `frechet` is None where they are too wide for it.

    Rows in which nothing was found are left out of both sets, and counted.
    """

    features: str
    frechet: float | None
    kernel: KernelDistance
    manifold: Manifold
    made: int
    real: int
    made_misses: int
    real_misses: int

    @property
    def names(self) -> tuple[str, str]:
        """What the Frechet and the kernel distance are called."""
        return f"FD-{self.features}", f"KD-{self.features}"


def fidelity(
    made: Features, real: Features, *, features: str, neighbours: int = NEIGHBOURS, seed: int = 0
) -> Fidelity:
    """All measures of the features of `made` (N, d) and `real` (M, d), named `features`.

    Raises MeasureError where either has not more than `neighbours` rows in which something was found.
    """
    seen_made, seen_real = made[was_found(made)], real[was_found(real)]
    for rows, what in ((seen_made, "outputs"), (seen_real, "real images")):
        if len(rows) <= neighbours:
            raise MeasureError(
                f"{features} found something in {len(rows)} {what}; their neighbourhoods of {neighbours} need "
                "more: take a larger sample"
            )
    return Fidelity(
        features=features,
        frechet=frechet_distance(seen_made, seen_real) if made.shape[1] <= WIDEST else None,
        kernel=kernel_distance(seen_made, seen_real, seed=seed),
        manifold=manifold(seen_made, seen_real, neighbours=neighbours),
        made=len(seen_made),
        real=len(seen_real),
        made_misses=len(made) - len(seen_made),
        real_misses=len(real) - len(seen_real),
    )


def frechet_distance(made: Features, real: Features) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the sample means and covariances, never below 0.

    No matrix square root is taken. With the centred sets' triangular factors R and R' (R^T R = (N - 1) S) the
    last trace is the sum of the singular values of R R'^T over sqrt((N - 1) (M - 1)), which holds for singular
    covariances too. With fewer images than numbers per image that is what they are: the value is exact for the
    two samples and above that of the distributions, so compare only values from equal numbers of images.
    """
    if made.shape[1] > WIDEST:
        raise MeasureError(
            f"features of {made.shape[1]} numbers are too wide for a Frechet distance; {WIDEST} is the limit: "
            "take it on the embedder pca"
        )
    if min(len(made), len(real)) < 2:
        raise MeasureError("a Frechet distance needs two images in either set: a covariance needs two")
    shift = made.mean(axis=0, dtype=np.float64) - real.mean(axis=0, dtype=np.float64)
    first, second = _triangle(made), _triangle(real)
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    traces = np.square(first).sum() + np.square(second).sum()
    return max(0.0, float(shift @ shift + traces - 2 * shared))


def kernel_distance(
    made: Features, real: Features, *, subsets: int | None = None, seed: int = 0
) -> KernelDistance:
    """The unbiased squared MMD with the cubic polynomial kernel, over disjoint subsets (arXiv 1307.1954).

    Subsets that share images, as KID draws them, would have no standard error. There are ten, or as many as
    keep them at 1,000 images; the expected value doesn't depend on their size. It may be negative: then it is
    0.
    """
    smaller, larger = sorted((len(made), len(real)))
    if subsets is None:
        subsets = max(1, min(max(_SUBSETS, -(-larger // _SUBSET_SIZE)), smaller // 2))
    if smaller < 2 * subsets:
        raise MeasureError(f"{subsets} subsets of {smaller} images are too small; each needs two images")
    rng = np.random.default_rng(seed)
    parts = zip(*(np.array_split(rng.permutation(len(rows)), subsets) for rows in (made, real)), strict=True)
    values = [_kernel_mmd(made[mine], real[theirs]) for mine, theirs in parts]
    error = float(np.std(values, ddof=1) / np.sqrt(subsets)) if subsets > 1 else float("nan")
    return KernelDistance(value=float(np.mean(values)), error=error, subsets=subsets)


def manifold(made: Features, real: Features, *, neighbours: int = NEIGHBOURS) -> Manifold:
    """Precision, recall, density and coverage of the features of `made` (N, d) against `real` (M, d)."""
    made_reach, real_reach = (_reach(rows, neighbours) for rows in (made, real))
    # Who is exactly as far as the k-th neighbour is not within; rounding must not let it in.
    slack = tolerance(made, real)
    balls = np.zeros(len(made))
    recalled = np.zeros(len(real), bool)
    nearest_made = np.full(len(real), np.inf)
    for rows, columns, squared in tiles(made, real):
        squared += slack
        balls[rows] += (squared < real_reach[columns]).sum(axis=1)
        recalled[columns] |= (squared < made_reach[rows, None]).any(axis=0)
        nearest_made[columns] = np.minimum(nearest_made[columns], squared.min(axis=0))
    return Manifold(
        precision=float((balls > 0).mean()),
        recall=float(recalled.mean()),
        density=float(balls.mean() / neighbours),
        coverage=float((nearest_made < real_reach).mean()),
        neighbours=neighbours,
    )


def _triangle(rows: Features) -> Wide:
    """R (min(N, d), d) with R^T R the covariance of `rows` (N, d); block after block, each in float64."""
    mean = rows.mean(axis=0, dtype=np.float64)
    triangle: Wide = np.empty((0, rows.shape[1]))
    step = max(_BLOCK_ROWS, rows.shape[1])  # of fewer than it has columns, most work would be on zeros
    for start in range(0, len(rows), step):
        centred = rows[start : start + step] - mean
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, centred]), mode="r"))
    return np.asarray(triangle / np.sqrt(len(rows) - 1))


def _kernel_mmd(made: Features, real: Features) -> float:
    first, second = made.astype(np.float64), real.astype(np.float64)

    def kernel(rows: Wide, others: Wide) -> Wide:
        product = rows @ others.T
        product /= rows.shape[1]
        product += 1
        return np.asarray(product**3)

    def within(rows: Wide) -> float:
        # An image with itself says nothing about its set: leaving the diagonal out makes it unbiased.
        similar = kernel(rows, rows)
        return float((similar.sum() - np.trace(similar)) / (len(rows) * (len(rows) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def _reach(rows: Features, neighbours: int) -> Wide:
    """The squared distance (N,) of each row to its k-th nearest other row."""
    names = np.arange(len(rows))
    _, distance = nearest_rows(rows, rows, count=neighbours, apart=(names, names))
    return np.asarray(np.square(distance[:, -1]))
