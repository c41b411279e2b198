"""Closed forms: for Gaussian data Boomerang's output law is known on any grid, so it is tested, not trusted.

For x_0 ~ N(mu, s2) every step is affine, and the output given x_0 is N(mu + G (x_0 - mu), V). `law` computes G
and V from the textbook coefficients alone; `measured_law` reads them off the code, by impulses instead of
samples. rho = s2 / (s2 + sigma_t^2). The labels T1 to T8 number the facts being tested:

T1 impulse response · T2 Monte Carlo · T3 distance grows with t · T4 the data's law is preserved · T5 cascades ·
T6 order of convergence · T7 all samplers are one · T8 the start level is the one asked for
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import NoiseLevels, Schedule, build_schedule
from tests.oracles import (
    GivenNoise,
    Oracle,
    SequentialNoise,
    empirical_oracle,
    gaussian_oracle,
    levels_of,
    linear_levels,
    mixture_oracle,
    scalar_gaussian_oracle,
    self_weights,
)

pytestmark = pytest.mark.slow

LINEAR = linear_levels()
KINDS = ["vp", "ve", "flow"]
RANDOM_LEVELS = st.lists(st.floats(0.02, 2), min_size=2, max_size=30)


def schedule_for(levels: NoiseLevels, t, *, steps: int, grid="linspace", start="exact") -> Schedule:
    return build_schedule(levels, grid=grid, steps=steps, t=t, start=start)


def solver_for(oracle: Oracle, schedule: Schedule, *, eta=1.0, variance="fixed_small", data_variance=None):
    return build_solver(
        schedule,
        prediction=oracle.spec.prediction,
        eta=eta,
        variance=variance,
        data_variance=data_variance,
        clip_range=oracle.spec.clip_range,
    )


def measured_law(oracle: Oracle, schedule: Schedule, solver) -> tuple[Tensor, Tensor]:
    """G and V, (d, d) each, of an affine denoiser: one batch whose rows are unit impulses.

    Rows: a base of zeros; a unit in each coordinate of x_0; then for the jump and for each step a unit in each
    coordinate of its draw alone.
    """
    size, n = oracle.spec.channels, schedule.n
    eye = torch.eye(size, dtype=torch.float64).view(size, size, 1, 1)
    rows = 1 + size * (n + 2)
    x_0, forward = torch.zeros(2, rows, size, 1, 1, dtype=torch.float64)
    x_0[1 : 1 + size] = eye
    forward[1 + size : 1 + 2 * size] = eye
    reverse = {}
    for i in range(1, n + 1):
        reverse[i] = torch.zeros_like(forward)
        reverse[i][1 + size * (i + 1) : 1 + size * (i + 2)] = eye
    out = boomerang(x_0, oracle, schedule, solver, GivenNoise(forward, reverse))
    response = (out[1:] - out[:1]).view(n + 2, size, size)
    return response[0].T, sum(part.T @ part for part in response[1:])


def law(
    schedule: Schedule, s2: float, *, eta: float = 1.0, variance: str = "fixed_small"
) -> tuple[float, float]:
    """G and V of one eigenvalue, from the coefficients as DDPM and DDIM publish them, in plain floats."""
    product, spread = 1.0, 0.0
    for i in range(1, schedule.n + 1):  # the last step executed comes first
        a, s = float(schedule.alpha[i]), float(schedule.sigma[i])
        b, r = float(schedule.alpha[i - 1]), float(schedule.sigma[i - 1])
        posterior = r**2 / s**2 * (s**2 - (a / b) ** 2 * r**2)
        gain = a * s2 / (a**2 * s2 + s**2)
        straight = math.sqrt(max(r**2 - eta**2 * posterior, 0.0))
        c_0 = b - straight * a / s
        added = eta**2 * posterior
        if variance == "fixed_large" and i > 1:
            added = s**2 - (a / b) ** 2 * r**2
        if variance == "optimal":
            added += c_0**2 * s2 * s**2 / (a**2 * s2 + s**2)
        spread += added * product**2
        product *= b * gain + straight * (1 - a * gain) / s
    a, s = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    return a * product, spread + s**2 * product**2


def rho(schedule: Schedule, s2: float) -> float:
    return s2 / (s2 + schedule.relative_sigma**2)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(size: int, seed: int) -> Tensor:
    root = normals(seed, size, size)
    return root @ root.T / size + 0.05 * torch.eye(size, dtype=torch.float64)


# --- T1: impulse response ---


@given(
    kind=st.sampled_from(KINDS),
    noise=RANDOM_LEVELS,
    s2=st.floats(0.01, 3),
    eta=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_t1_gain_and_spread_are_the_closed_form(kind, noise, s2, eta, data):
    levels = levels_of(kind, torch.tensor(noise, dtype=torch.float64).cumsum(0))
    steps, timestep = data.draw(st.integers(1, len(noise))), data.draw(st.integers(1, len(noise)))
    variance = data.draw(
        st.sampled_from(["fixed_small", "optimal", "fixed_large"][: 3 if kind != "flow" else 2])
    )
    eta = eta if variance == "fixed_small" else 1.0
    predictions = {"vp": ["epsilon", "sample", "v_prediction"], "ve": ["score"], "flow": ["flow", "epsilon"]}
    prediction = data.draw(st.sampled_from(predictions[kind]))

    oracle = scalar_gaussian_oracle(s2, levels, prediction)
    schedule = schedule_for(levels, ("timestep", timestep), steps=steps)
    data_variance = s2 if variance == "optimal" else None
    solver = solver_for(oracle, schedule, eta=eta, variance=variance, data_variance=data_variance)
    gain, spread = measured_law(oracle, schedule, solver)
    expected = law(schedule, s2, eta=eta, variance=variance)
    assert float(gain) == pytest.approx(expected[0], rel=1e-10, abs=1e-10)
    assert float(spread) == pytest.approx(expected[1], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_t1_in_several_dimensions_law_is_a_matrix_function(eta):
    covariance, mean = random_covariance(4, 1), normals(2, 4)
    oracle = gaussian_oracle(mean, covariance, LINEAR)
    schedule = schedule_for(LINEAR, ("fraction", 0.5), steps=20)
    gain, spread = measured_law(oracle, schedule, solver_for(oracle, schedule, eta=eta))
    values, basis = torch.linalg.eigh(covariance)
    laws = torch.tensor([law(schedule, float(s2), eta=eta) for s2 in values], dtype=torch.float64)
    assert torch.allclose(gain, basis @ laws[:, 0].diag() @ basis.T, rtol=0, atol=1e-10)
    assert torch.allclose(spread, basis @ laws[:, 1].diag() @ basis.T, rtol=0, atol=1e-10)
    # The mean is a fixed point, and everything moves around it.
    at_mean = boomerang(
        mean.view(1, 4, 1, 1),
        oracle,
        schedule,
        solver_for(oracle, schedule, eta=eta),
        GivenNoise(torch.zeros(1, 4, 1, 1, dtype=torch.float64)),
    )
    assert torch.allclose(at_mean.flatten(), mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 5, 50, 1000])
@pytest.mark.parametrize("timestep", [100, 500, 900])
def test_t1_stochastic_gain_is_rho_on_every_grid(kind, steps, timestep):
    """The tower property: at eta 1 no grid, however coarse, biases the mean."""
    levels = levels_of(kind, LINEAR.relative_sigma)
    schedule = schedule_for(levels, ("timestep", timestep), steps=steps)
    oracle = scalar_gaussian_oracle(0.25, levels)
    solver = solver_for(oracle, schedule)
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = boomerang(x_0, oracle, schedule, solver, GivenNoise(torch.zeros_like(x_0)))
    assert float(out) == pytest.approx(rho(schedule, 0.25), rel=1e-9)


@pytest.mark.parametrize("steps", [5, 28, 100])
def test_t1_ancestral_flow_is_unbiased_at_the_middle(steps):
    """s = .5, s2 = .25: rho = .2 at any number of steps, where Euler-Maruyama would give .17 at 28."""
    s = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    levels = levels_of("flow", s / (1 - s))
    oracle = scalar_gaussian_oracle(0.25, levels, "flow")
    schedule = schedule_for(levels, ("sigma", 1.0), steps=steps)
    gain, _ = measured_law(oracle, schedule, solver_for(oracle, schedule))
    assert float(gain) == pytest.approx(0.2, abs=1e-10)


# Half way on the linear schedule with data variance .25: nodes, G and V / s2 of DDPM with its three variances,
# and of DDIM.
HALF_WAY = [
    (500, 0.020877, 0.98407, 1.00257, 0.999564, 0.144057, 0.97327),
    (100, 0.020877, 0.93087, 1.01647, 0.999564, 0.142438, 0.95151),
    (20, 0.020877, 0.74308, 1.09248, 0.999564, 0.134229, 0.84500),
    (5, 0.020877, 0.38482, 1.49267, 0.999564, 0.100400, 0.47275),
]


@pytest.mark.parametrize(("nodes", "gain", "small", "large", "optimal", "ddim_gain", "ddim_spread"), HALF_WAY)
def test_t1_the_published_table_half_way(nodes, gain, small, large, optimal, ddim_gain, ddim_spread):
    indices = torch.linspace(0, 499, nodes, dtype=torch.float64).round().long().unique().tolist()
    schedule = schedule_for(LINEAR, ("timestep", 500), grid=tuple(indices), steps=nodes)
    assert schedule.n == nodes
    oracle = scalar_gaussian_oracle(0.25, LINEAR)

    def measured(**options) -> list[float]:
        g, v = measured_law(oracle, schedule, solver_for(oracle, schedule, **options))
        return [float(g), float(v) / 0.25]

    assert measured(variance="fixed_small") == pytest.approx([gain, small], abs=6e-6)
    assert measured(variance="fixed_large") == pytest.approx([gain, large], abs=6e-6)
    assert measured(variance="optimal", data_variance=0.25) == pytest.approx([gain, optimal], abs=6e-6)
    assert measured(eta=0.0) == pytest.approx([ddim_gain, ddim_spread], abs=6e-6)


def test_t1_the_limits_of_the_table():
    schedule = schedule_for(LINEAR, ("timestep", 500), steps=1000)
    r = rho(schedule, 0.25)
    assert [r, 1 - r**2, math.sqrt(r), 1 - r] == pytest.approx(
        [0.020877, 0.999564, 0.144490, 0.97912], abs=6e-6
    )


# --- T2: Monte Carlo, with the keyed noise that runs use ---


@pytest.mark.parametrize(
    ("eta", "variance"), [(1.0, "fixed_small"), (1.0, "fixed_large"), (0.0, "fixed_small")]
)
def test_t2_keyed_draws_have_the_closed_forms_law(eta, variance):
    """One input, 100,000 noise keys, a float32 state: mean within 5 standard errors, covariance within 4."""
    size, count = 4, 100_000
    covariance, mean = random_covariance(size, 3), normals(4, size)
    oracle = gaussian_oracle(mean, covariance, LINEAR)
    schedule = schedule_for(LINEAR, ("fraction", 0.3), steps=16)
    solver = solver_for(oracle, schedule, eta=eta, variance=variance)
    gain, spread = measured_law(oracle, schedule, solver)

    x_0 = (mean + normals(5, size)).float().view(1, size, 1, 1)
    keys = [noise_key(bytes(32), identity=b"x", variant=i) for i in range(count)]
    batch = x_0.expand(count, -1, -1, -1)
    out = boomerang(batch, oracle, schedule, solver, KeyedNoise(keys, batch)).double().flatten(1)

    expected = mean + gain @ (x_0.double().flatten() - mean)
    z = (out.mean(0) - expected) / (spread.diagonal() / count).sqrt()
    assert float(z.abs().max()) < 5
    error = torch.linalg.norm(out.T.cov() - spread) / torch.linalg.norm(spread)
    assert float(error) < covariance_bound(spread, count)


def covariance_bound(covariance: Tensor, count: int) -> float:
    """Four standard errors of a sample covariance's relative Frobenius distance."""
    return 4 * math.sqrt((1 + float(covariance.trace() ** 2 / covariance.square().sum())) / count)


