"""Latents: the way between two, what a fit recovers, and what it takes for one of its own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.latents import Fit, fit, merged, moments, slerp, standing, without

SHAPE = (2, 3, 4)
PAPER = 196_608
"""Elements of a latent of the paper's: 3 x 256 x 256."""


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(latents: Tensor, references: int = 10) -> Fit:
    found = moments(latents)
    assert found is not None
    return fit(found, latents[:128], references=references)


# --- slerp ---

numbers = st.lists(st.floats(-100, 100), min_size=3, max_size=3)


@settings(deadline=None)
@given(a=numbers, b=numbers, weight=st.floats(0, 1), scale=st.floats(0.1, 50))
def test_slerp_ends_where_it_should_keeps_norms_and_does_not_care_who_is_first(a, b, weight, scale):
    u, v = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    size = float(u.norm() + v.norm())
    try:
        found = slerp(u, v, weight)
    except ValueError:
        assert float((u / u.norm() + v / v.norm()).norm()) < 1e-6
        return
    near = {"atol": 1e-6 * size + 1e-12, "rtol": 0}
    assert torch.allclose(slerp(u, v, 0.0), u, **near)
    assert torch.allclose(slerp(u, v, 1.0), v, **near)
    norm = (1 - weight) * float(u.norm()) + weight * float(v.norm())
    assert float(found.norm()) == pytest.approx(norm, abs=near["atol"])
    assert torch.allclose(slerp(v, u, 1 - weight), found, **near)
    assert torch.allclose(slerp(scale * u, scale * v, weight), scale * found, atol=scale * near["atol"])


def test_slerp_takes_the_great_circle_at_an_even_pace():
    a, b = normals(1, *SHAPE), normals(2, *SHAPE)
    points = [slerp(a, b, i / 8) for i in range(9)]
    angles = [math.acos(float((u * v).sum() / (u.norm() * v.norm()))) for u, v in itertools.pairwise(points)]
    assert max(angles) - min(angles) < 1e-12
    whole = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    assert sum(angles) == pytest.approx(whole)


def test_between_opposite_latents_there_is_no_way_and_from_zero_a_straight_one():
    a = normals(1, *SHAPE)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -2 * a, 0.5)
    assert torch.equal(slerp(torch.zeros_like(a), a, 0.25), 0.25 * a)
    assert torch.equal(slerp(a.float(), a.float(), 0.3), a.float())


# --- the fit ---


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), shift=st.floats(-1e6, 1e6))
def test_moments_do_not_depend_on_how_the_latents_are_dealt_out(sizes, shift):
    latents = normals(len(sizes), sum(sizes), *SHAPE) + shift
    parts = [moments(part) for part in latents.split(sizes)]
    found = parts[0]
    for part in parts[1:]:
        found = merged(found, part)
    assert found.count == len(latents)
    mean = latents.mean(0)
    assert torch.allclose(found.mean, mean, rtol=1e-12, atol=1e-12)
    assert found.squares == pytest.approx(float((latents - mean).square().sum()), rel=1e-6, abs=1e-9)
    assert moments([]) is None
    if len(latents) > 2:
        less, expected = without(found, latents[-1]), moments(latents[:-1])
        assert less.count == expected.count
        assert torch.allclose(less.mean, expected.mean, rtol=1e-12, atol=1e-12)
        assert less.squares == pytest.approx(expected.squares, rel=1e-6, abs=1e-6)


def test_a_fit_recovers_the_mean_and_the_variance_that_are_known():
    mean, variance, count = 3 * normals(1, *SHAPE), 0.7, 20_000
    latents = mean + math.sqrt(variance) * normals(2, count, *SHAPE)
    found = fitted(latents)
    # Within five standard errors of each.
    assert float((found.moments.mean - mean).abs().max()) < 5 * math.sqrt(variance / count)
    assert abs(found.moments.variance / variance - 1) < 5 * math.sqrt(2 / (count * mean.numel()))
    drawn = torch.stack([found.candidate(z) for z in normals(3, 5000, *SHAPE)])
    assert float((drawn.mean(0) - mean).abs().max()) < 0.06
    assert float((drawn - mean).square().mean()) == pytest.approx(variance, rel=0.02)


