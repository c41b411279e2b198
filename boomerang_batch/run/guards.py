"""What must never be saved as a success: an output not finite, flat, untouched, or the same as another's.

In NumPy, of tensors on the CPU: every operation of torch lets other threads take over the interpreter, and to
wait for it again costs more than these looks at an image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable

import numpy as np
from torch import Tensor

from boomerang_batch.errors import SampleError

RETRIED = ("non-finite-output", "flat-output", "output-equals-input", "output-repeated")
"""Reasons for which half precision may be to blame, so that float32 deserves a try."""

_FLAT = 0.5 / 255
"""Half a grey level, as a share of the value range: less contrast than this is next to none."""
_PLAIN = 8 / 255
"""What compression leaves in a plain picture: one of less contrast may rightly become a single colour."""

ValueRange = tuple[float, float]
"""Black and white, as a model has them. An image keeps nothing that is beyond them."""


def check_output(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) can't be an image made from `source` of the same shape.

    Half-precision networks overflow to NaN, which an encoder would turn into a black image; a collapsed one
    gives a single colour. Both have passed for success in other tools.
    """
    contrast = _contrast(x_0, value_range)
    if not math.isfinite(contrast):
        raise SampleError("non-finite-output", "the model returned NaN or infinity; try dtype float32")
    if contrast < _FLAT and _contrast(source, value_range) >= _PLAIN:
        raise SampleError("flat-output", "the model returned a single colour for an image that has several")


def check_changed(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) is `source` bit for bit, where the source has any contrast.

    For outputs that took at least one evaluation: with none, the input is the right answer. Both are float
    states or images before rounding, which no noise and denoising bring back exactly.
    """
    if np.array_equal(x_0.numpy(), source.numpy()) and _contrast(source, value_range) >= _FLAT:
        raise SampleError(
            "output-equals-input", "the model gave the image back unchanged; check its weights and t"
        )


class RepeatedOutputError(SampleError):
    """Two draws gave the same output; `first` is the one that was there before, as good or bad as this one."""

    def __init__(self, first: Hashable) -> None:
        super().__init__(
            "output-repeated",
            "the model gave this sample exactly what it gave another one drawn with other noise",
        )
        self.first = first


class Seen:
    """The outputs of one task so far, by digest, to tell when two draws gave the same one.

    A collapsed model, or noise used twice, gives different samples one image.
    """

    def __init__(self, value_range: ValueRange) -> None:
        self._range = value_range
        self._draws: dict[bytes, Hashable] = {}

    def check(self, x_0: Tensor, *, draw: Hashable) -> None:
        """Raise RepeatedOutputError if another draw gave just this output (C, H, W), unless it has no contrast.

        `draw` names where the noise came from: noise key and pass. Equal images under one noise key rightly
        give equal outputs, and so does a repetition. For outputs that took at least one evaluation.
        """
        if _contrast(x_0, self._range) < _FLAT:
            return
        digest = hashlib.blake2b(x_0.numpy().tobytes(), digest_size=16).digest()
        first = self._draws.setdefault(digest, draw)
        if first != draw:
            raise RepeatedOutputError(first)


def _contrast(image: Tensor, value_range: ValueRange) -> float:
    """The largest range of any one channel of `image` (C, H, W) within `value_range`, as a share of it.

    NaN if any value is NaN or infinite.
    """
    channels = image.numpy().reshape(len(image), -1)
    ends = np.stack([channels.min(axis=1), channels.max(axis=1)])
    if not np.isfinite(ends).all():
        return math.nan
    low, high = value_range
    least, most = ends.clip(low, high)
    return float((most - least).max()) / (high - low)
