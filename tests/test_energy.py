"""Energy guidance: moves of a known length in a known direction, of no one else, and nothing else changed."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from boomerang_batch.diffusion.boomerang import boomerang
from boomerang_batch.diffusion.codes import decode, encode
from boomerang_batch.diffusion.denoiser import Guided
from boomerang_batch.diffusion.energy import EnergyGuided
from boomerang_batch.diffusion.engine import Engine
from boomerang_batch.diffusion.parity import check_batching, synthetic_images
from boomerang_batch.diffusion.samplers import Column, build_solver, readings
from boomerang_batch.diffusion.schedule import build_schedule, level_at_tau
from boomerang_batch.errors import ModelError
from tests import engines
from tests.oracles import GivenNoise, SequentialNoise, gaussian_oracle, levels_of, linear_levels

KINDS = {"vp": "epsilon", "ve": "score", "flow": "flow"}


class Score:
    """An energy made of a function (images, references) to (B,)."""

    digest = "e" * 64

    def __init__(self, function, *, name="score", classes=None):
        self.function = function
        self.name = name
        self.classes = classes
        self.asked = []

    def reference(self, about):
        self.asked.append(about)
        return torch.as_tensor(about)

    def of(self, images, references):
        assert images.dtype == torch.float32
        assert bool(((images >= 0) & (images <= 1)).all())
        return self.function(images, references)


def about(value=0, condition=None):
    return Guided(condition=condition, about=value)


def linear(weights):
    """E = <weights, x>: one direction, everywhere."""
    return Score(lambda images, _: (images * weights).sum((1, 2, 3)))


def network(seed=0, *, channels=engines.CHANNELS, mixing=False):
    """A small smooth network as an energy, that looks at its neighbours if it is told to."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3)).eval()
    body.requires_grad_(False)

    def function(images, references):
        features = body(images)
        if mixing:
            features = features - features.mean(0, keepdim=True)
        return features.square().mean((1, 2, 3)) * (1 + references)

    return Score(function, classes=9)


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def estimate(spec, x, tau, output):
    alpha, sigma, _ = level_at_tau(spec.levels, tau)
    from_x, from_output = (part.view(-1, 1, 1, 1) for part in readings(spec.prediction, alpha, sigma))
    return from_x * x + from_output * output[:, : x.shape[1]]


