"""Super-resolution's two ends: enlarging, and holding the output to the image it came from, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boomerang_batch.data import upscale
from boomerang_batch.data.upscale import consistent, enlarge, project, reduced, target_size
from boomerang_batch.errors import SampleError

FACTORS = st.sampled_from([2, 3, 4, 5, 8, 16])


def noise(height, width, channels=3, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (height, width, channels), dtype=np.uint8)


@st.composite
def pairs(draw, least=0, most=255):
    """Levels of (factor H, factor W, C) float32, the low (H, W, C) they should reduce to, and the factor."""
    factor = draw(FACTORS)
    height, width, channels = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 3])))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = random.integers(least, most + 1, (height, width, channels), dtype=np.uint8)
    values = random.uniform(least, most, (height * factor, width * factor, channels)).astype(np.float32)
    return values, low, factor


def mean_of_blocks(pixels, factor):
    """D by Pillow's own reduction, one channel at a time, in float32."""
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., c], dtype=np.float32)).reduce(factor))
        for c in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=-1)


# --- enlarging ---


@pytest.mark.parametrize("factor", [2, 3, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_nearest_repeats_each_pixel(factor, channels):
    pixels = noise(5, 7, channels)
    expected = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    assert (enlarge(pixels, factor, "nearest") == expected).all()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
def test_filters_are_pillows(filter):
    pixels = noise(9, 6)
    expected = Image.fromarray(pixels).resize((24, 36), Image.Resampling[filter.upper()])
    assert (enlarge(pixels, 4, filter) == np.asarray(expected)).all()


def test_the_filters_differ_and_an_alpha_channel_is_enlarged_too():
    alpha = noise(6, 6, 1)
    results = [enlarge(alpha, 3, filter) for filter in ("nearest", "bilinear", "bicubic", "lanczos")]
    assert {result.shape for result in results} == {(18, 18, 1)}
    assert len({result.tobytes() for result in results}) == 4


def test_what_grows_over_the_limit_is_refused_before_it_grows():
    assert target_size((10, 20), 4, max_pixels=3200) == (40, 80)
    with pytest.raises(SampleError, match=r"too-many-pixels.*20x10 .*80x40.*images\.max_pixels is 3,199"):
        target_size((10, 20), 4, max_pixels=3199)


# --- consistency ---


@pytest.mark.slow
@given(pair=pairs())
def test_the_projection_is_in_range_and_reduces_to_the_low_image(pair):
    values, low, factor = pair
    projected = project(values, low, factor)
    assert projected.shape == values.shape
    assert projected.min() >= -1e-9
    assert projected.max() <= 255 + 1e-9
    assert np.abs(reduced(projected, factor) - low).max() < 1e-9
    assert np.abs(mean_of_blocks(projected, factor) - low).max() < 1e-3  # in Pillow's float32


@given(pair=pairs(least=100, most=140))
def test_within_the_range_the_projection_is_the_formula(pair):
    values, low, factor = pair
    difference = low - mean_of_blocks(values, factor)
    expected = values + difference.repeat(factor, axis=0).repeat(factor, axis=1)
    assert np.abs(project(values, low, factor) - expected).max() < 1e-3


@pytest.mark.slow
@given(pair=pairs(), seed=st.integers(0, 99))
def test_no_image_in_range_with_that_reduction_is_nearer(pair, seed):
    """The projection on a convex set: the angle at it towards every other member is obtuse."""
    values, low, factor = pair
    nearest = project(values, low, factor)
    other = project(noise(*values.shape, seed=seed), low, factor)
    flat = low.repeat(factor, axis=0).repeat(factor, axis=1)
    for member in (other, flat):
        inner = ((values - nearest) * (member - nearest)).sum()
        assert inner <= 1e-6 * values.size


@given(pair=pairs())
def test_a_consistent_image_is_left_alone(pair):
    values, low, factor = pair
    image = consistent(values, low, factor)
    assert np.abs(project(image, low, factor) - image).max() < 1e-9
    assert (consistent(image, low, factor) == image).all()


@pytest.mark.slow
@given(pair=pairs(), eight_bits=st.booleans())
def test_eight_bits_leave_nothing_of_the_difference(pair, eight_bits):
    values, low, factor = pair
    if eight_bits:
        values = np.rint(values).astype(np.uint8)
    image = consistent(values, low, factor)
    assert image.dtype == np.uint8
    assert (reduced(image, factor) == low).all()  # whole numbers over whole numbers: exact
    assert np.abs(image - project(values, low, factor)).max() < 1 + 1e-9


@given(pair=pairs(), level=st.sampled_from([0, 255]))
def test_a_pixel_at_the_end_of_the_range_makes_its_block_flat(pair, level):
    values, low, factor = pair
    low = np.full_like(low, level)
    assert (consistent(values, low, factor) == level).all()


def test_plain_rounding_would_leave_up_to_half_a_level():
    """Why `consistent` rounds as it does: three of four values at .4 round away what the fourth can't hold."""
    low = np.full((1, 1, 1), 10, np.uint8)
    values = np.array([[10.4, 10.4], [10.4, 8.8]])[..., None]
    assert np.abs(reduced(np.rint(values), 2) - low).max() > 0.2
    assert sorted(consistent(values, low, 2).ravel()) == [9, 10, 10, 11]
    assert (reduced(consistent(values, low, 2), 2) == low).all()


@settings(max_examples=20)
@given(rows=st.integers(1, 9), band=st.integers(1, 400), seed=st.integers(0, 99))
def test_the_bands_do_not_show(rows, band, seed):
    low, values = noise(rows, 3, seed=seed), noise(rows * 2, 6, seed=seed + 1)
    whole = consistent(values, low, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscale, "_BAND_ELEMENTS", band)
        assert (consistent(values, low, 2) == whole).all()


def test_another_size_is_a_bug():
    with pytest.raises(ValueError, match="not 2 times"):
        consistent(noise(8, 9), noise(4, 4), 2)
