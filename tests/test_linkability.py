"""Linkability against brute force on small sets, against theory on large ones, and what it must not claim."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import distances, matching
from boomerang_batch.measures.intervals import Rate
from boomerang_batch.measures.linkability import linkability


def one_group(records):
    return np.zeros(records, dtype=np.int64)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# --- against brute force ---


@st.composite
def small_sets(draw):
    """Few records on a coarse grid, so that ties are common, in groups, some with several of one identity."""
    records = draw(st.integers(2, 5))
    coordinate = st.integers(-2, 2)
    rows = st.lists(st.tuples(coordinate, coordinate), min_size=records, max_size=records)
    outputs, sources = (np.array(draw(rows), dtype=np.float32) for _ in range(2))
    groups = np.array(draw(st.lists(st.integers(0, 1), min_size=records, max_size=records)))
    identities = np.array(draw(st.lists(st.integers(0, 3), min_size=records, max_size=records)))
    return outputs, sources, groups, identities


def brute_rank(outputs, sources, groups, identities, k):
    """Each query's chance of a hit over all orders in which ties may be broken."""
    credits = []
    for query in range(len(outputs)):
        candidates = [index for index in range(len(sources)) if groups[index] == groups[query]]
        apart = {index: int(((outputs[query] - sources[index]) ** 2).sum()) for index in candidates}
        hits, orders = 0, 0
        for order in itertools.permutations(candidates):
            nearest = sorted(order, key=apart.__getitem__)[:k]
            hits += any(identities[index] == identities[query] for index in nearest)
            orders += 1
        credits.append(hits / orders)
    return float(np.mean(credits))


def brute_pairs(outputs, sources, groups, identities):
    genuine, impostors = [], []
    for output, source in itertools.product(range(len(outputs)), repeat=2):
        if groups[output] == groups[source]:
            kind = genuine if identities[output] == identities[source] else impostors
            kind.append(float(((outputs[output] - sources[source]) ** 2).sum()))
    return genuine, impostors


def spread(sources, groups):
    return any(len(np.unique(sources[groups == group], axis=0)) > 1 for group in set(groups.tolist()))


@pytest.mark.slow
@given(small_sets())
@settings(max_examples=120)
def test_small_sets_are_as_brute_force_says(drawn):
    outputs, sources, groups, identities = drawn
    compared = [int((groups == group).sum()) for group in set(groups.tolist())]
    if max(compared) > 1 and not spread(sources, groups):
        with pytest.raises(MeasureError, match="another embedder"):
            linkability(outputs, sources, groups=groups, identities=identities)
        return
    found = linkability(outputs, sources, groups=groups, identities=identities, ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert found.rank[k].value == pytest.approx(brute_rank(outputs, sources, groups, identities, k))
        blind = np.zeros_like(outputs)
        assert found.chance[k] == pytest.approx(brute_rank(blind, blind, groups, identities, k))
    genuine, impostors = brute_pairs(outputs, sources, groups, identities)
    assert found.misses == 0
    assert found.records == found.rank[1].trials == len(outputs)
    if not impostors:
        assert math.isnan(found.auc.value)
    else:
        wins = [(far > near) + (far == near) / 2 for near in genuine for far in impostors]
        assert found.auc.value == pytest.approx(np.mean(wins))
        assert 0 <= found.auc.low <= found.auc.value <= found.auc.high <= 1


@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 4, 1000]), far=st.sampled_from([0.03, 0.1]))
@settings(max_examples=40)
def test_true_accepts_are_as_brute_force_says(seed, levels, far):
    generator = np.random.default_rng(seed)
    sources = generator.integers(0, levels, (24, 2)).astype(float)
    outputs = sources + generator.integers(-1, 2, (24, 2)) * (levels > 2)
    identities = np.arange(24) // 2
    found = linkability(outputs, sources, groups=one_group(24), identities=identities, fars=(far,)).tar[far]
    genuine, impostors = brute_pairs(outputs, sources, one_group(24), identities)
    passing = math.floor(far * len(impostors))
    limit = sorted(impostors)[passing]
    nearer, equal = sum(x < limit for x in impostors), impostors.count(limit)
    accepted = [(x < limit) + (x == limit) * (passing - nearer) / equal for x in genuine]
    assert found.rate.trials == len(genuine) == 48
    assert found.rate.value == pytest.approx(np.mean(accepted))
    assert found.threshold == pytest.approx(math.sqrt(limit), abs=1e-6)


