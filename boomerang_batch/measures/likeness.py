"""How alike two images of a pair are: PSNR, SSIM and the power by spatial frequency, each pair by itself.

Images are uint8 (N, H, W, C) with C 1 or 3, and pair n is `made[n]` with `truth[n]`. SSIM is that of Wang et
al. 2004 (doi 10.1109/TIP.2003.819861): on the luma, a Gaussian window of 11 pixels and sigma 1.5, the mean over
the places where the window fits. The spectrum says whether there is as much detail of each size as in the
truth, not whether it is the right one: block edges count as detail too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures.images import Images, check_images

BANDS = 12
LUMA = np.array([0.299, 0.587, 0.114])
_WINDOW, _SIGMA = 11, 1.5
_NYQUIST = 0.5
_SMALLEST = 3
_BLOCK_PIXELS = 1 << 20
"""Of one block of pairs: a few dozen MB in float64."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Likeness:
    """Of N pairs. `psnr_db` (N,) is infinite where a pair is equal; `ssim` (N,) is NaN where no window fits.

    `gain_db` (N, bands) is the power of `made` over that of `truth`, in bands from `edges[b]` to `edges[b + 1]`
    cycles per pixel: 0 is as much detail as there was, below is blur, above is invented.
    """

    psnr_db: Scores
    ssim: Scores
    gain_db: Scores
    edges: Scores

    @property
    def median_gain_db(self) -> Scores:
        """The median pair's gain by band (bands,)."""
        medians: Scores = np.median(self.gain_db, axis=0)
        return medians


def likeness(made: Images, truth: Images) -> Likeness:
    """All three measures of pairs. Raises MeasureError where the two are no pairs of images."""
    edges = band_edges(truth)
    return Likeness(psnr_db=psnr(made, truth), ssim=ssim(made, truth), gain_db=gain(made, truth), edges=edges)


def psnr(made: Images, truth: Images) -> Scores:
    """Peak signal to noise ratio over all channels (N,), dB; infinite for equal images."""
    _check_pairs(made, truth)

    def block(first: Images, second: Images) -> Scores:
        error = np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            return np.asarray(20 * np.log10(255.0) - 10 * np.log10(error))

    return _by_blocks(block, made, truth)


def ssim(made: Images, truth: Images) -> Scores:
    """Structural similarity of the luma (N,); NaN for images too small for the window of 11 pixels."""
    _check_pairs(made, truth)
    if min(truth.shape[1:3]) < _WINDOW:
        return np.full(len(truth), np.nan)
    return _by_blocks(_ssim, made, truth)


def gain(made: Images, truth: Images) -> Scores:
    """The power of `made` over the power of `truth` by band (N, bands), dB.

    What rounding to 8 bits alone would add is added to both, so that empty images give 0 and not infinity. NaN
    for images of one or two pixels across: nothing of them is inside the window.
    """
    _check_pairs(made, truth)
    edges = band_edges(truth)
    if min(truth.shape[1:3]) < _SMALLEST:
        return np.full((len(truth), len(edges) - 1), np.nan)
    _, counts, window = _bands(truth.shape[1:3], edges)
    rounding = counts * np.square(window).sum() / 12
    return np.asarray(10 * np.log10((spectrum(made) + rounding) / (spectrum(truth) + rounding)))


def spectrum(images: Images, *, lowest: float = 0.0, bands: int | None = None) -> Scores:
    """The luma's power by radial frequency (N, bands), through a Hann window, its mean removed.

    The bands have equal widths between `lowest` and the Nyquist frequency 0.5, in cycles per pixel; by default
    there are 12, or as many as the smaller side has frequencies. The corners beyond 0.5 are left out.
    """
    edges = band_edges(images, lowest=lowest, bands=bands)
    place, counts, window = _bands(images.shape[1:3], edges)

    def block(part: Images) -> Scores:
        luma = _luma(part)
        luma -= luma.mean(axis=(1, 2), keepdims=True)
        power = np.square(np.abs(np.fft.fft2(luma * window))).reshape(len(part), -1)
        # One sum per image and band: the images' bands stand one after the other in the counted array.
        spread = place + np.arange(len(part))[:, None] * (len(counts) + 1)
        sums = np.bincount(spread.ravel(), power.ravel(), minlength=len(part) * (len(counts) + 1))
        return np.asarray(sums.reshape(len(part), -1)[:, :-1], np.float64)

    return _by_blocks(block, images)


def band_edges(images: Images, *, lowest: float = 0.0, bands: int | None = None) -> Scores:
    """The frequencies (bands + 1,) between the bands of `spectrum`, in cycles per pixel."""
    check_images(images)
    fit = max(1, min(BANDS, min(images.shape[1:3]) // 2))
    return np.linspace(lowest, _NYQUIST, (fit if bands is None else bands) + 1)


def _ssim(made: Images, truth: Images) -> Scores:
    x, y = _luma(made), _luma(truth)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    closeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    closeness /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.asarray(closeness.mean(axis=(1, 2)))


def _luma(images: Images) -> Scores:
    """The grey (N, H, W) of images, 0 to 255."""
    return images[..., 0].astype(np.float64) if images.shape[3] == 1 else images @ LUMA


def _blur(planes: Scores) -> Scores:
    """Planes (N, H, W) through the Gaussian window, at every place where it fits."""
    half = _WINDOW // 2
    kernel = np.exp(-np.square(np.arange(_WINDOW) - half) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    blurred = correlate1d(correlate1d(planes, kernel, axis=1), kernel, axis=2)
    return np.asarray(blurred[:, half:-half, half:-half])


def _bands(size: tuple[int, ...], edges: Scores) -> tuple[NDArray[np.intp], Scores, Scores]:
    """The band of each frequency (H * W,), how many are in each band, and the Hann window (H, W).

    Band b holds what is above edge b and not above edge b + 1; the last number means: in no band.
    """
    height, width = size
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]).ravel()
    # A frequency on an edge must not change bands by the last bit of either.
    place = np.searchsorted(edges, radius * (1 - 1e-12), side="left") - 1
    place[(place < 0) | (place >= len(edges) - 1)] = len(edges) - 1
    counts = np.bincount(place, minlength=len(edges))[:-1].astype(np.float64)
    return place, counts, np.outer(np.hanning(height), np.hanning(width))


def _by_blocks(score: Callable[..., Scores], *arrays: Images) -> Scores:
    step = max(1, _BLOCK_PIXELS // int(np.prod(arrays[0].shape[1:3])))
    starts = range(0, len(arrays[0]), step)
    return np.concatenate([score(*(array[start : start + step] for array in arrays)) for start in starts])


def _check_pairs(made: Images, truth: Images) -> None:
    for images in (made, truth):
        check_images(images)
    if made.shape != truth.shape:
        raise MeasureError(f"images of shape {made.shape} and {truth.shape} make no pairs; they must be equal")
