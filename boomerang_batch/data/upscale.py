"""Super-resolution around Boomerang: enlarge before it, and afterwards hold it to the image it came from.

With D the mean over blocks of factor x factor pixels and U repeating each pixel over its block, the nearest
image to `out` whose reduction is `low` is out + U(low - D(out)). What runs over 0 or 255 that way is clipped
and the rest of its block makes up for it, which is the nearest such image among those that can be stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.data.images import Filter, Pixels, resize
from boomerang_batch.errors import SampleError

_BAND_ELEMENTS = 2**20
_BISECTIONS = 64


def target_size(source: tuple[int, int], factor: int, *, max_pixels: int) -> tuple[int, int]:
    """The output's (height, width). Raises SampleError `too-many-pixels`, told before anything is enlarged."""
    height, width = source[0] * factor, source[1] * factor
    if height * width > max_pixels:
        detail = f"{source[1]}x{source[0]} pixels enlarged {factor} times are {width}x{height}"
        raise SampleError("too-many-pixels", f"{detail}; the limit images.max_pixels is {max_pixels:,}")
    return height, width


def enlarge(pixels: Pixels, factor: int, filter: Filter) -> Pixels:
    """(H, W, C) enlarged to (factor H, factor W, C); an alpha channel (H, W, 1) likewise."""
    height, width = pixels.shape[:2]
    return resize(pixels, (height * factor, width * factor), filter=filter)


def reduced(pixels: NDArray[np.generic], factor: int) -> NDArray[np.float64]:
    """D: the mean of each block, (factor H, factor W, C) to (H, W, C)."""
    height, width, channels = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(1, 3), dtype=np.float64)


def project(values: NDArray[np.generic], low: Pixels, factor: int) -> NDArray[np.float64]:
    """The nearest image in [0, 255] to `values` (factor H, factor W, C) whose reduction is `low` (H, W, C).

    `values` are in units of 8-bit levels, within 0 and 255 or not. out + U(low - D(out)) wherever that stays
    in range. D of the result is `low` to float64 rounding.
    """
    blocks = _blocks(values.astype(np.float64), low, factor)
    wanted = low.reshape(-1).astype(np.float64)
    return _image(_in_range(blocks, wanted), low, factor)


def consistent(values: NDArray[np.generic], low: Pixels, factor: int) -> Pixels:
    """`project`, in 8 bits, and D of it is still exactly `low`: rounding leaves nothing.

    In each block as many values are rounded up, those of the largest fractions, as make the sum right, the
    others down. So each value is less than one level from the projection's, plain rounding's half at best.
    Encoding to jpeg or lossy webp afterwards leaves what it leaves.
    """
    if values.shape != (low.shape[0] * factor, low.shape[1] * factor, low.shape[2]):
        raise ValueError(f"{values.shape} is not {factor} times {low.shape}")
    result = np.empty(values.shape, np.uint8)
    # In bands, so that float64 copies of a large image are never held at once.
    rows = max(1, _BAND_ELEMENTS // (values[0].size * factor))
    for first in range(0, len(low), rows):
        part = low[first : first + rows]
        band = slice(first * factor, (first + len(part)) * factor)
        blocks = _blocks(project(values[band], part, factor), part, factor)
        result[band] = _image(_rounded(blocks, part.reshape(-1)), part, factor)
    return result


def _blocks(values: NDArray[np.float64], low: Pixels, factor: int) -> NDArray[np.float64]:
    """(H W C, factor**2): the values over each pixel and channel of `low`."""
    height, width, channels = low.shape
    grid = values.reshape(height, factor, width, factor, channels)
    return grid.transpose(0, 2, 4, 1, 3).reshape(-1, factor**2)


def _image(blocks: NDArray[np.float64], low: Pixels, factor: int) -> NDArray[np.float64]:
    height, width, channels = low.shape
    grid = blocks.reshape(height, width, channels, factor, factor).transpose(0, 3, 1, 4, 2)
    return grid.reshape(height * factor, width * factor, channels)


def _in_range(blocks: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest point to each block with the wanted mean and all values in [0, 255].

    By the conditions of optimality that is the block plus one number, clipped; the mean grows with the number.
    """
    moved = blocks + (wanted - blocks.mean(axis=1))[:, None]
    over = ((moved < 0) | (moved > 255)).any(axis=1)
    if not over.any():
        return moved
    block, mean = blocks[over], wanted[over]
    lower, upper = -block.max(axis=1), 255 - block.min(axis=1)
    for _ in range(_BISECTIONS):
        middle = (lower + upper) / 2
        high = np.clip(block + middle[:, None], 0, 255).mean(axis=1) >= mean
        lower, upper = np.where(high, lower, middle), np.where(high, middle, upper)
    moved[over] = np.clip(block + upper[:, None], 0, 255)
    return moved


def _rounded(blocks: NDArray[np.float64], wanted: Pixels) -> NDArray[np.float64]:
    """Each block, whose mean is the wanted one, in whole numbers of exactly that mean."""
    floor = np.floor(blocks)
    missing = wanted.astype(np.int64) * blocks.shape[1] - floor.sum(axis=1).astype(np.int64)
    order = np.argsort(floor - blocks, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(blocks.shape[1])[None, :], axis=1)
    return floor + (rank < missing[:, None])