@pytest.mark.slow
def test_the_papers_windows_are_what_the_fit_of_such_latents_has():
    """611.4 +- .3, 88 +- .1 and 60 +- .1 degrees at d = 196,608 (arXiv 2310.09213)."""
    variance = 611.4**2 / (2 * PAPER)
    shared = math.cos(math.radians(88))  # the mean's share of a latent's squared norm
    mean = math.sqrt(variance * shared / (1 - shared)) * torch.ones(PAPER)
    latents = mean + math.sqrt(variance) * normals(1, 40, PAPER)
    found = fitted(latents)
    # What is usual is known as well as ten references tell it.
    for told, usual, spread in zip((611.4, 88, 60), found.usual.figures, found.spread.figures, strict=True):
        assert abs(usual - told) < spread
    # Its windows reach some of their own standard deviations, not none and not all.
    for window, spread in zip((0.3, 0.1, 0.1), found.spread.figures, strict=True):
        assert 0.5 < window / spread < 2.5
    ideal = fitted(normals(2, 40, PAPER))
    assert ideal.usual.distance == pytest.approx(math.sqrt(2 * PAPER), abs=0.6)
    assert ideal.usual.figures[1:] == pytest.approx((90, 60), abs=0.1)


@pytest.mark.parametrize("size", [12, 300, 5000])
def test_what_is_accepted_meets_the_criteria_as_numpy_has_them_at_any_dimension(size):
    latents = 0.4 + 1.3 * normals(1, 400, size)
    found, tolerance = fitted(latents), 1.5
    others = found.references.double().numpy()
    figures = np.array([by_numpy(latent, others) for latent in latents[10:128].numpy()])
    usual, spread = figures.mean(0), figures.std(0, ddof=1)
    assert found.usual.figures == pytest.approx(usual, rel=1e-6)
    verdicts = []
    for z in normals(2, 200, size):
        candidate = found.candidate(z)
        placed = by_numpy(candidate.numpy(), others)
        verdicts.append(found.accepts(standing(candidate, found.references), tolerance=tolerance))
        off = np.abs(np.array(placed) - usual) / spread
        if abs(off.max() - tolerance) > 1e-6:
            assert verdicts[-1] == (off.max() <= tolerance)
    assert 0.3 < np.mean(verdicts) < 1


def by_numpy(latent: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """The three figures, by the law of cosines."""
    norm, norms = np.linalg.norm(latent), np.linalg.norm(others, axis=1)
    distances = np.linalg.norm(others - latent, axis=1)
    angles = np.degrees(np.arccos((norm**2 + norms**2 - distances**2) / (2 * norm * norms)))
    pairs = []
    for i in range(len(others)):
        for j in range(i):
            apart = np.linalg.norm(others[i] - others[j])
            cosine = (distances[i] ** 2 + distances[j] ** 2 - apart**2) / (2 * distances[i] * distances[j])
            pairs.append(np.degrees(np.arccos(cosine)))
    return float(distances.mean()), float(angles.mean()), float(np.mean(pairs))


@pytest.mark.parametrize("planted", ["shrunk", "grown", "shifted", "one of the mean", "nearly a reference"])
def test_latents_off_the_manifold_are_rejected(planted):
    latents = 0.1 + normals(1, 400, 2000)
    found = fitted(latents)
    good = found.candidate(normals(2, 2000))
    off = {
        "shrunk": 0.8 * good,
        "grown": 1.2 * good,
        "shifted": good + 0.6,
        "one of the mean": found.moments.mean,
        "nearly a reference": 0.2 * good + 0.8 * found.references[3].double(),
    }[planted]
    assert found.accepts(standing(good, found.references), tolerance=3)
    assert not found.accepts(standing(off, found.references), tolerance=3)


def test_fits_of_two_domains_are_apart():
    near, far = fitted(normals(1, 400, 500)), fitted(1 + 0.9 * normals(2, 400, 500))
    assert near.accepts(standing(near.candidate(normals(3, 500)), near.references), tolerance=3)
    assert not near.accepts(standing(far.candidate(normals(3, 500)), near.references), tolerance=3)
    assert abs(near.usual.angle - far.usual.angle) > 5 * near.spread.angle


def test_what_has_no_fit_is_refused():
    with pytest.raises(ValueError, match="5 different latents are too few for a fit with 4 references"):
        fitted(normals(1, 5, *SHAPE), references=4)
    mirrored = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with pytest.raises(ValueError, match="all alike"):
        fitted(mirrored, references=2)
    with pytest.raises(ValueError, match="one of the references"):
        standing(mirrored[0], mirrored)


def test_equal_latents_of_equal_images_count_once_among_those_that_others_are_compared_with():
    latents = normals(1, 60, *SHAPE)
    twice = latents.repeat_interleave(2, dim=0)
    once, found = fitted(latents, references=6), fitted(twice, references=6)
    assert torch.equal(found.references, once.references)
    assert (found.usual, found.spread, found.norm) == (once.usual, once.spread, once.norm)
    assert found.moments.count == 120 - 6
