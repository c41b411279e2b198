"""What is drawn: one sample's way out and back, what of it may change, and what becomes of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from boomerang_batch.diffusion.codes import Code, Path, fed
from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.samplers import Solver
from boomerang_batch.diffusion.schedule import Schedule


class Walk:
    """One t on one chain, resolved: the nodes to walk and the coefficients of every step."""

    def __init__(self, schedule: Schedule, solver: Solver) -> None:
        self.schedule = schedule
        self.solver = solver
        self.n = schedule.n
        # Plain lists: the loop picks a row for every slot in every iteration.
        self.rows: list[list[float]] = solver.table.tolist()
        self.tau: list[float] = schedule.tau.tolist()

    @functools.cached_property
    def fed_rows(self) -> list[list[float]]:
        """`rows` for a walk that is fed a code."""
        found: list[list[float]] = fed(self.solver).table.tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of a draw that may change."""

    mask: Tensor
    """(1, h, w) bool on the state's grid; True where it changes."""
    outside: Tensor
    """(C, H, W) float32, the image whose state stands outside the mask. A latent model's must not show the
    inside: an autoencoder mixes what is near."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a tile's noise lies in the one noise field of its image, on the state's grid."""

    corner: tuple[int, int]
    """(top, left)"""
    field: tuple[int, int]
    """(height, width)"""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One variant of one sample, or a tile of it. `tag` is the caller's and comes back untouched."""

    tag: Any
    image: Tensor
    """(C, H, W) float32 in the denoiser's value range."""
    noise_key: bytes
    walk: Walk
    condition: Condition = None
    passes: int = 1
    emit_all: bool = False
    """Whether every pass of a cascade comes out, or the last alone."""
    region: Region | None = None
    window: Window | None = None
    path: Path | None = None
    """How to find the image's code, which is then what comes out; for `ddim` along the `inverted` walk. Of a
    walk of order 1, in one pass and without a region."""
    code: Code | None = None
    """What the walk is fed: `image` then says no more than the size. On the CPU."""

    @property
    def leaves_residuals(self) -> bool:
        """Whether it draws a path whose code has residuals."""
        return self.path in ("dpm-encoder", "edit-friendly")

    @property
    def evaluations(self) -> int:
        """Network calls that it takes part in, over all its passes."""
        return self.walk.n * self.passes


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A draw, or one pass of it, at the end of its walk."""

    draw: Draw
    pass_number: int
    """1 for the first pass."""
    x_0: Tensor
    """The state, (c, h, w) float32 on the device."""
    batch_size: int
    """The smallest batch shape that any of its steps was computed in; the autoencoder's for t = 0."""
    code: Code | None = None
    """Of a draw with a path."""
