"""What the measures take for images: arrays of pixels, all of one size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.errors import MeasureError

Images = NDArray[np.uint8]
"""(N, H, W, C), C 1 or 3, sRGB."""


def check_images(images: Images) -> None:
    """Raises MeasureError where `images` are not uint8 (N, H, W, C), C 1 or 3, N at least 1."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3) or not images.size:
        raise MeasureError(
            f"{images.dtype} of shape {images.shape} is not images; they are uint8 (N, H, W, C), C 1 or 3"
        )
