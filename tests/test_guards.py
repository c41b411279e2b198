"""What must never be saved as a success, and models that must never be batched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.guards import (
    Seen,
    check_batching,
    check_changed,
    check_output,
    synthetic_images,
)
from boomerang_batch.errors import ModelError, SampleError
from tests import tiny_models
from tests.oracles import linear_levels

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
    seen.check(picture(1), draw=(b"key-1", 1))
    seen.check(picture(2), draw=(b"key-2", 1))
    with pytest.raises(SampleError, match="other noise") as caught:
        seen.check(picture(1), draw=(b"key-3", 1))
    assert caught.value.reason == "output-repeated"
    with pytest.raises(SampleError, match="other noise"):
        seen.check(picture(1), draw=(b"key-1", 2))  # a cascade that stands still


def test_one_output_for_one_draw_may_come_again():
    """Equal images under one noise key, or an attempt repeated."""
    seen = Seen(RANGE)
    for _ in range(3):
        seen.check(picture(1), draw=(b"key-1", 1))


def test_flat_outputs_may_be_alike_and_shapes_are_not_told_apart_by_layout():
    seen = Seen(RANGE)
    seen.check(plain(0, 0, 0), draw=1)
    seen.check(plain(0, 0, 0), draw=2)
    seen.check(picture(5).permute(0, 2, 1), draw=3)
    with pytest.raises(SampleError):
        seen.check(picture(5).permute(0, 2, 1).contiguous(), draw=4)


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
        seen.check(output, draw=number)


# --- batching ---


class Model:
    """A denoiser made of a function (x, tau, conditions) to an output."""

    def __init__(self, function, *, shape=(3, 8, 8), dtype=torch.float32, classes=None):
        self.function = function
        self.dtype = dtype
        self.calls = []
        self.spec = DenoiserSpec(
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            value_range=(-1.0, 1.0),
            levels=linear_levels(),
            prediction="epsilon",
            clip_range=1.0,
            fractional_tau=True,
            conditioning="none" if classes is None else "label",
            classes=classes,
            digest="0" * 64,
        )

    def encode(self, images):
        return images

    def decode(self, x_0):
        return x_0

    def flagged(self, images):
        return [False] * len(images)

    def in_float32(self):
        return self

    def denoise(self, x_t, tau, conditions):
        self.calls.append(len(x_t))
        assert tau.dtype == torch.float64
        assert x_t.dtype == torch.float32
        assert len(conditions) == len(tau) == len(x_t)
        return self.function(x_t.to(self.dtype), tau.to(self.dtype).view(-1, 1, 1, 1), conditions).float()


def check(model, batch_size, *, count=3, conditions=None):
    images = synthetic_images(model.spec, count)
    taus = [900.0, 400.0, 20.0, 700.0][:count]
    check_batching(model, images, conditions or [None] * count, taus, batch_size, dtype=model.dtype)


def unet(seed=0, *, dtype=torch.float32, side=8, channels=3, classes=None, train=False):
    network = tiny_models.network(
        seed, sample_size=side, in_channels=channels, out_channels=channels, num_class_embeds=classes
    )
    for module in network.modules():
        module.to(dtype)
    network.train(train)

    def function(x, tau, conditions):
        labels = None if classes is None else torch.tensor(conditions)
        with torch.no_grad():
            return network(x, tau.flatten().float(), class_labels=labels).sample

    return Model(function, shape=(channels, side, side), dtype=dtype, classes=classes)


SHAPES = [(side, channels) for side in (8, 16) for channels in (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "channels"), SHAPES)
def test_a_unet_passes(dtype, side, channels):
    for seed, batch_size in ((0, 1), (1, 3), (2, 8)):
        check(unet(seed, dtype=dtype, side=side, channels=channels), batch_size)


def test_a_class_conditional_unet_passes():
    check(unet(classes=5), 8, conditions=[0, 3, 4])


def test_the_states_are_noised_as_their_tau_says_and_the_shape_is_the_planned_one():
    seen = []

    def function(x, tau, conditions):
        seen.append((x, tau))
        return x

    model = Model(function)
    check(model, 8)
    assert model.calls == [8, 8, 1]
    x, tau = seen[0]
    assert tau[:3].flatten().tolist() == [900.0, 400.0, 20.0]
    levels = linear_levels()
    assert float(x[0].std()) == pytest.approx(1.0, abs=0.1)  # nearly pure noise
    clean = synthetic_images(model.spec, 3)[2]
    assert float((x[2] - levels.alpha[20] * clean).std()) == pytest.approx(float(levels.sigma[20]), rel=0.2)


WEIGHT = torch.linspace(0.5, 1.5, 8 * 8 * 3).view(1, 3, 8, 8)

BROKEN = {
    "a mean over the batch": (lambda x, tau, c: WEIGHT * x - x.mean(0, keepdim=True), "it mixes samples"),
    "BatchNorm in training mode": (
        lambda x, tau, c: torch.nn.functional.batch_norm(x, None, None, training=True),
        "it mixes samples",
    ),
    "attention across the batch": (
        lambda x, tau, c: (x.flatten(1) @ x.flatten(1).T / 200).softmax(1).matmul(x.flatten(1)).view_as(x),
        "it mixes samples",
    ),
    "the first row's timestep": (lambda x, tau, c: x * (1 + tau[:1]), "one row's timestep or condition"),
    "the last row's timestep": (lambda x, tau, c: x * (1 + tau[-1:]), "one row's timestep or condition"),
    "the mean timestep": (lambda x, tau, c: x * (1 + tau.mean()), "one row's timestep or condition"),
    "the first row's label": (lambda x, tau, c: x * (1 + c[0]), "one row's timestep or condition"),
    "its place in the batch": (
        lambda x, tau, c: x * (1 + torch.arange(len(x)).view(-1, 1, 1, 1)),
        "depends on the position",
    ),
    "a last bit by place": (
        lambda x, tau, c: x * (1 + 2e-7 * torch.arange(len(x)).view(-1, 1, 1, 1)),
        "depends on the position",
    ),
}


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("what", BROKEN)
def test_a_model_whose_batching_changes_its_output_is_refused(what, batch_size):
    function, told = BROKEN[what]
    with pytest.raises(ModelError, match=told) as caught:
        check(Model(function), batch_size, conditions=[1, 2, 3])
    assert "batch_size: 1" in str(caught.value)


def test_dropout_left_on_is_told_even_in_a_batch_of_one():
    generator = torch.Generator().manual_seed(0)
    model = Model(lambda x, tau, c: x * (torch.rand(x.shape, generator=generator) > 0.1))
    for batch_size in (1, 8):
        with pytest.raises(ModelError, match="something else each time it is asked"):
            check(model, batch_size)


def test_a_model_that_depends_on_the_batchs_size_is_refused():
    with pytest.raises(ModelError, match="depends on the batch's size"):
        check(Model(lambda x, tau, c: x * len(x)), 8)
    check(Model(lambda x, tau, c: x * len(x)), 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_rounding_by_batch_size_is_allowed_and_no_more(dtype, tolerance):
    def function(share):
        return lambda x, tau, c: x + (share * x.float().abs().amax() / 4 if len(x) == 1 else 0)

    check(Model(function(0.1 * tolerance), dtype=dtype), 8)
    with pytest.raises(ModelError, match="more than rounding explains"):
        check(Model(function(10 * tolerance), dtype=dtype), 8)


def test_a_network_of_zeros_or_nans_is_not_this_tests_concern():
    check(Model(lambda x, tau, c: torch.zeros_like(x)), 8)
    check(Model(lambda x, tau, c: torch.full_like(x, torch.nan)), 8)


def test_synthetic_images_keep_to_the_models_range_and_differ():
    spec = Model(lambda x, tau, c: x).spec
    images = synthetic_images(spec, 4, size=(16, 24))
    assert images.shape == (4, 3, 16, 24)
    assert float(images.abs().max()) < 1
    assert len({image.sum().item() for image in images}) == 4
    assert torch.equal(images, synthetic_images(spec, 4, size=(16, 24)))
