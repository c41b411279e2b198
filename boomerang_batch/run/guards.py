"""What must never be saved as a success: an output not finite, flat, untouched, or the same as another's.

In NumPy, of tensors on the CPU: every operation of torch lets other threads take over the interpreter, and to
wait for it again costs more than these looks at an image.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor

from boomerang_batch.errors import SampleError

RETRIED = ("non-finite-output", "flat-output", "output-equals-input", "output-repeated")
"""Reasons for which half precision may be to blame, so that float32 deserves a try."""

_FLAT = 0.5 / 255
"""Half a grey level, as a share of the value range: less contrast than this is next to none."""
_PLAIN = 8 / 255
"""What compression leaves in a plain picture: one of less contrast may rightly become a single colour."""
_BACK = 0.5 / 255
"""Half a grey level: images that are no farther from each other may be saved as the very same."""

_NEAR = 0.05
"""As a share of its size: a latent that is nearer to an image's own decodes to what that one decodes to, but
for a few grey levels, as many as inversion loses."""

ValueRange = tuple[float, float]
"""Black and white, as a model has them. An image keeps nothing that is beyond them."""


def check_output(x_0: Tensor, source: Tensor, *, value_range: ValueRange, who: str = "the model") -> None:
    """Raise SampleError if `x_0` (C, H, W) can't be an image that `who` made from `source` of the same shape.

    Half-precision networks overflow to NaN, which an encoder would turn into a black image; a collapsed one
    gives a single colour. Both have passed for success in other tools.
    """
    contrast = _contrast(x_0, value_range)
    if not math.isfinite(contrast):
        raise SampleError("non-finite-output", f"{who} returned NaN or infinity; try dtype float32")
    if contrast < _FLAT and _contrast(source, value_range) >= _PLAIN:
        raise SampleError("flat-output", f"{who} returned a single colour for an image that has several")


def check_changed(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) is `source` bit for bit, where the source has any contrast.

    For outputs that took at least one evaluation: with none, the input is the right answer. Both are float
    states or images before rounding, which no noise and denoising bring back exactly.
    """
    if np.array_equal(x_0.numpy(), source.numpy()) and _contrast(source, value_range) >= _FLAT:
        raise SampleError(
            "output-equals-input", "the model gave the image back unchanged; check its weights and t"
        )


def check_hidden(x_0: Tensor, source: Tensor, *, value_range: ValueRange) -> None:
    """Raise SampleError if `x_0` (C, H, W) shows `source`, which is to be hidden, but for rounding."""
    low, high = value_range
    apart = float((x_0.clamp(low, high) - source.clamp(low, high)).square().mean().sqrt())
    if apart <= _BACK * (high - low):
        raise SampleError(
            "output-equals-input", "its own latent or code gave the image back; go further from it"
        )


def check_apart(mixed: Tensor, latent: Tensor) -> None:
    """Raise SampleError if a mixture of latents (C, H, W) is all but this one, whose image is to be hidden.

    By latents, for inversion is not exact: what one of them alone is decoded to differs from its image by more
    than rounding, and behind an autoencoder by that too.
    """
    apart = float((mixed - latent).double().norm())
    if apart < _NEAR * float(latent.double().norm()):
        raise SampleError(
            "mixture-is-source",
            "its latent is all but that of one image, which it would give back; mix more evenly, and give "
            "equal images once",
        )


class RepeatedOutputError(SampleError):
    """Several draws gave the same output; `others` were there before, and not refused yet."""

    def __init__(self, others: Sequence[Hashable]) -> None:
        super().__init__(
            "output-repeated",
            "the model gave this sample exactly what it gave another one drawn with other noise",
        )
        self.others = others


class Seen:
    """The outputs of one task so far, by digest, to tell when two draws gave the same one.

    A collapsed model, or noise used twice, gives different samples one image. Threads may share it.
    """

    def __init__(self, value_range: ValueRange) -> None:
        self._range = value_range
        self._draws: dict[bytes, list[Hashable] | None] = {}
        """Who gave an output, by its digest; None once they were refused, as all will be who give it again."""
        self._looking = threading.Lock()

    def digest(self, x_0: Tensor) -> bytes | None:
        """What stands for an output (C, H, W) here; None without contrast, for those may be alike."""
        if _contrast(x_0, self._range) < _FLAT:
            return None
        return hashlib.blake2b(x_0.numpy().tobytes(), digest_size=16).digest()

    def check(self, digest: bytes | None, *, draw: Hashable) -> None:
        """Raise RepeatedOutputError if another draw gave just the output of this digest.

        In the end all who gave it are refused, whatever their order. `draw` names where the noise came from:
        noise key and pass. Equal images under one noise key rightly give equal outputs, and so does a
        repetition. For outputs that took at least one evaluation.
        """
        if digest is None:
            return
        with self._looking:
            draws = self._draws.setdefault(digest, [])
            if draws is not None and (not draws or draws[0] == draw):  # so all of them are
                draws.append(draw)
                return
            self._draws[digest] = None
        raise RepeatedOutputError(draws or ())


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
