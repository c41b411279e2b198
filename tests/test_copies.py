"""Copies: nearest rows against brute force, and every kind of copy planted and found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import distances
from boomerang_batch.measures.copies import copies, exact_duplicates
from boomerang_batch.measures.neighbours import nearest_rows, row_distances, tiles

WIDTH = 8


def rows(count, seed, *, width=WIDTH, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((count, width)) * scale).astype(np.float32)


def brute(query, keys, allowed):
    """The distances of one query to the allowed keys, ascending."""
    return np.array(sorted(np.linalg.norm(query.astype(float) - keys[key].astype(float)) for key in allowed))


@pytest.mark.slow
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 60),
    st.booleans(),
    st.integers(0, 9999),
)
def test_nearest_rows_are_those_of_brute_force(queries, keys, count, block, on_a_grid, seed):
    first, second = rows(queries, seed, width=3), rows(keys, seed + 1, width=3)
    if on_a_grid:
        first, second = np.rint(first), np.rint(second)
    rng = np.random.default_rng(seed)
    names = rng.integers(0, 4, queries), rng.integers(0, 4, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        found, near = nearest_rows(first, second, count=count, apart=names)
    for query in range(queries):
        allowed = [key for key in range(keys) if names[1][key] != names[0][query]]
        expected = np.full(count, np.inf)
        exact = brute(first[query], second, allowed)[:count]
        expected[: len(exact)] = exact
        assert near[query] == pytest.approx(expected)
        assert ((found[query] >= 0) == np.isfinite(expected)).all()
        chosen = found[query][found[query] >= 0]
        assert len(set(chosen)) == len(chosen)
        assert brute(first[query], second, chosen) == pytest.approx(near[query][: len(chosen)])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(9, 90))
def test_tiles_cover_every_pair_once_and_none_is_large(queries, keys, width, block):
    first, second = rows(queries, 1, width=width), rows(keys, 2, width=width)
    covered = np.zeros((queries, keys), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        for mine, theirs, tile in tiles(first, second):
            covered[mine, theirs] += 1
            assert tile.size <= block
            assert max(len(first[mine]), len(second[theirs])) * width <= block
    assert (covered == 1).all()


def test_equal_rows_are_at_distance_0_however_far_from_the_origin():
    far = rows(50, 3) * np.float32(1e-3) + np.float32(1000)
    found, near = nearest_rows(far, far)
    assert (near == 0).all()
    assert (row_distances(far, far[found[:, 0]]) == 0).all()


@pytest.mark.slow
@given(st.integers(3, 10), st.integers(1, 10), st.integers(0, 9999))
def test_distances_are_those_of_the_definitions(sources, outputs, seed):
    rng = np.random.default_rng(seed)
    gallery, made, held = rows(sources, seed), rows(outputs, seed + 1), rows(7, seed + 2)
    own = rng.integers(0, sources, outputs)
    identities = rng.permutation(np.concatenate([np.arange(3), rng.integers(0, 5, sources - 3)]))
    found = copies(made, gallery, own=own, identities=identities, holdout=held)
    for place in range(outputs):
        every = brute(made[place], gallery, range(sources))
        others = [key for key in range(sources) if identities[key] != identities[own[place]]]
        assert found.closest[place] == pytest.approx(every[0])
        assert found.ratio[place] == pytest.approx(every[0] / every[1])
        assert found.own[place] == pytest.approx(np.linalg.norm(made[place] - gallery[own[place]]), rel=1e-5)
        assert found.other[place] == pytest.approx(brute(made[place], gallery, others)[0])
    assert found.own_is_closest.hits == int((found.own < found.other).sum())
    usual = [brute(row, gallery, range(sources))[0] for row in held]
    assert found.baseline == pytest.approx(np.array(usual))
    assert found.threshold == pytest.approx(np.percentile(usual, 5))
    assert found.below.hits == int((found.closest < np.percentile(usual, 5)).sum())
    assert found.below.trials == outputs


def test_independent_outputs_are_copies_in_five_percent_of_cases():
    own, shares = np.arange(400) % 200, {"hold-out": [], "sources": []}
    for seed in range(0, 90, 3):
        outputs, sources, held = rows(400, seed), rows(200, seed + 1), rows(400, seed + 2)
        for holdout in (held, None):  # the sources, each left out, stand in for a hold-out
            found = copies(outputs, sources, own=own, holdout=holdout)
            shares[found.baseline_of].append(found.below.value)
            assert found.own_is_closest.value < 0.03
    assert np.mean(shares["hold-out"]) == pytest.approx(0.05, abs=0.012)
    assert np.mean(shares["sources"]) == pytest.approx(0.05, abs=0.02)


def test_planted_copies_are_found():
    sources = rows(200, 1)
    outputs = rows(200, 2)
    outputs[:60] = sources[:60] + rows(60, 3, scale=1e-3)
    found = copies(outputs, sources, holdout=rows(500, 4))
    assert found.below.hits >= 60
    assert (found.closest[:60] < found.threshold).all()
    assert (found.ratio[:60] < 0.1).all()
    assert np.median(found.ratio[60:]) > 0.8
    assert (found.own[:60] < found.other[:60]).all()


def test_a_model_that_gives_everyone_the_same_is_found():
    sources = rows(100, 1)
    found = copies(np.tile(rows(1, 2), (100, 1)), sources)
    assert found.near_duplicates.value == 1
    assert copies(rows(100, 3), sources).near_duplicates.value < 0.15


def test_variants_of_one_source_are_no_duplicates():
    sources = rows(50, 1)
    own = np.repeat(np.arange(50), 4)
    found = copies(sources[own] + rows(200, 2, scale=1e-3), sources, own=own)
    assert found.near_duplicates.value < 0.12
    assert found.below.value == 1


def test_photographs_of_one_person_are_not_others():
    faces = np.repeat(rows(40, 1), 3, axis=0) + rows(120, 2, scale=1e-3)
    people = np.repeat(np.arange(40), 3)
    found = copies(faces, faces, identities=people)
    assert found.own_is_closest.value == 1
    assert found.other.min() > 0.5
    assert found.baseline.min() > 0.5
    assert found.near_duplicates.value < 0.12


@pytest.mark.slow
def test_memorized_training_images_are_found():
    sources, training = rows(200, 1), rows(300, 2)
    outputs = sources + rows(200, 3, scale=1e-2)
    outputs[:50] = training[:50] + rows(50, 4, scale=1e-3)
    found = copies(outputs, sources, training=training).training
    assert found is not None
    assert found.swaps.hits == 50
    usual = [brute(row, training, range(300))[0] for row in sources]
    assert found.baseline == pytest.approx(np.array(usual))
    assert found.threshold == pytest.approx(np.percentile(usual, 5))
    assert (found.closest[:50] < found.threshold).all()
    # The others are where their sources are, of which 5 % are nearer than the threshold.
    assert found.below.hits - 50 == pytest.approx(0.05 * 150, abs=6)


def test_misses_are_left_out_and_counted():
    sources, outputs, held, trained = rows(60, 1), rows(60, 2), rows(30, 3), rows(30, 4)
    kept = np.arange(5, 60)
    whole = copies(outputs[kept], sources[kept], holdout=held, training=trained)
    outputs[:3], sources[2:5], held[:0] = np.nan, np.nan, np.nan
    nothing = np.full((2, WIDTH), np.nan, np.float32)
    found = copies(
        outputs, sources, holdout=np.concatenate([nothing, held]), training=np.concatenate([trained, nothing])
    )
    assert found.misses == 5
    # Sources 0 and 1 were found in, but not their outputs: they stay in the gallery.
    assert found.own == pytest.approx(whole.own)
    assert (found.closest <= whole.closest + 1e-9).all()
    assert len(found.closest) == 55


def test_equal_pictures_are_counted():
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    images[7] = images[2]
    images[9] = images[2]
    images[4, 0, 0, 0] ^= 1
    found = exact_duplicates(images)
    assert (found.hits, found.trials) == (3, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"own": np.array([0, 1, 9])}, "row 9"),
        ({"own": np.array([0, 1])}, "each must have one"),
        ({"identities": np.zeros(3, np.int64)}, r"sources of 1 identities .* larger sample"),
        ({"holdout": np.full((2, WIDTH), np.nan, np.float32)}, "hold-out"),
        ({"training": np.full((2, WIDTH), np.nan, np.float32)}, "training"),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments, message):
    with pytest.raises(MeasureError, match=message):
        copies(rows(3, 1), rows(3, 2), **arguments)
    with pytest.raises(MeasureError, match="can't be compared"):
        copies(rows(3, 1), rows(3, 2, width=5))


def test_a_training_set_that_holds_the_sources_hides_no_copies_where_there_is_a_hold_out():
    """By the sources' own distances to it nothing would be near."""
    draw = np.random.default_rng(8)
    sources, strangers, holdout = (draw.normal(size=(200, 16)).astype(np.float32) for _ in range(3))
    outputs = strangers + draw.normal(size=strangers.shape, scale=0.1).astype(np.float32)
    training = np.concatenate([strangers, sources + np.float32(0.01)])
    found = copies(outputs, sources, holdout=holdout, training=training).training
    assert found.below.value == found.swaps.value == 1
    assert copies(outputs, sources, training=training).training.below.value == 0
