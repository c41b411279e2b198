"""Classifier-free guidance (arXiv 2207.12598), the same for labels and for prompts."""

from __future__ import annotations

import torch
from torch import Tensor


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
