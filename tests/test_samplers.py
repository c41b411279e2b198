"""The one step against diffusers' DDPM, DDIM, Euler and ancestral schedulers, given the same noise.

Where the tables on both sides are float64 the two agree to rounding; diffusers' stock tables are float32 and
cancel, so there the bound is 1e-3 of the state's RMS.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.samplers import Column, Solver, build_solver, step
from boomerang_batch.diffusion.schedule import (
    NoiseLevels,
    Schedule,
    build_schedule,
    flow_levels,
    ve_levels,
    vp_levels,
)
from boomerang_batch.errors import ConfigError
from tests.oracles import levels_of, linear_levels, step_from

SHAPE = (3, 2, 4, 4)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
LINEAR = linear_levels()
BETAS = st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=40)


def network(x: Tensor, tau: float) -> Tensor:
    """Some smooth function of the state and the timestep; no diffusion model, the algebra doesn't care."""
    return torch.tanh(0.8 * x + 0.01 * tau) + 0.1 * x.flip(-1)


def normals(seed: int, dtype: torch.dtype = torch.float64, shape=SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk(schedule: Schedule, solver: Solver, x: Tensor, z: list[Tensor]) -> Tensor:
    """The reverse pass; z[i] is the draw of the step from node i."""
    for i in range(schedule.n, 0, -1):
        node = torch.full((len(x),), i)
        x = step_from(solver, x, network(x, float(schedule.tau[i])), node, z[i])
    return x


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def in_float64(scheduler, levels: NoiseLevels):
    """Give a diffusers scheduler our float64 table, so that what is compared is the algebra."""
    scheduler.alphas_cumprod = levels.alpha**2
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def ddpm_walk(scheduler: DDPMScheduler, timesteps: list[int], x: Tensor, seeds: dict[int, int]) -> Tensor:
    scheduler.set_timesteps(timesteps=timesteps)
    for i, timestep in zip(range(len(timesteps), 0, -1), timesteps, strict=True):
        generator = torch.Generator().manual_seed(seeds[i])
        x = scheduler.step(network(x, timestep), timestep, x, generator=generator).prev_sample
    return x


# --- DDPM ---


@pytest.mark.slow
@given(
    betas=BETAS,
    data=st.data(),
    prediction=st.sampled_from(PREDICTIONS),
    clip=st.sampled_from([None, 0.5, 1.0]),
    variance=st.sampled_from(["fixed_small", "fixed_large"]),
)
@settings(max_examples=120, deadline=None)
def test_eta_one_is_ddpm(betas, data, prediction, clip, variance):
    """Random chain, random node lists, start off the grid, with and without clamping of x_0."""
    levels = vp_levels((1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0))
    grid = tuple(sorted(data.draw(st.sets(st.integers(0, len(betas) - 1), min_size=1))))
    timestep = data.draw(st.integers(1, len(betas)))
    schedule = build_schedule(levels, grid=grid, steps=len(grid), t=("timestep", timestep), start="exact")
    solver = build_solver(schedule, prediction=prediction, eta=1, variance=variance, clip_range=clip)

    scheduler = DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=prediction,
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    timesteps = [int(tau) for tau in schedule.tau.tolist()[:0:-1]]
    start, seeds = normals(1), {i: 100 + i for i in range(schedule.n + 1)}
    theirs = ddpm_walk(in_float64(scheduler, levels), timesteps, start, seeds)
    if timesteps[-1] != 0:
        # diffusers draws at its last step unless that is timestep 0, with a variance of 1e-20 (fixed_small) or
        # beta; the last step of DDPM's paper draws nothing.
        last = float(1 - levels.alpha[timesteps[-1]] ** 2) if variance == "fixed_large" else 1e-20
        theirs = theirs - last**0.5 * normals(seeds[1])
    ours = walk(schedule, solver, start, [normals(seeds[i]) for i in range(schedule.n + 1)])
    assert rms(ours - theirs) <= 1e-10 * max(1.0, rms(theirs))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("steps", "timestep"), [(50, 400), (1000, 150), (7, 1000)])
