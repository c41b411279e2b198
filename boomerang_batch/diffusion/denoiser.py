"""What the algorithm asks of a model: a few facts and five methods. `models/` implements it, tests fake it.

The algorithm works on a state: the image itself for a pixel-space model, its autoencoder's latent for a latent
one. Every method acts per sample: row b of its output depends on row b of its input alone, so samples at
different noise levels, under different labels or prompts, can share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from boomerang_batch.diffusion.schedule import NoiseLevels

Prediction = Literal["epsilon", "sample", "v_prediction", "flow", "score"]


Told = int | str | None
"""What a model is told of one sample: a class label, a prompt, or nothing. To a text model nothing means the
prompt that the recipe has for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Guided:
    """What a sample is drawn under that an energy guides: what the model is told, and what the energy is."""

    condition: Told
    about: int | Tensor
    """The class that it is led towards; or the image (C, H, W) in the value range that it is led away from."""


Condition = Told | Guided
"""What one sample is drawn under. No model meets `Guided`: it is for the denoisers of `energy`."""


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """What a model is, as far as the algorithm and the data need to know."""

    channels: int
    height: int
    width: int
    """Of the image, in pixels; the size the model was trained on."""
    size_multiple: int | None = None
    """Other sizes are fine if height and width are multiples of this; None: the trained size only."""
    latent: bool = False
    """Whether the state is an autoencoder's latent instead of the image."""
    state_factor: int = 1
    """Pixels a side that one element of the state stands for."""
    value_range: tuple[float, float]
    """Pixel values the model was trained on: (-1, 1) or (0, 1)."""
    levels: NoiseLevels
    levels_of_size: Callable[[int, int], NoiseLevels] | None = None
    """The chain for images of another (height, width), where it depends on that (Flux's dynamic shift)."""
    prediction: Prediction
    """epsilon, x_0 (sample), v (arXiv 2202.00512), flow velocity eps - x_0, or score -eps / sigma."""
    learned_variance: bool = False
    """Whether the output has a second half of channels, in [-1, 1], that interpolates the log variance between
    fixed_small and fixed_large (arXiv 2102.09672, eq. 15)."""
    clip_range: float | None
    """Predicted x_0 is clamped to [-clip_range, clip_range]; None: not clamped."""
    fractional_tau: bool
    """False when the time embedding is a table, so that tau must be one of the trained ones."""
    conditioning: Literal["none", "label", "prompt"] = "none"
    classes: int | None
    """Rows of the class embedding, the null label included; None: not conditioned on classes."""
    guided_classes: int | None = None
    """Classes that an energy can lead samples towards; None: no energy does."""
    safety: bool = False
    """Whether a safety checker was loaded with the model."""
    digest: str
    """SHA-256 (hex) over the configurations and the weights of every part that is used."""

    def levels_at(self, height: int, width: int) -> NoiseLevels:
        """The chain for images of this size, in pixels."""
        return self.levels_of_size(height, width) if self.levels_of_size else self.levels


class Denoiser(Protocol):
    """A pretrained model, ready on its device."""

    @property
    def spec(self) -> DenoiserSpec:
        """What the model is."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """The states of images (B, C, H, W) float32 in the value range; the identity for a pixel model."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """The images (B, C, H, W) float32 of states; the identity for a pixel model."""
        ...

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's raw output for states x_t, guidance applied, float32 on x_t's device.

        x_t (B, c, h, w) float32, tau (B,) float64 on the CPU, one condition per row. Returns (B, c, h, w), or
        (B, 2c, h, w) where the model learned its variance.
        """
        ...

    def flagged(self, images: Tensor) -> list[bool]:
        """Whether the model's own safety checker flags each of images (B, C, H, W) float32 in the value range.

        All False unless spec.safety.
        """
        ...

    def in_float32(self) -> Denoiser:
        """The same model in full precision, itself if it is; to retry what half precision may have spoilt."""
        ...
