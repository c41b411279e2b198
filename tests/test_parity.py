"""Models that must never be batched."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.parity import check_autoencoder, check_batching, synthetic_images
from boomerang_batch.errors import ModelError
from tests import tiny_models
from tests.oracles import linear_levels


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


@pytest.mark.slow
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
    assert model.calls == [8, 8, 1, 1, 1]
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


def latent(encode=lambda images: images, decode=lambda latents: latents):
    """A latent model whose autoencoder is made of these functions."""
    model = Model(lambda x, tau, c: x)
    model.spec = dataclasses.replace(model.spec, latent=True)
    model.encode, model.decode = encode, decode
    return model


def check_latent(model, batch_size, *, dtype=torch.float32):
    check_autoencoder(model, synthetic_images(model.spec, 4), batch_size, dtype=dtype)


MIXING = {
    "a mean": lambda x: WEIGHT * x - x.mean(0, keepdim=True),
    "BatchNorm in training mode": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
    "its place": lambda x: x * (1 + 2e-7 * torch.arange(len(x)).view(-1, 1, 1, 1)),
}


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("what", MIXING)
def test_an_autoencoder_that_mixes_images_is_refused(what, batch_size):
    for part, model in (("encoder", latent(encode=MIXING[what])), ("decoder", latent(decode=MIXING[what]))):
        with pytest.raises(ModelError, match=f"change one another in its {part}") as caught:
            check_latent(model, batch_size)
        assert "model.autoencoder.batch_size: 1" in str(caught.value)


def test_an_autoencoder_that_depends_on_the_batchs_size_is_refused():
    with pytest.raises(ModelError, match="depends on the batch's size"):
        check_latent(latent(encode=lambda x: x * len(x)), 4)
    check_latent(latent(encode=lambda x: x * len(x)), 1)


def test_a_pixel_model_has_no_autoencoder_to_try():
    model = Model(lambda x, tau, c: x)
    model.encode = MIXING["a mean"]
    check_latent(model, 4)


def test_synthetic_images_keep_to_the_models_range_and_differ():
    spec = Model(lambda x, tau, c: x).spec
    images = synthetic_images(spec, 4, size=(16, 24))
    assert images.shape == (4, 3, 16, 24)
    assert float(images.abs().max()) < 1
    assert len({image.sum().item() for image in images}) == 4
    assert torch.equal(images, synthetic_images(spec, 4, size=(16, 24)))
