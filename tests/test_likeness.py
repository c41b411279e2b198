"""PSNR, SSIM and spectra of pairs: against torchmetrics, and against what pure waves must give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import likeness
from boomerang_batch.measures.likeness import LUMA, band_edges, gain, psnr, spectrum, ssim


def pictures(count=4, height=24, width=33, channels=3, seed=0):
    """Noise over a slope: neither flat nor white."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 180, width)[None, None, :, None] * np.ones((count, height, 1, channels))
    return (slope + rng.integers(0, 75, (count, height, width, channels))).astype(np.uint8)


def noisy(images, sigma=9.0, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def waves(frequency, size=64, amplitude=50.0, across=True):
    """One grey image with a single frequency, in cycles per pixel."""
    line = 128 + amplitude * np.sin(2 * np.pi * frequency * np.arange(size))
    plane = np.tile(line, (size, 1)) if across else np.tile(line[:, None], (1, size))
    return np.rint(plane).astype(np.uint8)[None, ..., None]


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_torchmetrics(channels):
    truth = pictures(channels=channels)
    made = noisy(truth)
    expected = [
        peak_signal_noise_ratio(
            torch.from_numpy(a.astype(float)), torch.from_numpy(b.astype(float)), data_range=255.0
        )
        for a, b in zip(made, truth, strict=True)
    ]
    assert psnr(made, truth) == pytest.approx(np.array(expected), rel=1e-6)


@pytest.mark.parametrize(("channels", "size"), [(1, (24, 33)), (3, (24, 33)), (3, (11, 40))])
def test_ssim_is_torchmetrics_on_the_luma(channels, size):
    truth = pictures(5, *size, channels=channels)
    made = noisy(truth, 25.0)
    planes = [
        torch.from_numpy((images @ LUMA if channels == 3 else images[..., 0].astype(float))[:, None])
        for images in (made, truth)
    ]
    _, everywhere = structural_similarity_index_measure(
        *planes, data_range=255.0, reduction="none", return_full_image=True
    )
    # torchmetrics mirrors the image at its edges; Wang's window stays inside.
    expected = everywhere[:, 0, 5:-5, 5:-5].mean((1, 2)).numpy()
    assert 0.1 < expected.mean() < 0.95
    assert ssim(made, truth) == pytest.approx(expected, abs=1e-6)


def test_equal_images_are_infinitely_near_and_alike():
    images = pictures()
    assert np.isposinf(psnr(images, images)).all()
    assert ssim(images, images) == pytest.approx(np.ones(4))
    assert gain(images, images) == pytest.approx(np.zeros((4, likeness.BANDS)))


def test_images_smaller_than_the_window_have_no_ssim():
    small = pictures(2, 10, 20)
    assert np.isnan(ssim(small, small)).all()
    assert np.isfinite(psnr(small, noisy(small))).all()


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(2, 40), st.integers(3, 40), st.integers(0, 100))
def test_blocks_change_no_pair(count, height, width, seed):
    truth = pictures(count, height, width, seed=seed)
    made = noisy(truth, seed=seed + 1)
    whole = likeness.likeness(made, truth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "_BLOCK_PIXELS", 2 * height * width)
        parts = likeness.likeness(made, truth)
    for name in ("psnr_db", "ssim", "gain_db"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    one = likeness.likeness(made[-1:], truth[-1:])
    np.testing.assert_allclose(one.gain_db[0], whole.gain_db[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("frequency", [0.1, 0.23, 0.4])  # none is near an edge
def test_a_wave_lies_in_the_band_of_its_frequency(frequency, across):
    image = waves(frequency, across=across)
    power, edges = spectrum(image)[0], band_edges(image)
    band = int(np.searchsorted(edges, frequency)) - 1
    assert power[max(0, band - 1) : band + 2].sum() > 0.99 * power.sum()
    assert power[band] > 0.9 * power.sum()


def test_power_is_the_square_of_the_contrast():
    strong, weak = spectrum(waves(0.2, amplitude=100))[0], spectrum(waves(0.2, amplitude=50))[0]
    assert strong.max() / weak.max() == pytest.approx(4, rel=0.01)


def test_spectrum_holds_all_power_below_the_nyquist_frequency():
    image = pictures(1, 16, 16, channels=1)
    luma = image[0, ..., 0] - image[0, ..., 0].mean()
    power = np.abs(np.fft.fft2(luma * np.outer(np.hanning(16), np.hanning(16)))) ** 2
    across = np.fft.fftfreq(16)
    radius = np.hypot(across[:, None], across[None, :])
    assert spectrum(image).sum() == pytest.approx(power[(radius > 0) & (radius <= 0.5)].sum())
    high = spectrum(image, lowest=0.25, bands=3)[0]
    expected = [
        power[(radius > low) & (radius <= low + 0.25 / 3 + 1e-9)].sum() for low in (0.25, 1 / 3, 0.5 - 0.25 / 3)
    ]
    assert high == pytest.approx(np.array(expected))


@given(st.integers(2, 70), st.integers(2, 70))
def test_every_band_of_the_default_ones_has_frequencies(height, width):
    edges = band_edges(np.zeros((1, height, width, 1), np.uint8))
    counts = likeness._bands((height, width), edges)[1]
    assert (counts > 0).all()


def test_gain_tells_blur_from_invented_detail():
    truth = noisy(np.full((6, 32, 32, 1), 128, np.uint8), 20.0)
    blurred = truth.astype(float)
    for axis in (1, 2):
        blurred = (blurred + np.roll(blurred, 1, axis)) / 2
    softer = gain(np.rint(blurred).astype(np.uint8), truth)
    assert np.median(softer[:, -1]) < -8
    assert abs(np.median(softer[:, 0])) < 1.5
    assert np.median(gain(noisy(truth, 40.0), truth)[:, -1]) > 4


def test_empty_images_have_a_gain_too():
    flat = np.full((1, 20, 20, 1), 7, np.uint8)
    assert gain(flat, flat) == pytest.approx(np.zeros((1, 10)))
    against = gain(noisy(flat, 30.0), flat)
    assert np.isfinite(against).all()
    assert (against > 10).all()


def test_summary_is_the_median_pair():
    truth = pictures(3)
    made = truth.copy()
    made[2] = 0
    found = likeness.likeness(made, truth)
    assert found.median_gain_db == pytest.approx(np.zeros(likeness.BANDS))
    assert found.gain_db.shape == (3, len(found.edges) - 1)


@pytest.mark.parametrize(
    ("made", "truth"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 9, 3), np.uint8)),
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8)),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)),
        (np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)),
    ],
)
def test_what_is_no_pair_of_images_is_refused(made, truth):
    with pytest.raises(MeasureError, match="images"):
        likeness.likeness(made, truth)