# --- T3: distance to the input grows with t ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_t3_mean_squared_distance_grows_with_t_as_the_formula_says(kind, eta):
    """Over x_0 ~ p: MSD = (1 - G)^2 s2 + V, near 2 s2 (1 - rho), and for an ODE near 2 s2 (1 - sqrt(rho))."""
    s2 = 0.25
    levels = levels_of(kind, LINEAR.relative_sigma)
    oracle = scalar_gaussian_oracle(s2, levels)
    distances = []
    for timestep in (0, 1, 20, 100, 200, 300, 400, 500):
        schedule = schedule_for(levels, ("timestep", timestep), steps=200)
        solver = solver_for(oracle, schedule, eta=eta)
        gain, spread = measured_law(oracle, schedule, solver)
        distances.append(float((1 - gain) ** 2 * s2 + spread))
        expected_gain, expected_spread = law(schedule, s2, eta=eta)
        assert distances[-1] == pytest.approx((1 - expected_gain) ** 2 * s2 + expected_spread, rel=1e-9)
        r = rho(schedule, s2)
        limit = 2 * s2 * (1 - (r if eta else math.sqrt(r)))
        assert distances[-1] == pytest.approx(limit, rel=0.12, abs=0.006)
    assert distances[0] == 0
    assert all(low < high for low, high in itertools.pairwise(distances))