def test_stock_ddpm_with_its_float32_tables(prediction, clip, variance, steps, timestep):
    schedule = build_schedule(LINEAR, grid="linspace", steps=steps, t=("timestep", timestep), start="exact")
    solver = build_solver(schedule, prediction=prediction, eta=1, variance=variance, clip_range=clip)
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=variance, clip_sample=clip is not None)
    timesteps = [int(tau) for tau in schedule.tau.tolist()[:0:-1]]
    seeds = {i: i for i in range(schedule.n + 1)}
    start = normals(1, torch.float32)
    theirs = ddpm_walk(scheduler, timesteps, start, seeds)
    ours = walk(schedule, solver, start, [normals(i, torch.float32) for i in range(schedule.n + 1)])
    assert ours.dtype == torch.float32
    assert rms(ours - theirs) <= 1e-3 * rms(theirs)


# --- DDIM ---


def ddim_walk(scheduler, steps: int, n: int, eta: float, x: Tensor, z: list[Tensor], rederive: bool) -> Tensor:
    """On leading spacing, the only one for which DDIMScheduler.step finds its own next timestep."""
    scheduler.set_timesteps(steps)
    for i, timestep in zip(range(n, 0, -1), scheduler.timesteps.tolist()[-n:], strict=True):
        x = scheduler.step(
            network(x, timestep),
            timestep,
            x,
            eta=eta,
            use_clipped_model_output=rederive,
            variance_noise=z[i] if eta > 0 else None,
        ).prev_sample
    return x


@pytest.mark.slow
@given(
    betas=BETAS,
    data=st.data(),
    eta=st.floats(0, 1),
    prediction=st.sampled_from(PREDICTIONS),
    clip=st.sampled_from([None, 0.5, 1.0]),
)
@settings(max_examples=120, deadline=None)
def test_every_eta_is_ddim(betas, data, eta, prediction, clip):
    levels = vp_levels((1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0))
    steps = data.draw(st.integers(1, len(betas)))
    fraction = data.draw(st.floats(1 / steps, 1))
    schedule = build_schedule(
        levels, grid="leading", steps=steps, t=("fraction", fraction), start="diffusers-strength"
    )
    solver = build_solver(schedule, prediction=prediction, eta=eta, clip_range=clip)
    if schedule.n == 0:  # int(steps * (1 / steps)) may be 0
        return

    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    start, z = normals(1), [normals(100 + i) for i in range(schedule.n + 1)]
    theirs = ddim_walk(
        in_float64(scheduler, levels), steps, schedule.n, eta, start, z, rederive=clip is not None
    )
    ours = walk(schedule, solver, start, z)
    assert rms(ours - theirs) <= 1e-10 * max(1.0, rms(theirs))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("steps", "fraction"), [(50, 0.4), (10, 1.0), (250, 0.3)])
def test_stock_ddim_with_its_float32_tables(prediction, eta, steps, fraction):
    schedule = build_schedule(
        LINEAR, grid="leading", steps=steps, t=("fraction", fraction), start="diffusers-strength"
    )
    solver = build_solver(schedule, prediction=prediction, eta=eta)
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    start = normals(1, torch.float32)
    z = [normals(100 + i, torch.float32) for i in range(schedule.n + 1)]
    theirs = ddim_walk(scheduler, steps, schedule.n, eta, start, z, rederive=False)
    assert rms(walk(schedule, solver, start, z) - theirs) <= 1e-3 * rms(theirs)


def test_clamping_without_rederiving_the_noise_would_not_be_ddpm():
    """Why `step` re-derives it: diffusers' DDIM default keeps the unclamped noise, and differs."""
    schedule = build_schedule(LINEAR, grid="leading", steps=10, t=("fraction", 0.5), start="diffusers-strength")
    solver = build_solver(schedule, prediction="epsilon", eta=1, clip_range=1.0)
    start, z = 3 * normals(1), [normals(i) for i in range(schedule.n + 1)]
    ours = walk(schedule, solver, start, z)
    kept, rederived = (
        ddim_walk(in_float64(DDIMScheduler(), LINEAR), 10, schedule.n, 1.0, start, z, rederive=rederive)
        for rederive in (False, True)
    )
    assert rms(ours - rederived) < 1e-10
    assert rms(ours - kept) > 1e-2


# --- ancestral and Euler: the same walk in variance-exploding coordinates ---