def test_one_to_one_is_the_best_of_all_assignments():
    for seed in range(20):
        outputs, sources = normals(seed, 2, 6, 2)
        apart = distances.squared_distances(outputs, sources)
        best = min(itertools.permutations(range(6)), key=lambda p: sum(apart[i, j] for i, j in enumerate(p)))
        found = linkability(outputs, sources, groups=one_group(6))
        assert found.one_to_one == Rate(sum(i == j for i, j in enumerate(best)), 6)


def test_one_to_one_can_tell_more_than_the_nearest_one():
    sources = np.arange(10.0)[:, None]
    outputs = sources + 0.6  # each is nearer to the next one's source
    found = linkability(outputs, sources, groups=one_group(10))
    assert found.rank[1].value == pytest.approx(0.1)
    assert found.one_to_one.value == 1.0


# --- how it is cut does not matter ---


def test_blocks_order_and_other_groups_change_nothing(monkeypatch):
    sources, noise = normals(1, 2, 240, 5)
    outputs = (sources + noise).astype(np.float32)
    groups, identities = np.arange(240) % 3, np.arange(240) // 4
    fars = (0.1, 0.01)

    def measured(order):
        return linkability(
            outputs[order], sources[order], groups=groups[order], identities=identities[order], fars=fars
        )

    whole = measured(np.arange(240))
    monkeypatch.setattr(distances, "BLOCK", 700)
    shuffled = measured(np.random.default_rng(2).permutation(240))
    for k, expected in whole.rank.items():
        assert shuffled.rank[k].hits == pytest.approx(expected.hits)
        assert shuffled.chance[k] == pytest.approx(whole.chance[k])
    assert shuffled.one_to_one == whole.one_to_one
    assert shuffled.auc.value == pytest.approx(whole.auc.value, rel=1e-12)
    assert shuffled.auc.low == pytest.approx(whole.auc.low, rel=1e-9)
    for far in fars:
        assert shuffled.tar[far].rate.hits == pytest.approx(whole.tar[far].rate.hits)
        assert shuffled.tar[far].threshold == pytest.approx(whole.tar[far].threshold)
    parts = [
        linkability(
            outputs[groups == g], sources[groups == g], groups=one_group(80), identities=identities[groups == g]
        )
        for g in range(3)
    ]
    assert sum(part.rank[1].hits for part in parts) == pytest.approx(whole.rank[1].hits)
    assert sum(part.one_to_one.hits for part in parts) == whole.one_to_one.hits


def test_an_offset_of_all_features_changes_nothing():
    sources, noise = normals(3, 2, 100, 6)
    near = linkability(sources + 0.5 * noise, sources, groups=one_group(100))
    far = linkability(sources + 0.5 * noise + 1e4, sources + 1e4, groups=one_group(100))
    assert far.rank[1] == near.rank[1]
    assert far.auc.value == pytest.approx(near.auc.value)


# --- controls ---


def test_the_source_itself_links_always():
    sources = normals(4, 400, 8).astype(np.float32)
    found = linkability(sources, sources, groups=np.arange(400) % 10, fars=(0.01,))
    assert found.rank[1] == Rate(400, 400)
    assert found.auc.value == 1.0
    assert 0.98 < found.auc.low < 1  # 400 people can't show that it is always so
    assert found.tar[0.01].rate == Rate(400, 400)
    assert found.one_to_one == Rate(400, 400)


