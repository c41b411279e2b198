"""Placing and restoring: sizes always, pixels exactly wherever nothing was scaled, and no shift anywhere."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from boomerang_batch.data.geometry import (
    place,
    refuse_moved_places,
    refuse_scaled_places,
    restore,
    restore_onto,
)
from boomerang_batch.data.upscale import enlarge, target_size
from boomerang_batch.errors import SampleError

POLICIES = st.sampled_from(["cover", "contain", "stretch", "pad"])
SIDES = st.integers(1, 70)
CHANNELS = st.sampled_from([1, 3])


def noise(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, model=st.tuples(SIDES, SIDES), channels=CHANNELS, policy=POLICIES)
def test_the_models_size_goes_in_and_the_sources_comes_back(height, width, model, channels, policy):
    assume(policy != "pad" or (height <= model[0] and width <= model[1]))
    pixels = noise(height, width, channels)
    placed, placement = place(pixels, size=model, policy=policy)
    assert placed.shape == (*model, channels)
    back = restore(placed, placement)
    assert back.shape == pixels.shape
    assert (placed.dtype, back.dtype) == (np.uint8, np.uint8)
    if policy == "pad" or (height, width) == model:
        assert (back == pixels).all()


@given(model=st.tuples(SIDES, SIDES), channels=CHANNELS, policy=POLICIES)
def test_equal_size_is_the_identity(model, channels, policy):
    pixels = noise(*model, channels)
    placed, placement = place(pixels, size=model, policy=policy)
    assert (placed == pixels).all()
    assert not placement.crops
    assert (restore(placed, placement) == pixels).all()


@settings(deadline=None)
@given(height=SIDES, width=SIDES, model=st.tuples(SIDES, SIDES), policy=POLICIES, level=st.integers(1, 255))
def test_flat_images_stay_flat_and_bars_never_leak_in(height, width, model, policy, level):
    assume(policy != "pad" or (height <= model[0] and width <= model[1]))
    placed, placement = place(np.full((height, width, 3), level, np.uint8), size=model, policy=policy)
    top, left, inner_height, inner_width = placement.inner
    inside = np.zeros(model, bool)
    inside[top : top + inner_height, left : left + inner_width] = True
    assert (placed[inside] == level).all()
    assert (placed[~inside] == 0).all()
    assert (restore(placed, placement) == level).all()


@settings(deadline=None)
@given(height=SIDES, width=SIDES, model=st.tuples(SIDES, SIDES), policy=POLICIES)
def test_mirroring_commutes_so_nothing_shifts(height, width, model, policy):
    """Bars of odd width can't be equal on both sides; there the mirror image is off by the one pixel."""
    assume(policy != "pad" or (height <= model[0] and width <= model[1]))
    pixels = noise(height, width, 1)
    placed, placement = place(pixels, size=model, policy=policy)
    mirrored, _ = place(np.ascontiguousarray(pixels[:, ::-1]), size=model, policy=policy)
    _, left, _, inner_width = placement.inner
    uneven = model[1] - inner_width - 2 * left
    assert uneven in (0, 1)
    expected = np.roll(placed[:, ::-1], -uneven, axis=1)
    assert np.abs(mirrored.astype(int) - expected).max() <= 1


def test_a_smooth_picture_survives_scaling():
    ramp = np.linspace(20, 230, 60)
    pixels = np.rint((ramp[:, None] + ramp[None, :40]) / 2).astype(np.uint8)[..., None]
    for policy in ("contain", "stretch"):
        placed, placement = place(pixels, size=(32, 32), policy=policy)
        assert np.abs(restore(placed, placement).astype(int) - pixels).mean() < 1.5


def test_cover_keeps_the_centre_and_contain_keeps_all():
    pixels = np.zeros((30, 90, 1), np.uint8)
    pixels[:, 30:60] = 200
    placed, placement = place(pixels, size=(30, 30), policy="cover")
    assert (placed == 200).all()
    assert placement.crops
    assert placement.box == (30.0, 0.0, 60.0, 30.0)
    placed, placement = place(pixels, size=(30, 30), policy="contain")
    assert placement.inner == (10, 0, 10, 30)
    assert not placement.crops


def test_cover_with_equal_proportions_crops_nothing():
    _, placement = place(noise(21, 49, 3), size=(3, 7), policy="cover")
    assert not placement.crops


def test_pad_refuses_what_is_larger():
    for height, width in ((9, 8), (8, 9)):
        with pytest.raises(SampleError, match="larger-than-model"):
            place(noise(height, width, 1), size=(8, 8), policy="pad")


def test_restore_wants_what_was_placed():
    placed, placement = place(noise(9, 9, 1), size=(8, 8), policy="cover")
    with pytest.raises(ValueError, match="placed"):
        restore(placed[:7], placement)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, model=st.tuples(SIDES, SIDES), policy=POLICIES)