def test_t3_deterministic_samplers_stay_closer():
    """The ratio of their distances is 1 / (1 + sqrt(rho)), between a half and one."""
    s2 = 0.25
    for timestep in (100, 300, 500):
        schedule = schedule_for(LINEAR, ("timestep", timestep), steps=1000)
        by_eta = []
        for eta in (0.0, 1.0):
            gain, spread = law(schedule, s2, eta=eta)
            by_eta.append((1 - gain) ** 2 * s2 + spread)
        assert by_eta[0] / by_eta[1] == pytest.approx(1 / (1 + math.sqrt(rho(schedule, s2))), rel=0.02)


# --- T4: the data's own law is preserved ---


@pytest.mark.parametrize("kind", KINDS)
@given(noise=RANDOM_LEVELS, s2=st.floats(0.01, 3), data=st.data())
@settings(max_examples=30, deadline=None)
def test_t4_optimal_variance_preserves_the_data_on_any_grid(kind, noise, s2, data):
    levels = levels_of(kind, torch.tensor(noise, dtype=torch.float64).cumsum(0))
    timestep, steps = data.draw(st.integers(1, len(noise))), data.draw(st.integers(1, len(noise)))
    schedule = schedule_for(levels, ("timestep", timestep), steps=steps)
    oracle = scalar_gaussian_oracle(s2, levels)
    solver = solver_for(oracle, schedule, variance="optimal", data_variance=s2)
    gain, spread = measured_law(oracle, schedule, solver)
    assert float(spread) == pytest.approx(s2 * (1 - rho(schedule, s2) ** 2), rel=1e-8)
    assert float(gain**2 * s2 + spread) == pytest.approx(s2, rel=1e-8)


