"""Denoisers whose exact answer is known, and noise that is whatever a test says it is.

Each oracle is the posterior mean E[x_0 | x_t] of a distribution with a closed form, spoken in any prediction
type. It computes in float64 and answers in x_t's dtype, so a float64 state is exact to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec, Prediction
from boomerang_batch.diffusion.samplers import Solver, step
from boomerang_batch.diffusion.schedule import Kind, NoiseLevels, flow_levels, ve_levels, vp_levels


def linear_levels(train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseLevels:
    """The DDPM paper's chain: betas linear, tau the array index."""
    betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float64)
    return vp_levels((1 - betas).cumprod(0))


def levels_of(kind: Kind, ratios: Tensor) -> NoiseLevels:
    """A chain of `kind` with the given relative noise levels, tau the array index."""
    tau = torch.arange(len(ratios))
    if kind == "vp":
        return vp_levels(1 / (1 + ratios.double() ** 2), tau)
    if kind == "ve":
        return ve_levels(ratios, tau)
    return flow_levels(torch.where(ratios.isinf(), 1.0, ratios / (1 + ratios)), tau)


class Oracle:
    """A denoiser made of a posterior mean. Inverts tau by the table, and between its rows as the table says."""

    def __init__(
        self,
        posterior_mean: Callable[[Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, int, int],
        levels: NoiseLevels,
        prediction: Prediction = "epsilon",
        clip_range: float | None = None,
    ) -> None:
        self.posterior_mean = posterior_mean
        self.evaluations = 0
        self.told: list[Tensor] = []
        self._spec = DenoiserSpec(
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            value_range=(-1.0, 1.0),
            levels=levels,
            prediction=prediction,
            clip_range=clip_range,
            fractional_tau=True,
            classes=None,
            digest=hashlib.sha256(b"oracle").hexdigest(),
        )

    @property
    def spec(self) -> DenoiserSpec:
        return self._spec

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.evaluations += 1
        self.told.append(tau)
        assert tau.dtype == torch.float64
        assert tau.shape == (len(x_t),)
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self._level(tau))
        x = x_t.double()
        x_0 = self.posterior_mean(x, alpha, sigma)
        prediction = self.spec.prediction
        if prediction == "sample":
            output = x_0
        elif prediction == "v_prediction":
            eps = (x - alpha * x_0) / sigma
            output = alpha * eps - sigma * x_0
        elif prediction == "flow":
            output = (x - alpha * x_0) / sigma - x_0
        else:
            eps = (x - alpha * x_0) / sigma
            output = eps if prediction == "epsilon" else -eps / sigma
        return output.to(x_t.dtype)

    def _level(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.spec.levels
        high = torch.searchsorted(levels.tau, tau).clamp(1, len(levels) - 1)
        low = high - 1
        weight = (tau - levels.tau[low]) / (levels.tau[high] - levels.tau[low])
        on_table = torch.where(weight >= 0.5, high, low)
        exact = (weight == 0) | (weight == 1)
        if levels.kind == "flow":
            s = torch.lerp(levels.sigma[low], levels.sigma[high], weight)
            alpha, sigma = 1 - s, s
        else:
            logs = levels.relative_sigma.log()
            ratio = (logs[low] + weight * (logs[high] - logs[low])).exp()
            scale = (1 + ratio**2).sqrt() if levels.kind == "vp" else torch.ones_like(ratio)
            alpha, sigma = 1 / scale, ratio / scale
        return (
            torch.where(exact, levels.alpha[on_table], alpha),
            torch.where(exact, levels.sigma[on_table], sigma),
        )


def gaussian_oracle(
    mean: Tensor,
    covariance: Tensor,
    levels: NoiseLevels,
    prediction: Prediction = "epsilon",
    clip_range: float | None = None,
) -> Oracle:
    """Data N(mean, covariance): mean (d,), covariance (d, d); images are (d, 1, 1)."""
    mean = mean.double()
    values, basis = torch.linalg.eigh(covariance.double())

    def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a, s = alpha.view(-1, 1), sigma.view(-1, 1)
        gain = a * values / (a**2 * values + s**2)
        offset = (x.flatten(1) - a * mean) @ basis
        return (mean + (gain * offset) @ basis.T).view_as(x)

    return Oracle(posterior_mean, (len(mean), 1, 1), levels, prediction, clip_range)


def scalar_gaussian_oracle(variance: float, levels: NoiseLevels, prediction: Prediction = "epsilon") -> Oracle:
    """Data N(0, variance) in one dimension; images are (1, 1, 1)."""
    return gaussian_oracle(
        torch.zeros(1), torch.full((1, 1), variance, dtype=torch.float64), levels, prediction
    )


def mixture_oracle(means: Tensor, variance: float, levels: NoiseLevels) -> Oracle:
    """Data: an even mixture of N(means[c], variance * I); means (c, d), images (d, 1, 1)."""
    means = means.double()

    def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        flat = x.flatten(1)[:, None, :]
        a, s = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
        spread = a**2 * variance + s**2
        offset = flat - a * means[None]
        weights = torch.softmax(-(offset**2).sum(-1) / (2 * spread[:, :, 0]), dim=1)
        component = means[None] + a * variance / spread * offset
        return (weights[:, :, None] * component).sum(1).view_as(x)

    return Oracle(posterior_mean, (means.shape[1], 1, 1), levels)


def empirical_oracle(records: Tensor, levels: NoiseLevels) -> Oracle:
    """Data: exactly the stored records (n, C, H, W), each as likely: a model that memorized its set."""
    stored = records.double().flatten(1)

    def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self_weights(x, stored, alpha, sigma) @ stored).view_as(x)

    _, channels, height, width = records.shape
    return Oracle(posterior_mean, (channels, height, width), levels)


def self_weights(x: Tensor, stored: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """P(record | x_t), (B, n), for x_t (B, ...) over equally likely stored records (n, d)."""
    a, s = alpha.view(-1, 1), sigma.view(-1, 1)
    products = a * (x.flatten(1) @ stored.T) - a**2 * (stored**2).sum(1) / 2
    return torch.softmax(products / s**2, dim=1)


def step_from(solver: Solver, x_t: Tensor, output: Tensor, node: Tensor, z: Tensor) -> Tensor:
    """One step of a batch whose samples stand at `node` (B,) of one walk."""
    return step(solver.table[node], x_t, output, z)[0]


class GivenNoise:
    """The draws a test dictates: forward is one tensor, reverse[i] the draw of the step from node i."""

    def __init__(self, forward: Tensor, reverse: dict[int, Tensor] | None = None) -> None:
        self._forward = forward
        self._reverse = reverse or {}

    def forward(self, node: Tensor) -> Tensor:
        return self._forward

    def reverse(self, node: Tensor) -> Tensor:
        assert bool((node == node[0]).all())
        return self._reverse.get(int(node[0]), torch.zeros_like(self._forward))


class SequentialNoise:
    """Plain seeded normals, for Monte Carlo tests that are not about keyed noise."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self._like = like
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, node: Tensor) -> Tensor:
        return torch.randn(self._like.shape, generator=self._generator, dtype=self._like.dtype)

    def reverse(self, node: Tensor) -> Tensor:
        return self.forward(node)


def normal_cdf(value: float) -> float:
    """Phi(value)."""
    return 0.5 * math.erfc(-value / math.sqrt(2))
