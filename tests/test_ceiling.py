"""The noise ceiling: attained by doing nothing, exceeded by a leak, and taken within what is released."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from boomerang_batch.measures import distances, matching
from boomerang_batch.measures.attackers import attack, training_half
from boomerang_batch.measures.ceiling import exceeds, noise_ceiling
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.measures.linkability import linkability
from tests.oracles import Oracle, gaussian_oracle, linear_levels

LEVELS = linear_levels()


def one_group(records):
    return np.zeros(records, dtype=np.int64)


def labelled(seed, *, records=600, size=16, labels=6):
    """Gaussian clusters: what tells labels apart and what tells records apart."""
    generator = np.random.default_rng(seed)
    groups = np.arange(records) % labels
    return 1.5 * generator.normal(size=(labels, size))[groups] + generator.normal(size=(records, size)), groups


def walked(oracle, sources, sigma, *, eta, seed=0, **options):
    """The project's own outputs of `sources` (n, d) at `sigma`; (n, d)."""
    schedule = build_schedule(LEVELS, grid="linspace", steps=10, t=("sigma", sigma), start="exact")
    solver = build_solver(schedule, prediction=oracle.spec.prediction, eta=eta, **options)
    x_0 = torch.from_numpy(sources)[:, :, None, None]
    keys = [noise_key(bytes(32), identity=b"%d" % index, variant=seed) for index in range(len(sources))]
    return boomerang(x_0, oracle, schedule, solver, KeyedNoise(keys, x_0)).flatten(1).numpy()


def apart(measured, ceiling):
    """How many standard errors."""
    error = sum(rate.value * (1 - rate.value) / rate.trials for rate in (measured, ceiling))
    return abs(measured.value - ceiling.value) / math.sqrt(error)


def test_who_has_fewer_candidates_has_a_ceiling_of_his_own():
    """He goes above the one of all, with no more than x_t at hand, and not above his own."""
    generator = np.random.default_rng(3)
    sources = generator.normal(size=(1000, 16))
    noised = sources + 1.5 * generator.normal(size=sources.shape)
    his = np.arange(1000) < 300
    reached = linkability(noised[his], sources[his], groups=one_group(300)).rank[1]
    of_all = noise_ceiling(sources, np.full(1000, 1.5), groups=one_group(1000)).rank[1]
    of_his = noise_ceiling(sources[his], np.full(300, 1.5), groups=one_group(300)).rank[1]
    assert exceeds(reached, of_all).exceeds
    assert not exceeds(reached, of_his).exceeds
    assert apart(reached, of_his) < 3


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.8, 2.0, 6.0])
@pytest.mark.parametrize("within", [True, False])
def test_a_denoiser_that_changes_nothing_attains_it(sigma, within):
    """It gives x_t / alpha_t back, so measured ranks are the ceiling's within three standard errors."""
    sources, labels = labelled(1)
    groups = labels if within else one_group(len(sources))
    identity = Oracle(lambda x, alpha, sigma: x / alpha, (sources.shape[1], 1, 1), LEVELS)
    outputs = walked(identity, sources, sigma, eta=0.0)
    found = linkability(outputs, sources, groups=groups)
    ceiling = noise_ceiling(sources, np.full(len(sources), sigma), groups=groups, draws=10)
    assert ceiling.rank[1].trials == 10 * len(sources)
    assert ceiling.chance == found.chance
    for k in (1, 5, 10):
        assert apart(found.rank[k], ceiling.rank[k]) < 3
        assert not exceeds(found.rank[k], ceiling.rank[k]).exceeds
    assert apart(found.one_to_one, ceiling.one_to_one) < 4


def leaking(*, sigma, size, records):
    """Sources N(0, 1/4), and outputs of them that are a tenth x_0."""
    s2 = 0.25
    sources = math.sqrt(s2) * np.random.default_rng(2).normal(size=(records, size))
    oracle = gaussian_oracle(torch.zeros(size), s2 * torch.eye(size, dtype=torch.float64), LEVELS)
    outputs = walked(oracle, sources, sigma, eta=1.0, variance="optimal", data_variance=s2)
    return sources, outputs, 0.9 * outputs + 0.1 * sources


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [6.0, 12.0])
def test_a_planted_leak_is_caught_and_an_honest_output_is_not(sigma):
    """A tenth of x_0 mixed into the output, at levels where hardly anything of it should be left."""
    sources, honest, leaky = leaking(sigma=sigma, size=768, records=800)
    groups = np.arange(len(sources)) % 2
    ceiling = noise_ceiling(sources, np.full(len(sources), sigma), groups=groups).rank[1]
    assert not exceeds(linkability(honest, sources, groups=groups).rank[1], ceiling).exceeds
    caught = exceeds(linkability(leaky, sources, groups=groups).rank[1], ceiling)
    assert caught.exceeds
    assert caught.p_value < 1e-4
    assert "Fisher" in caught.test