def chain(kind, count=40):
    return levels_of(kind, torch.logspace(-2, 1, count, dtype=torch.float64))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score", "flow"])
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_a_move_is_down_the_gradient_and_its_length_is_scale_times_what_is_open(prediction, scale):
    levels = chain("flow" if prediction == "flow" else "vp")
    inner = gaussian_oracle(torch.zeros(6), 0.3 * torch.eye(6), levels, prediction)
    guided = EnergyGuided(inner, Score(lambda x, _: x.square().sum((1, 2, 3))), scale=scale)
    x, tau = 0.3 * normals(3, 6, 1, 1).double(), torch.tensor([3.0, 20.0, 34.5], dtype=torch.float64)
    plain = inner.denoise(x, tau, [None] * 3)
    led = guided.denoise(x, tau, [about() for _ in range(3)])
    alpha, sigma, _ = level_at_tau(levels, tau)
    before, after = (estimate(inner.spec, x, tau, output) for output in (plain, led))
    open_ = (sigma / (alpha**2 + sigma**2).sqrt()).view(-1, 1, 1, 1)
    # The energy is |image|^2 with the image (x + 1) / 2 clamped to 0..1, so its gradient is that.
    down = -((before + 1) / 2).clamp(0, 1)
    unit = down / down.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(after - before, scale * open_ * unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_on_gaussian_data_a_walk_ends_where_the_closed_form_says(kind, eta):
    """A linear energy moves every estimate by a known constant, and each step hands it on by a known gain."""
    variance, scale, levels = 0.25, 0.2, chain(kind, 60)
    prediction = KINDS[kind]
    inner = gaussian_oracle(torch.zeros(4), variance * torch.eye(4), levels, prediction)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0]).view(4, 1, 1)
    guided = EnergyGuided(inner, linear(weights), scale=scale, within=(0.2, 0.6))
    schedule = build_schedule(levels, grid="linspace", steps=20, t=("fraction", 0.73), start="exact")
    solver = build_solver(schedule, prediction=prediction, eta=eta)

    a, s, above = solver[Column.ALPHA], solver[Column.SIGMA], solver[Column.ALPHA_NEXT]
    direction = solver[Column.DIRECTION]
    gain = a * variance / (a**2 * variance + s**2)  # of the posterior mean, in x_t
    shift = 0.0
    unit = weights / weights.square().mean().sqrt()
    fractions = level_at_tau(levels, schedule.tau)[2]
    for i in range(schedule.n, 0, -1):
        of_estimate = above[i] - direction[i] * a[i] / s[i]
        move = -scale * s[i] / (a[i] ** 2 + s[i] ** 2).sqrt() if 0.2 <= fractions[i] <= 0.6 else 0.0
        shift = of_estimate * (gain[i] * shift + move) + direction[i] / s[i] * shift

    x_0 = 0.2 * normals(2, 4, 1, 1).double()
    walks = [
        boomerang(x_0, model, schedule, solver, SequentialNoise(x_0, 3), [about(), about()])
        for model in (guided, EnergyGuided(inner, linear(0 * weights), scale=scale))
    ]
    moved = walks[0] - walks[1]
    assert abs(float(shift)) > 0.02
    torch.testing.assert_close(moved, (shift * unit.double()).expand_as(moved), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    model = EnergyGuided(engines.Tiny(), network(), scale=1.0)
    x = (0.4 * normals(3, engines.CHANNELS, 8, 8)).clamp(-0.9, 0.9)
    rows = [about(number) for number in (0, 1, 2)]
    gradient = model.gradient(x, rows)
    references = torch.tensor([0, 1, 2])
    for place in [(0, 0, 0), (1, 3, 4), (0, 7, 7), (1, 5, 2)]:
        step = torch.zeros_like(x)
        step[(slice(None), *place)] = 2e-2
        up, down = (model._energy.of((x + sign * step + 1) / 2, references) for sign in (1, -1))
        numeric = (up - down) / 2e-2  # of images in 0..1, where the step is half as long
        torch.testing.assert_close(gradient[(slice(None), *place)], numeric, rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize("sampler", engines.SAMPLERS)
def test_who_is_not_guided_is_not_changed_to_the_last_bit(sampler):
    """Whatever the prediction, with a learned variance too."""
    inner = engines.Tiny(sampler)
    model = EnergyGuided(inner, network(), scale=0.5, clip_range=inner.spec.clip_range)
    x = normals(4, engines.CHANNELS, 8, 8)
    tau = inner.spec.levels.tau[torch.tensor([3, 9, 14, 6])]
    with torch.inference_mode():
        plain = inner.denoise(x, tau, [0, 1, 2, 3])
        mixed = model.denoise(x, tau, [0, about(1, 1), 2, about(0, 3)])
        none = model.denoise(x, tau, [0, 1, 2, 3])
    assert torch.equal(none, plain)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[3], plain[3])
    # A learned variance is nothing that an estimate could be moved in.
    assert torch.equal(mixed[:, engines.CHANNELS :], plain[:, engines.CHANNELS :])


def test_outside_its_range_it_does_not_lead_and_is_not_asked():
    inner, energy = engines.Tiny(), network()
    model = EnergyGuided(inner, energy, scale=0.5, within=(0.25, 0.5))  # timesteps 5 to 10 of 20
    x, tau = normals(6, engines.CHANNELS, 8, 8), torch.tensor([3, 4, 9, 10, 4.0, 9.0], dtype=torch.float64)
    rows = [about(1, 0) for _ in range(6)]
    changed = (model.denoise(x, tau, rows) != inner.denoise(x, tau, [0] * 6)).flatten(1).any(1)
    assert changed.tolist() == [False, True, True, False, True, True]
    asked = len(energy.asked)
    far = torch.full_like(tau, 15.0)
    assert torch.equal(model.denoise(x, far, [about(1, 0)] * 6), inner.denoise(x, far, [0] * 6))
    assert len(energy.asked) == asked


@pytest.mark.slow
@hypothesis.given(
    sampler=st.sampled_from(["ddpm", "2m", "learned", "flow-ancestral", "ve-score"]),
    number=st.integers(0, 5),
    timestep=st.integers(1, 20),
    beside=st.lists(st.tuples(st.integers(6, 99), st.integers(1, 20), st.booleans()), max_size=6),
)
@hypothesis.settings(max_examples=25)
def test_a_guided_draw_is_the_same_alone_and_among_any_others(sampler, number, timestep, beside):
    """Through the slots, to the last bit: what an energy says of one image is its own business."""
    model = EnergyGuided(engines.Tiny(sampler), network(), scale=0.3, clip_range=2.0)

    def draw(number, timestep, led):
        condition = number % engines.CLASSES
        return engines.draw(
            number,
            timestep=timestep,
            sampler=sampler,
            condition=about(number % 3, condition) if led else condition,
        )

    one = draw(number, timestep, True)
    with torch.inference_mode():
        whole = dataclasses.replace(one, window=None)
        expected = engines.alone(whole, model, batch_size=3)[1]
    engine = Engine(model, batch_size=3, order=engines.order_of(sampler), threads=1)
    try:
        found = {done.draw.tag: done.image for done in engine.run([*(draw(*other) for other in beside), one])}
    finally:
        engine.close()
    assert torch.equal(found[number], expected)


def test_a_source_is_looked_at_once_for_each_draw_and_forgotten_with_it():
    energy = Score(lambda images, source: (images - source).square().sum((1, 2, 3)))
    model = EnergyGuided(engines.Tiny(), energy, scale=0.1)
    images = torch.rand(2, engines.CHANNELS, 8, 8) * 2 - 1
    rows = [about(image, 0) for image in images]
    x, tau = normals(3, engines.CHANNELS, 8, 8), torch.full((3,), 9.0, dtype=torch.float64)
    for _ in range(3):
        model.denoise(x, tau, [rows[0], 0, rows[1]])
    assert len(energy.asked) == 2
    torch.testing.assert_close(torch.stack(energy.asked), (images + 1) / 2)
    assert len(model._references) == 2
    del rows
    assert len(model._references) == 0


def test_no_gradient_is_no_move_and_a_tiny_or_huge_one_is_a_whole_one():
    inner = engines.Tiny()
    x, tau = normals(2, engines.CHANNELS, 8, 8), torch.full((2,), 9.0, dtype=torch.float64)
    plain = inner.denoise(x, tau, [0, 0])

    def led(energy):
        return EnergyGuided(inner, energy, scale=0.2).denoise(x, tau, [about(condition=0)] * 2)

    weights = normals(engines.CHANNELS, 8, 8)
    assert torch.equal(led(linear(0 * weights)), plain)
    whole = led(linear(weights))
    assert not torch.equal(whole, plain)
    for factor in (2.0**-100, 2.0**60):
        torch.testing.assert_close(led(linear(factor * weights)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_its_own_samples_alone(bad):
    """An energy that says nothing of one image must not pass for one that lets it be."""

    def function(images, references):
        return torch.where(references == 1, bad, images.square().sum((1, 2, 3)))

    inner = engines.Tiny()
    model = EnergyGuided(inner, Score(function), scale=0.2)
    x, tau = normals(3, engines.CHANNELS, 8, 8), torch.full((3,), 9.0, dtype=torch.float64)
    output = model.denoise(x, tau, [about(0, 0), about(1, 0), 0])
    assert output.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    assert bool(output[1].isnan().all())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, _: x.sum(), r"energy score comes to torch.float32 \(\) for 2 images"),
        (lambda x, _: x.sum((1, 2, 3), keepdim=True), r"torch.float32 \(2, 1, 1, 1\)"),
        (lambda x, _: x.sum((1, 2, 3)).double(), r"torch.float64 \(2,\)"),
        (lambda x, _: [0.0, 0.0], r"comes to \[0.0, 0.0\]"),
        (lambda x, _: x.detach().sum((1, 2, 3)), "has no gradient"),
        (lambda x, _: torch.zeros(len(x)), "has no gradient"),
    ],
)
def test_what_is_no_energy_is_refused_by_name(function, message):
    model = EnergyGuided(engines.Tiny(), Score(function), scale=0.2)
    tau = torch.full((2,), 9.0, dtype=torch.float64)
    with pytest.raises(ModelError, match=message):
        model.denoise(normals(2, engines.CHANNELS, 8, 8), tau, [about(condition=0)] * 2)