def test_t4_the_papers_variance_is_under_dispersed_and_converges():
    """fixed_small loses variance on any grid, half as much on a grid twice as fine."""
    schedules = [schedule_for(LINEAR, ("timestep", 500), steps=steps) for steps in (80, 160, 320, 640)]
    lost = []
    for schedule in schedules:
        gain, spread = law(schedule, 0.25)
        lost.append(1 - (gain**2 * 0.25 + spread) / 0.25)
    assert all(loss > 0 for loss in lost)
    assert all(1.7 < coarse / fine < 2.1 for coarse, fine in itertools.pairwise(lost))


def test_t4_the_lost_variance_is_the_sum_of_the_steps_uncertainties():
    """V_exact - V = sum over steps of c_0^2 P (product of later gains)^2."""
    s2, schedule = 0.25, schedule_for(LINEAR, ("timestep", 500), steps=20)
    product, missing = 1.0, 0.0
    for i in range(1, schedule.n + 1):
        abar, abar_below = float(schedule.alpha[i] ** 2), float(schedule.alpha[i - 1] ** 2)
        beta = 1 - abar / abar_below
        c_0 = math.sqrt(abar_below) * beta / (1 - abar)
        c_t = math.sqrt(1 - beta) * (1 - abar_below) / (1 - abar)
        uncertainty = s2 * (1 - abar) / (abar * s2 + 1 - abar)
        missing += c_0**2 * uncertainty * product**2
        product *= c_0 * math.sqrt(abar) * s2 / (abar * s2 + 1 - abar) + c_t
    oracle = scalar_gaussian_oracle(s2, LINEAR)
    _, spread = measured_law(oracle, schedule, solver_for(oracle, schedule))
    assert s2 * (1 - rho(schedule, s2) ** 2) - float(spread) == pytest.approx(missing, rel=1e-9)


