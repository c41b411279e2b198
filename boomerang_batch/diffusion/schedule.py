"""Noise levels, the grid of nodes a run walks, and where it starts.

A schedule is ascending nodes i = 0..n of (alpha_i, sigma_i, tau_i); node 0 is clean, (1, 0). The forward law is
x_i = alpha_i * x_0 + sigma_i * eps. Variance-preserving, variance-exploding and flow-matching chains differ
only in these numbers; tau_i is what the network is told. Noise is compared across chains by its standard
deviation relative to the clean signal, sigma_i / alpha_i. Tables are float64.
Boomerang: arXiv 2210.12100.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from boomerang_batch.diffusion.grids import VAR, Grid, grid_indices, var_alpha_bars
from boomerang_batch.errors import ConfigError

Kind = Literal["vp", "ve", "flow"]
StartPolicy = Literal["exact", "snap", "diffusers-strength"]


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The chain a model was trained on. Array index j = 0..T-1 is the paper's timestep t = j + 1.

    alpha, sigma, tau: float64 tensors of shape (T,), relative noise positive and ascending. Raises ConfigError
    when it is not. The last three fields matter to start diffusers-strength alone, which repeats what diffusers
    does with the model's scheduler configuration.
    """

    kind: Kind
    alpha: Tensor
    sigma: Tensor
    tau: Tensor
    shift: float = 1.0
    """Flow: s = shift * raw / (1 + (shift - 1) * raw), raw spread evenly over (0, 1] (arXiv 2403.03206)."""
    steps_offset: int = 0
    """What diffusers adds to every train index of a leading grid."""
    end: tuple[float, float] = (1.0, 0.0)
    """(alpha, sigma) where diffusers' walk ends; abar_0 instead of clean where set_alpha_to_one is false."""
    raw_floor: float | None = None
    """Flow: raw of the lowest node of diffusers' grid; None: 1 / steps."""

    def __post_init__(self) -> None:
        ratios = self.relative_sigma
        if not (bool((self.sigma > 0).all()) and bool((ratios[1:] > ratios[:-1]).all())):
            raise ConfigError(
                "the chain's noise levels are not positive and ascending; check the model's scheduler config"
            )

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def relative_sigma(self) -> Tensor:
        """Noise std relative to the clean signal, (T,); infinite where alpha is 0."""
        return self.sigma / self.alpha


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The nodes of one run: index 0 is clean, the last one is where Boomerang turns round.

    alpha, sigma, tau: float64 tensors of shape (n + 1,). tau[0] is never shown to a network.
    """

    kind: Kind
    alpha: Tensor
    sigma: Tensor
    tau: Tensor

    @property
    def n(self) -> int:
        """The start node, which is also the number of evaluations; 0 means identity."""
        return len(self.alpha) - 1

    @functools.cached_property
    def relative_sigma(self) -> float:
        """Noise std at the start node relative to the clean signal."""
        return float(self.sigma[-1] / self.alpha[-1])


def vp_levels(alpha_bar: Tensor, tau: Tensor | None = None) -> NoiseLevels:
    """Variance-preserving: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). alpha_bar (T,) descending."""
    alpha_bar = alpha_bar.double()
    tau = torch.arange(len(alpha_bar)) if tau is None else tau
    return NoiseLevels(kind="vp", alpha=alpha_bar.sqrt(), sigma=(1 - alpha_bar).sqrt(), tau=tau.double())


def ve_levels(sigma: Tensor, tau: Tensor) -> NoiseLevels:
    """Variance-exploding: alpha = 1. sigma (T,) ascending."""
    return NoiseLevels(kind="ve", alpha=torch.ones_like(sigma).double(), sigma=sigma.double(), tau=tau.double())


def flow_levels(s: Tensor, tau: Tensor, *, shift: float = 1.0, raw_floor: float | None = None) -> NoiseLevels:
    """Flow matching: alpha = 1 - s, sigma = s. s (T,) ascending in (0, 1], already shifted."""
    s = s.double()
    return NoiseLevels(kind="flow", alpha=1 - s, sigma=s, tau=tau.double(), shift=shift, raw_floor=raw_floor)


def build_schedule(
    levels: NoiseLevels,
    *,
    grid: Grid,
    steps: int,
    t: tuple[str, float],
    start: StartPolicy,
    fractional_tau: bool = True,
) -> Schedule:
    """Resolve `t` (unit, value) on a grid of `steps` nodes into the nodes a run walks.

    Units: timestep (the paper's, 0..T), fraction of T (rounded to the nearest timestep), sigma relative to the
    clean signal, snr = 1 / sigma^2. t = 0 is the identity, n = 0, under every policy.
    exact: the grid's nodes with less noise than the target, then the target itself.
    snap: the grid cut at its node nearest to the target in log noise.
    diffusers-strength: the nodes and the cut of diffusers' img2img pipelines, rounding included; takes a
    fraction only.
    Raises ConfigError when t lies outside the chain or needs a tau the network can't be told.
    """
    unit, value = t
    if start == "diffusers-strength":
        if unit != "fraction" or not 0 <= value <= 1:
            raise ConfigError(f"start diffusers-strength needs t as a fraction in 0..1, not {unit}={value:g}")
        return _strength_nodes(levels, grid=grid, steps=steps, strength=value)
    rows = _grid_rows(levels, grid, steps=steps, fractional_tau=fractional_tau)
    target = _target(levels, unit, value)
    if target is None:
        return _nodes(levels.kind, rows[:, :0])
    alpha, sigma, tau = target
    if start == "snap":
        if alpha == 0:  # pure noise lies above every other node
            return _nodes(levels.kind, rows)
        gap = ((rows[1] / rows[0]).log() - math.log(sigma / alpha)).abs()
        return _nodes(levels.kind, rows[:, : int(gap.argmin()) + 1])
    if not fractional_tau and abs(tau - round(tau)) > 1e-6:
        raise ConfigError(
            f"t {unit}={value:g} lies between two train indices (tau {tau:.3f}), and this network looks its "
            "timesteps up in a table; give t as a timestep or fraction, or use start: snap"
        )
    tau = tau if fractional_tau else round(tau)
    below = rows[:, sigma * rows[0] > rows[1] * alpha * (1 + 1e-12)]
    return _nodes(
        levels.kind, torch.cat([below, torch.tensor([[alpha], [sigma], [tau]], dtype=torch.float64)], dim=1)
    )


def _grid_rows(levels: NoiseLevels, grid: Grid, *, steps: int, fractional_tau: bool) -> Tensor:
    """(alpha, sigma, tau) of the full grid's nodes, (3, S), ascending and distinct."""
    if grid not in VAR:
        return _trained(levels, grid_indices(grid, steps=steps, train_steps=len(levels)))
    if levels.kind != "vp":
        raise ConfigError(f"grid {grid} is made of betas, which this model's chain ({levels.kind}) has none of")
    if not fractional_tau:
        raise ConfigError(
            f"grid {grid} lies between the train indices, and this network looks its timesteps up in a table; "
            "take another grid"
        )
    first, last = (float(levels.alpha[j]) ** 2 for j in (0, -1))
    bars = var_alpha_bars(grid, steps=steps, first=first, last=last)
    sigma, alpha = (1 - bars).sqrt(), bars.sqrt()
    tau = [_tau_at(levels, ratio) for ratio in (sigma / alpha).tolist()]
    return torch.stack([alpha, sigma, torch.tensor(tau, dtype=torch.float64)])


def _trained(levels: NoiseLevels, indices: Sequence[int]) -> Tensor:
    """The rows of train indices.

    A repeated index would be a step from a level to itself, which changes nothing; it is dropped.
    """
    chosen = torch.tensor(sorted(set(indices)), dtype=torch.long)
    return torch.stack([levels.alpha, levels.sigma, levels.tau])[:, chosen]


def _strength_nodes(levels: NoiseLevels, *, grid: Grid, steps: int, strength: float) -> Schedule:
    """What diffusers' img2img walks at a strength: the lowest int(steps * strength) nodes of its grid, but one
    more for flow models where that is no whole number; and its walk may end short of the clean node.

    A flow model's grid has one spacing, even in the raw level before the shift; raw is 1 at the top.
    """
    if levels.kind == "flow":
        if grid != "linspace":
            raise ConfigError(
                f"grid {grid} with start diffusers-strength: diffusers spaces a flow model's nodes evenly "
                "before its shift and knows no other grid; write grid: linspace, or take another start"
            )
        count = steps - int(max(steps - steps * strength, 0))
        floor = 1 / steps if levels.raw_floor is None else levels.raw_floor
        raw = torch.linspace(1, floor, steps, dtype=torch.float64).flip(0)[:count]
        s = levels.shift * raw / (1 + (levels.shift - 1) * raw)
        rows = torch.stack([1 - s, s, s * (levels.tau[-1] / levels.sigma[-1])])
    elif grid in VAR:
        raise ConfigError(
            f"start diffusers-strength: diffusers knows no grid {grid}; take start: exact or snap"
        )
    else:
        nodes = grid_indices(grid, steps=steps, train_steps=len(levels))
        offset = levels.steps_offset if grid == "leading" else 0
        cut = torch.tensor(sorted(set(nodes[: int(steps * strength)])), dtype=torch.long) + offset
        if len(cut) and int(cut[-1]) >= len(levels):
            raise ConfigError(
                f"steps {steps} with the model's steps_offset {offset} leaves the chain of {len(levels)}; "
                "take fewer steps"
            )
        rows = torch.stack([levels.alpha, levels.sigma, levels.tau])[:, cut]
    if rows.shape[1] == 0:
        return _nodes(levels.kind, rows)
    end = torch.tensor([*levels.end, 0.0], dtype=torch.float64).view(3, 1)
    alpha, sigma, tau = torch.cat([end, rows], dim=1)
    return Schedule(kind=levels.kind, alpha=alpha, sigma=sigma, tau=tau)


def _target(levels: NoiseLevels, unit: str, value: float) -> tuple[float, float, float] | None:
    """(alpha, sigma, tau) of the requested level, or None for the identity."""
    count = len(levels)
    if unit in ("fraction", "timestep"):
        timestep = round(value * count) if unit == "fraction" else int(value)
        if not 0 <= timestep <= count:
            raise ConfigError(f"t timestep={timestep} lies outside the chain; choose 0..{count}")
        if timestep == 0 and value != 0:
            raise ConfigError(
                f"t {unit}={value:g} rounds to timestep 0, the identity; write 0 if you mean that, else at "
                f"least timestep 1 of {count}"
            )
        if timestep == 0:
            return None
        j = timestep - 1
        return float(levels.alpha[j]), float(levels.sigma[j]), float(levels.tau[j])

    snr_ratio = value**-0.5 if value > 0 else math.inf
    ratio = value if unit == "sigma" else snr_ratio
    if ratio == 0:
        return None
    ratios = levels.relative_sigma
    in_chain = float(ratios[0]) * (1 - 1e-9) <= ratio <= float(ratios[-1]) * (1 + 1e-9)
    if not (in_chain and math.isfinite(ratio)):
        raise ConfigError(
            f"t {unit}={value:g} (sigma {ratio:g}) lies outside what this model was trained on, "
            f"sigma {float(ratios[0]):.4g} to {float(ratios[-1]):.4g}"
        )
    return (*_level_at(levels.kind, ratio), _tau_at(levels, ratio))


def _level_at(kind: Kind, ratio: float) -> tuple[float, float]:
    """(alpha, sigma) with sigma / alpha = ratio on a chain of `kind`."""
    if kind == "ve":
        return 1.0, ratio
    scale = (1 + ratio**2) ** 0.5 if kind == "vp" else 1 + ratio
    return 1 / scale, ratio / scale


def _tau_at(levels: NoiseLevels, ratio: float) -> float:
    """What the network is told at noise `ratio`, tau interpolated between the two nearest levels.

    Flow chains interpolate in s, in which their tau is linear and pure noise is finite; the others in log
    relative noise.
    """
    at = torch.tensor(ratio, dtype=torch.float64)
    if levels.kind == "flow":
        marks, at = levels.sigma, at / (1 + at)
    else:
        marks, at = levels.relative_sigma.log(), at.log()
    high = int(torch.searchsorted(marks, at).clamp(1, len(levels) - 1))
    low = high - 1
    if not torch.isfinite(marks[high]):
        return float(levels.tau[low])
    weight = ((at - marks[low]) / (marks[high] - marks[low])).clamp(0, 1)
    return float(torch.lerp(levels.tau[low], levels.tau[high], weight))


def level_at_tau(levels: NoiseLevels, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha, sigma, fraction of the chain) where a network is told tau; all (B,), float64.

    The other way round from what a node between two levels is given for its tau; beyond the chain, its end.
    """
    order = levels.tau.argsort()
    known = levels.tau[order]
    high = torch.searchsorted(known, tau.double().contiguous()).clamp(1, len(levels) - 1)
    weight = ((tau - known[high - 1]) / (known[high] - known[high - 1])).clamp(0, 1)
    low, high = order[high - 1], order[high]
    marks = levels.sigma if levels.kind == "flow" else levels.relative_sigma.log()
    between = torch.lerp(marks[low], marks[high], weight)
    ratio = between / (1 - between) if levels.kind == "flow" else between.exp()
    pairs = torch.tensor([_level_at(levels.kind, one) for one in ratio.tolist()], dtype=torch.float64)
    # At a level of the chain itself exactly that one, pure noise included.
    nearest = torch.where(weight < 0.5, low, high)
    exact = (weight == 0) | (weight == 1)
    alpha = torch.where(exact, levels.alpha[nearest], pairs[:, 0])
    sigma = torch.where(exact, levels.sigma[nearest], pairs[:, 1])
    return alpha, sigma, (torch.lerp(low.double(), high.double(), weight) + 1) / len(levels)


def _nodes(kind: Kind, rows: Tensor) -> Schedule:
    """The clean node and those of `rows` (3, n) above it."""
    clean = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    alpha, sigma, tau = torch.cat([clean, rows], dim=1)
    return Schedule(kind=kind, alpha=alpha, sigma=sigma, tau=tau)