def k_walk(scheduler, x: Tensor, n: int, seeds: dict[int, int]) -> Tensor:
    """x in VE coordinates. The scheduler looks up its own start index, so it must be given grid timesteps."""
    for i, timestep in zip(range(n, 0, -1), scheduler.timesteps[-n:], strict=True):
        scaled = scheduler.scale_model_input(x, timestep)
        generator = torch.Generator().manual_seed(seeds[i])
        x = scheduler.step(network(scaled, float(timestep)), timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, NumPy 2
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "eta"), [(EulerAncestralDiscreteScheduler, 1), (EulerDiscreteScheduler, 0)])
@pytest.mark.parametrize(("steps", "fraction"), [(50, 0.4), (20, 1.0), (250, 0.1)])
def test_ancestral_and_euler_walk_the_same_nodes(prediction, kind, eta, steps, fraction):
    schedule = build_schedule(
        LINEAR, grid="leading", steps=steps, t=("fraction", fraction), start="diffusers-strength"
    )
    scheduler = kind(beta_start=1e-4, beta_end=0.02, timestep_spacing="leading", prediction_type=prediction)
    scheduler.set_timesteps(steps)
    seeds = {i: i for i in range(schedule.n + 1)}
    start = normals(1, torch.float32)
    theirs = k_walk(scheduler, start / float(schedule.alpha[-1]), schedule.n, seeds)
    solver = build_solver(schedule, prediction=prediction, eta=eta)
    ours = walk(schedule, solver, start, [normals(i, torch.float32) for i in range(schedule.n + 1)])
    assert rms(ours - theirs) <= 1e-3 * rms(theirs)


@given(sigmas=st.lists(st.floats(0.01, 5), min_size=1, max_size=12), eta=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_ve_levels_step_as_euler_does(sigmas, eta):
    """A VE chain as levels of its own, network input unscaled, against Euler's formulas."""
    levels = ve_levels(torch.tensor(sigmas, dtype=torch.float64).cumsum(0), torch.arange(len(sigmas)))
    schedule = build_schedule(levels, grid="linspace", steps=len(levels), t=("fraction", 1.0), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=eta)
    z = [normals(i) for i in range(schedule.n + 1)]
    x = start = 5 * normals(99)
    for i in range(schedule.n, 0, -1):
        sigma, below = float(schedule.sigma[i]), float(schedule.sigma[i - 1])
        up = eta * (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5
        down = (below**2 - up**2) ** 0.5
        x = x + network(x, float(schedule.tau[i])) * (down - sigma) + up * z[i]
    assert rms(walk(schedule, solver, start, z) - x) <= 1e-10 * max(1.0, rms(x))


def test_the_score_is_the_noise_over_minus_sigma():
    levels = levels_of("ve", torch.linspace(0.1, 10, 20))
    schedule = build_schedule(levels, grid="linspace", steps=20, t=("fraction", 1.0), start="exact")
    x, eps, z, node = normals(1), normals(2), normals(3), torch.tensor([20, 11, 1])
    sigma = schedule.sigma[node].view(-1, 1, 1, 1)
    as_eps = step_from(build_solver(schedule, prediction="epsilon", eta=1), x, eps, node, z)
    as_score = step_from(build_solver(schedule, prediction="score", eta=1), x, -eps / sigma, node, z)
    assert torch.allclose(as_eps, as_score, rtol=0, atol=1e-10)


# --- flow matching ---


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_flow_without_noise_is_flow_match_euler(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    levels = flow_levels(scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0))
    schedule = build_schedule(levels, grid="linspace", steps=steps, t=("fraction", 1.0), start="exact")
    solver = build_solver(schedule, prediction="flow", eta=0)
    x = start = normals(1, torch.float32)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, float(timestep)), timestep, x).prev_sample
    ours = walk(schedule, solver, start, [torch.zeros(SHAPE)] * (steps + 1))
    assert rms(ours - x) <= 1e-5 * rms(x)


@given(s=st.lists(st.floats(0.01, 0.999), min_size=1, max_size=10, unique=True), pure=st.booleans())
@settings(max_examples=60, deadline=None)
def test_flow_without_noise_is_euler_in_float64(s, pure):
    table = torch.tensor(sorted(s) + [1.0] * pure, dtype=torch.float64)
    schedule = build_schedule(
        flow_levels(table, 1000 * table), grid="linspace", steps=len(table), t=("fraction", 1), start="exact"
    )
    solver = build_solver(schedule, prediction="flow", eta=0)
    z = [normals(i) for i in range(schedule.n + 1)]
    x = start = normals(99)
    for i in range(schedule.n, 0, -1):
        x = x + (schedule.sigma[i - 1] - schedule.sigma[i]) * network(x, float(schedule.tau[i]))
    assert rms(walk(schedule, solver, start, z) - x) <= 1e-10 * max(1.0, rms(x))


