"""The bound against numeric integration of two Gaussians, and attacks on the project's outputs against it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.measures.bound import delta, epsilon, two_candidate_accuracy
from tests.oracles import gaussian_oracle, linear_levels

MUS = [0.05, 0.5, 1.0, 2.0, 4.3]


@pytest.mark.parametrize("mu", MUS)
def test_accuracy_is_the_better_of_two_densities(mu):
    """The best rule names the likelier candidate: half the integral of the larger density."""
    best, _ = quad(lambda x: max(norm.pdf(x), norm.pdf(x - mu)) / 2, -12, mu + 12, points=[mu / 2], limit=200)
    assert two_candidate_accuracy(mu) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 3.0])
def test_delta_is_what_exceeds_the_factor(mu, eps):
    turn = mu / 2 + eps / mu
    excess, _ = quad(
        lambda x: max(0.0, norm.pdf(x - mu) - math.exp(eps) * norm.pdf(x)), turn, turn + 40, limit=400
    )
    assert delta(mu, eps) == pytest.approx(excess, rel=1e-6, abs=1e-12)


@given(mu=st.floats(1e-3, 60), allowed=st.floats(1e-12, 0.9))
def test_epsilon_is_the_inverse_of_delta(mu, allowed):
    found = epsilon(mu, allowed)
    assert found >= 0
    if found > 0:
        assert delta(mu, found) == pytest.approx(allowed, rel=1e-5)
    else:
        assert delta(mu, 0.0) <= allowed


@given(mu=st.floats(1e-3, 100), eps=st.floats(0, 500), more=st.floats(0, 10))
def test_delta_is_a_share_falls_with_epsilon_and_grows_with_mu(mu, eps, more):
    here = delta(mu, eps)
    assert 0 <= here <= 1
    assert delta(mu, eps + more) <= here * (1 + 1e-9)
    assert delta(mu + more, eps) >= here * (1 - 1e-9)


def test_the_ends():
    assert two_candidate_accuracy(0.0) == 0.5
    assert two_candidate_accuracy(math.inf) == 1.0
    assert delta(0.0, 0.0) == 0.0
    assert delta(math.inf, 5.0) == 1.0
    assert delta(3.0, math.inf) == 0.0
    assert delta(1.0, 0.0) == pytest.approx(2 * norm.cdf(0.5) - 1)
    assert epsilon(0.0, 0.0) == 0.0
    assert epsilon(1.0, 0.0) == math.inf
    assert epsilon(math.inf, 1e-5) == math.inf
    assert epsilon(math.inf, 1.0) == 0.0
    # Deep tails keep their digits: no underflow into "no delta at all".
    assert 0 < delta(1.0, 35.0) < 1e-200


@pytest.mark.parametrize("call", [lambda: delta(-1, 1), lambda: delta(math.nan, 1), lambda: delta(1, -1)])
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="at least 0"):
        call()


def test_a_delta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="within 0 and 1"):
        epsilon(1.0, 1.5)


# --- the attack on Gaussian data: algorithms in closed form, run on the project's own samplers ---


@pytest.mark.slow
@pytest.mark.parametrize("timestep", [150, 300, 450])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_attack_on_gaussian_data_is_as_good_as_theory_says(timestep, eta):
    """Two candidates from N(0, s2 I): stochastic outputs give Phi(rho Delta / (2 sqrt(s2 (1 - rho^2)))) away,
    deterministic ones the ceiling Phi(Delta / (2 sigma)) itself, as they can be undone."""
    size, pairs, s2 = 64, 4000, 0.25
    levels = linear_levels()
    oracle = gaussian_oracle(torch.zeros(size), s2 * torch.eye(size, dtype=torch.float64), levels)
    schedule = build_schedule(levels, grid="linspace", steps=20, t=("timestep", timestep), start="exact")
    options = {"variance": "optimal", "data_variance": s2} if eta else {}
    solver = build_solver(schedule, prediction=oracle.spec.prediction, eta=eta, **options)
    generator = torch.Generator().manual_seed(timestep)
    source, other = math.sqrt(s2) * torch.randn(2, pairs, size, 1, 1, generator=generator, dtype=torch.float64)
    keys = [noise_key(bytes(32), identity=b"%d" % index, variant=0) for index in range(pairs)]
    output = boomerang(source, oracle, schedule, solver, KeyedNoise(keys, source))

    # The likelier candidate is the nearer one after both went the noiseless way: G x_0.
    gain = boomerang(torch.ones_like(source[:1]), oracle, schedule, solver, _NoNoise()).flatten()[0]
    nearer = (output - gain * source).flatten(1).norm(dim=1) < (output - gain * other).flatten(1).norm(dim=1)
    accuracy = float(nearer.double().mean())
    sigma, apart = schedule.relative_sigma, (source - other).flatten(1).norm(dim=1).tolist()
    rho = s2 / (s2 + sigma**2)
    ceiling = float(np.mean([two_candidate_accuracy(distance / sigma) for distance in apart]))
    softened = math.sqrt(s2 * (1 - rho**2)) / rho
    expected = float(np.mean([two_candidate_accuracy(distance / softened) for distance in apart]))

    error = math.sqrt(ceiling * (1 - ceiling) / pairs)
    assert accuracy == pytest.approx(expected if eta else ceiling, abs=4 * max(error, 1e-3))
    assert expected < ceiling - 8 * error  # so that the two can be told from each other


class _NoNoise:
    def forward(self, node):
        return torch.zeros(1, 64, 1, 1, dtype=torch.float64)

    def reverse(self, node):
        return self.forward(node)
