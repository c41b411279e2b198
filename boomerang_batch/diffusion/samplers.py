"""One reverse step that covers DDPM, ancestral, DDIM, Euler and everything between.

From node (alpha, sigma) to the next lower node (alpha', sigma'), with x0h and eh the predicted clean sample and
noise (DDIM: arXiv 2010.02502, eq. 12 and 16):

    x'     = alpha' * x0h + sqrt(sigma'^2 - zeta^2) * eh + w * z,   z ~ N(0, I)
    zeta^2 = eta^2 * (sigma'^2 / sigma^2) * (sigma^2 - (alpha / alpha')^2 * sigma'^2)

eta = 1 is DDPM and Euler-ancestral, eta = 0 is DDIM and Euler; on a flow-matching chain they are flow ancestral
and flow Euler. w is zeta for the paper's `fixed_small`; the other variance choices change w alone.
DPM-Solver++(2M) (arXiv 2211.01095) is the step of eta = 0 with x0h led on by its change since the node before.

A solver is a table with a row for every node, so a batch may mix nodes and whole walks: `step` takes one row
per sample. Tables are float64; the state is float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Prediction
from boomerang_batch.diffusion.schedule import Schedule
from boomerang_batch.errors import ConfigError

Variance = Literal["fixed_small", "fixed_large", "optimal", "learned"]


class Column(IntEnum):
    """What the columns of a solver's table are: coefficients of the step that leaves the row's node."""

    ALPHA = 0
    SIGMA = 1
    FROM_X = 2
    """x0h = FROM_X * x_t + FROM_OUTPUT * output."""
    FROM_OUTPUT = 3
    CLIP = 4
    """Bound of |x0h|; infinite where it is not clamped."""
    LEAD = 5
    """How far order 2 leads x0h on, as a share of its change since the node before."""
    ALPHA_NEXT = 6
    DIRECTION = 7
    """sqrt(sigma'^2 - zeta^2), the weight of eh."""
    NOISE = 8
    """w, the standard deviation of the fresh noise; 1 where it is learned."""
    LOG_SMALL = 9
    LOG_LARGE = 10
    """Log variances that a learned variance lies between; both 0 where it is not learned."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How one schedule is walked. `table` (n + 1, columns) float64; row 0 is unused."""

    table: Tensor
    order: int
    learned: bool
    """Whether the network's second half of channels says how much noise a step adds."""

    def __getitem__(self, column: Column) -> Tensor:
        """One coefficient of every step, (n + 1,)."""
        return self.table[:, column]


def build_solver(
    schedule: Schedule,
    *,
    prediction: Prediction,
    eta: float,
    variance: Variance = "fixed_small",
    data_variance: float | None = None,
    clip_range: float | None = None,
    order: int = 1,
) -> Solver:
    """Tables for walking `schedule` downwards.

    order 2 is DPM-Solver++(2M), for eta 0; its first and last steps are of order 1.

    fixed_small: zeta^2, the posterior variance of the forward chain (the paper's choice).
    fixed_large: the forward chain's own variance beta (eta 1; not for flow, whose beta is unbounded).
    optimal: fixed_small + c_0^2 * P with P the posterior variance of x_0 for Gaussian data of per-element
    variance `data_variance`; then every step's output variance is exact for such data on any grid.
    learned: between fixed_small and fixed_large, as the network says (arXiv 2102.09672, eq. 15).
    Raises ConfigError for combinations that have no meaning.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta {eta:g} lies outside 0..1, between DDIM (0) and DDPM (1)")
    if order not in (1, 2) or (order == 2 and eta != 0):
        raise ConfigError(f"order {order} with eta {eta:g} is not defined; order is 1, or 2 with eta 0")
    alpha, sigma = schedule.alpha, schedule.sigma
    if prediction in ("epsilon", "score") and bool((alpha == 0).any()):
        raise ConfigError(
            f"the start node is pure noise (alpha 0), where a network that predicts {prediction} says nothing "
            "about the image; lower t"
        )
    alpha_next = torch.cat([alpha[:1], alpha[:-1]])
    sigma_next = torch.cat([sigma[:1], sigma[:-1]])
    safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))

    # Variance of the forward step from the lower node to this one, and of its posterior given x_0.
    forward = sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2
    posterior = sigma_next**2 / safe**2 * forward
    direction = (sigma_next**2 - eta**2 * posterior).clamp(min=0).sqrt()
    extra = torch.zeros_like(posterior)
    if variance != "fixed_small" and eta != 1:
        raise ConfigError(f"variance {variance} is defined for eta 1 only; eta is {eta}")
    if variance in ("fixed_large", "learned"):
        if schedule.kind == "flow":
            raise ConfigError(f"variance {variance} has no meaning for flow matching; use fixed_small")
        # No noise enters at the last step, as in DDPM's sampler.
        extra = torch.where(posterior > 0, forward - posterior, extra)
    if variance == "optimal":
        if data_variance is None:
            raise ConfigError("variance optimal needs data_variance")
        x0_weight = alpha_next - direction * alpha / safe
        uncertainty = data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)
        extra = x0_weight**2 * uncertainty
    noise = (eta**2 * posterior + extra).clamp(min=0).sqrt()
    log_small = log_large = torch.zeros_like(noise)
    if variance == "learned":
        noisy = posterior > 0
        log_small, log_large = (
            torch.where(noisy, value, torch.ones_like(value)).log() for value in (posterior, forward)
        )
        noise = noisy.double()
    from_x, from_output = readings(prediction, alpha, sigma)
    columns = {
        Column.ALPHA: alpha,
        Column.SIGMA: safe,
        Column.FROM_X: from_x,
        Column.FROM_OUTPUT: from_output,
        Column.CLIP: torch.full_like(alpha, math.inf if clip_range is None else clip_range),
        Column.LEAD: _lead(schedule) if order == 2 else torch.zeros_like(alpha),
        Column.ALPHA_NEXT: alpha_next,
        Column.DIRECTION: direction,
        Column.NOISE: noise,
        Column.LOG_SMALL: log_small,
        Column.LOG_LARGE: log_large,
    }
    table = torch.stack([columns[column] for column in Column], dim=1)
    return Solver(table=table, order=order, learned=variance == "learned")


def readings(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What x0h is made of at nodes alpha, sigma (n,): the weights (n,) of x_t and of the network's output."""
    one = torch.ones_like(alpha)
    weights = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (0 * one, one),
        "v_prediction": (alpha, -sigma),
        "flow": (one, -sigma),
        "score": (1 / alpha, sigma**2 / alpha),  # output = -eps / sigma
    }
    return weights[prediction]


