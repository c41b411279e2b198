"""Images larger than the model, in overlapping tiles: where they lie, and how they become one image again.

Nothing is scaled and nothing moves. All tiles of an image draw from one noise field, each the window that lies
under it (`diffusion.noise.normal_window`), so that where tiles overlap they were noised alike; what remains of
a difference is blended over the whole overlap with raised-cosine weights that sum to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.data.geometry import Placement
from boomerang_batch.data.images import Pixels
from boomerang_batch.errors import ConfigError

Values = NDArray[np.float32]

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of one size over a canvas, at every crossing of `tops` and `lefts`; sizes are (height, width).

    Tiles are numbered row by row. Units are pixels, or the state's elements after `in_states`.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """(top, left) of every tile, by number."""
        return tuple(itertools.product(self.tops, self.lefts))

    def in_states(self, factor: int) -> Tiling:
        """The same tiles on a latent model's grid, where one element stands for `factor` pixels a side."""
        lengths = (*self.size, *self.tile, *self.tops, *self.lefts)
        if any(length % factor for length in lengths):
            raise ValueError(f"tiles planned for another multiple than {factor}: {self}")
        return Tiling(
            size=(self.size[0] // factor, self.size[1] // factor),
            tile=(self.tile[0] // factor, self.tile[1] // factor),
            tops=tuple(top // factor for top in self.tops),
            lefts=tuple(left // factor for left in self.lefts),
        )


def check_overlap(overlap: int, tile: tuple[int, int], multiple: int = 1) -> None:
    """Refuse an overlap that leaves tiles no room to advance. Raises ConfigError naming `images.tiles`."""
    most = min(tile) - multiple
    if overlap > most:
        detail = f"images.tiles.overlap: tiles of {tile[1]}x{tile[0]} can't overlap by {overlap} pixels"
        raise ConfigError(f"{detail}; use at most {most}" if most > 0 else f"{detail}; leave tiles out")


def canvas_size(source: tuple[int, int], tile: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """The least (height, width) that holds the image and that tiles with starts on multiples fill exactly."""
    height, width = (
        side + -(-max(0, length - side) // multiple) * multiple
        for length, side in zip(source, tile, strict=True)
    )
    return height, width


def place_on_canvas(pixels: Pixels, *, tile: tuple[int, int], multiple: int = 1) -> tuple[Pixels, Placement]:
    """Bring (H, W, C) to a size that tiles fill: unscaled, centred, mirrored at its edges where too small.

    `geometry.restore` undoes it exactly. A mirror image is what a model goes on from without a visible border.
    """
    height, width = pixels.shape[:2]
    size = canvas_size((height, width), tile, multiple)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    placement = Placement(
        source=(height, width),
        model=size,
        inner=(top, left, height, width),
        box=(0.0, 0.0, float(width), float(height)),
    )
    margins = ((top, size[0] - height - top), (left, size[1] - width - left), (0, 0))
    return np.pad(pixels, margins, mode="symmetric"), placement


def plan(size: tuple[int, int], *, tile: tuple[int, int], overlap: int, multiple: int = 1) -> Tiling:
    """As few tiles over `size` (height, width) as overlap by at least `overlap`, evenly spread to the edges.

    Starts are multiples of `multiple`: a latent model's pixels per state element and side. Raises ConfigError
    like `check_overlap`, and ValueError where `size` is none that `canvas_size` gives.
    """
    check_overlap(overlap, tile, multiple)
    if canvas_size(size, tile, multiple) != size:
        raise ValueError(f"{size} can't be filled with tiles of {tile} at multiples of {multiple}")
    tops, lefts = (_starts(length, side, overlap, multiple) for length, side in zip(size, tile, strict=True))
    return Tiling(size=size, tile=tile, tops=tops, lefts=lefts)


def cut(values: NDArray[_Scalar], tiling: Tiling, index: int) -> NDArray[_Scalar]:
    """Tile `index` of (C, H, W) values or of a (H, W) mask, as a view."""
    if values.shape[-2:] != tiling.size:
        raise ValueError(f"values of {values.shape} don't fill {tiling.size}")
    row, column = divmod(index, len(tiling.lefts))
    top, left = tiling.tops[row], tiling.lefts[column]
    return values[..., top : top + tiling.tile[0], left : left + tiling.tile[1]]


def weights(tiling: Tiling) -> tuple[Values, Values]:
    """Vertical (tops, tile height) and horizontal (lefts, tile width) weights; a tile has their outer product.

    All are positive, and at each place of the canvas those of the tiles above it sum to one.
    """
    return (
        _axis_weights(tiling.tops, tiling.tile[0], tiling.size[0]),
        _axis_weights(tiling.lefts, tiling.tile[1], tiling.size[1]),
    )


class Mosaic:
    """Drawn tiles, (C, h, w) float32 each, becoming one image (C, H, W).

    Tiles may come in any order and are added in the order of their numbers: a float sum depends on its order,
    and the image must not. Those that come early wait, so in order one image is all that is held.
    """

    def __init__(self, tiling: Tiling, channels: int) -> None:
        self.tiling = tiling
        self._weights = weights(tiling)
        self._sum = np.zeros((channels, *tiling.size), np.float32)
        self._waiting: dict[int, Values] = {}
        self._next = 0

    def add(self, index: int, values: Values) -> None:
        """Take tile `index`. Raises ValueError for a wrong shape or a tile that was there already."""
        if values.shape != (len(self._sum), *self.tiling.tile):
            raise ValueError(f"tile {index} is {values.shape}, not {(len(self._sum), *self.tiling.tile)}")
        if not self._next <= index < len(self.tiling) or index in self._waiting:
            raise ValueError(f"tile {index} of {len(self.tiling)} is unknown or was added before")
        self._waiting[index] = values
        while (ready := self._waiting.pop(self._next, None)) is not None:
            row, column = divmod(self._next, len(self.tiling.lefts))
            weight = np.outer(self._weights[0][row], self._weights[1][column])
            place = cut(self._sum, self.tiling, self._next)
            place += weight * ready
            self._next += 1

    @property
    def complete(self) -> bool:
        """Whether every tile is in."""
        return self._next == len(self.tiling)

    def image(self) -> Values:
        """The blended image (C, H, W). Raises ValueError while tiles are missing."""
        if not self.complete:
            raise ValueError(f"tile {self._next} of {len(self.tiling)} is missing")
        return self._sum


def _starts(length: int, side: int, overlap: int, multiple: int) -> tuple[int, ...]:
    span, reach = (length - side) // multiple, (side - overlap) // multiple
    gaps = -(-span // reach)
    # The gaps are span / gaps rounded down or up, and up is still at most `reach`, which is whole.
    return tuple(i * span // gaps * multiple for i in range(gaps + 1)) if gaps else (0,)


def _axis_weights(starts: Sequence[int], side: int, length: int) -> Values:
    """(tiles, side): a ramp wherever a tile meets a neighbour, over all of what they share, then normalized."""
    raw = np.ones((len(starts), side))
    for i, (here, there) in enumerate(itertools.pairwise(starts)):
        shared = here + side - there
        ramp = np.sin(np.pi / 2 * (np.arange(shared) + 0.5) / shared) ** 2
        raw[i, side - shared :] *= ramp[::-1]
        raw[i + 1, :shared] *= ramp
    total = np.zeros(length)
    for start, weight in zip(starts, raw, strict=True):
        total[start : start + side] += weight
    # Of three tiles over one place the ramps of neighbours alone don't sum to one.
    shares = [weight / total[start : start + side] for start, weight in zip(starts, raw, strict=True)]
    return np.stack(shares).astype(np.float32)