@pytest.mark.parametrize("photos", [1, 4])
def test_unrelated_outputs_link_by_chance(photos):
    """With several photos of a person too: chance and the area know how many there are."""
    records, seeds = 400, range(12)
    hits, areas, matched = [], [], []
    for seed in seeds:
        outputs, sources = normals(100 + seed, 2, records, 6)
        found = linkability(
            outputs, sources, groups=np.arange(records) % 4, identities=np.arange(records) // (4 * photos)
        )
        hits.append([found.rank[k].value for k in (1, 5, 10)])
        areas.append(found.auc.value)
        matched.append(found.one_to_one.value)
    # Identities span the four groups, so that each has `photos` in a group of 100.
    assert found.chance[1] == pytest.approx(photos / 100)
    assert found.chance[5] == pytest.approx(1 - math.comb(100 - photos, 5) / math.comb(100, 5))
    error = np.std(hits, axis=0, ddof=1) / math.sqrt(len(seeds))
    assert (np.abs(np.mean(hits, axis=0) - list(found.chance.values())) < 4 * error).all()
    assert abs(np.mean(areas) - 0.5) < 4 * np.std(areas, ddof=1) / math.sqrt(len(seeds))
    assert abs(np.mean(matched) - found.chance[1]) < 4 * max(np.std(matched, ddof=1), 0.005) / math.sqrt(
        len(seeds)
    )


def test_outputs_that_are_all_the_same_score_chance_and_not_one():
    """Every candidate ties; whoever breaks ties by position would find each source."""
    sources = normals(5, 300, 4)
    found = linkability(np.zeros_like(sources), np.sign(sources), groups=one_group(300), fars=(0.05,))
    assert found.rank[1].value == pytest.approx(1 / 300)
    assert found.rank[10].value == pytest.approx(10 / 300)
    assert found.auc.value == pytest.approx(0.5)
    assert found.tar[0.05].rate.value == pytest.approx(0.05, abs=1e-3)
    assert found.one_to_one.value < 0.05


def test_matching_by_costs_that_say_nothing_is_a_guess():
    """The method takes what stands first, which in the records' own order would be all of them right."""
    found = matching.OneToOne(300, np.random.default_rng(1))
    found.add(slice(0, 300), np.zeros((300, 300)))
    assert found.hits(np.arange(300)).sum() < 8


def test_duplicates_among_the_sources_share_the_credit():
    sources = np.repeat(normals(6, 50, 30), 2, axis=0)
    found = linkability(sources + 1e-3 * normals(7, 100, 30), sources, groups=one_group(100))
    assert found.rank[1].value == pytest.approx(0.5)
    assert found.rank[5].value == pytest.approx(1.0)


# --- what it does not claim ---


def test_too_few_impostors_give_no_true_accept_rate():
    sources = normals(8, 100, 4)
    found = linkability(sources, sources, groups=one_group(100), fars=(0.01, 0.001))
    assert found.tar[0.01].rate == Rate(100, 100)
    assert found.tar[0.001].rate.trials == 0  # 9 of 9,900 would pass
    assert math.isnan(found.tar[0.001].rate.value)
    assert math.isnan(found.tar[0.001].threshold)


def test_the_threshold_lets_the_asked_share_of_impostors_pass():
    sources, noise = normals(9, 2, 300, 6)
    outputs = sources + noise
    found = linkability(outputs, sources, groups=one_group(300), fars=(0.02,)).tar[0.02]
    apart = np.sqrt(distances.squared_distances(outputs, sources))
    impostors = apart[~np.eye(300, dtype=bool)]
    assert (impostors < found.threshold).sum() == math.floor(0.02 * len(impostors))
    assert found.rate.hits == (np.diag(apart) < found.threshold).sum()


def test_misses_are_counted_apart():
    sources = normals(10, 60, 4)
    outputs = sources + 0.3 * normals(11, 60, 4)
    blind_outputs, blind_sources = outputs.copy(), sources.copy()
    blind_outputs[3, 1], blind_sources[7] = np.nan, np.nan
    found = linkability(blind_outputs, blind_sources, groups=one_group(60))
    kept = np.delete(np.arange(60), [3, 7])
    expected = linkability(outputs[kept], sources[kept], groups=one_group(58))
    assert (found.misses, found.records) == (2, 58)
    assert found.rank == expected.rank
    assert found.auc == expected.auc


