"""The two embedders that need no weights: the pixels themselves, and their principal components.

Images of more than 64 pixels on a side are shrunk to 64 by area first, so that a large image has no more
numbers than a small one and one noisy pixel in a thousand counts for what it is seen as. Nothing is enlarged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.embedders.contract import Embedder, Features
from boomerang_batch.measures.images import Images

LONGEST = 64
COMPONENTS = 64
_FITTED_ON = 2000
_LICENCE = "Apache-2.0"  # this file


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """Each image's pixels as one row, 0 to 1; implements `Embedder`."""

    name: str = "pixels"
    digest: str = hashlib.sha256(f"pixels by area, longest {LONGEST}, over 255".encode()).hexdigest()
    licence: str = _LICENCE

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        return shrunk(images).reshape(len(images), -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """The pixels' coordinates along `axes` (k, d) from `mean` (d,), not whitened; implements `Embedder`."""

    mean: Features
    axes: Features
    digest: str
    name: str = "pca"
    licence: str = _LICENCE

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        rows = shrunk(images).reshape(len(images), -1)
        if rows.shape[1] != self.mean.shape[0]:
            raise MeasureError(
                f"embedder pca was fitted on images of {self.mean.shape[0]} numbers and got {rows.shape[1]}: "
                "sources and outputs must have one size and one number of channels"
            )
        return np.asarray((rows - self.mean) @ self.axes.T)


def of_pixels(fit_on: Images) -> Embedder:
    """The pixels; nothing is fitted."""
    return Pixels()


def fitted_pca(fit_on: Images) -> Embedder:
    """The principal components of the images, 64 at most, and no more than those that vary.

    Of more than 2,000 images 2,000 are taken, evenly spaced. Raises MeasureError where all are equal.
    """
    spaced = np.linspace(0, len(fit_on) - 1, min(len(fit_on), _FITTED_ON)).round().astype(np.intp)
    rows = shrunk(fit_on[spaced]).reshape(len(spaced), -1)
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows -= mean
    axes = _principal_axes(rows)
    if not len(axes):
        raise MeasureError("embedder pca: all images that it is fitted on are equal; they have no components")
    digest = hashlib.sha256(b"pca" + mean.tobytes() + axes.tobytes()).hexdigest()
    return Components(mean=mean, axes=axes, digest=digest)


def _principal_axes(rows: Features) -> Features:
    """The directions (k, d) in which centred rows (N, d) vary, the most first, each of length 1.

    From the smaller of the two products: of images times images there are 2,000 squared at most.
    """
    count, width = rows.shape
    wide = width > count
    product = (rows @ rows.T if wide else rows.T @ rows).astype(np.float64)
    keep = min(COMPONENTS, len(product))
    values, vectors = eigh(product, subset_by_index=[len(product) - keep, len(product) - 1])
    # float32 products can't tell less than this from none.
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors[:, values > max(values[0], 0) * 1e-6]
    axes = (rows.T @ vectors.astype(np.float32) if wide else vectors.astype(np.float32)).T
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    largest = np.abs(axes).argmax(axis=1)
    return np.ascontiguousarray(axes * np.sign(axes[np.arange(len(axes)), largest])[:, None])


def shrunk(images: Images) -> NDArray[np.float32]:
    """Images (N, H, W, C) as float32, 0 to 1, none of their sides longer than 64 pixels."""
    height, width = images.shape[1:3]
    scale = min(1.0, LONGEST / max(height, width))
    if scale == 1.0:
        return images.astype(np.float32) / np.float32(255)
    rows, columns = (_by_area(side, max(1, round(side * scale))) for side in (height, width))
    small = np.empty((len(images), len(rows), len(columns), images.shape[3]), np.float32)
    for image, place in zip(images, small, strict=True):  # one by one: a float copy of all would be large
        for channel in range(images.shape[3]):
            place[..., channel] = rows @ image[..., channel].astype(np.float32) @ columns.T
    return small / np.float32(255)


def _by_area(old: int, new: int) -> NDArray[np.float32]:
    """The share (new, old) that each old pixel of a line has in each new one; rows sum to 1."""
    ends = np.arange(new + 1) * (old / new)
    starts, stops = ends[:-1, None], ends[1:, None]
    covered = np.minimum(stops, np.arange(1, old + 1)) - np.maximum(starts, np.arange(old))
    return np.asarray(np.maximum(covered, 0) * (new / old), np.float32)