@pytest.mark.parametrize("mixing", [False, True])
def test_an_energy_that_looks_at_neighbours_does_not_pass_for_a_model(mixing):
    model = EnergyGuided(engines.Tiny(), network(mixing=mixing), scale=0.2)
    images = synthetic_images(model.spec, 4)
    rows = [about(number, number) for number in range(4)]

    def check():
        check_batching(model, images, rows, [15.0, 9.0, 2.0, 12.0], 6)

    if mixing:
        with pytest.raises(ModelError, match="it mixes samples"):
            check()
    else:
        check()


def test_full_precision_is_guided_as_well():
    class Half(engines.Tiny):
        def in_float32(self):
            return exact

    exact, inner, energy = engines.Tiny(), Half(), network()
    exact.in_float32 = lambda: exact
    model = EnergyGuided(inner, energy, scale=0.2)
    twin = model.in_float32()
    assert isinstance(twin, EnergyGuided)
    assert twin.in_float32() is twin
    x, tau = normals(2, engines.CHANNELS, 8, 8), torch.full((2,), 9.0, dtype=torch.float64)
    rows = [about(0, 0), 1]
    assert torch.equal(twin.denoise(x, tau, rows), model.denoise(x, tau, rows))


def test_its_digest_tells_model_and_energy():
    inner = engines.Tiny()
    digests = {inner.spec.digest}
    for energy_digest in ("a" * 64, "b" * 64):
        energy = network()
        energy.digest = energy_digest
        digests.add(EnergyGuided(inner, energy, scale=1.0).spec.digest)
    assert len(digests) == 3
    assert EnergyGuided(inner, network(), scale=1.0).spec.guided_classes == 9