def test_t4_samples_of_the_data_stay_samples_of_the_data():
    size, count, s2 = 4, 100_000, 0.25
    covariance = s2 * torch.eye(size, dtype=torch.float64)
    oracle = gaussian_oracle(torch.zeros(size), covariance, LINEAR)
    schedule = schedule_for(LINEAR, ("fraction", 0.4), steps=20)
    solver = solver_for(oracle, schedule, variance="optimal", data_variance=s2)
    x_0 = math.sqrt(s2) * normals(6, count, size, 1, 1)
    out = boomerang(x_0, oracle, schedule, solver, SequentialNoise(x_0, 7)).flatten(1)
    assert float((out.mean(0) / math.sqrt(s2 / count)).abs().max()) < 5
    error = torch.linalg.norm(out.T.cov() - covariance) / torch.linalg.norm(covariance)
    assert float(error) < covariance_bound(covariance, count)
    # Far out at t, yet correlated with the source as rho says.
    cross = float((out * x_0.flatten(1)).mean()) / s2
    assert cross == pytest.approx(rho(schedule, s2), abs=5 / math.sqrt(size * count))


def test_t4_stochastic_boomerang_is_reversible():
    """Two-block Gibbs sampling: G Sigma is symmetric, and on a fine grid V = Sigma - G Sigma G^T."""
    covariance = random_covariance(3, 8)
    schedule = schedule_for(LINEAR, ("timestep", 300), steps=1000)
    oracle = gaussian_oracle(torch.zeros(3), covariance, LINEAR)
    solver = solver_for(oracle, schedule)
    gain, spread = measured_law(oracle, schedule, solver)
    noise = schedule.relative_sigma**2 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(gain, covariance @ torch.linalg.inv(covariance + noise), rtol=0, atol=1e-9)
    assert torch.allclose(gain @ covariance, (gain @ covariance).T, rtol=0, atol=1e-9)
    exact = covariance - gain @ covariance @ gain.T
    assert float(torch.linalg.norm(spread - exact) / torch.linalg.norm(exact)) < 0.03


# --- T5: cascades ---


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_t5_a_cascade_is_gibbs_sampling(passes):
    """n passes: G = rho^n and V = s2 (1 - rho^(2n)), read off by sending impulses through all of them."""
    s2, schedule = 0.25, schedule_for(LINEAR, ("timestep", 150), steps=40)
    oracle = scalar_gaussian_oracle(s2, LINEAR)
    solver = solver_for(oracle, schedule, variance="optimal", data_variance=s2)
    draws = schedule.n + 1
    rows = 1 + passes * draws
    x = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
    x[0] = 1
    for pass_index in range(passes):
        unit = torch.eye(rows, dtype=torch.float64)[1 + pass_index * draws :][:draws].view(draws, rows, 1, 1, 1)
        noise = GivenNoise(unit[0], {i: unit[i] for i in range(1, draws)})
        x = boomerang(x, oracle, schedule, solver, noise)
    r = rho(schedule, s2)
    assert float(x[0]) == pytest.approx(r**passes, rel=1e-9)
    assert float(x[1:].square().sum()) == pytest.approx(s2 * (1 - r ** (2 * passes)), rel=1e-9)


# --- T6: DDIM converges with order 1, DPM-Solver++(2M) with order 2 ---


