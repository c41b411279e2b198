"""Boomerang, Algorithm 1 of Luzi et al., "Local sampling on image manifolds using diffusion models".

https://arxiv.org/abs/2210.12100. Out with one draw of noise, back with the partial reverse diffusion:

    x_t = alpha_t * x_0 + sigma_t * eps                            (the paper's eq. 5)
    for i = t, ..., 1:  x_{i-1} = step(x_i, denoiser(x_i, i), z_i)  (its eq. 2, by any sampler of `samplers`)

Small t stays close to the input, large t forgets it; t = 0 is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, Denoiser
from boomerang_batch.diffusion.noise import Purpose, key_words, normal
from boomerang_batch.diffusion.samplers import Solver, step
from boomerang_batch.diffusion.schedule import Schedule


class Noise(Protocol):
    """Where the draws of one batch come from; each method returns (B, C, H, W) standard normals."""

    def forward(self, node: Tensor) -> Tensor:
        """The one draw of the jump out to `node` (B,)."""
        ...

    def reverse(self, node: Tensor) -> Tensor:
        """The draw of the step that leaves `node` (B,)."""
        ...


class KeyedNoise:
    """Noise that is a function of each sample's noise key (see `noise`)."""

    def __init__(self, keys: list[bytes], like: Tensor) -> None:
        self._words = key_words(keys, like.device)
        self._shape = like.shape[1:]

    def forward(self, node: Tensor) -> Tensor:
        """The jump's draw; it does not depend on the node, so equal seeds show the same noise at any t."""
        return normal(self._words, self._shape, purpose=Purpose.FORWARD, node=torch.zeros_like(node))

    def reverse(self, node: Tensor) -> Tensor:
        """The draw of the step from `node` to the next lower one."""
        return normal(self._words, self._shape, purpose=Purpose.REVERSE, node=node)


def boomerang(
    x_0: Tensor,
    denoiser: Denoiser,
    schedule: Schedule,
    solver: Solver,
    noise: Noise,
    conditions: Sequence[Condition] | None = None,
) -> Tensor:
    """Local samples around `x_0`, at the noise level where `schedule` ends.

    x_0 (B, C, H, W), states of the denoiser; conditions: a label or prompt for each, None for none. Returns
    (B, C, H, W) of x_0's dtype. Evaluates the network `schedule.n` times.
    """
    n = schedule.n
    if n == 0:
        return x_0
    if conditions is None:
        conditions = [None] * len(x_0)

    # Out: one jump to node n.
    node = torch.full((len(x_0),), n, dtype=torch.int64)
    alpha, sigma = schedule.alpha[n].to(x_0.dtype), schedule.sigma[n].to(x_0.dtype)
    x_t = alpha * x_0 + sigma * noise.forward(node)

    # Back: the partial reverse diffusion, node n down to node 0.
    before = None
    for i in range(n, 0, -1):
        node = torch.full((len(x_0),), i, dtype=torch.int64)
        output = denoiser.denoise(x_t, schedule.tau[node], conditions)
        x_t, before = step(solver.table[node], x_t, output, noise.reverse(node), before)
    return x_t