def _lead(schedule: Schedule) -> Tensor:
    """h / (2 h_before), h being a step's length in log(alpha / sigma); 0 for the first step and the last."""
    log_ratio = (schedule.alpha / schedule.sigma).log()
    length = log_ratio[:-1] - log_ratio[1:]  # of the step that leaves node 1, 2, ...
    lead = torch.zeros_like(log_ratio)
    lead[2:-1] = length[1:-1] / (2 * length[2:])
    return lead


def jump(rows: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """The forward process in one draw, x_t = alpha * x_0 + sigma * eps, to the node of each sample's row.

    rows (B, columns) as in a solver's table; x_0, eps (B, C, H, W). Returns x_0's shape and dtype.
    """
    return _spread(rows, Column.ALPHA, x_0) * x_0 + _spread(rows, Column.SIGMA, x_0) * eps


def step(
    rows: Tensor,
    x_t: Tensor,
    output: Tensor,
    z: Tensor | None,
    before: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step of each sample, from its row's node to the next lower one.

    rows (B, columns); x_t, z (B, C, H, W), z None where no row adds noise; output (B, C, H, W), or with a
    learned variance (B, 2C, H, W). before: the x0h of each sample's node before, for order 2; its value is
    ignored where a row does not lead on, but must be finite. known: (x_0, mask), what x_0 is wherever mask
    (B, 1, H, W) is false; there the step draws from q(x' | x_t, x_0), so that the known part has each node's
    own noise level. Returns the new state and x0h.

    eh is re-derived from the clamped x0h, which makes eta = 1 with clamping equal to DDPM's own step.
    """
    channels = x_t.shape[1]
    at = functools.partial(_spread, rows, like=x_t)
    mean = output[:, :channels]
    clip = at(Column.CLIP)
    x0 = (at(Column.FROM_X) * x_t + at(Column.FROM_OUTPUT) * mean).clamp(-clip, clip)
    if known is not None:
        x0 = torch.where(known[1], x0, known[0])
    led = x0 if before is None else x0 + at(Column.LEAD) * (x0 - before)
    eps = (x_t - at(Column.ALPHA) * led) / at(Column.SIGMA)
    moved = at(Column.ALPHA_NEXT) * led + at(Column.DIRECTION) * eps
    # In the end -0 becomes 0, or a zero's sign would tell whether any row of the batch adds noise.
    if z is None:
        return moved + 0.0, x0
    noise = at(Column.NOISE)
    if output.shape[1] == 2 * channels:
        large, small, share = at(Column.LOG_LARGE), at(Column.LOG_SMALL), (output[:, channels:] + 1) / 2
        # Where they are equal nothing is to be learned, and what the network says, NaN maybe, is ignored.
        log_variance = torch.where(large == small, small, share * large + (1 - share) * small)
        # In float64, where a last-bit difference between two exp kernels is gone after rounding.
        noise = noise * (0.5 * log_variance.double()).exp().to(x_t.dtype)
    return moved + noise * z + 0.0, x0


def _spread(rows: Tensor, column: Column, like: Tensor) -> Tensor:
    """One column shaped (B, 1, 1, 1) to act on `like`, in its dtype."""
    return rows[:, column].to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))