def test_a_code_found_without_it_is_decoded_with_it():
    """An edit-friendly code gives its image back, and led there gives what the energy has lowered."""
    levels = linear_levels(20, 0.001, 0.3)
    inner = engines.Tiny()
    target = torch.full((engines.CHANNELS, 8, 8), 0.9)
    energy = Score(lambda images, wanted: (images - wanted).square().mean((1, 2, 3)))
    guided = EnergyGuided(inner, energy, scale=0.1, clip_range=2.0)
    schedule = build_schedule(levels, grid="linspace", steps=8, t=("fraction", 0.6), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=1.0, clip_range=2.0)
    x_0 = 0.5 * normals(2, engines.CHANNELS, 8, 8)
    code = encode(x_0, guided, schedule, solver, SequentialNoise(x_0, 0), [1, 2], path="edit-friendly")
    back = decode(code, guided, schedule, solver, [1, 2])
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-4)
    led = decode(code, guided, schedule, solver, [about(target, 1), about(target, 2)])
    nearer, was = ((x - target).square().mean((1, 2, 3)) for x in (led, x_0))
    assert bool((nearer < 0.9 * was).all())


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(
    t=st.one_of(
        st.tuples(st.just("fraction"), st.floats(0.05, 1.0)), st.tuples(st.just("sigma"), st.floats(0.02, 9.0))
    ),
    steps=st.integers(2, 30),
)
@hypothesis.settings(max_examples=30)
def test_a_nodes_level_is_read_off_its_tau(kind, t, steps):
    levels = chain(kind)
    schedule = build_schedule(levels, grid="linspace", steps=steps, t=t, start="exact")
    alpha, sigma, fraction = level_at_tau(levels, schedule.tau[1:])
    torch.testing.assert_close(alpha, schedule.alpha[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigma, schedule.sigma[1:], rtol=1e-9, atol=1e-12)
    assert bool((fraction[1:] > fraction[:-1]).all())
    if t[0] == "fraction":
        assert float(fraction[-1]) == pytest.approx(round(t[1] * len(levels)) / len(levels))


def test_a_level_of_pure_noise_is_read_off_its_tau():
    levels = engines.SAMPLERS["zero-snr"]["levels"]
    alpha, sigma, fraction = level_at_tau(levels, levels.tau)
    assert torch.equal(alpha, levels.alpha)
    assert torch.equal(sigma, levels.sigma)
    assert float(fraction[-1]) == 1.0


def test_a_walk_without_noise_ends_lower():
    """What the figures of moves come to in the end: the energy falls, the more the larger the scale."""
    inner = engines.Tiny("ddim")
    energy = network()
    walk = engines.walk_at(14, "ddim")
    x_0 = normals(3, engines.CHANNELS, 8, 8).clamp(-1, 1)
    found = []
    for scale in (1e-9, 0.1, 0.3):
        model = EnergyGuided(inner, energy, scale=scale, clip_range=2.0)
        rows = [about(1, 0) for _ in range(3)]
        out = boomerang(x_0, model, walk.schedule, walk.solver, GivenNoise(normals(*x_0.shape, seed=5)), rows)
        found.append(energy.of(((out + 1) / 2).clamp(0, 1), torch.ones(3)))
    assert bool((found[0] > found[1]).all())
    assert bool((found[1] > found[2]).all())
