"""Codes: what the reverse walk must be fed so that it ends in a given image, or in a counterpart of it.

Where Boomerang draws each step's noise afresh, a code holds it: a path of states x_n, ..., x_0 is drawn that
ends in the image, and what each step's mean lacks to the next state is kept. Fed back under the same condition
it gives the image again; under another it gives that image's counterpart. Two ways to draw the path:

    dpm-encoder     x' ~ q(x' | x_t, x_0), the posterior of the forward chain with the solver's eta
                    (CycleDiffusion, Wu and De la Torre, arXiv 2210.05559, section 3.2)
    edit-friendly   x' ~ q(x' | x_0), each state by itself, so that its code holds more of the image
                    (Huberman-Spiegelglas, Kulikov and Michaeli, arXiv 2304.06140, section 3.2)

Both papers keep z = (x' - mean) / zeta. Kept here is the residual x' - mean: the last step, whose zeta is 0,
leaves one too, without which the image would come back only up to its last noise.

The third way has no noise at all: `inverted` turns the walk of eta 0 round, up from the image to the state that
it comes from, as far as steps of that size tell (DDIM inversion, arXiv 2010.02502, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from boomerang_batch.diffusion.boomerang import Noise
from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.samplers import Column, Solver, jump, step
from boomerang_batch.diffusion.schedule import Schedule

Path = Literal["dpm-encoder", "edit-friendly", "ddim"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Code:
    """Where the walk back begins, and what each of its steps adds; of one image, or of a batch."""

    x_n: Tensor
    """(..., C, H, W), the state at the start node."""
    residuals: Tensor | None
    """(n + 1, ..., C, H, W): row i is what the step that leaves node i adds to its mean; row 0 is unused. None
    where steps add what noise they draw, as after DDIM inversion."""


def encode(
    x_0: Tensor,
    denoiser: Denoiser,
    schedule: Schedule,
    solver: Solver,
    noise: Noise,
    conditions: Sequence[Condition],
    *,
    path: Literal["dpm-encoder", "edit-friendly"],
) -> Code:
    """The code of x_0 (B, C, H, W), states of the denoiser, drawn by `noise`; evaluates `schedule.n` times.

    `solver` is of order 1 and draws the forward chain's own posterior (variance fixed_small).
    """
    residuals = torch.zeros((schedule.n + 1, *x_0.shape), dtype=x_0.dtype, device=x_0.device)
    node = torch.full((len(x_0),), schedule.n, dtype=torch.int64)
    x_n = x_0 if schedule.n == 0 else jump(solver.table[node], x_0, noise.forward(node))
    x_t = x_n
    for i in range(schedule.n, 0, -1):
        node = torch.full((len(x_0),), i, dtype=torch.int64)
        output = denoiser.denoise(x_t, schedule.tau[node], conditions)
        rows, below = solver.table[node], solver.table[node - 1]
        x_t, residuals[i] = code_step(
            rows,
            below,
            x_t,
            output,
            x_0,
            noise.reverse(node),
            apart=torch.full_like(node, path == "edit-friendly", dtype=torch.bool),
            last=node == 1,
        )
    return Code(x_n=x_n, residuals=residuals)


def code_step(
    rows: Tensor,
    below: Tensor,
    x_t: Tensor,
    output: Tensor,
    x_0: Tensor,
    z: Tensor,
    *,
    apart: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of each path: the next lower state, and the residual that leads a walk from x_t there.

    rows (B, columns) of the step, and below (B, columns) of the node that it leads to; x_t, x_0, z
    (B, C, H, W); output as `step` takes it. apart (B,) bool: whether the state is drawn by itself, as
    edit-friendly draws it; last (B,) bool: whether the step leads to the image.
    """
    apart, last = (where.to(x_t.device).view(-1, *[1] * (x_t.ndim - 1)) for where in (apart, last))
    mean, _ = step(rows, x_t, output, None)
    nothing_free = torch.zeros_like(x_0[:, :1], dtype=torch.bool)
    posterior, _ = step(rows, x_t, output, z, known=(x_0, nothing_free))
    drawn = torch.where(last, x_0, torch.where(apart, jump(below, x_0, z), posterior))
    residual = drawn - mean
    # Where the walk will be when it is fed the residual: rounding must not add up along the path.
    return mean + residual, residual


def decode(
    code: Code,
    denoiser: Denoiser,
    schedule: Schedule,
    solver: Solver,
    conditions: Sequence[Condition],
) -> Tensor:
    """The image (B, C, H, W) of a code under `conditions`: x_0 itself under those it was encoded with.

    Without residuals it is the walk of eta 0 that begins at x_n; on an `inverted` one, the x_n of an x_0.
    """
    x_t = code.x_n
    table = fed(solver).table
    for i in range(schedule.n, 0, -1):
        node = torch.full((len(x_t),), i, dtype=torch.int64)
        output = denoiser.denoise(x_t, schedule.tau[node], conditions)
        x_t, _ = step(table[node], x_t, output, None if code.residuals is None else code.residuals[i])
    return x_t


def inverted(schedule: Schedule) -> Schedule:
    """The same nodes the other way, to be walked with eta 0: from an image, taken for node 1's state, to n.

    Each step uses the noise that the network sees at its lower end for the upper one too, which is exact for
    small steps alone.
    """
    if schedule.n == 0:
        return schedule
    up = {name: getattr(schedule, name)[1:].flip(0) for name in ("alpha", "sigma", "tau")}
    return Schedule(kind=schedule.kind, **up)


def fed(solver: Solver) -> Solver:
    """The same steps with their noise taken as it is given, unscaled."""
    table = solver.table.clone()
    table[:, Column.NOISE] = 1
    table[:, [Column.LOG_SMALL, Column.LOG_LARGE]] = 0
    return Solver(table=table, order=solver.order, learned=solver.learned)


def noise_maps(code: Code, solver: Solver) -> Tensor:
    """The papers' z (n + 1, B, C, H, W): residuals in units of each step's own noise, 0 where it has none."""
    if code.residuals is None:
        raise ValueError("a code without residuals has no noise maps")
    scale = solver[Column.NOISE].to(code.residuals.dtype).view(-1, 1, 1, 1, 1)
    return torch.where(scale > 0, code.residuals / torch.where(scale > 0, scale, 1), 0)


def flipped(code: Code, axis: Literal["horizontal", "vertical"]) -> Code:
    """The code mirrored: as far as the denoiser does not tell left from right, that of the mirrored image."""
    side = -1 if axis == "horizontal" else -2
    residuals = None if code.residuals is None else code.residuals.flip(side)
    return Code(x_n=code.x_n.flip(side), residuals=residuals)


def shifted(code: Code, solver: Solver, by: Tensor, *, over: tuple[float, float] = (0.0, 1.0)) -> Code:
    """The code with `by` (C,) added to its noise maps, which moves colours (as in arXiv 2304.06140).

    `over` says at which of the walk's nodes, as shares of it: 0 is its end, the image, 1 where it begins.
    """
    if code.residuals is None:
        raise ValueError("a code without residuals has no noise maps")
    n, low, high = len(code.residuals) - 1, *over
    within = [low * n <= i <= high * n for i in range(n + 1)]
    scale = solver[Column.NOISE] * torch.tensor(within)
    added = scale.view(-1, 1) * by.double()
    shape = (n + 1, *[1] * (code.x_n.ndim - 3), len(by), 1, 1)
    return Code(x_n=code.x_n, residuals=code.residuals + added.view(shape).to(code.residuals))
