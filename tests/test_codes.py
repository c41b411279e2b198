"""Codes of images: they lead back to the image, and are what two papers say of them in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.boomerang import boomerang
from boomerang_batch.diffusion.codes import Code, decode, encode, flipped, inverted, noise_maps, shifted
from boomerang_batch.diffusion.samplers import Column, Solver, build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from tests.oracles import Oracle, SequentialNoise, linear_levels, scalar_gaussian_oracle

LINEAR = linear_levels()
SHAPE = (4, 2, 3, 3)
PATHS = ("dpm-encoder", "edit-friendly")
COUNT = 20_000


def bent_oracle(shift: float = 0.0) -> Oracle:
    """A nonlinear denoiser; another `shift` is another model."""
    return Oracle(lambda x, alpha, sigma: torch.tanh(x / (alpha + sigma) + shift), SHAPE[1:], LINEAR)


def walk(t: int, steps: int, eta: float) -> tuple[Schedule, Solver]:
    schedule = build_schedule(LINEAR, grid="linspace", steps=steps, t=("timestep", t), start="exact")
    return schedule, build_solver(schedule, prediction="epsilon", eta=eta)


def normals(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(1, 1000),
    steps=st.integers(1, 60),
    eta=st.floats(0, 1),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)
def test_a_code_leads_back_to_its_image(t, steps, eta, path, dtype):
    schedule, solver = walk(t, steps, eta)
    oracle, x_0 = bent_oracle(), normals(1).to(dtype)
    conditions = [None] * len(x_0)
    code = encode(x_0, oracle, schedule, solver, SequentialNoise(x_0, 2), conditions, path=path)
    back = decode(code, oracle, schedule, solver, conditions)
    assert back.dtype == dtype
    assert rms(back - x_0) <= (1e-10 if dtype == torch.float64 else 1e-4) * rms(x_0)
    assert oracle.evaluations == 2 * schedule.n


@pytest.mark.parametrize("path", PATHS)
def test_another_model_makes_another_image_of_a_code_and_says_what_it_changes(path):
    schedule, solver = walk(600, 30, 1.0)
    x_0 = normals(1)
    conditions = [None] * len(x_0)
    code = encode(x_0, bent_oracle(), schedule, solver, SequentialNoise(x_0, 2), conditions, path=path)
    other = decode(code, bent_oracle(0.5), schedule, solver, conditions)
    fresh = boomerang(x_0, bent_oracle(0.5), schedule, solver, SequentialNoise(x_0, 7))
    assert 1e-3 < rms(other - x_0) < rms(fresh - x_0)


def test_t_zero_has_an_empty_code():
    schedule, solver = walk(0, 10, 1.0)
    x_0 = normals(1)
    code = encode(x_0, bent_oracle(), schedule, solver, SequentialNoise(x_0, 2), [None] * 4, path="dpm-encoder")
    assert torch.equal(decode(code, bent_oracle(), schedule, solver, [None] * 4), x_0)


# --- closed forms: Gaussian data of variance s2, whose denoiser is linear, so that a step's mean is A x ---


def gaussian_code(
    path: str, t: int, steps: int, eta: float, s2: float = 0.3
) -> tuple[Code, Schedule, Solver, float]:
    schedule, solver = walk(t, steps, eta)
    x_0 = math.sqrt(s2) * normals(3, (COUNT, 1, 1, 1))
    noise, oracle = SequentialNoise(x_0, 4), scalar_gaussian_oracle(s2, LINEAR)
    return encode(x_0, oracle, schedule, solver, noise, [None] * COUNT, path=path), schedule, solver, s2


def coefficients(schedule: Schedule, solver: Solver, s2: float) -> tuple[Tensor, ...]:
    """(a, s, a', s', A, zeta) of the step that leaves each node 2..n."""
    a, s = schedule.alpha[2:], schedule.sigma[2:]
    below, less = schedule.alpha[1:-1], schedule.sigma[1:-1]
    shrink = a * s2 / (a**2 * s2 + s**2)
    mean = below * shrink + solver[Column.DIRECTION][2:] * (1 - a * shrink) / s
    return a, s, below, less, mean, solver[Column.NOISE][2:]


@pytest.mark.parametrize("eta", [1.0, 0.1])
def test_the_dpm_encoders_maps_are_as_large_as_its_closed_form(eta):
    code, schedule, solver, s2 = gaussian_code("dpm-encoder", 850, 40, eta)
    z = noise_maps(code, solver)[2:].flatten(1)
    a, s, below, _, _, zeta = coefficients(schedule, solver, s2)
    gap = below - solver[Column.DIRECTION][2:] * a / s
    expected = 1 + gap**2 * (s2 * s**2 / (a**2 * s2 + s**2)) / zeta**2
    error = expected * math.sqrt(2 / z.shape[1])
    assert ((z.square().mean(1) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_edit_friendly_maps_have_the_variance_and_correlation_of_their_closed_form(eta):
    code, schedule, solver, s2 = gaussian_code("edit-friendly", 900, 50, eta)
    z = noise_maps(code, solver)[2:].flatten(1)
    a, s, below, less, mean, zeta = coefficients(schedule, solver, s2)
    variance = (s2 * (below - mean * a) ** 2 + less**2 + mean**2 * s**2) / zeta**2
    assert ((z.square().mean(1) / variance - 1).abs() < 5 * math.sqrt(2 / z.shape[1])).all()
    # Of two steps in a row the upper one's state is where the lower one begins.
    upper, lower = slice(1, None), slice(0, -1)
    shared = s2 * (below - mean * a)[upper] * (below - mean * a)[lower] - mean[lower] * less[upper] ** 2
    correlation = shared / (zeta[upper] * zeta[lower]) / (variance[upper] * variance[lower]).sqrt()
    measured = (z[upper] * z[lower]).mean(1) / (variance[upper] * variance[lower]).sqrt()
    assert ((measured - correlation).abs() < 5 / math.sqrt(z.shape[1])).all()
    if eta == 1:
        middle = len(correlation) // 2
        assert variance[middle].sqrt() > 2
        assert correlation[middle] == pytest.approx(-0.5, abs=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_papers_codes_drop_is_the_last_steps_residual(path):
    """Without it the image comes back but for the noise of its last step, sqrt(P_1) of the lowest node."""
    code, schedule, solver, s2 = gaussian_code(path, 500, 20, 1.0)
    oracle = scalar_gaussian_oracle(s2, LINEAR)
    dropped = code.residuals.clone()
    dropped[1] = 0
    whole = decode(code, oracle, schedule, solver, [None] * COUNT)
    less = decode(Code(x_n=code.x_n, residuals=dropped), oracle, schedule, solver, [None] * COUNT)
    a, s = float(schedule.alpha[1]), float(schedule.sigma[1])
    assert rms(less - whole) == pytest.approx(math.sqrt(s2 * s**2 / (a**2 * s2 + s**2)), rel=0.02)


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
@pytest.mark.parametrize("path", PATHS)
def test_a_mirrored_code_is_the_code_of_the_mirrored_image(path, axis):
    schedule, solver = walk(700, 25, 1.0)
    x_0 = normals(1)
    code = encode(x_0, bent_oracle(), schedule, solver, SequentialNoise(x_0, 2), [None] * 4, path=path)
    found = decode(flipped(code, axis), bent_oracle(), schedule, solver, [None] * 4)
    assert rms(found - x_0.flip(-1 if axis == "horizontal" else -2)) < 1e-10


@pytest.mark.parametrize("over", [(0.0, 1.0), (0.3, 0.6), (0.0, 0.05)])
@pytest.mark.parametrize("path", PATHS)
def test_shifted_maps_move_each_channel_by_what_the_closed_form_says(path, over):
    """Steps of Gaussian data multiply by A: what node i is given is worth zeta_i A_1 ... A_{i-1} in the end."""
    s2, by = 0.3, torch.tensor([0.5, -0.2], dtype=torch.float64)
    schedule, solver = walk(700, 25, 1.0)
    x_0 = math.sqrt(s2) * normals(3, (5, 2, 3, 3))
    oracle = Oracle(lambda x, a, s: x * a * s2 / (a**2 * s2 + s**2), SHAPE[1:], LINEAR)
    code = encode(x_0, oracle, schedule, solver, SequentialNoise(x_0, 4), [None] * 5, path=path)
    moved = shifted(code, solver, by, over=over)
    found = decode(moved, oracle, schedule, solver, [None] * 5)
    a, s, below = schedule.alpha[1:], schedule.sigma[1:], schedule.alpha[:-1]
    shrink = a * s2 / (a**2 * s2 + s**2)
    mean = below * shrink + solver[Column.DIRECTION][1:] * (1 - a * shrink) / s
    gain = torch.cat([torch.ones(1, dtype=torch.float64), mean.cumprod(0)[:-1]])
    inside = torch.tensor([over[0] <= i / schedule.n <= over[1] for i in range(1, schedule.n + 1)])
    worth = float((solver[Column.NOISE][1:] * gain * inside).sum())
    assert rms(found - x_0 - worth * by.view(2, 1, 1)) < 1e-10
    alone = Code(x_n=code.x_n[0], residuals=code.residuals[:, 0])
    assert torch.equal(shifted(alone, solver, by, over=over).residuals, moved.residuals[:, 0])


# --- DDIM inversion ---


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 20, 40, 80, 160, 500])
def test_the_round_trip_of_inversion_has_the_gain_of_its_closed_form(steps):
    """Of Gaussian data, whose every step multiplies; small steps lose less."""
    s2 = 0.3
    oracle = scalar_gaussian_oracle(s2, LINEAR)
    down, back = walk(900, steps, 0.0)
    up = inverted(down)
    x_0 = math.sqrt(s2) * normals(5, (7, 1, 1, 1))
    begun = Code(x_n=x_0, residuals=None)
    x_n = decode(begun, oracle, up, build_solver(up, prediction="epsilon", eta=0.0), [None] * 7)
    found = decode(Code(x_n=x_n, residuals=None), oracle, down, back, [None] * 7)

    a, s = down.alpha, down.sigma
    shrink = a * s2 / (a**2 * s2 + s**2)
    noise = (1 - a * shrink)[1:] / s[1:]
    upward = (a[2:] * shrink[1:-1] + s[2:] * noise[:-1]).prod()
    downward = (a[:-1] * shrink[1:] + s[:-1] * noise).prod()
    gain = float(upward * downward)
    assert rms(found - gain * x_0) < 1e-10
    assert gain < 1 - 1 / (3 * steps)


def test_inversion_of_nothing_is_nothing_and_has_no_maps():
    schedule, solver = walk(0, 10, 0.0)
    assert inverted(schedule) is schedule
    with pytest.raises(ValueError, match="no noise maps"):
        noise_maps(Code(x_n=normals(1), residuals=None), solver)
