"""Algorithm 1, step by step, with noise that says what was asked of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.noise import Purpose, key_words, noise_key, normal
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from tests.oracles import GivenNoise, Oracle, SequentialNoise, linear_levels, mixture_oracle, step_from

LINEAR = linear_levels()
SHAPE = (4, 2, 3, 3)


def smooth_oracle() -> Oracle:
    """A nonlinear posterior mean over images of SHAPE's size."""
    return Oracle(lambda x, alpha, sigma: torch.tanh(x / (alpha + sigma)), SHAPE[1:], LINEAR)


def schedule_at(timestep: int, steps: int = 20) -> Schedule:
    return build_schedule(LINEAR, grid="linspace", steps=steps, t=("timestep", timestep), start="exact")


def solver_of(schedule: Schedule, eta: float = 1.0):
    return build_solver(schedule, prediction="epsilon", eta=eta)


def normals(seed: int, shape=SHAPE, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keys(count: int) -> list[bytes]:
    return [noise_key(bytes(32), identity=b"%d" % i, variant=0) for i in range(count)]


class RecordingNoise(SequentialNoise):
    """Remembers the nodes at which draws were asked for."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like, seed=0)
        self.asked: list[tuple[str, list[int]]] = []

    def forward(self, node: Tensor) -> Tensor:
        self.asked.append(("forward", node.tolist()))
        return super().forward(node)

    def reverse(self, node: Tensor) -> Tensor:
        self.asked.append(("reverse", node.tolist()))
        return SequentialNoise.forward(self, node)


def test_it_is_algorithm_1_written_out():
    schedule, oracle = schedule_at(400), smooth_oracle()
    solver = solver_of(schedule)
    x_0, draws = normals(1), {i: normals(10 + i) for i in range(schedule.n + 1)}

    x = schedule.alpha[schedule.n] * x_0 + schedule.sigma[schedule.n] * draws[0]
    for i in range(schedule.n, 0, -1):
        node = torch.full((len(x),), i)
        x = step_from(solver, x, oracle.denoise(x, schedule.tau[node], [None] * len(x)), node, draws[i])

    assert torch.equal(boomerang(x_0, oracle, schedule, solver, GivenNoise(draws[0], draws)), x)


@pytest.mark.slow
@pytest.mark.parametrize("timestep", [1, 53, 400, 1000])
@pytest.mark.parametrize("steps", [1, 20, 1000])
def test_one_evaluation_and_one_draw_per_node_downwards(timestep, steps):
    schedule, oracle = schedule_at(timestep, steps), smooth_oracle()
    x_0 = normals(1)
    noise = RecordingNoise(x_0)
    boomerang(x_0, oracle, schedule, solver_of(schedule), noise)
    assert oracle.evaluations == schedule.n
    assert [set(tau.tolist()) for tau in oracle.told] == [{tau} for tau in schedule.tau.tolist()[:0:-1]]
    down = [("reverse", [i] * len(x_0)) for i in range(schedule.n, 0, -1)]
    assert noise.asked[0] == ("forward", [schedule.n] * len(x_0))
    assert noise.asked[1:] == down


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t_zero_is_the_identity_to_the_bit_and_costs_nothing(dtype):
    schedule, oracle = schedule_at(0), smooth_oracle()
    x_0 = normals(1, dtype=dtype)
    noise = RecordingNoise(x_0)
    assert torch.equal(boomerang(x_0, oracle, schedule, solver_of(schedule), noise), x_0)
    assert oracle.evaluations == 0
    assert noise.asked == []


@pytest.mark.parametrize("timestep", [0, 1, 500])
def test_the_input_is_not_touched_and_its_dtype_kept(timestep):
    schedule = schedule_at(timestep)
    for dtype in (torch.float32, torch.float64):
        x_0 = normals(1, dtype=dtype)
        before = x_0.clone()
        out = boomerang(x_0, smooth_oracle(), schedule, solver_of(schedule), SequentialNoise(x_0, 2))
        assert out.dtype == dtype
        assert out.shape == x_0.shape
        assert torch.equal(x_0, before)


def test_conditions_reach_the_denoiser_at_every_evaluation():
    seen = []

    class Labelled(Oracle):
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            seen.append(conditions)
            return super().denoise(x_t, tau, conditions)

    schedule, labels, x_0 = schedule_at(300), [3, 1, 4, 1], normals(1)
    oracle = Labelled(lambda x, alpha, sigma: torch.tanh(x), SHAPE[1:], LINEAR)
    boomerang(x_0, oracle, schedule, solver_of(schedule), SequentialNoise(x_0, 2), labels)
    assert len(seen) == schedule.n
    assert all(got == labels for got in seen)


def test_a_perfect_denoiser_undoes_the_jump_without_fresh_noise():
    """At eta 0, a network that names the very noise of the jump brings x_0 back from any t, on any grid."""
    x_0, eps = normals(1), normals(2)

    class Perfect(Oracle):
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            return eps

    for timestep, steps in itertools.product((1, 137, 700), (1, 20, 1000)):
        schedule = schedule_at(timestep, steps)
        oracle = Perfect(lambda x, alpha, sigma: x, SHAPE[1:], LINEAR)
        out = boomerang(x_0, oracle, schedule, solver_of(schedule, eta=0.0), GivenNoise(eps))
        assert torch.allclose(out, x_0, rtol=0, atol=1e-11)


@pytest.mark.slow
@given(timestep=st.integers(1, 1000), steps=st.integers(1, 30), eta=st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_rows_do_not_see_each_other(timestep, steps, eta):
    schedule = schedule_at(timestep, steps)
    solver, x_0 = solver_of(schedule, eta), normals(1, dtype=torch.float32)
    together = boomerang(x_0, smooth_oracle(), schedule, solver, KeyedNoise(keys(4), x_0))
    for row in range(4):
        one = x_0[row : row + 1]
        alone = boomerang(one, smooth_oracle(), schedule, solver, KeyedNoise([keys(4)[row]], one))
        assert torch.equal(together[row], alone[0])


@pytest.mark.slow
def test_distance_to_the_input_grows_with_t_at_equal_seeds():
    """Two modes, keyed noise, the fractions the project promises; and labels flip more often."""
    count = 4000
    oracle = mixture_oracle(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.05, LINEAR)
    modes = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])[torch.arange(count) % 2]
    x_0 = (modes + math.sqrt(0.05) * normals(1, (count, 2)).float()).view(count, 2, 1, 1)
    noise_keys = keys(count)
    distances, agreements = [], []
    for fraction in (0, 0.1, 0.2, 0.4, 0.6, 0.8):
        schedule = schedule_at(round(1000 * fraction), steps=50)
        out = boomerang(x_0, oracle, schedule, solver_of(schedule), KeyedNoise(noise_keys, x_0))
        distances.append(float((out - x_0).square().sum((1, 2, 3)).mean()))
        agreements.append(float(((out > 0) == (x_0 > 0))[:, 0].double().mean()))
    assert distances[0] == 0
    assert all(low < high for low, high in itertools.pairwise(distances))
    assert agreements == sorted(agreements, reverse=True)
    assert agreements[0] > 0.99
    assert agreements[-1] == pytest.approx(0.5, abs=0.04)


def test_keyed_noise_shows_the_same_jump_at_any_t_and_a_new_draw_at_every_step():
    x_0 = torch.zeros(3, 2, 4, 4)
    noise = KeyedNoise(keys(3), x_0)
    at = [torch.full((3,), i) for i in range(4)]
    assert torch.equal(noise.forward(at[1]), noise.forward(at[3]))
    words = key_words(keys(3))
    assert torch.equal(noise.forward(at[3]), normal(words, (2, 4, 4), purpose=Purpose.FORWARD, node=at[0]))
    assert torch.equal(noise.reverse(at[3]), normal(words, (2, 4, 4), purpose=Purpose.REVERSE, node=at[3]))
    assert not torch.equal(noise.reverse(at[2]), noise.reverse(at[3]))
    assert not torch.equal(noise.forward(at[0]), noise.reverse(at[0]))