# --- prediction types ---


@given(
    kind=st.sampled_from(["vp", "ve", "flow"]),
    node=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    clip=st.sampled_from([None, 0.7]),
)
@settings(deadline=None)
def test_every_prediction_type_names_the_same_clean_sample(kind, node, clip):
    levels = levels_of(kind, torch.logspace(-1, 1.5, 12, dtype=torch.float64))
    schedule = build_schedule(levels, grid="linspace", steps=12, t=("fraction", 1), start="exact")
    node = torch.tensor(node)
    alpha, sigma = (table[node].view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    x_0, eps = normals(1), normals(2)
    x_t = alpha * x_0 + sigma * eps
    outputs = {"epsilon": eps, "sample": x_0, "score": -eps / sigma}
    if kind == "vp":
        outputs["v_prediction"] = alpha * eps - sigma * x_0
    if kind == "flow":
        outputs["flow"] = eps - x_0
    expected = x_0 if clip is None else x_0.clamp(-clip, clip)
    for prediction, output in outputs.items():
        solver = build_solver(schedule, prediction=prediction, eta=1, clip_range=clip)
        assert torch.allclose(step(solver.table[node], x_t, output, None)[1], expected, rtol=0, atol=1e-10)


def test_clamping_bounds_the_last_step():
    schedule = build_schedule(LINEAR, grid="linspace", steps=10, t=("timestep", 1), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=1, clip_range=0.5)
    out = step_from(solver, 9 * normals(1), normals(2), torch.ones(3, dtype=torch.int64), normals(3))
    assert float(out.abs().max()) == 0.5


def test_rows_at_different_nodes_step_as_they_would_alone():
    schedule = build_schedule(LINEAR, grid="linspace", steps=20, t=("fraction", 0.8), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=0.7, clip_range=1.0)
    x, output, z, node = normals(1), normals(2), normals(3), torch.tensor([1, schedule.n, 5])
    together = step_from(solver, x, output, node, z)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(together[one], step_from(solver, x[one], output[one], node[one], z[one]))


def test_the_state_keeps_its_dtype_and_the_tables_are_float64():
    schedule = build_schedule(LINEAR, grid="linspace", steps=20, t=("fraction", 0.8), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=1)
    for table in (
        solver[Column.ALPHA],
        solver[Column.SIGMA],
        solver[Column.ALPHA_NEXT],
        solver[Column.DIRECTION],
        solver[Column.NOISE],
    ):
        assert table.dtype == torch.float64
        assert table.shape == (schedule.n + 1,)
    for dtype in (torch.float32, torch.float64):
        x = normals(1, dtype)
        assert step_from(solver, x, x, torch.ones(3, dtype=torch.int64), x).dtype == dtype


# --- variance ---


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@given(eta=st.floats(0, 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_step_keeps_the_forward_law(kind, eta, data):
    """direction^2 + w^2 = sigma'^2: with the true x_0 and noise, the next state has the next node's law."""
    noise = data.draw(st.lists(st.floats(0.01, 2), min_size=1, max_size=30))
    levels = levels_of(kind, torch.tensor(noise, dtype=torch.float64).cumsum(0))
    schedule = build_schedule(levels, grid="linspace", steps=len(levels), t=("fraction", 1), start="exact")
    solver = build_solver(schedule, prediction="sample", eta=eta)
    below = schedule.sigma[:-1] ** 2
    assert torch.allclose(
        solver[Column.DIRECTION][1:] ** 2 + solver[Column.NOISE][1:] ** 2, below, rtol=1e-12, atol=1e-15
    )
    assert float(solver[Column.NOISE][1]) == 0
    assert float(solver[Column.DIRECTION][1]) == 0


def test_eta_zero_adds_no_noise():
    schedule = build_schedule(LINEAR, grid="linspace", steps=20, t=("fraction", 0.8), start="exact")
    assert float(build_solver(schedule, prediction="epsilon", eta=0)[Column.NOISE].abs().max()) == 0


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_fixed_large_is_the_forward_steps_variance(kind):
    levels = levels_of(kind, torch.linspace(0.1, 3, 20))
    schedule = build_schedule(levels, grid="linspace", steps=20, t=("fraction", 1), start="exact")
    large, small = (
        build_solver(schedule, prediction="epsilon", eta=1, variance=variance)
        for variance in ("fixed_large", "fixed_small")
    )
    kept = (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2
    beta = schedule.sigma[1:] ** 2 - kept * schedule.sigma[:-1] ** 2
    assert torch.allclose(large[Column.NOISE][2:] ** 2, beta[1:], rtol=1e-10)
    assert bool((large[Column.NOISE][2:] > small[Column.NOISE][2:]).all())
    assert float(large[Column.NOISE][1]) == 0
    assert torch.equal(large[Column.DIRECTION], small[Column.DIRECTION])


def test_optimal_grows_from_fixed_small_with_the_datas_variance():
    """Data without variance leaves nothing to add; at variance 1 it is fixed_large, but for the last step."""
    schedule = build_schedule(LINEAR, grid="linspace", steps=20, t=("fraction", 0.8), start="exact")

    def noise(variance, data_variance=None):
        return build_solver(
            schedule, prediction="epsilon", eta=1, variance=variance, data_variance=data_variance
        )[Column.NOISE][1:]

    assert torch.allclose(noise("optimal", 1e-12), noise("fixed_small"), atol=1e-6)
    assert torch.allclose(noise("optimal", 1.0)[1:], noise("fixed_large")[1:], rtol=1e-9)
    assert bool((noise("optimal", 0.5) > noise("optimal", 0.1)).all())


def learned_walk(n: int = 6) -> tuple[Schedule, dict[str, Solver]]:
    schedule = build_schedule(LINEAR, grid="linspace", steps=n, t=("fraction", 0.8), start="exact")
    return schedule, {
        variance: build_solver(schedule, prediction="epsilon", eta=1, variance=variance)
        for variance in ("fixed_small", "fixed_large", "learned")
    }


def test_a_learned_variance_lies_between_small_and_large():
    schedule, solvers = learned_walk()
    node = torch.arange(1, schedule.n + 1)
    x, mean, z = (normals(seed, shape=(schedule.n, 2, 4, 4)) for seed in (1, 2, 3))
    moved = {name: step_from(solver, x, mean, node, z) for name, solver in solvers.items() if name != "learned"}
    for said, name in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        output = torch.cat([mean, torch.full_like(mean, said)], 1)
        assert torch.allclose(step_from(solvers["learned"], x, output, node, z), moved[name], atol=1e-12)
    between = step_from(solvers["learned"], x, torch.cat([mean, torch.zeros_like(mean)], 1), node, z)
    # Halfway in the logarithm: the geometric mean of the two deviations.
    deviations = (
        (solvers["fixed_small"][Column.NOISE] * solvers["fixed_large"][Column.NOISE])
        .sqrt()[node]
        .view(-1, 1, 1, 1)
    )
    without = step(solvers["fixed_small"].table[node], x, mean, None)[0]
    assert torch.allclose(between, without + deviations * z, atol=1e-12)


@pytest.mark.parametrize("said", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_said_of_a_variance_that_nobody_asked_for_is_ignored(said):
    """Under a fixed variance, and at the last step, which adds no noise."""
    schedule, solvers = learned_walk()
    x, mean, z = (normals(seed, shape=(schedule.n, 2, 4, 4)) for seed in (1, 2, 3))
    output = torch.cat([mean, torch.full_like(mean, said)], 1)
    node = torch.arange(1, schedule.n + 1)
    fixed = step_from(solvers["fixed_small"], x, mean, node, z)
    assert torch.equal(step_from(solvers["fixed_small"], x, output, node, z), fixed)
    assert torch.equal(step_from(solvers["learned"], x, output, node, z)[0], fixed[0])


# --- bits and extremes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whether_others_add_noise_changes_no_bit_not_even_a_zeros_sign(dtype):
    """The last step adds none, and a network that says -0 is believed."""
    schedule = build_schedule(LINEAR, grid="linspace", steps=5, t=("fraction", 0.5), start="exact")
    solver = build_solver(schedule, prediction="sample", eta=1)
    rows = solver.table[torch.ones(3, dtype=torch.int64)]
    x, z = normals(1, dtype), normals(2, dtype)
    silent = step(rows, x, torch.full_like(x, -0.0), None)[0]
    beside = step(rows, x, torch.full_like(x, -0.0), z)[0]
    assert torch.equal(silent.signbit(), beside.signbit())
    assert torch.equal(silent, beside)


def chains() -> dict[str, tuple[NoiseLevels, str]]:
    """Chains with the predictions that are at home in them, begun at pure noise where that means anything."""
    table = torch.linspace(0.999, 0, 12, dtype=torch.float64) ** 2
    flow = flow_levels(torch.linspace(0.05, 1, 12), torch.arange(12))
    wide = torch.logspace(-3, 2.5, 12, dtype=torch.float64)
    return {
        "zero-snr v": (vp_levels(table), "v_prediction"),
        "zero-snr sample": (vp_levels(table), "sample"),
        "vp epsilon": (levels_of("vp", wide), "epsilon"),
        "ve score": (levels_of("ve", wide), "score"),
        "flow": (flow, "flow"),
    }


@pytest.mark.parametrize("name", chains())
@pytest.mark.parametrize(("eta", "order"), [(1, 1), (0.5, 1), (0, 1), (0, 2)])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("end", [(1.0, 0.0), (0.9999, 0.0141), "first"])
def test_a_walk_in_float32_stays_finite_wherever_it_begins_and_ends(name, eta, order, clip, end):
    """And near its walk in float64: pure noise at the start, an end that is not clean or is node 1 itself."""
    levels, prediction = chains()[name]
    schedule = build_schedule(levels, grid="linspace", steps=12, t=("fraction", 1), start="exact")
    if end != (1.0, 0.0):
        at = (float(schedule.alpha[1]), float(schedule.sigma[1])) if end == "first" else end
        ratio = at[1] / at[0]
        above = [
            i for i in range(1, schedule.n + 1) if schedule.sigma[i] >= ratio * schedule.alpha[i] * (1 - 1e-12)
        ]
        parts = (
            torch.cat([torch.tensor([value], dtype=torch.float64), column[above]])
            for value, column in zip((*at, 0.0), (schedule.alpha, schedule.sigma, schedule.tau), strict=True)
        )
        schedule = Schedule(kind=schedule.kind, **dict(zip(("alpha", "sigma", "tau"), parts, strict=True)))
    solver = build_solver(schedule, prediction=prediction, eta=eta, order=order, clip_range=clip)
    finite = [column for column in Column if column is not Column.CLIP or clip is not None]
    assert bool(solver.table[1:, finite].isfinite().all())

    def walked(dtype: torch.dtype) -> Tensor:
        x, before = (float(schedule.alpha[-1]) + float(schedule.sigma[-1]) * normals(1)).to(dtype), None
        rows = solver.table.to(dtype)
        for i in range(schedule.n, 0, -1):
            node = torch.full((len(x),), i)
            scale = float(schedule.sigma[i]) if prediction == "score" else 1.0
            output = network(x / max(1.0, float(schedule.sigma[i])), float(schedule.tau[i])) / scale
            x, x0 = step(rows[node], x, output, normals(100 + i).to(dtype), before)
            before = x0 if order == 2 else None
            assert x.dtype == dtype
        return x

    exact, single = walked(torch.float64), walked(torch.float32)
    assert bool(single.isfinite().all())
    assert rms(single.double() - exact) <= 1e-3 * max(1.0, rms(exact))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_a_row_of_nonsense_changes_no_bit_of_the_others(poison):
    """In its state, its output, its history and what is known of it."""
    schedule = build_schedule(LINEAR, grid="linspace", steps=8, t=("fraction", 0.9), start="exact")
    solver = build_solver(schedule, prediction="epsilon", eta=0, order=2, clip_range=1.0)
    rows = solver.table[torch.tensor([5, 4, 3])].float()
    inputs = [normals(seed, torch.float32) for seed in range(5)]
    mask = torch.arange(16).view(1, 1, 4, 4).expand(3, 1, 4, 4) % 3 > 0

    def stepped(x, output, z, before, known):
        return step(rows, x, output, z, before, (known, mask))

    clean = stepped(*inputs)
    for tensor in inputs:
        tensor[1] = poison
    for good, beside in zip(clean, stepped(*inputs), strict=True):
        assert torch.equal(good[[0, 2]], beside[[0, 2]])


# --- what has no meaning is refused ---


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_pure_noise_is_refused_where_the_prediction_is_silent(prediction):
    levels = flow_levels(torch.linspace(0.1, 1, 10), torch.arange(10))
    schedule = build_schedule(levels, grid="linspace", steps=10, t=("fraction", 1), start="exact")
    with pytest.raises(ConfigError, match="pure noise"):
        build_solver(schedule, prediction=prediction, eta=1)


@pytest.mark.parametrize(("kind", "prediction"), [("vp", "v_prediction"), ("vp", "sample"), ("flow", "flow")])
@pytest.mark.parametrize("eta", [0, 1])
def test_pure_noise_is_no_singularity_elsewhere(kind, prediction, eta):
    """Zero-terminal-SNR chains and flows start at alpha = 0."""
    table = torch.linspace(0.9, 0, 10, dtype=torch.float64)
    levels = vp_levels(table) if kind == "vp" else flow_levels(1 - table, torch.arange(10))
    schedule = build_schedule(levels, grid="linspace", steps=10, t=("fraction", 1), start="exact")
    assert schedule.alpha[-1] == 0
    solver = build_solver(schedule, prediction=prediction, eta=eta)
    assert bool(solver[Column.NOISE][1:].isfinite().all())
    assert bool(walk(schedule, solver, normals(1), [normals(i) for i in range(11)]).isfinite().all())
    x_0, eps = normals(1), normals(2)
    output = {"v_prediction": -x_0, "sample": x_0, "flow": eps - x_0}[prediction]
    node = torch.full((3,), 10)
    assert torch.allclose(step(solver.table[node], eps, output, None)[1], x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    schedule = build_schedule(LINEAR, grid="linspace", steps=10, t=("fraction", 0.5), start="exact")
    with pytest.raises(ConfigError, match=r"outside 0\.\.1"):
        build_solver(schedule, prediction="epsilon", eta=eta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.5, "variance": "fixed_large"}, "eta 1 only"),
        ({"eta": 0.0, "variance": "optimal", "data_variance": 1.0}, "eta 1 only"),
        ({"eta": 1.0, "variance": "optimal"}, "data_variance"),
    ],
)
def test_variances_without_meaning_are_refused(options, message):
    schedule = build_schedule(LINEAR, grid="linspace", steps=10, t=("fraction", 0.5), start="exact")
    with pytest.raises(ConfigError, match=message):
        build_solver(schedule, prediction="epsilon", **options)


def test_fixed_large_is_refused_for_flow():
    schedule = build_schedule(
        levels_of("flow", torch.linspace(0.1, 3, 10)),
        grid="linspace",
        steps=10,
        t=("fraction", 1),
        start="exact",
    )
    with pytest.raises(ConfigError, match="no meaning for flow"):
        build_solver(schedule, prediction="flow", eta=1, variance="fixed_large")


def test_a_schedule_of_no_steps_has_a_solver():
    """t = 0 needs no special case in the caller."""
    schedule = build_schedule(LINEAR, grid="linspace", steps=10, t=("fraction", 0), start="exact")
    for variance, data_variance in (("fixed_small", None), ("fixed_large", None), ("optimal", 0.25)):
        solver = build_solver(
            schedule, prediction="epsilon", eta=1, variance=variance, data_variance=data_variance
        )
        assert bool(solver[Column.NOISE].isfinite().all())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_order_two_is_dpm_solver_multistep(steps, share):
    """A walk begun in the middle, against diffusers' own: first and last step of order 1, 2M between."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    told = scheduler.timesteps.tolist()[-max(1, round(share * steps)) :]
    levels = vp_levels(scheduler.alphas_cumprod)
    schedule = build_schedule(
        levels, grid=sorted(told), steps=len(told), t=("timestep", told[0] + 1), start="exact"
    )
    solver = build_solver(schedule, prediction="epsilon", eta=0.0, order=2)
    x = theirs = normals(3, torch.float32)
    before = None
    for i, tau in zip(range(schedule.n, 0, -1), told, strict=True):
        node = torch.full((len(x),), i)
        x, before = step(solver.table[node], x, network(x, tau), None, before)
        theirs = scheduler.step(network(theirs, tau), tau, theirs).prev_sample
    assert rms(x - theirs) <= 1e-3 * rms(theirs)


def test_order_two_is_refused_with_fresh_noise():
    with pytest.raises(ConfigError, match="order 2 with eta 1"):
        build_solver(
            build_schedule(LINEAR, grid="linspace", steps=5, t=("fraction", 0.5), start="exact"),
            prediction="epsilon",
            eta=1.0,
            order=2,
        )
