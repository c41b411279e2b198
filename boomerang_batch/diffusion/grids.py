"""Which levels of a model's training chain a grid of S nodes has.

Most grids pick train indices. FastDPM's VAR grids (arXiv 2106.00132, section 3.1) make a chain of their own, of
S betas, that ends where the training chain does, and so lie between its levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from boomerang_batch.errors import ConfigError

Var = Literal["var-linear", "var-quadratic"]
VAR: tuple[Var, ...] = ("var-linear", "var-quadratic")
Grid = Literal["leading", "trailing", "linspace", "step-linear", "step-quadratic"] | Var | Sequence[int]


def grid_indices(grid: Grid, *, steps: int, train_steps: int) -> list[int]:
    """The train indices of the full grid of `steps` nodes, ascending.

    leading, trailing and linspace are diffusers' timestep spacings with offset 0, bit for bit, but that a
    linspace of one step is the top index; step-linear and step-quadratic are FastDPM's. step-quadratic repeats
    its lowest indices when steps is large, the others are distinct. A list is taken as it is. Raises
    ConfigError when the grid does not fit the chain.
    """
    top = train_steps - 1
    if not isinstance(grid, str):
        return _listed(grid, steps=steps, top=top)
    if not 1 <= steps <= train_steps:
        raise ConfigError(f"steps {steps} does not fit a chain of {train_steps}; choose 1..{train_steps}")
    if grid == "leading":
        return [i * (train_steps // steps) for i in range(steps)]
    if grid == "trailing":
        # The stride as numpy.arange rounds it, so that halves fall to the side where diffusers puts them.
        stride = train_steps - (train_steps - train_steps / steps)
        return [round(train_steps - k * stride) - 1 for k in reversed(range(steps))]
    if steps == 1:  # the others divide by steps - 1
        return [top]
    if grid == "linspace":
        return [round(i * (top / (steps - 1))) for i in range(steps)]
    if grid == "step-linear":
        return [i * top // (steps - 1) for i in range(steps)]
    root = math.sqrt(0.8 * train_steps)
    return [int((i * (root / (steps - 1))) ** 2) for i in range(steps - 1)] + [int(root**2)]


def _listed(grid: Sequence[int], *, steps: int, top: int) -> list[int]:
    """An explicit grid, checked."""
    indices = [int(index) for index in grid]
    if len(indices) != steps:
        raise ConfigError(f"grid lists {len(indices)} train indices but steps is {steps}; make them agree")
    if not indices or any(low >= high for low, high in itertools.pairwise(indices)):
        raise ConfigError("grid lists train indices that do not ascend; sort them and drop repeats")
    if indices[0] < 0 or indices[-1] > top:
        raise ConfigError(f"grid lists train indices outside the chain's 0..{top}")
    return indices


def var_alpha_bars(grid: Var, *, steps: int, first: float, last: float) -> Tensor:
    """alpha_bar (S,), float64, descending from the training chain's `first` alpha_bar to its `last`.

    Its betas begin with the training chain's, 1 - first, and grow evenly (var-linear) or as the square of
    1 + c i (var-quadratic); how fast is what makes it end at `last`. Raises ConfigError where none does.
    """
    beta = 1 - first
    if last <= 0:
        raise ConfigError(f"grid {grid}: this model's chain ends in pure noise, to which no betas lead")
    most_steps = math.ceil(math.log(last) / math.log(first)) - 1
    if not 2 <= steps <= most_steps:
        raise ConfigError(
            f"grid {grid} with steps {steps}: betas that begin with the model's own, {beta:.3g}, and grow "
            f"can't end at its last noise level; take 2 to {most_steps} steps"
        )
    index = torch.arange(steps, dtype=torch.float64)

    def betas(growth: float) -> Tensor:
        return beta * ((1 + growth * index) if grid == "var-linear" else (1 + growth * index) ** 2)

    # At the most that growth can be the last beta is 1, and nothing of the image is left.
    low, high = 0.0, ((1 / beta if grid == "var-linear" else math.sqrt(1 / beta)) - 1) / (steps - 1)
    while low < (middle := (low + high) / 2) < high:
        ends = float((1 - betas(middle)).clamp(min=0).prod())
        low, high = (middle, high) if ends > last else (low, middle)
    bars = (1 - betas(low)).cumprod(0)
    bars[-1] = last  # to the last bit, lest a walk to the chain's end take that node twice
    return bars
