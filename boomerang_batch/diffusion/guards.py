"""Outputs that must never be saved as a success: not finite, or flat where the input was not."""

from __future__ import annotations

from torch import Tensor

from boomerang_batch.errors import SampleError

_FLAT_STD = 1e-3


def check_output(x_0: Tensor, source: Tensor) -> None:
    """Raise SampleError if `x_0` (C, H, W) can't be an image made from `source` of the same shape.

    Half-precision networks overflow to NaN, which an encoder would turn into a black image; a collapsed one
    gives a single colour. Both have passed for success in other tools.
    """
    if not bool(x_0.isfinite().all()):
        raise SampleError("non-finite-output", "the model returned NaN or infinity; try dtype float32")
    if _contrast(x_0) < _FLAT_STD <= _contrast(source):
        raise SampleError("flat-output", "the model returned a single colour for an image that has several")


def _contrast(image: Tensor) -> float:
    """The largest standard deviation over the pixels of any one channel of `image` (C, H, W)."""
    return float(image.flatten(1).std(dim=1, correction=0).amax())
