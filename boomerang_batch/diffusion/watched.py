"""A denoiser that knows how long it has been at its step, so that a slow device is not taken for a hung one.

A step is one batch through the network or the autoencoder, or on CUDA, where calls return at once, whatever the
host waits for next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from boomerang_batch.diffusion.denoiser import Condition, Denoiser, DenoiserSpec


class Watched:
    """The denoiser that it is made of, and a watch. One thread works with it, any may look at the watch."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._began: float | None = None

    @property
    def stalled_s(self) -> float:
        """How long it has been at its step; 0 while it rests."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def next_step(self) -> None:
        """A step begins; every call ends one and begins another."""
        self._began = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do."""
        self._began = None

    @property
    def spec(self) -> DenoiserSpec:
        """What the model is."""
        return self._denoiser.spec

    def encode(self, images: Tensor) -> Tensor:
        """Images to states."""
        states = self._denoiser.encode(images)
        self.next_step()
        return states

    def decode(self, x_0: Tensor) -> Tensor:
        """States to images."""
        images = self._denoiser.decode(x_0)
        self.next_step()
        return images

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """The network's raw output."""
        output = self._denoiser.denoise(x_t, tau, conditions)
        self.next_step()
        return output

    def flagged(self, images: Tensor) -> list[bool]:
        """What the safety checker says."""
        return self._denoiser.flagged(images)

    def in_float32(self) -> Denoiser:
        """The same model in full precision, without a watch."""
        return self._denoiser.in_float32()