@pytest.mark.slow
def test_a_leak_that_distances_miss_is_caught_by_the_trained_attacker():
    """In few dimensions a tenth is too little for plain distances; whoever learned what to look for sees it."""
    sources, honest, leaky = leaking(sigma=6.0, size=64, records=4000)
    groups, rest = np.arange(4000) % 10, ~training_half(np.arange(4000))
    ceiling = noise_ceiling(sources[rest], np.full(2000, 6.0), groups=groups[rest], draws=5).rank[1]
    plain = linkability(leaky[rest], sources[rest], groups=groups[rest]).rank[1]
    assert not exceeds(plain, ceiling).exceeds
    assert exceeds(attack(leaky, sources, groups=groups).linkability.rank[1], ceiling).exceeds
    assert not exceeds(attack(honest, sources, groups=groups).linkability.rank[1], ceiling).exceeds


def test_knowing_the_label_raises_it():
    sources, labels = labelled(3)
    sigmas = np.full(len(sources), 2.5)
    without = noise_ceiling(sources, sigmas, groups=one_group(len(sources)), draws=5)
    within = noise_ceiling(sources, sigmas, groups=labels, draws=5)
    assert within.rank[1].low > without.rank[1].high
    assert within.chance[1] == pytest.approx(1 / 100)
    assert without.chance[1] == pytest.approx(1 / 600)


@pytest.mark.slow
def test_two_records_are_told_apart_as_often_as_the_bound_says():
    """A group of two is the two-candidate problem: Phi(Delta / (2 sigma))."""
    pairs, sigma = 1500, 1.3
    sources = np.zeros((2 * pairs, 3))
    sources[1::2, 0] = 2.0
    sources += np.repeat(np.random.default_rng(4).normal(size=(pairs, 3)), 2, axis=0)
    found = noise_ceiling(sources, np.full(2 * pairs, sigma), groups=np.arange(2 * pairs) // 2, ks=(1,))
    expected = norm.cdf(2.0 / (2 * sigma))
    assert found.rank[1].value == pytest.approx(expected, abs=4 * math.sqrt(0.25 / (2 * pairs)))


def test_it_does_not_bound_one_to_one_matching():
    sources = np.random.default_rng(5).normal(size=(50, 16))
    found = noise_ceiling(sources, np.full(50, 1.2), groups=one_group(50), draws=20)
    assert found.one_to_one.low > found.rank[1].high


def test_each_record_has_its_own_noise():
    """None leaves all, infinite leaves chance, one beside the other too."""
    sources = np.random.default_rng(6).normal(size=(200, 10))
    sigmas = np.where(np.arange(200) < 100, 0.0, np.inf)
    groups = np.arange(200) // 100
    split = noise_ceiling(sources, sigmas, groups=groups, ks=(1, 10))
    assert split.rank[1].hits == pytest.approx(100 + 1)
    assert split.rank[10].hits == pytest.approx(100 + 10)
    mixed = noise_ceiling(sources, sigmas, groups=one_group(200), ks=(1,))
    assert mixed.rank[1].hits == pytest.approx(100 + 100 / 200)
    # One to one, the records without noise take their own sources, and the others guess among the rest.
    assert 100 <= mixed.one_to_one.hits <= 110


def test_matching_weighs_each_record_by_its_noise():
    """Distances of the noisiest are the largest; unweighed, they would push the certain ones aside."""
    generator = np.random.default_rng(7)
    sources = generator.normal(size=(100, 8))
    sigmas = np.where(np.arange(100) % 2, 0.5, 20.0)
    found = noise_ceiling(sources, sigmas, groups=one_group(100), draws=20)
    noised = [sources + sigmas[:, None] * generator.normal(size=sources.shape) for _ in range(20)]
    plain = [linkability(outputs, sources, groups=one_group(100)).one_to_one.hits for outputs in noised]
    assert found.one_to_one.low > np.mean(plain) / 100


def test_duplicates_among_the_records_share_the_credit():
    sources = np.repeat(np.random.default_rng(8).normal(size=(40, 20)), 2, axis=0)
    found = noise_ceiling(sources, np.zeros(80), groups=one_group(80), ks=(1, 2))
    assert found.rank[1].value == pytest.approx(0.5)
    assert found.rank[2].value == pytest.approx(1.0)


def test_the_sources_units_are_the_noises():
    sources = np.random.default_rng(9).integers(0, 256, (300, 12), dtype=np.uint8)
    model = sources / 127.5 - 1
    pixels = noise_ceiling(sources, np.full(300, 1.1 * 127.5), groups=one_group(300), seed=3)
    assert pixels.rank == noise_ceiling(model, np.full(300, 1.1), groups=one_group(300), seed=3).rank


def test_strips_and_groups_larger_than_the_matching(monkeypatch):
    sources, _ = labelled(10, records=300)
    sigmas = np.full(300, 1.5)
    whole = noise_ceiling(sources, sigmas, groups=one_group(300), draws=10)
    monkeypatch.setattr(distances, "BLOCK", 2000)
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 120)
    cut = noise_ceiling(sources, sigmas, groups=one_group(300), draws=10)
    assert apart(cut.rank[1], whole.rank[1]) < 3.5
    assert (whole.cut_groups, cut.cut_groups) == (0, 1)
    assert (whole.one_to_one.trials, cut.one_to_one.trials) == (3000, 1200)


