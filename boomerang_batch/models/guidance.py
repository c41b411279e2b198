"""Classifier-free guidance (arXiv 2207.12598), the same for labels and for prompts."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.errors import ModelError


class Guidable(Denoiser, Protocol):
    """A model that can be had under another weight of guidance."""

    def with_guidance(self, weight: float) -> Denoiser:
        """The same model, its networks shared, guided by `weight`."""
        ...


def with_guidance(denoiser: Denoiser, weight: float) -> Denoiser:
    """`denoiser` guided by another weight, its networks shared. Raises ModelError where it can't be guided."""
    if not callable(getattr(denoiser, "with_guidance", None)):
        raise ModelError("this model has no classifier-free guidance that a recipe could change")
    return cast("Guidable", denoiser).with_guidance(weight)


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    *,
    weight: float,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Tensor:
    """o_u + w (o_c - o_u), (B, C, H, W), then `rescale` (phi) of the way to o_c's own standard deviation.

    Rescaling is arXiv 2305.08891, eq. 15 and 16. Only the first `channels` are guided (None: all): a learned
    variance stays the conditional one's.
    """
    count = conditional.shape[1] if channels is None else channels
    mean, rest = conditional[:, :count], conditional[:, count:]
    guided = unconditional[:, :count] + weight * (mean - unconditional[:, :count])
    if rescale:
        level = mean.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        guided = rescale * guided * level + (1 - rescale) * guided
    return torch.cat([guided, rest], dim=1)