def test_nothing_but_misses_is_nan():
    found = linkability(np.full((5, 3), np.nan), normals(12, 5, 3), groups=one_group(5))
    assert (found.misses, found.records) == (5, 0)
    for value in (found.rank[1].value, found.chance[1], found.auc.value, found.one_to_one.value):
        assert math.isnan(value)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_constant_embedder_is_refused(noise):
    features = (np.full((30, 8), 0.7) + noise * normals(13, 30, 8)).astype(np.float32)
    with pytest.raises(MeasureError, match=r"same features.*another embedder"):
        linkability(normals(14, 30, 8), features, groups=one_group(30))


def test_an_embedder_constant_within_every_group_is_refused():
    groups = np.arange(30) % 3
    with pytest.raises(MeasureError, match="tells none of them apart"):
        linkability(normals(15, 30, 3), np.eye(3)[groups], groups=groups)


def test_records_without_rivals_say_nothing():
    found = linkability(np.zeros((4, 2)), np.ones((4, 2)), groups=np.arange(4))
    assert found.rank[1].value == found.chance[1] == 1.0
    assert math.isnan(found.auc.value)


def test_infinite_features_are_refused():
    features = normals(16, 9, 3)
    features[2, 1] = np.inf
    with pytest.raises(MeasureError, match="infinite"):
        linkability(features, normals(17, 9, 3), groups=one_group(9))


def test_arrays_that_do_not_fit_are_refused():
    features = normals(18, 9, 3)
    with pytest.raises(ValueError, match="same records"):
        linkability(features, features[:8], groups=one_group(9))
    with pytest.raises(ValueError, match="at least 1"):
        linkability(features, features, groups=one_group(9), ks=(0,))
    with pytest.raises(ValueError, match="false-accept"):
        linkability(features, features, groups=one_group(9), fars=(0.5,))


def test_large_groups_are_cut_for_the_one_to_one_matching_and_said(monkeypatch):
    monkeypatch.setattr(matching, "MOST_ASSIGNED", 20)
    monkeypatch.setattr(distances, "BLOCK", 500)
    sources = normals(19, 100, 6)
    groups = np.where(np.arange(100) < 70, 0, 1 + np.arange(100) // 10)
    found = linkability(sources + 0.01, sources, groups=groups)
    assert found.cut_groups == 1
    assert found.one_to_one == Rate(50, 50)
    assert found.rank[1] == Rate(100, 100)


# --- intervals ---


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "photos"), [(0.6, 1), (1.5, 1), (1.5, 3)])
def test_the_areas_interval_covers(noise, photos):
    """Pairs share records, and records people: a rate of pairs would be far too sure of itself."""
    people, repeats = 60, 400

    def drawn(seed, people):
        generator = np.random.default_rng(seed)
        centres = np.repeat(generator.normal(size=(people, 4)), photos, axis=0)
        sources = centres + 0.5 * generator.normal(size=centres.shape)
        outputs = sources + noise * generator.normal(size=centres.shape)
        names = np.repeat(np.arange(people), photos)
        return linkability(outputs, sources, groups=one_group(len(names)), identities=names).auc

    true = drawn(1, 1500).value
    covered = [
        found.low <= true <= found.high for found in (drawn(10 + seed, people) for seed in range(repeats))
    ]
    assert 0.915 < np.mean(covered) < 0.98


# --- size ---


@pytest.mark.slow
def test_ten_thousand_in_one_group_fit_in_time_and_memory():
    """10,000 outputs against as many sources of 1,280 numbers, in one group: the worst case."""
    program = """
        import resource, time
        import numpy as np
        from boomerang_batch.measures.linkability import linkability
        generator = np.random.default_rng(1)
        sources = generator.standard_normal((10_000, 1280), dtype=np.float32)
        outputs = sources + 5 * generator.standard_normal((10_000, 1280), dtype=np.float32)
        start = time.process_time()
        found = linkability(outputs, sources, groups=np.zeros(10_000, dtype=np.int64))
        assert found.rank[1].trials == 10_000 and found.one_to_one.trials == 2000 and found.cut_groups == 1
        print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    cpu_s, megabytes = map(float, done.stdout.split())
    assert cpu_s < 90
    assert megabytes < 1500