@pytest.mark.slow
def test_large_images_are_read_in_strips(tmp_path):
    """64 uint8 images of 3 x 512 x 512: as float64 they would take 400 MB."""
    size = 3 * 512 * 512
    sources = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(64, size))
    generator = np.random.default_rng(11)
    sources[:] = generator.integers(0, 256, (64, 1), dtype=np.uint8)
    sources[:, : size // 2] = 128
    sigmas = np.full(64, 40 * math.sqrt(size / 2))  # what half the pixels, all alike, differ by
    tracemalloc.start()
    try:
        found = noise_ceiling(sources, sigmas, groups=np.arange(64) // 32, ks=(1, 5))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    # All that differs is one number for each image, so the ceiling is that of one pixel as good as the half.
    levels = sources[:, -1:].astype(float)
    one_pixel = noise_ceiling(levels, np.full(64, 40.0), groups=np.arange(64) // 32, ks=(1, 5), draws=30)
    assert apart(found.rank[5], one_pixel.rank[5]) < 3.5


def test_it_is_repeatable_and_its_draws_are_not_the_same():
    sources, groups = labelled(12, records=120)
    sigmas = np.full(120, 1.5)
    assert noise_ceiling(sources, sigmas, groups=groups) == noise_ceiling(sources, sigmas, groups=groups)
    once, thrice = (noise_ceiling(sources, sigmas, groups=groups, draws=draws).rank[1].hits for draws in (1, 3))
    assert thrice != 3 * once


def test_no_records_are_nan():
    none = noise_ceiling(np.zeros((0, 4)), np.zeros(0), groups=np.zeros(0, dtype=np.int64))
    assert math.isnan(none.rank[1].value)
    assert math.isnan(none.chance[1])


@pytest.mark.parametrize(
    ("sigmas", "options", "message"),
    [
        (np.ones(4), {}, "same records"),
        (-np.ones(5), {}, "at least 0"),
        (np.full(5, np.nan), {}, "at least 0"),
        (np.ones(5), {"draws": 0}, "at least 1"),
        (np.ones(5), {"ks": (0,)}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(sigmas, options, message):
    with pytest.raises(ValueError, match=message):
        noise_ceiling(np.ones((5, 2)), sigmas, groups=one_group(5), **options)


# --- the test for an excess ---


@given(share=st.floats(0.001, 0.9), trials=st.integers(50, 2000))
def test_no_excess_below_the_ceiling(share, trials):
    ceiling = Rate(round(share * trials), trials)
    assert not exceeds(Rate(ceiling.hits, trials), ceiling).exceeds
    assert not exceeds(Rate(0, trials), ceiling).exceeds


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5])
def test_false_alarms_are_rarer_than_the_level(share):
    generator = np.random.default_rng(13)
    alarms = 0
    for measured, ceiling in generator.binomial(1000, share, size=(2000, 2)):
        alarms += exceeds(Rate(int(measured), 1000), Rate(int(ceiling), 1000), level=0.05).exceeds
    assert alarms / 2000 <= 0.055


def test_an_excess_that_is_certain_and_one_that_cannot_be_tested():
    assert exceeds(Rate(30, 1000), Rate(3, 1000)).p_value < 1e-5
    assert exceeds(Rate(5, 1000), Rate(3, 1000)).p_value > 0.2
    assert exceeds(Rate(3.9, 10), Rate(0.1, 10)).p_value == exceeds(Rate(3, 10), Rate(1, 10)).p_value
    untested = exceeds(Rate(0, 0), Rate(3, 1000))
    assert not untested.exceeds
    assert math.isnan(untested.p_value)
