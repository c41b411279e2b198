"""The trained attacker reaches the optimum where that is known, and learns nothing where there is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import attackers
from boomerang_batch.measures.attackers import STRENGTHS, attack, learn, training_half
from boomerang_batch.measures.linkability import linkability


def one_group(records):
    return np.zeros(records, dtype=np.int64)


def rotation(seed, size):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def boomeranged(seed, *, records, variances, sigma):
    """Sources N(0, S) and outputs by the closed law of eta 1: G = S (S + sigma^2)^-1, V = S - G S G.

    Returns outputs, sources, and both as the best attack on Gaussian data sees them.
    """
    generator = np.random.default_rng(seed)
    variances = np.asarray(variances)
    basis = rotation(1, len(variances))
    gain = variances / (variances + sigma**2)
    spread = variances * (1 - gain**2)
    sources = np.sqrt(variances) * generator.normal(size=(records, len(variances)))
    outputs = gain * sources + np.sqrt(spread) * generator.normal(size=sources.shape)
    best = outputs / np.sqrt(spread), gain * sources / np.sqrt(spread)
    return (outputs @ basis).astype(np.float32), (sources @ basis).astype(np.float32), *best


SPECTRUM = np.geomspace(4, 0.01, 24)


@pytest.mark.slow
def test_on_gaussian_data_it_reaches_the_optimum_which_plain_distances_do_not():
    outputs, sources, *best = boomeranged(2, records=4000, variances=np.geomspace(1, 0.05, 64), sigma=1.0)
    groups = np.arange(4000) % 10
    found = attack(outputs, sources, groups=groups)
    rest = ~training_half(np.arange(4000))
    optimum = linkability(best[0][rest], best[1][rest], groups=groups[rest])
    plain = linkability(outputs[rest], sources[rest], groups=groups[rest])
    assert found.trained_on == 2000
    assert found.linkability.records == 2000
    for k in (1, 5):
        reached, possible = found.linkability.rank[k].value, optimum.rank[k].value
        error = math.sqrt(possible * (1 - possible) / 2000)
        assert abs(reached - possible) < 3 * error
        assert reached > plain.rank[k].value + 4 * error


def test_it_finds_what_no_embedders_distance_can():
    """Outputs that are sources turned and recoloured: far from them in every feature, and all there."""
    generator = np.random.default_rng(3)
    sources = generator.normal(size=(600, 12))
    outputs = sources @ rotation(4, 12) * 3 + 5 + 0.5 * generator.normal(size=sources.shape)
    assert linkability(outputs, sources, groups=one_group(600)).rank[1].value < 0.02
    found = attack(outputs, sources, groups=one_group(600))
    assert found.linkability.rank[1].value > 0.95
    assert found.strength < 1


def test_few_pairs_of_many_features_are_learned_from_axis_by_axis(monkeypatch):
    """400 pairs of 400 features: a regression alone fits noise; one axis at a time still tells."""
    outputs, sources, *best = boomeranged(5, records=800, variances=np.geomspace(4, 0.001, 400), sigma=2.5)
    rest = ~training_half(np.arange(800))
    groups = one_group(800)
    found = attack(outputs, sources, groups=groups)
    optimum = linkability(best[0][rest], best[1][rest], groups=groups[rest]).rank[5].value
    plain = linkability(outputs[rest], sources[rest], groups=groups[rest]).rank[5].value
    monkeypatch.setattr(attackers, "STRENGTHS", (0.0,))
    fitted = attack(outputs, sources, groups=groups).linkability.rank[5].value
    assert found.strength == 1.0
    assert fitted < plain < found.linkability.rank[5].value < optimum + 0.05
    assert found.linkability.rank[5].value > 0.8 * optimum


def test_groups_means_are_taken_out():
    """What makes groups differ is most of the features, and tells no candidates apart."""
    outputs, sources, *best = boomeranged(6, records=3000, variances=SPECTRUM, sigma=0.5)
    generator = np.random.default_rng(7)
    groups = np.arange(3000) % 5
    shift = 30 * generator.normal(size=(2, 5, 24))
    found = attack(outputs + shift[0][groups], sources + shift[1][groups], groups=groups)
    rest = ~training_half(np.arange(3000))
    optimum = linkability(best[0][rest], best[1][rest], groups=groups[rest]).rank[1].value
    assert found.linkability.rank[1].value > optimum - 4 * math.sqrt(optimum * (1 - optimum) / 1500)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 300])
def test_unrelated_outputs_stay_at_chance(size):
    """More features than pairs leave room to learn by heart, which is of no use on others."""
    hits = []
    for seed in range(10):
        outputs, sources = np.random.default_rng(20 + seed).normal(size=(2, 400, size))
        found = attack(outputs, sources, groups=np.arange(400) % 4, seed=seed).linkability
        hits.append([found.rank[k].value - found.chance[k] for k in (1, 10)] + [found.auc.value - 0.5])
    error = np.std(hits, axis=0, ddof=1) / math.sqrt(len(hits))
    assert (np.abs(np.mean(hits, axis=0)) < 4 * error).all()


def test_what_is_learned_by_heart_is_of_no_use_on_others(monkeypatch):
    """An attacker made to overfit is right about every pair it has seen, though nothing links them, and right
    about others by chance: were any of these among the former, the tests here would tell."""
    monkeypatch.setattr(attackers, "_PAIRS_PER_AXIS", 1)
    monkeypatch.setattr(attackers, "STRENGTHS", (0.0,))
    outputs, sources = np.random.default_rng(8).normal(size=(2, 200, 300))
    groups = one_group(200)
    train = training_half(np.arange(200))
    attacker = learn(outputs[train], sources[train], groups=groups[train])
    seen = linkability(
        attacker.outputs(outputs[train], groups[train]),
        attacker.sources(sources[train], groups[train]),
        groups=groups[train],
    )
    assert seen.rank[1].value > 0.9
    unseen = attack(outputs, sources, groups=groups).linkability
    assert unseen.rank[1].value < 0.06
    assert unseen.auc.low < 0.5 < unseen.auc.high


def test_the_halves_share_no_identity():
    identities = np.repeat(np.arange(40), 5) * 7 + 3
    train = training_half(identities, seed=4)
    assert not set(identities[train]) & set(identities[~train])
    assert train.sum() == 100
    assert (train == training_half(identities, seed=4)).all()
    assert (train != training_half(identities, seed=5)).any()


def test_the_tested_half_teaches_nothing():
    """Features of the tested half may be anything: what was learned stays the same."""
    outputs, sources, *_ = boomeranged(9, records=200, variances=SPECTRUM, sigma=0.5)
    groups, train = np.arange(200) % 2, training_half(np.arange(200))
    changed = outputs.copy(), sources.copy()
    for seed, part in enumerate(changed):
        part[~train] = np.random.default_rng(seed).normal(size=part[~train].shape)
    first = attack(outputs, sources, groups=groups)
    again = attack(*changed, groups=groups)
    assert (first.trained_on, first.strength) == (again.trained_on, again.strength)
    assert again.linkability.rank[1].value < 0.15 < first.linkability.rank[1].value
    one = learn(outputs[train], sources[train], groups=groups[train])
    other = learn(changed[0][train], changed[1][train], groups=groups[train])
    assert (one.of_outputs == other.of_outputs).all()


def test_copies_are_found_and_misses_counted():
    sources = np.random.default_rng(11).normal(size=(400, 10)).astype(np.float32)
    outputs = sources.copy()
    outputs[::10] = np.nan
    found = attack(outputs, sources, groups=one_group(400))
    assert found.linkability.rank[1].value == 1.0
    assert found.trained_on + found.linkability.records + 40 == 400
    assert 0 < found.linkability.misses < 40


def test_axes_without_any_spread_are_no_trouble():
    sources = np.zeros((100, 6), dtype=np.float32)
    sources[:, 0] = np.arange(100)
    found = attack(sources, sources, groups=one_group(100))
    assert found.linkability.rank[1].value == 1.0


def test_too_few_pairs_are_refused():
    features = np.random.default_rng(12).normal(size=(30, 3))
    with pytest.raises(MeasureError, match=r"15 pairs are too few.*larger sample"):
        attack(features, features, groups=one_group(30))


def test_groups_that_were_not_seen_are_centred_by_all():
    outputs, sources, *_ = boomeranged(13, records=300, variances=SPECTRUM, sigma=0.1)
    attacker = learn(outputs[:200], sources[:200], groups=one_group(200))
    unseen = np.full(100, 9)
    assert np.isfinite(attacker.outputs(outputs[200:], unseen)).all()
    assert (attacker.outputs(outputs[200:], unseen) == attacker.outputs(outputs[200:], one_group(100))).all()
    assert attacker.strength in STRENGTHS
