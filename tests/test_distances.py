"""Distances against scipy's, in any blocks; what is held at once; what counts as equal."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import cdist, pdist

from boomerang_batch.measures import distances
from boomerang_batch.measures.distances import (
    members,
    pair_distances,
    squared_between,
    squared_distances,
    strips,
    tolerance,
)


@given(
    arrays.arrays(np.float64, (4, 3), elements=st.floats(-1e3, 1e3)),
    arrays.arrays(np.float64, (5, 3), elements=st.floats(-1e3, 1e3)),
)
def test_squared_distances_are_scipys(queries, gallery):
    found = squared_distances(queries, gallery)
    assert (found >= 0).all()
    assert np.abs(found - cdist(queries, gallery, "sqeuclidean")).max() <= max(
        tolerance(queries, gallery), 1e-300
    )


def test_duplicates_are_equal_and_near_duplicates_are_not():
    generator = np.random.default_rng(1)
    gallery = generator.normal(size=(50, 300))
    gallery[17] = gallery[3]
    gallery[30] = gallery[3] + 1e-5 * generator.normal(size=300)
    queries = generator.normal(size=(200, 300))
    found, equal = squared_distances(queries, gallery), tolerance(queries, gallery)
    assert (np.abs(found[:, 17] - found[:, 3]) <= equal).all()
    assert (np.abs(found[:, 30] - found[:, 3]) > equal).all()


@given(total=st.integers(0, 5000), across=st.integers(0, 10**7))
def test_strips_cover_all_once_and_keep_to_the_block(total, across):
    cut = list(strips(total, across))
    assert [index for strip in cut for index in range(strip.start, strip.stop)] == list(range(total))
    for strip in cut:
        assert strip.stop - strip.start == 1 or (strip.stop - strip.start) * across <= distances.BLOCK


@given(arrays.arrays(np.int64, st.integers(0, 30), elements=st.integers(-3, 3)))
def test_members_are_the_records_of_each_group(groups):
    found = members(groups)
    assert sorted(np.concatenate([np.zeros(0, int), *found]).tolist()) == list(range(len(groups)))
    assert [groups[part[0]] for part in found] == sorted(set(groups.tolist()))
    for part in found:
        assert (groups[part] == groups[part[0]]).all()
        assert (np.diff(part) > 0).all()


def test_distances_about_a_centre_are_the_same_strip_by_strip(monkeypatch):
    generator = np.random.default_rng(2)
    first, second = (1000 + generator.normal(size=(count, 37)).astype(np.float32) for count in (9, 7))
    rows, columns = np.array([8, 0, 0, 3]), np.array([6, 1, 5])
    centre = second.mean(axis=0, dtype=np.float64)
    whole = squared_between(first, rows, second, columns, centre=centre)
    exact = cdist(first[rows].astype(float), second[columns].astype(float), "sqeuclidean")
    assert whole == pytest.approx(exact, rel=1e-9)
    equal = tolerance(first, second, centre=centre)
    assert 0 < equal < 1e-9 * whole.min()
    monkeypatch.setattr(distances, "BLOCK", 20)
    assert squared_between(first, rows, second, columns, centre=centre) == pytest.approx(whole, rel=1e-9)
    assert tolerance(first, second, centre=centre) == equal


def test_pair_distances_are_within_groups_alone(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 50)  # several strips
    generator = np.random.default_rng(3)
    records = generator.integers(0, 256, (20, 30), dtype=np.uint8)
    groups = np.array([0, 1] * 9 + [2, 3])
    found = pair_distances(records, groups=groups)
    every = np.concatenate([pdist(records[groups == group].astype(float)) for group in (0, 1)])
    assert found.pairs == len(every) == 72
    assert (found.least, found.largest) == pytest.approx((every.min(), every.max()))
    assert found.median == pytest.approx(np.median(every))
    alone = pair_distances(records, groups=np.arange(20))
    assert alone.pairs == 0
    assert all(map(math.isnan, (alone.least, alone.median, alone.largest)))


def test_large_groups_are_drawn_from(monkeypatch):
    monkeypatch.setattr(distances, "MOST_FOR_PAIRS", 10)
    records = np.random.default_rng(4).normal(size=(40, 3))
    found = pair_distances(records, groups=np.zeros(40, int), seed=1)
    assert found.pairs == 45
    assert found == pair_distances(records, groups=np.zeros(40, int), seed=1)
    assert found != pair_distances(records, groups=np.zeros(40, int), seed=2)


@pytest.mark.slow
def test_large_images_are_read_in_strips(tmp_path):
    """64 uint8 images of 3 x 512 x 512: as float64 they would take 400 MB."""
    size = 3 * 512 * 512
    records = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(64, size))
    records[:] = np.random.default_rng(5).integers(0, 256, (64, 1), dtype=np.uint8)
    tracemalloc.start()
    try:
        found = pair_distances(records, groups=np.arange(64) // 32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    levels = records[:, 0].astype(float)
    expected = np.concatenate([pdist(levels[:32, None]), pdist(levels[32:, None])]) * math.sqrt(size)
    apart = expected[expected > 0]  # of some levels there are two
    assert found.pairs == len(apart) < len(expected)
    assert (found.least, found.median) == pytest.approx((apart.min(), np.median(apart)), rel=1e-9)
