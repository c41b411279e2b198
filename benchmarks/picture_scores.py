"""How good is an enlarged photograph, or a garment that became another? Scores beside the original.

Not a benchmark itself. PSNR and SSIM say how close an enlarged photograph is. The spectrum above the Nyquist
frequency of the reduced image says whether there is as much fine detail as in the photograph, not whether it is
the right one: block edges count as detail too. The overlap of edges says what of a shape is where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.ndimage import sobel

from boomerang_batch.data.upscale import reduced
from boomerang_batch.measures.likeness import psnr, spectrum, ssim

BANDS = 12
EDGE = 0.1
"""From how steep a slope on a place is an edge: the change per pixel, of [0, 1], by Sobel's operator."""
Pixels = np.ndarray
"""(H, W, 3) uint8."""


def high_spectrum(pixels: Pixels, factor: int) -> np.ndarray:
    """Power of the luma by radial frequency, above the Nyquist of an image reduced by `factor`."""
    return spectrum(pixels[None], lowest=0.5 / factor, bands=BANDS)[0]


def scores(
    made: Mapping[str, Pixels], truth: Mapping[str, Pixels], small: Mapping[str, Pixels], factor: int
) -> dict[str, float]:
    """Means over the photographs; of the energies' ratios the geometric one."""
    spectra = [(high_spectrum(made[key], factor), high_spectrum(truth[key], factor)) for key in truth]
    ratios = [math.log(mine.sum() / right.sum()) for mine, right in spectra]
    decibels = [10 * np.log10((mine + 1e-9) / (right + 1e-9)) for mine, right in spectra]
    off = [np.abs(reduced(made[key], factor) - small[key]).mean() for key in truth]
    return {
        "psnr_db": round(float(np.mean([psnr(made[key][None], truth[key][None]) for key in truth])), 3),
        "ssim": round(float(np.mean([ssim(made[key][None], truth[key][None]) for key in truth])), 4),
        "high_frequency_energy": round(math.exp(float(np.mean(ratios))), 4),
        "spectrum_error_db": round(float(np.mean([np.sqrt(np.square(line).mean()) for line in decibels])), 2),
        "off_the_input": round(float(np.mean(off)), 3),
    }


def edge_overlap(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union (N,) of the edges of grey pairs, uint8 (N, H, W); 1 where neither has any.

    An edge that moves by its own width counts as lost and as new.
    """
    first, second = _edges(made), _edges(truth)
    union = (first | second).sum((1, 2))
    return np.where(union > 0, (first & second).sum((1, 2)) / np.maximum(union, 1), 1.0)


def _edges(images: np.ndarray) -> np.ndarray:
    """Where the slope is steep (N, H, W)."""
    grey = images.astype(np.float64) / 255
    return np.hypot(sobel(grey, axis=1), sobel(grey, axis=2)) / 8 > EDGE
