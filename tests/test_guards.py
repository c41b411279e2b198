"""What must never be saved as a success."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.errors import SampleError
from boomerang_batch.run.guards import Seen, check_changed, check_hidden, check_output

RANGE = (-1.0, 1.0)


def picture(seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(*colour: float) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(-1, 1, 1).expand(-1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_ordinary_image_passes(channels):
    check_output(picture(1, channels), picture(2, channels), value_range=RANGE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_refused(value):
    broken = picture()
    broken[1, 2, 3] = value
    with pytest.raises(SampleError, match="float32") as caught:
        check_output(broken, picture(), value_range=RANGE)
    assert caught.value.reason == "non-finite-output"


@pytest.mark.parametrize("colour", [(0, 0, 0), (-1, -1, -1), (1, 0.2, -0.7)])
def test_a_single_colour_is_refused_grey_or_not(colour):
    with pytest.raises(SampleError, match="single colour") as caught:
        check_output(plain(*colour), picture(), value_range=RANGE)
    assert caught.value.reason == "flat-output"


@pytest.mark.parametrize("shift", [-2.5, 2.5])
def test_an_output_all_beyond_black_or_white_is_a_single_colour(shift):
    """What is saved is clamped, so contrast out there is lost."""
    with pytest.raises(SampleError) as caught:
        check_output(picture() + shift, picture(), value_range=RANGE)
    assert caught.value.reason == "flat-output"
    check_output(picture() + shift / 2, picture(), value_range=RANGE)


@pytest.mark.parametrize("white", [1.0, -1.0])
def test_a_plain_picture_may_become_a_single_colour(white):
    """A tile of blown-out sky: one pixel is a level off, and the decoder overshoots everywhere."""
    source = torch.full((3, 8, 8), white)
    source[:, 4, 4] = white * (1 - 2 / 255)
    check_output(white * 1.02 + 0.02 * white * picture().abs(), source, value_range=RANGE)
    source[:, 4, 4] = white * (1 - 20 / 255)
    with pytest.raises(SampleError):
        check_output(white * 1.02 + 0.02 * white * picture().abs(), source, value_range=RANGE)


def test_contrast_is_told_in_the_models_own_range():
    """A grey level of a range of 2 is flat where the range is 200."""
    output = plain(0.0, 0.0, 0.0).clone()
    output[0, 4, 4] = 2 / 255
    check_output(output, picture(), value_range=RANGE)
    with pytest.raises(SampleError):
        check_output(output, 100 * picture(), value_range=(-100.0, 100.0))


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 0.2, -0.7)])
def test_a_flat_image_may_stay_flat(colour):
    check_output(plain(0.1, 0.1, 0.1), plain(*colour), value_range=RANGE)


def test_contrast_in_one_channel_or_one_pixel_is_no_single_colour():
    one_channel = plain(0.0, 0.0, 0.0).clone()
    one_channel[2] = picture()[2]
    check_output(one_channel, picture(), value_range=RANGE)
    one_pixel = plain(-1.0, -1.0, -1.0).clone()
    one_pixel[:, 4, 4] = 1
    check_output(one_pixel, picture(), value_range=RANGE)


def test_an_image_of_one_pixel_is_judged_without_a_warning():
    check_output(torch.zeros(3, 1, 1), torch.ones(3, 1, 1), value_range=RANGE)
    with pytest.raises(SampleError):
        check_output(torch.full((3, 1, 1), float("nan")), torch.ones(3, 1, 1), value_range=RANGE)


def test_half_precision_outputs_are_judged_too():
    check_output(picture().half(), picture(), value_range=RANGE)
    with pytest.raises(SampleError):
        check_output((picture() * 1e6).half(), picture(), value_range=RANGE)


# --- outputs that are the input, or another's ---


def test_an_output_that_is_its_input_is_refused():
    with pytest.raises(SampleError, match="unchanged") as caught:
        check_changed(picture(), picture(), value_range=RANGE)
    assert caught.value.reason == "output-equals-input"


def test_the_last_bit_of_one_value_is_a_change():
    output = picture()
    output[0, 0, 0] = torch.nextafter(output[0, 0, 0], torch.tensor(2.0))
    check_changed(output, picture(), value_range=RANGE)
    check_changed(picture(1), picture(2), value_range=RANGE)


def test_a_flat_input_may_come_back():
    check_changed(plain(0.1, 0.2, 0.3), plain(0.1, 0.2, 0.3), value_range=RANGE)


def test_one_output_for_two_draws_is_refused():
    seen = Seen(RANGE)
    seen.check(seen.digest(picture(1)), draw=(b"key-1", 1))
    seen.check(seen.digest(picture(2)), draw=(b"key-2", 1))
    with pytest.raises(SampleError, match="other noise") as caught:
        seen.check(seen.digest(picture(1)), draw=(b"key-3", 1))
    assert caught.value.reason == "output-repeated"
    with pytest.raises(SampleError, match="other noise"):
        seen.check(seen.digest(picture(1)), draw=(b"key-1", 2))  # a cascade that stands still


def test_one_output_for_one_draw_may_come_again():
    """Equal images under one noise key, or an attempt repeated."""
    seen = Seen(RANGE)
    for _ in range(3):
        seen.check(seen.digest(picture(1)), draw=(b"key-1", 1))


def test_flat_outputs_may_be_alike_and_shapes_are_not_told_apart_by_layout():
    seen = Seen(RANGE)
    seen.check(seen.digest(plain(0, 0, 0)), draw=1)
    seen.check(seen.digest(plain(0, 0, 0)), draw=2)
    seen.check(seen.digest(picture(5).permute(0, 2, 1)), draw=3)
    with pytest.raises(SampleError):
        seen.check(seen.digest(picture(5).permute(0, 2, 1).contiguous()), draw=4)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(2, 9))
def test_no_false_alarm_over_clean_outputs(seed, channels, side):
    """Fifty outputs that stay near their sources, as at small t; a thousand in all."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.rand(50, channels, side, side, generator=generator) * 2 - 1
    outputs = sources + 1e-2 * torch.randn(sources.shape, generator=generator)
    seen = Seen(RANGE)
    for number, (output, source) in enumerate(zip(outputs, sources, strict=True)):
        check_output(output, source, value_range=RANGE)
        check_changed(output, source, value_range=RANGE)
        seen.check(seen.digest(output), draw=number)


def test_an_image_that_shows_its_source_is_refused_whatever_is_beyond_black_and_white():
    source = torch.round((picture() + 1) * 127.5) / 127.5 - 1
    source[0], source[1, :4] = 1.0, -1.0
    rounds_to_it = source + 0.45 * 2 / 255 * torch.sign(picture(1))
    beyond = torch.where(source == 1, 1.7, torch.where(source == -1, -1.4, source))
    for back in (source, rounds_to_it, beyond):
        with pytest.raises(SampleError, match="gave the image back") as caught:
            check_hidden(back, source, value_range=RANGE)
        assert caught.value.reason == "output-equals-input"
    check_hidden(source + 2 * 2 / 255 * torch.sign(picture(1)), source, value_range=RANGE)