def test_restoring_onto_the_source_changes_only_what_went_in(height, width, model, policy):
    assume(policy != "pad" or (height <= model[0] and width <= model[1]))
    source = np.full((height, width, 3), 90, np.uint8)
    placed, placement = place(source, size=model, policy=policy)
    drawn = np.full_like(placed, 200)
    result = restore_onto(source, drawn, placement)
    top, left, bottom, right = placement.kept
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    assert (result[inside] == 200).all()
    assert (result[~inside] == 90).all()
    assert (source == 90).all()
    if not placement.crops:
        assert (result == restore(drawn, placement)).all()
    elif inside.any():
        box_left, box_top, box_right, box_bottom = placement.box
        margins = (top - box_top, left - box_left, box_bottom - bottom, box_right - right)
        assert all(0 <= margin < 1 for margin in margins)


def test_an_unscaled_crop_returns_to_its_place_exactly():
    source = noise(30, 90, 3)
    placed, placement = place(source, size=(30, 30), policy="cover")
    assert placement.kept == (0, 30, 30, 60)
    assert (placed == source[:, 30:60]).all()
    assert (restore_onto(source, placed, placement) == source).all()
    drawn = noise(30, 30, 3, seed=1)
    assert (restore_onto(source, drawn, placement)[:, 30:60] == drawn).all()


@pytest.mark.parametrize("size", [(45, 120), (37, 111)])
def test_a_scaled_crop_returns_without_a_shift(size):
    """A smooth picture through a crop whose edges cut pixels comes back where it was, and as it was."""
    height, width = size
    ramp = np.linspace(20, 230, width)[None, :] + np.linspace(-10, 10, height)[:, None]
    source = np.rint(ramp).astype(np.uint8)[..., None]
    placed, placement = place(source, size=(64, 62), policy="cover")
    assert placement.crops
    back = restore_onto(source, placed, placement)
    top, left, bottom, right = placement.kept
    # But at the crop's own edges, where a filter has nothing to look at.
    inner = (slice(top + 4, bottom - 4), slice(left + 4, right - 4))
    error = back[inner].astype(int) - source[inner]
    assert np.abs(error).max() <= 1
    assert abs(error.mean()) < 0.2


def test_a_crop_thinner_than_a_pixel_leaves_the_source():
    source = noise(1, 70, 1)
    placed, placement = place(source, size=(8, 8), policy="cover")
    assert placement.kept == (0, 35, 1, 35)
    assert (restore_onto(source, placed + 1, placement) == source).all()


def test_restore_onto_wants_what_was_placed():
    source = noise(9, 12, 1)
    placed, placement = place(source, size=(8, 8), policy="cover")
    with pytest.raises(ValueError, match="placed"):
        restore_onto(source, placed[:7], placement)
    with pytest.raises(ValueError, match="placed"):
        restore_onto(source[:8], placed, placement)


@settings(deadline=None)
@given(
    source=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    model=st.tuples(SIDES, SIDES),
    factor=st.integers(2, 5),
    policy=st.sampled_from(["cover", "contain", "stretch"]),
)
def test_enlarged_pictures_come_back_at_exactly_factor_times_the_size(source, model, factor, policy):
    enlarged = enlarge(noise(*source, 3), factor, "bicubic")
    placed, placement = place(enlarged, size=model, policy=policy)
    back = restore(placed, placement)
    assert back.shape[:2] == target_size(source, factor, max_pixels=10**6)
    assert back.shape[:2] == (source[0] * factor, source[1] * factor)


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("seg.png", b""),
        ("png", b""),
        ("mask.npy", b""),
        ("bbox.json", b"[]"),
        ("boxes.txt", b""),
        ("left_boxes", b""),
        ("json", json.dumps({"bbox": [1, 2, 3, 4]}).encode()),
        ("json", json.dumps({"annotations": [{"area": 1}, {"head_box": [1]}]}).encode()),
        ("meta.json", json.dumps({"a": {"b": [{"keypoints": []}]}}).encode()),
        ("json", json.dumps({"faceBox": []}).encode()),
    ],
)
def test_places_in_the_picture_do_not_travel_with_cover(field, data):
    with pytest.raises(SampleError, match="boxes-would-move") as refused:
        refuse_moved_places({"cls": b"1", field: data})
    assert field in refused.value.detail
    with pytest.raises(SampleError, match=r"boxes-would-move.*4 times as large; drop the field") as refused:
        refuse_scaled_places({"cls": b"1", field: data}, factor=4)
    assert field in refused.value.detail


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("cls", b"1"),
        ("txt", b"a box of masks"),
        ("json", json.dumps({"caption": "bbox", "boxer": 1, "maskless": 2, "xbox_url": 3}).encode()),
        ("json", b"not json: bbox"),
        ("json", b"[" * 100_000),
    ],
)
def test_other_fields_travel(field, data):
    refuse_moved_places({field: data})
    refuse_scaled_places({field: data}, factor=2)
