"""What the algorithm asks of a model: a few facts and one method. `models/` implements it, tests fake it.

A denoiser acts per sample: row b of its output depends on row b of its input alone, so samples at different
noise levels can share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from boomerang_batch.diffusion.schedule import NoiseLevels

Prediction = Literal["epsilon", "sample", "v_prediction", "flow", "score"]


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """What a model is, as far as the algorithm and the data need to know."""

    channels: int
    height: int
    width: int
    value_range: tuple[float, float]
    """Pixel values the model was trained on: (-1, 1) or (0, 1)."""
    levels: NoiseLevels
    prediction: Prediction
    """epsilon, x_0 (sample), v (arXiv 2202.00512), flow velocity eps - x_0, or score -eps / sigma."""
    clip_range: float | None
    """Predicted x_0 is clamped to [-clip_range, clip_range]; None: not clamped."""
    fractional_tau: bool
    """False when the time embedding is a table, so that tau must be one of the trained ones."""
    classes: int | None
    """Rows of the class embedding, the null label included; None: unconditional."""
    digest: str
    """SHA-256 (hex) over the network's configuration, the scheduler's and the weights."""


class Denoiser(Protocol):
    """A pretrained model, ready on its device."""

    @property
    def spec(self) -> DenoiserSpec:
        """What the model is."""
        ...

    def denoise(self, x_t: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
        """The network's raw output, (B, C, H, W) float32.

        x_t (B, C, H, W) float32, tau (B,) float64 on the CPU, labels (B,) int64 or None for an unconditional
        model.
        """
        ...