@pytest.mark.parametrize(("order", "least", "most"), [(1, 0.75, 1.25), (2, 1.75, 2.6)])
@pytest.mark.parametrize("kind", KINDS)
def test_t6_the_error_falls_with_the_solvers_order(kind, order, least, most):
    levels = levels_of(kind, LINEAR.relative_sigma)
    oracle = scalar_gaussian_oracle(0.25, levels)
    errors = []
    for steps in (20, 40, 80, 160):
        indices = torch.linspace(0, 499, steps, dtype=torch.float64).round().long().tolist()
        schedule = schedule_for(levels, ("timestep", 500), grid=tuple(indices), steps=steps)
        solver = build_solver(schedule, prediction=oracle.spec.prediction, eta=0.0, order=order)
        gain, _ = measured_law(oracle, schedule, solver)
        errors.append(abs(float(gain) - math.sqrt(rho(schedule, 0.25))))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(least < slope < most for slope in slopes), (errors, slopes)


# --- T7: all chains and samplers are one ---


@given(noise=RANDOM_LEVELS, eta=st.floats(0, 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_t7_chains_of_equal_relative_noise_give_the_same_image(noise, eta, data):
    """VP, VE and flow differ by a factor on the state that is 1 at the clean end, nonlinear model or not."""
    ratios = torch.tensor(noise, dtype=torch.float64).cumsum(0)
    steps, timestep = data.draw(st.integers(1, len(noise))), data.draw(st.integers(1, len(noise)))
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    x_0, draws = normals(1, 3, 2, 1, 1), {i: normals(10 + i, 3, 2, 1, 1) for i in range(len(noise) + 1)}
    results = []
    for kind in KINDS:
        levels = levels_of(kind, ratios)
        oracle = mixture_oracle(means, 0.05, levels)
        schedule = schedule_for(levels, ("timestep", timestep), steps=steps)
        solver = solver_for(oracle, schedule, eta=eta)
        results.append(boomerang(x_0, oracle, schedule, solver, GivenNoise(draws[0], draws)))
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-8)
    assert torch.allclose(results[0], results[2], rtol=0, atol=1e-8)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "score"])
def test_t7_prediction_types_give_the_same_image(prediction):
    schedule = schedule_for(LINEAR, ("fraction", 0.6), steps=25)
    covariance = random_covariance(3, 9)
    x_0 = normals(1, 5, 3, 1, 1)
    results = []
    for spoken in ("epsilon", prediction):
        oracle = gaussian_oracle(torch.ones(3), covariance, LINEAR, spoken, clip_range=1.5)
        solver = solver_for(oracle, schedule)
        results.append(boomerang(x_0, oracle, schedule, solver, SequentialNoise(x_0, 2)))
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-9)


# --- T8: the start level is the one asked for ---


@pytest.mark.parametrize("kind", KINDS)
@given(log_sigma=st.floats(math.log(0.05), math.log(20)), steps=st.sampled_from([1, 7, 50, 200]))
@settings(max_examples=25, deadline=None)
def test_t8_exact_starts_at_the_sigma_asked_for(kind, log_sigma, steps):
    """Off the grid too: noise, first step and what the network is told name one level, so G is its rho."""
    levels = levels_of(kind, LINEAR.relative_sigma)
    sigma = math.exp(log_sigma)
    schedule = schedule_for(levels, ("sigma", sigma), steps=steps)
    oracle = scalar_gaussian_oracle(0.25, levels)
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = boomerang(x_0, oracle, schedule, solver_for(oracle, schedule), GivenNoise(torch.zeros_like(x_0)))
    assert float(out) == pytest.approx(0.25 / (0.25 + sigma**2), rel=1e-7)


