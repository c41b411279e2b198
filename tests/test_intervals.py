"""Wilson's interval by its definition and by coverage; the bootstrap by coverage, with seeds of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.measures.intervals import Rate, Z, bootstrap, rate, wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (0, 10, 0.0, Z**2 / (10 + Z**2)),
        (10, 10, 10 / (10 + Z**2), 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1000, 0.000177, 0.005643),
    ],
)
def test_wilson_closed_values(hits, trials, low, high):
    found = Rate(hits, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.value == hits / trials


@given(trials=st.integers(1, 10**4), share=st.sampled_from([0, 1]) | st.floats(0.001, 0.999))
def test_both_ends_are_where_the_score_test_turns(trials, share):
    """Its definition: a true rate at either end would be 1.96 of its own standard errors away."""
    hits = share * trials
    found = Rate(hits, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / trials)
            assert abs(found.value - end) == pytest.approx(Z * error, rel=1e-6)


@pytest.mark.parametrize("true", [0.01, 0.1, 0.5, 0.97])
def test_wilson_covers_nineteen_times_in_twenty(true):
    drawn = np.random.default_rng(1).binomial(300, true, size=20_000)
    values, counts = np.unique(drawn, return_counts=True)
    covered = [low <= true <= high for low, high in (wilson(int(hits), 300) for hits in values)]
    assert 0.93 < np.average(covered, weights=counts) < 0.975


def test_unequal_trials_with_parts_of_hits_are_covered_at_least_as_often():
    generator = np.random.default_rng(2)
    chances = generator.beta(0.5, 1.5, size=200)
    covered = 0
    for _ in range(2000):
        hits = (generator.random(200) < chances).astype(float)
        hits[:50] = chances[:50]  # ties, credited in expectation
        found = rate(hits)
        covered += found.low <= chances.mean() <= found.high
    assert covered / 2000 > 0.95


def test_nothing_tried_is_nan_and_not_zero():
    none = Rate(0, 0)
    assert all(map(math.isnan, (none.value, none.low, none.high)))


@pytest.mark.parametrize(("hits", "trials"), [(3, 2), (-1, 2), (math.nan, 2)])
def test_rates_that_cannot_be_are_refused(hits, trials):
    with pytest.raises(ValueError, match="trials"):
        Rate(hits, trials)


def test_credits_are_summed_exactly():
    assert rate(np.full(10, 0.1)) == Rate(1.0, 10)
    assert rate(np.zeros(0)) == Rate(0, 0)


def auc(scores, genuine):
    """Of two sorts of continuous scores: how often the genuine one is higher."""
    return (
        float((scores[genuine][:, None] > scores[~genuine]).mean())
        if 0 < genuine.sum() < len(scores)
        else math.nan
    )


@pytest.mark.slow
def test_bootstrap_covers_an_auc():
    """Two normals one apart: the true area is Phi(1 / sqrt 2) = .7602."""
    generator, covered, repeats = np.random.default_rng(3), 0, 120
    for repeat in range(repeats):
        genuine = generator.random(80) < 0.5
        scores = generator.normal(size=80) + genuine

        def statistic(index, scores=scores, genuine=genuine):
            return auc(scores[index], genuine[index])

        found = bootstrap(statistic, 80, resamples=150, seed=repeat)
        assert found.value == auc(scores, genuine)
        covered += found.low <= 0.760250 <= found.high
    assert 0.89 < covered / repeats < 0.99


def test_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = np.random.default_rng(4).normal(size=2000)
    found = bootstrap(lambda index: float(values[index].mean()), 2000, resamples=2000, seed=5)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert found.value == values.mean()
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_bootstrap_depends_on_its_seed_alone():
    values = np.arange(50.0) ** 2

    def mean(index):
        return float(values[index].mean())

    before = np.random.get_state()[1].copy()
    first, again = bootstrap(mean, 50, seed=1), bootstrap(mean, 50, seed=1)
    assert first == again != bootstrap(mean, 50, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_leaves_out_resamples_without_a_value():
    empty = bootstrap(lambda index: 1 / 0, 0)
    assert all(map(math.isnan, (empty.value, empty.low, empty.high)))
    never = bootstrap(lambda index: math.nan if len(set(index.tolist())) < 50 else 1.0, 50)
    assert never.value == 1.0
    assert all(map(math.isnan, (never.low, never.high)))
    sometimes = bootstrap(lambda index: math.nan if index[0] else 2.0, 5)
    assert (sometimes.low, sometimes.high) == (2.0, 2.0)
