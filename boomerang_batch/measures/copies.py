"""Are outputs copies: of a source, of each other, or of what the model was trained on? Distances of features.

Distance to the closest record (DCR) and its ratio to the second nearest (NNDR) against all sources; the
distance to an output's own source beside the nearest other one; and shares of outputs nearer than 95 % of real
images that are no copies. Those are the hold-out's where there is one, and otherwise the sources themselves,
each against the others. A share of 5 % is what independent images have; much more are copies.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.measures.neighbours import nearest_rows, row_distances, was_found

PERCENTILE = 5.0
"""Of the distances of real images that are no copies: what is nearer counts as a copy."""

Features = NDArray[np.float32]
Distances = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingCopies:
    """Of the model's own training images. `closest` (n,) is each output's distance to the nearest of them.

    `baseline` (m,) is that of each source, and `threshold` the 5th percentile of the hold-out's, or without one
    of `baseline`; `below` is the share of outputs nearer than that, `swaps` the share that besides is nearer to
    a training image than to its own source.
    """

    closest: Distances
    baseline: Distances
    threshold: float
    below: Rate
    swaps: Rate


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Of n outputs in which, and in whose sources, something was found; `misses` are the others.

    `closest` (n,) is the DCR and `ratio` (n,) the NNDR, 1 where two sources are equally near; `own` (n,) is the
    distance to the own source and `other` (n,) to the nearest source of anyone else. `baseline` are the same
    distances of images that are no copies, of which `threshold` is the 5th percentile; `below` is the share of
    outputs nearer than that to a source. `near_duplicates` is the share nearer to another's output than
    `duplicate_threshold`, the 5th percentile of the sources' distances to each other.
    """

    closest: Distances
    ratio: Distances
    own: Distances
    other: Distances
    baseline: Distances
    baseline_of: Literal["hold-out", "sources"]
    threshold: float
    below: Rate
    own_is_closest: Rate
    near_duplicates: Rate
    duplicate_threshold: float
    training: TrainingCopies | None
    misses: int


def copies(
    outputs: Features,
    sources: Features,
    *,
    own: Indices | None = None,
    identities: Indices | None = None,
    holdout: Features | None = None,
    training: Features | None = None,
) -> Copies:
    """Measure the features of outputs (N, d) against those of sources (M, d).

    `own` (N,) is the row of each output's source, by default the same row; give each source once, whatever
    number of outputs it has. `identities` (M,) are equal where sources show the same person: nobody is compared
    with themselves as with another. `holdout` are real images that were no sources, `training` those that the
    model was trained on. Raises MeasureError where fewer than three people or images are left to be compared.
    """
    own = np.arange(len(outputs), dtype=np.int64) if own is None else own
    identities = np.arange(len(sources), dtype=np.int64) if identities is None else identities
    _check(outputs, sources, own, identities)
    seen_source = was_found(sources)
    seen = was_found(outputs) & seen_source[own]
    row_now = np.cumsum(seen_source) - 1
    outputs, own = outputs[seen], row_now[own[seen]]
    sources, identities = sources[seen_source], identities[seen_source]
    people = len(np.unique(identities))
    if not len(outputs) or people < 3:
        raise MeasureError(
            f"copies can't be told among {len(outputs)} outputs and sources of {people} identities in which "
            "something was found; there must be outputs, and three identities: take a larger sample"
        )

    # Against the sources: any, one's own, anyone else's.
    nearest, near = nearest_rows(outputs, sources, count=2)
    own_distance = row_distances(outputs, sources[own])
    if people == len(sources):
        others = np.where(nearest[:, 0] == own, near[:, 1], near[:, 0])
    else:
        others = nearest_rows(outputs, sources, apart=(identities[own], identities))[1][:, 0]
    ratio = np.divide(near[:, 0], near[:, 1], out=np.ones(len(near)), where=near[:, 1] > 0)

    # What is near, from images that are no copies.
    between = nearest_rows(sources, sources, apart=(identities, identities))[1][:, 0]
    kept = None if holdout is None else holdout[was_found(holdout)]
    baseline = between if kept is None else nearest_rows(kept, sources)[1][:, 0]
    if not len(baseline):
        raise MeasureError("nothing was found in any image of the hold-out; give other images, or none")
    threshold, duplicate_threshold = (float(np.percentile(each, PERCENTILE)) for each in (baseline, between))

    mine = identities[own]
    twins = nearest_rows(outputs, outputs, apart=(mine, mine))[1][:, 0]
    return Copies(
        closest=near[:, 0],
        ratio=ratio,
        own=own_distance,
        other=others,
        baseline=baseline,
        baseline_of="sources" if holdout is None else "hold-out",
        threshold=threshold,
        below=_share(near[:, 0] < threshold),
        own_is_closest=_share(own_distance < others),
        near_duplicates=_share(twins < duplicate_threshold),
        duplicate_threshold=duplicate_threshold,
        training=None if training is None else _of_training(outputs, sources, own_distance, training, kept),
        misses=int((~seen).sum()),
    )


def exact_duplicates(images: NDArray[np.uint8]) -> Rate:
    """The share of images (N, H, W, C) that have an equal one among the others, pixel by pixel."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    seen = Counter(digests)
    return _share(np.array([seen[digest] > 1 for digest in digests], bool))


def _of_training(
    outputs: Features,
    sources: Features,
    own_distance: Distances,
    training: Features,
    holdout: Features | None,
) -> TrainingCopies:
    kept = training[was_found(training)]
    if not len(kept):
        raise MeasureError("nothing was found in any of the training images; give others, or none")
    closest, usual = (nearest_rows(rows, kept)[1][:, 0] for rows in (outputs, sources))
    # Sources may be among what the model was trained on, and then tell nothing of what is near.
    strangers = usual if holdout is None else nearest_rows(holdout, kept)[1][:, 0]
    threshold = float(np.percentile(strangers, PERCENTILE))
    below = closest < threshold
    return TrainingCopies(
        closest=closest,
        baseline=usual,
        threshold=threshold,
        below=_share(below),
        swaps=_share(below & (closest < own_distance)),
    )


def _share(hits: NDArray[np.bool_]) -> Rate:
    return Rate(hits=int(hits.sum()), trials=len(hits))


def _check(outputs: Features, sources: Features, own: Indices, identities: Indices) -> None:
    if outputs.ndim != 2 or sources.ndim != 2 or outputs.shape[1] != sources.shape[1]:
        raise MeasureError(f"features of shape {outputs.shape} and {sources.shape} can't be compared")
    if own.shape != (len(outputs),) or identities.shape != (len(sources),):
        raise MeasureError(
            f"{len(outputs)} outputs have {own.shape} sources, and {len(sources)} sources {identities.shape} "
            "identities; each must have one"
        )
    if len(own) and not 0 <= own.min() <= own.max() < len(sources):
        raise MeasureError(f"an output's source is row {own.max()} or {own.min()} of {len(sources)} sources")
