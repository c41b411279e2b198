"""How good is an enlarged photograph? Scores beside the photograph itself. Not a benchmark itself.

PSNR and SSIM say how close it is. The spectrum above the Nyquist frequency of the reduced image says whether
there is as much fine detail as in the photograph, not whether it is the right one: block edges count as
detail too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from boomerang_batch.data.upscale import reduced

LUMA = np.array([0.299, 0.587, 0.114])
WINDOW, WINDOW_SIGMA = 11, 1.5
BANDS = 12
Pixels = np.ndarray
"""(H, W, 3) uint8."""


def psnr(made: Pixels, truth: Pixels) -> float:
    """Peak signal to noise ratio over all channels, dB."""
    return -10 * math.log10(float(np.square((made.astype(np.float64) - truth) / 255).mean()))


def _blur(plane: np.ndarray) -> np.ndarray:
    """A Gaussian window over every place where it fits."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-np.square(offsets) / (2 * WINDOW_SIGMA**2))
    kernel /= kernel.sum()
    down = np.lib.stride_tricks.sliding_window_view(plane, WINDOW, axis=0) @ kernel
    return np.lib.stride_tricks.sliding_window_view(down, WINDOW, axis=1) @ kernel


def ssim(made: Pixels, truth: Pixels) -> float:
    """Structural similarity of the luma (Wang et al. 2004): Gaussian window of 11, sigma 1.5."""
    x, y = made @ LUMA, truth @ LUMA
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    closeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((closeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


def high_spectrum(pixels: Pixels, factor: int) -> np.ndarray:
    """Power of the luma by radial frequency, above the Nyquist of an image reduced by `factor`; Hann window."""
    luma = pixels @ LUMA
    window = np.hanning(len(luma))
    power = np.abs(np.fft.fft2((luma - luma.mean()) * np.outer(window, window))) ** 2
    across = np.fft.fftfreq(len(luma))
    radius = np.hypot(across[:, None], across[None, :])
    edges = np.linspace(0.5 / factor, 0.5, BANDS + 1)
    return np.array([power[(radius > low) & (radius <= high)].sum() for low, high in itertools.pairwise(edges)])


def scores(
    made: Mapping[str, Pixels], truth: Mapping[str, Pixels], small: Mapping[str, Pixels], factor: int
) -> dict[str, float]:
    """Means over the photographs; of the energies' ratios the geometric one."""
    spectra = [(high_spectrum(made[key], factor), high_spectrum(truth[key], factor)) for key in truth]
    ratios = [math.log(mine.sum() / right.sum()) for mine, right in spectra]
    decibels = [10 * np.log10((mine + 1e-9) / (right + 1e-9)) for mine, right in spectra]
    off = [np.abs(reduced(made[key], factor) - small[key]).mean() for key in truth]
    return {
        "psnr_db": round(float(np.mean([psnr(made[key], truth[key]) for key in truth])), 3),
        "ssim": round(float(np.mean([ssim(made[key], truth[key]) for key in truth])), 4),
        "high_frequency_energy": round(math.exp(float(np.mean(ratios))), 4),
        "spectrum_error_db": round(float(np.mean([np.sqrt(np.square(line).mean()) for line in decibels])), 2),
        "off_the_input": round(float(np.mean(off)), 3),
    }