def test_t8_detects_the_level_mismatch_of_the_papers_notebook():
    """It noises with array[int(1000 p)] and then denoises from the grid's next timestep below."""
    p, s2 = 0.55, 0.25
    noised_at = int(1000 * p)
    oracle = scalar_gaussian_oracle(s2, LINEAR)
    grid = [20 * i + 1 for i in range(50)]  # Stable Diffusion's: leading, offset 1
    walked = [tau for tau in grid if tau - 1 <= noised_at]
    schedule = schedule_for(LINEAR, ("timestep", walked[-1] + 1), grid=tuple(walked), steps=len(walked))
    assert (noised_at, schedule.tau[-1]) == (550, 541)

    def gain(jump: Schedule) -> float:
        x_0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        noise = GivenNoise(torch.zeros_like(x_0))
        return float(boomerang(x_0, oracle, jump, solver_for(oracle, schedule), noise))

    def level(index: int) -> float:
        return s2 / (s2 + float(LINEAR.relative_sigma[index]) ** 2)

    assert gain(schedule) == pytest.approx(level(541), rel=1e-9)
    alpha, sigma = schedule.alpha.clone(), schedule.sigma.clone()
    alpha[-1], sigma[-1] = LINEAR.alpha[noised_at], LINEAR.sigma[noised_at]
    mismatched = gain(replace(schedule, alpha=alpha, sigma=sigma))
    for index in (541, 550):
        assert abs(mismatched / level(index) - 1) > 0.02


# --- mixtures: when the label flips ---

FLIPS = {100: 0.0105, 200: 0.1346, 300: 0.2929, 400: 0.4015}


def flip_probability(alpha: float, sigma: float, m: float, s2: float) -> float:
    """E over x ~ N(a m, D) of sigmoid(-2 a m x / D), by quadrature."""
    spread = alpha**2 * s2 + sigma**2
    mean, deviation = alpha * m, math.sqrt(spread)

    def integrand(z):
        x = mean + deviation * z
        return mpmath.npdf(z) / (1 + mpmath.exp(2 * mean * x / spread))

    return float(mpmath.quad(integrand, [-9, -3, 0, 3, 9]))


@pytest.mark.parametrize(("timestep", "published"), FLIPS.items())
def test_a_label_flips_as_often_as_the_mixture_says(timestep, published):
    """Two modes at +-1 with variance .05; Boomerang from the right one ends in the left one."""
    count = 10_000
    schedule = schedule_for(LINEAR, ("timestep", timestep), steps=250)
    expected = flip_probability(float(schedule.alpha[-1]), float(schedule.sigma[-1]), 1.0, 0.05)
    assert expected == pytest.approx(published, abs=6e-5)

    oracle = mixture_oracle(torch.tensor([[1.0], [-1.0]]), 0.05, LINEAR)
    x_0 = 1 + math.sqrt(0.05) * normals(timestep, count, 1, 1, 1)
    solver = solver_for(oracle, schedule)
    out = boomerang(x_0, oracle, schedule, solver, SequentialNoise(x_0, 1000 + timestep))
    flipped = float((out < 0).double().mean())
    # Four standard errors, and the paper's variance flips a little less than the exact posterior.
    assert abs(flipped - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 0.02 * expected


# --- stored data: a model that memorized swaps records, it invents none ---


@pytest.mark.parametrize(("timestep", "published"), {100: 0.91, 200: 0.27, 300: 0.07, 400: 0.03}.items())
def test_a_memorizing_model_returns_existing_records(timestep, published):
    """50 records in 16 dimensions; the source comes back as often as the posterior weighs it."""
    repeats = 20
    records = 0.385 * normals(11, 50, 16, 1, 1)
    oracle = empirical_oracle(records, LINEAR)
    schedule = schedule_for(LINEAR, ("timestep", timestep), steps=250)
    x_0 = records.repeat(repeats, 1, 1, 1)
    source = torch.arange(50).repeat(repeats)
    noise = SequentialNoise(x_0, timestep)
    out = boomerang(x_0, oracle, schedule, solver_for(oracle, schedule), noise)
    distances = torch.cdist(out.flatten(1), records.flatten(1))
    nearest = distances.min(dim=1)
    assert float(nearest.values.max()) < 1e-3

    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    jump = alpha * x_0 + sigma * normals(timestep + 1, *x_0.shape)
    weights = self_weights(jump, records.flatten(1), alpha.expand(len(jump)), sigma.expand(len(jump)))
    own = float(weights[torch.arange(len(jump)), source].mean())
    returned = float((nearest.indices == source).double().mean())
    assert returned == pytest.approx(own, abs=0.06)
    assert own == pytest.approx(published, abs=0.06)
