"""Distances of sets: against torchmetrics with a feature module, closed forms, and plain counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import fidelity as module
from boomerang_batch.measures.fidelity import fidelity, frechet_distance, kernel_distance, manifold

SIDE = 4
WIDTH = 3 * SIDE * SIDE


class Flat(torch.nn.Module):
    """Features that are the pixels, 0 to 1."""

    num_features = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255


def two_sets(made=300, real=250, seed=0):
    """uint8 images (N, 3, 4, 4) of two kinds."""
    rng = np.random.default_rng(seed)
    first = rng.normal(120, 30, (made, 3, SIDE, SIDE)) + rng.normal(0, 15, (made, 1, 1, 1))
    second = rng.normal(130, 35, (real, 3, SIDE, SIDE))
    return tuple(np.clip(each, 0, 255).astype(np.uint8) for each in (first, second))


def features(images):
    return (images.reshape(len(images), -1) / 255).astype(np.float32)


def gaussian(count, mean, scale, seed):
    drawn = np.random.default_rng(seed).standard_normal((count, len(mean)))
    return (drawn * scale + mean).astype(np.float32)


# --- Frechet ---


def test_frechet_is_torchmetrics_on_the_same_features():
    made, real = two_sets()
    oracle = FrechetInceptionDistance(feature=Flat())
    oracle.update(torch.from_numpy(made), real=False)
    oracle.update(torch.from_numpy(real), real=True)
    expected = float(oracle.compute())
    assert expected > 0.01
    assert frechet_distance(features(made), features(real)) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_two_gaussians_is_the_closed_form():
    mean, scale = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.3])
    other, wider = np.array([0.0, -2.0, 1.5]), np.array([1.5, 1.0, 0.3])
    exact = np.square(mean - other).sum() + np.square(scale - wider).sum()
    found = frechet_distance(gaussian(60_000, mean, scale, 1), gaussian(60_000, other, wider, 2))
    assert found == pytest.approx(exact, rel=0.02)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 40), st.integers(0, 1000))
def test_frechet_of_few_images_is_that_of_their_singular_covariances(made, real, width, seed):
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1, (made, width)).astype(np.float32)
    second = rng.normal(0.5, 2, (real, width)).astype(np.float32)
    one, other = (np.cov(rows.astype(float), rowvar=False).reshape(width, width) for rows in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    shift = first.mean(0, dtype=float) - second.mean(0, dtype=float)
    exact = shift @ shift + np.trace(one) + np.trace(other) - 2 * shared
    found = frechet_distance(first, second)
    # The roots of rounding errors in singular matrices are the oracle's limit, not ours.
    assert found == pytest.approx(exact, abs=3e-6 * width * (1 + np.trace(other)))
    assert found == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * width)


def test_frechet_is_the_same_in_blocks(monkeypatch):
    made, real = (features(images) for images in two_sets())
    whole = frechet_distance(made, real)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    assert frechet_distance(made, real) == pytest.approx(whole, rel=1e-9)


# --- kernel ---


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_one_kernel_subset_is_torchmetrics():
    made, real = two_sets(200, 200)
    oracle = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=200)
    oracle.update(torch.from_numpy(made), real=False)
    oracle.update(torch.from_numpy(real), real=True)
    found = kernel_distance(features(made), features(real), subsets=1)
    assert found.value == pytest.approx(float(oracle.compute()[0]), rel=1e-5)
    assert math.isnan(found.error)


def test_the_kernel_distance_of_equal_distributions_is_0_within_its_error():
    scores = []
    for seed in range(60):
        made, real = (gaussian(200, np.zeros(6), 1.0, 2 * seed + part) for part in (0, 1))
        found = kernel_distance(made, real, seed=seed)
        scores.append(found.value / found.error)
    # Student's t with nine degrees of freedom: its standard deviation is 1.13.
    assert abs(np.mean(scores)) < 4 * 1.13 / math.sqrt(60)
    assert 0.8 < np.std(scores) < 1.6


def test_subsets_are_ten_and_more_for_large_sets_and_fewer_for_tiny_ones():
    rows = gaussian(60, np.zeros(2), 1.0, 0)
    assert kernel_distance(rows, rows + 1).subsets == 10
    assert kernel_distance(rows[:7], rows).subsets == 3
    assert kernel_distance(np.tile(rows, (200, 1))[:11_001], rows).subsets == 12
    with pytest.raises(MeasureError, match="too small"):
        kernel_distance(rows, rows, subsets=31)


def test_the_seed_decides_on_the_subsets():
    made, real = (features(images) for images in two_sets())
    one = kernel_distance(made, real, seed=1)
    assert one == kernel_distance(made, real, seed=1)
    assert one != kernel_distance(made, real, seed=2)


# --- neighbourhoods ---


def counted(made, real, neighbours):
    """The four shares by their definitions, one image after the other."""

    def apart(one, other):
        return float(np.linalg.norm(one.astype(float) - other.astype(float)))

    def reach(rows, place):
        others = [apart(rows[place], row) for index, row in enumerate(rows) if index != place]
        return sorted(others)[neighbours - 1]

    def within(one, other, limit):
        return apart(one, other) < limit * (1 - 1e-9)

    real_reach = [reach(real, place) for place in range(len(real))]
    made_reach = [reach(made, place) for place in range(len(made))]
    balls = [sum(within(one, row, limit) for row, limit in zip(real, real_reach, strict=True)) for one in made]
    recalled = [
        any(within(row, one, limit) for one, limit in zip(made, made_reach, strict=True)) for row in real
    ]
    covered = [
        any(within(row, one, limit) for one in made) for row, limit in zip(real, real_reach, strict=True)
    ]
    return (
        np.mean([count > 0 for count in balls]),
        np.mean(recalled),
        np.mean(balls) / neighbours,
        np.mean(covered),
    )


@pytest.mark.slow
@given(st.integers(6, 14), st.integers(6, 14), st.integers(1, 5), st.booleans(), st.integers(0, 10_000))
def test_neighbourhoods_are_as_counted(made, real, neighbours, on_a_grid, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 1, (made, 3)), rng.normal(0.4, 0.7, (real, 3))
    if on_a_grid:  # many ties, and duplicates within and between the sets
        first, second = np.rint(first), np.rint(second)
    first, second = first.astype(np.float32), second.astype(np.float32)
    found = manifold(first, second, neighbours=neighbours)
    values = (found.precision, found.recall, found.density, found.coverage)
    assert values == pytest.approx(counted(first, second, neighbours))


def test_a_set_is_precisely_itself_and_not_another():
    rows = gaussian(400, np.zeros(8), 1.0, 0)
    same = manifold(rows, rows)
    assert (same.precision, same.recall, same.density, same.coverage) == (1, 1, 1, 1)
    far = manifold(rows + 100, rows)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_one_mode_of_two_is_precise_and_covers_half():
    near = gaussian(300, np.zeros(4), 1.0, 1)
    real = np.concatenate([gaussian(300, np.zeros(4), 1.0, 2), gaussian(300, np.full(4, 50.0), 1.0, 3)])
    found = manifold(near, real)
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert 0.4 < found.coverage <= 0.5


# --- all together ---


def test_misses_are_left_out_and_counted():
    made, real = (features(images) for images in two_sets(80, 90))
    whole = fidelity(made, real, features="dlib")
    nothing = np.full((3, WIDTH), np.nan, np.float32)
    found = fidelity(
        np.concatenate([made[:5], nothing, made[5:]]), np.concatenate([nothing[:2], real]), features="dlib"
    )
    assert (found.made, found.made_misses, found.real, found.real_misses) == (80, 3, 90, 2)
    assert found.frechet == whole.frechet
    assert (found.kernel, found.manifold) == (whole.kernel, whole.manifold)


def test_distances_go_by_their_features():
    made, real = (features(images) for images in two_sets(20, 20))
    assert fidelity(made, real, features="pca").names == ("FD-pca", "KD-pca")


def test_features_too_wide_for_a_covariance_have_no_frechet_distance(monkeypatch):
    made, real = (features(images) for images in two_sets(20, 20))
    monkeypatch.setattr(module, "WIDEST", WIDTH - 1)
    assert fidelity(made, real, features="pixels").frechet is None
    with pytest.raises(MeasureError, match="embedder pca"):
        frechet_distance(made, real)


def test_too_few_images_are_refused():
    made, real = (features(images) for images in two_sets(20, 5))
    with pytest.raises(MeasureError, match=r"5 real images; .* larger sample"):
        fidelity(made, real, features="pixels")
    with pytest.raises(MeasureError, match="two images"):
        frechet_distance(made[:1], real)
