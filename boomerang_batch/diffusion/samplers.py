"""One reverse step that covers DDPM, ancestral, DDIM, Euler and everything between.

From node (alpha, sigma) to the next lower node (alpha', sigma'), with x0h and eh the predicted clean sample and
noise (DDIM: arXiv 2010.02502, eq. 12 and 16):

    x'     = alpha' * x0h + sqrt(sigma'^2 - zeta^2) * eh + w * z,   z ~ N(0, I)
    zeta^2 = eta^2 * (sigma'^2 / sigma^2) * (sigma^2 - (alpha / alpha')^2 * sigma'^2)

eta = 1 is DDPM and Euler-ancestral, eta = 0 is DDIM and Euler. w is zeta for the paper's `fixed_small`; the
other variance choices widen w alone. DPM-Solver++(2M) (arXiv 2211.01095) is the step of eta = 0 with x0h led
on by its change since the node before. Every table is float64; the state is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Prediction
from boomerang_batch.diffusion.schedule import Schedule
from boomerang_batch.errors import ConfigError

Variance = Literal["fixed_small", "fixed_large", "optimal"]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Coefficients of every step of a schedule, float64, index i = the step from node i to node i - 1.

    All tensors have shape (n + 1,); index 0 is unused. `clip_range` bounds predicted x_0, or is None.
    """

    prediction: Prediction
    clip_range: float | None
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    direction: Tensor
    """sqrt(sigma'^2 - zeta^2), the weight of eh."""
    noise: Tensor
    """w, the standard deviation of the fresh noise."""
    lead: Tensor | None
    """How far order 2 leads x0h on, as a share of its change since the node before; None for order 1."""


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
    if variance == "fixed_large":
        if schedule.kind == "flow":
            raise ConfigError("variance fixed_large has no meaning for flow matching; use fixed_small")
        # No noise enters at the last step, as in DDPM's sampler.
        extra = torch.where(sigma_next > 0, forward - posterior, extra)
    if variance == "optimal":
        if data_variance is None:
            raise ConfigError("variance optimal needs data_variance")
        x0_weight = alpha_next - direction * alpha / safe
        uncertainty = data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)
        extra = x0_weight**2 * uncertainty
    return Solver(
        prediction=prediction,
        clip_range=clip_range,
        alpha=alpha,
        sigma=sigma,
        alpha_next=alpha_next,
        direction=direction,
        noise=(eta**2 * posterior + extra).clamp(min=0).sqrt(),
        lead=_lead(schedule) if order == 2 else None,
    )


def _lead(schedule: Schedule) -> Tensor:
    """h / (2 h_before), h being a step's length in log(alpha / sigma); 0 for the first step and the last."""
    log_ratio = (schedule.alpha / schedule.sigma).log()
    length = log_ratio[:-1] - log_ratio[1:]  # of the step that leaves node 1, 2, ...
    lead = torch.zeros_like(log_ratio)
    lead[2:-1] = length[1:-1] / (2 * length[2:])
    return lead


def predicted_x0(solver: Solver, x_t: Tensor, output: Tensor, node: Tensor) -> Tensor:
    """The clean sample a network's raw output stands for, clamped if the solver says so.

    x_t, output (B, C, H, W); node (B,) int64 on the CPU, each row's node. Returns (B, C, H, W) in x_t's dtype.
    """
    alpha, sigma = _rows(solver.alpha, node, x_t), _rows(solver.sigma, node, x_t)
    if solver.prediction == "epsilon":
        x0 = (x_t - sigma * output) / alpha
    elif solver.prediction == "sample":
        x0 = output
    elif solver.prediction == "v_prediction":
        x0 = alpha * x_t - sigma * output
    elif solver.prediction == "flow":
        x0 = x_t - sigma * output
    else:  # score: output = -eps / sigma
        x0 = (x_t + sigma**2 * output) / alpha
    return x0 if solver.clip_range is None else x0.clamp(-solver.clip_range, solver.clip_range)


def step(solver: Solver, x_t: Tensor, output: Tensor, node: Tensor, z: Tensor) -> Tensor:
    """One reverse step of each row, from its node to the next lower one.

    x_t, output, z (B, C, H, W); node (B,) int64, all >= 1. The noise estimate is re-derived from the clamped
    x_0, which makes eta = 1 with clamping equal to DDPM's own step.
    """
    return move(solver, x_t, predicted_x0(solver, x_t, output, node), node, z)


def led_on(solver: Solver, x0: Tensor, before: Tensor | None, node: Tensor) -> Tensor:
    """The clean sample an order-2 solver steps with: x0, led on by its change since the node `before` it."""
    if solver.lead is None or before is None:
        return x0
    return x0 + _rows(solver.lead, node, x0) * (x0 - before)


def move(solver: Solver, x_t: Tensor, x0: Tensor, node: Tensor, z: Tensor) -> Tensor:
    """`step`, for a clean sample x0 (B, C, H, W) that is already known."""
    alpha, sigma = _rows(solver.alpha, node, x_t), _rows(solver.sigma, node, x_t)
    eps = (x_t - alpha * x0) / sigma
    return (
        _rows(solver.alpha_next, node, x_t) * x0
        + _rows(solver.direction, node, x_t) * eps
        + _rows(solver.noise, node, x_t) * z
    )


def _rows(table: Tensor, node: Tensor, like: Tensor) -> Tensor:
    """table[node] shaped (B, 1, 1, 1) to act on `like`, in its dtype and on its device."""
    return table[node].to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))
