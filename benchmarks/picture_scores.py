"""How good is an enlarged photograph? Scores beside the photograph itself. Not a benchmark itself.

PSNR and SSIM say how close it is. The spectrum above the Nyquist frequency of the reduced image says whether
there is as much fine detail as in the photograph, not whether it is the right one: block edges count as
detail too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from boomerang_batch.data.upscale import reduced
from boomerang_batch.measures.likeness import psnr, spectrum, ssim

BANDS = 12
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
