"""What must never be saved as a success."""

from __future__ import annotations

import pytest
import torch

from boomerang_batch.diffusion.guards import check_output
from boomerang_batch.errors import SampleError


def picture(seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(*colour: float) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(-1, 1, 1).expand(-1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_ordinary_image_passes(channels):
    check_output(picture(1, channels), picture(2, channels))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_refused(value):
    broken = picture()
    broken[1, 2, 3] = value
    with pytest.raises(SampleError, match="float32") as caught:
        check_output(broken, picture())
    assert caught.value.reason == "non-finite-output"


@pytest.mark.parametrize("colour", [(0, 0, 0), (-1, -1, -1), (1, 0.2, -0.7)])
def test_a_single_colour_is_refused_grey_or_not(colour):
    with pytest.raises(SampleError, match="single colour") as caught:
        check_output(plain(*colour), picture())
    assert caught.value.reason == "flat-output"


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 0.2, -0.7)])
def test_a_flat_image_may_stay_flat(colour):
    check_output(plain(0.1, 0.1, 0.1), plain(*colour))


def test_contrast_in_one_channel_or_one_pixel_is_no_single_colour():
    one_channel = plain(0.0, 0.0, 0.0).clone()
    one_channel[2] = picture()[2]
    check_output(one_channel, picture())
    one_pixel = plain(-1.0, -1.0, -1.0).clone()
    one_pixel[:, 4, 4] = 1
    check_output(one_pixel, picture())


def test_an_image_of_one_pixel_is_judged_without_a_warning():
    check_output(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(SampleError):
        check_output(torch.full((3, 1, 1), float("nan")), torch.ones(3, 1, 1))


def test_half_precision_outputs_are_judged_too():
    check_output(picture().half(), picture())
    with pytest.raises(SampleError):
        check_output((picture() * 1e6).half(), picture())
