"""Regions: what a mask or boxes say, that no coarser grid loses a pixel of them, and that the rest stays."""

import io
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from boomerang_batch.config.pipeline import Region
from boomerang_batch.data.geometry import place, restore, restore_onto
from boomerang_batch.data.regions import blank, composite, dilate, model_mask, read_region, state_mask
from boomerang_batch.data.tiles import cut, place_on_canvas, plan
from boomerang_batch.errors import SampleError

SIDES = st.integers(1, 24)
FEATHERS = st.integers(0, 6)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@st.composite
def masks(draw, sides=SIDES):
    """Masks of any density, from none to all."""
    size = (draw(sides), draw(sides))
    share = draw(st.sampled_from([0, 0.02, 0.2, 0.7, 1]))
    return np.random.default_rng(draw(st.integers(0, 999))).random(size) < share


def distances(mask):
    """Of each pixel's centre to the nearest True one; by brute force, infinite where there is none."""
    there = np.argwhere(mask)
    if not len(there):
        return np.full(mask.shape, np.inf)
    places = np.stack(np.indices(mask.shape), axis=-1)[:, :, None, :]
    return np.sqrt(((places - there) ** 2).sum(axis=-1)).min(axis=-1)


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png(levels, **options):
    return saved(Image.fromarray(np.asarray(levels)), **options)


def read(data, *, size=(4, 6), field="mask.png", json_key=None, max_pixels=10**6):
    region = Region(field=field, json_key=json_key)
    return read_region({"jpg": b"", field.lower(): data}, region, size=size, max_pixels=max_pixels)


def refusal(data, **options):
    with pytest.raises(SampleError) as refused:
        read(data, **options)
    return refused.value


# --- mask images ---


def test_white_means_change():
    levels = np.array([[0, 127, 128, 255]] * 2, np.uint8)
    mask = read(png(levels), size=(2, 4))
    assert mask.dtype == bool
    assert mask.tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_neutral_masks_of_any_mode(mode):
    levels = np.zeros((4, 6), np.uint8)
    levels[1:3, 2:5] = 255
    image = Image.fromarray(levels).convert(mode)
    assert (read(saved(image)) == (levels > 0)).all()


@pytest.mark.parametrize(("field", "format"), [("mask.jpg", "JPEG"), ("mask.webp", "WEBP"), ("mask", "PNG")])
def test_masks_of_other_formats(field, format):
    levels = np.zeros((32, 32), np.uint8)
    levels[:, 16:] = 255
    assert (read(saved(Image.fromarray(levels), format), size=(32, 32), field=field) == (levels > 0)).all()


def test_sixteen_bit_masks():
    levels = np.zeros((4, 6), np.uint16)
    levels[2, 3] = 65535
    assert (read(png(levels)) == (levels > 0)).all()
    for dark in (1, 100, 255):
        levels[2, 3] = dark
        assert refusal(png(levels)).reason == "bad-region"


def test_what_is_transparent_does_not_change():
    image = np.full((4, 6, 2), 255, np.uint8)
    image[:, :3, 1] = 0
    assert read(saved(Image.fromarray(image))).tolist() == [[False] * 3 + [True] * 3] * 4


def test_a_black_mask_is_an_empty_region():
    assert not read(png(np.zeros((4, 6), np.uint8))).any()


def test_masks_are_turned_upright_as_pictures_are():
    levels = np.zeros((4, 6), np.uint8)
    levels[0, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    mask = read(png(levels, exif=exif), size=(6, 4))
    assert np.argwhere(mask).tolist() == [[1, 3]]
    assert "upright picture is 6x4" in refusal(png(levels, exif=exif), size=(4, 6)).detail


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(np.zeros((6, 4), np.uint8)), "mask of 4x6, the upright picture is 6x4"),
        (png(np.ones((4, 6), np.uint8)), "brightest shade is 1 of 255"),
        (png(np.full((4, 6, 3), (255, 0, 0), np.uint8)), "mask in colour"),
        (png(np.zeros((4, 6), np.uint8))[:40], "undecodable"),
        (b"", "undecodable"),
        (saved(Image.fromarray(np.zeros((4, 6), np.uint8)), "JPEG"), "wrong-extension"),
    ],
)
def test_masks_that_can_not_be_meant_are_refused(data, words):
    error = refusal(data)
    assert error.reason == "bad-region"
    assert words in error.detail
    assert "field mask.png" in error.detail


def test_masks_obey_the_limit_of_pixels():
    assert "too-many-pixels" in refusal(png(np.zeros((4, 6), np.uint8)), max_pixels=23).detail


# --- boxes ---


def boxes(value, *, size=(4, 6), json_key=None):
    return read(json.dumps(value).encode(), size=size, field="json", json_key=json_key)


def test_boxes_grow_to_whole_pixels_and_are_clipped():
    mask = boxes([[1.2, 0.9, 2.1, 2], [5, 3, 60, 70.5], [-3, -1.5, 1, 1.25]])
    expected = np.zeros((4, 6), bool)
    expected[0:2, 1:3] = True
    expected[3:, 5:] = True
    expected[0:2, 0:1] = True
    assert (mask == expected).all()


@pytest.mark.slow
@given(size=st.tuples(SIDES, SIDES), data=st.data())
def test_a_box_covers_every_pixel_it_touches_and_no_other(size, data):
    axis = st.integers(-40, 140).map(lambda quarter: quarter / 4)
    left, right = sorted(data.draw(st.tuples(axis, axis)))
    top, bottom = sorted(data.draw(st.tuples(axis, axis)))
    assume(left < right and top < bottom and right > 0 and bottom > 0 and left < size[1] and top < size[0])
    assume(max(right, bottom) > 1)
    mask = boxes([[left, top, right, bottom]], size=size)
    for (row, column), there in np.ndenumerate(mask):
        assert there == (left < column + 1 and right > column and top < row + 1 and bottom > row)


def test_boxes_under_a_key_and_none_at_all():
    expected = np.zeros((4, 6), bool)
    expected[1:3, 2:5] = True
    assert (boxes({"faces": [[2, 1, 5, 3]], "other": 1}, json_key="faces") == expected).all()
    assert not boxes([]).any()
    assert not boxes({"faces": []}, json_key="faces").any()


def test_the_fields_name_is_read_in_lower_case_as_fields_are():
    assert not read(b"[]", field="Boxes.JSON").any()


@pytest.mark.parametrize(
    ("value", "json_key", "words"),
    [
        ([[1, 2, 3]], None, "not four numbers"),
        ([1, 2, 3, 4], None, "not four numbers"),
        ([[1, 2, 3, "4"]], None, "not four numbers"),
        ([[True, False, True, True]], None, "not four numbers"),
        ([[0, 0, float("nan"), 2]], None, "not four numbers"),
        ([[0, 0, float("inf"), 2]], None, "not four numbers"),
        ([[0, 0, 10**400, 2]], None, "not four numbers"),
        ([[2, 0, 5, 3], [4, 1, 2, 3]], None, "box 1 is [4, 1, 2, 3], which has no area"),
        ([[2, 2, 2, 3]], None, "no area"),
        ([[0.1, 0.2, 0.5, 0.75]], None, "pixels, not fractions"),
        ([[6, 0, 9, 2]], None, "wholly outside the upright picture of 6x4"),
        ([[1, -5, 9, 0]], None, "wholly outside"),
        ({"faces": []}, None, "region.json_key"),
        ([[0, 0, 4, 4]], "faces", "no json object"),
        ({"faces": None}, "faces", "no list of boxes"),
        ({"faces": {"box": []}}, "faces", "no list of boxes"),
    ],
)
def test_boxes_that_can_not_be_meant_are_refused(value, json_key, words):
    with pytest.raises(SampleError) as refused:
        boxes(value, json_key=json_key)
    assert refused.value.reason == "bad-region"
    assert words in refused.value.detail
    assert "field json" in refused.value.detail


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b"[[1,2,3,4]] ..", b"9" * 5000])
def test_what_is_neither_image_nor_json_is_refused(data):
    assert refusal(data, field="json").reason == "bad-region"


def test_a_key_given_twice_is_refused():
    """Readers differ in which they take; the one not taken would stay in the picture."""
    error = refusal(b'{"faces": [], "faces": [[0, 0, 4, 4]]}', field="json", json_key="faces")
    assert error.reason == "bad-region"


def test_a_region_that_is_not_there():
    with pytest.raises(SampleError, match=r"missing-region.*no field mask\.png.*only jpg, json"):
        read_region({"jpg": b"", "json": b"{}"}, Region(field="mask.png"), size=(4, 6), max_pixels=100)
    with pytest.raises(SampleError, match="missing-region: field json has no key faces"):
        boxes({"face": []}, json_key="faces")


# --- growing ---


@given(mask=masks(), radius=st.integers(0, 30))
def test_dilation_reaches_exactly_its_radius(mask, radius):
    before = mask.copy()
    assert (dilate(mask, radius) == (distances(mask) <= radius)).all()
    assert (mask == before).all()


# --- in the model ---


def exact_span(policy, source, model, axis):
    """(first, last) of the source that fills the placement's inner part along an axis, as fractions."""
    if policy != "cover":
        return Fraction(0), Fraction(source[axis])
    kept = min(Fraction(source[axis]), Fraction(source[1 - axis] * model[axis], model[1 - axis]))
    return (source[axis] - kept) / 2, (source[axis] + kept) / 2


@pytest.mark.slow
@settings(max_examples=150)
@given(mask=masks(), model=st.tuples(SIDES, SIDES), policy=st.sampled_from(["cover", "contain", "stretch"]))
def test_a_model_pixel_belongs_if_any_of_its_source_does_and_only_then(mask, model, policy):
    """In fractions, pixel by pixel. So no part of the region ever lies under a pixel that does not belong."""
    _, placement = place(noise(*mask.shape), size=model, policy=policy)
    kept = np.zeros(mask.shape, bool)
    kept[placement.kept[0] : placement.kept[2], placement.kept[1] : placement.kept[3]] = True
    if placement.crops and (mask & ~kept).any():
        with pytest.raises(SampleError, match="region-outside-crop"):
            model_mask(mask, placement)
        mask &= kept
    found = model_mask(mask, placement)
    top, left, height, width = placement.inner
    touched = []
    for axis, count in ((0, height), (1, width)):
        first, last = exact_span(policy, mask.shape, model, axis)
        step = (last - first) / count
        edges = [(first + i * step, first + (i + 1) * step) for i in range(count)]
        touched.append(
            [[j for j in range(mask.shape[axis]) if start < j + 1 and j < stop] for start, stop in edges]
        )
    expected = np.zeros(model, bool)
    for i, rows in enumerate(touched[0]):
        for j, columns in enumerate(touched[1]):
            expected[top + i, left + j] = mask[np.ix_(rows, columns)].any()
    assert (found == expected).all()


@given(mask=masks(), feather=FEATHERS)
def test_the_feather_is_drawn_too(mask, feather):
    _, placement = place(noise(*mask.shape), size=mask.shape, policy="cover")
    assert (model_mask(mask, placement, feather=feather) == (distances(mask) <= feather)).all()


def test_a_region_outside_the_crop_is_refused_and_its_feather_is_not():
    _, placement = place(noise(10, 30), size=(10, 10), policy="cover")
    mask = np.zeros((10, 30), bool)
    mask[:, 10] = True
    assert model_mask(mask, placement, feather=3)[:, :4].all()
    mask[4, 9] = True
    with pytest.raises(SampleError, match=r"region-outside-crop.*columns 10 to 20 .*contain"):
        model_mask(mask, placement)


def test_bars_never_belong():
    _, placement = place(noise(10, 30), size=(32, 32), policy="contain")
    found = model_mask(np.ones((10, 30), bool), placement, feather=5)
    top, left, height, width = placement.inner
    assert found[top : top + height, left : left + width].all()
    assert found.sum() == height * width < 32 * 32


@given(mask=masks(), factor=st.sampled_from([1, 2, 4, 8]))
def test_a_latent_cell_belongs_if_any_of_its_pixels_does(mask, factor):
    mask = np.repeat(np.repeat(mask, factor, 0), factor, 1) if factor > 2 else mask
    height, width = (side // factor * factor for side in mask.shape)
    assume(height and width)
    mask = mask[:height, :width]
    cells = state_mask(mask, factor)
    for (row, column), there in np.ndenumerate(cells):
        assert there == mask[row * factor :, column * factor :][:factor, :factor].any()


def test_a_grid_that_does_not_divide_is_a_bug():
    with pytest.raises(ValueError, match="no grid of 8"):
        state_mask(np.zeros((8, 9), bool), 8)
    _, placement = place(noise(8, 8), size=(8, 8), policy="cover")
    with pytest.raises(ValueError, match="the mask is"):
        model_mask(np.zeros((8, 9), bool), placement)


def test_masks_go_through_tiles_as_pictures_do():
    mask = np.zeros((40, 20), bool)
    mask[35:, 12:] = True
    canvas, placement = place_on_canvas(mask[..., None].astype(np.uint8), tile=(32, 32), multiple=8)
    placed = model_mask(mask, placement)
    top, left, height, width = placement.inner
    inner = (slice(top, top + height), slice(left, left + width))
    assert (placed[inner] == canvas[inner][..., 0]).all()
    tiling = plan(placed.shape, tile=(32, 32), overlap=8, multiple=8)
    assert [bool(cut(placed, tiling, index).any()) for index in range(len(tiling))] == [False, True]


# --- blanking ---


@given(mask=masks(), seed=st.integers(0, 99))
def test_a_blanked_picture_carries_nothing_of_its_region(mask, seed):
    pixels, other = noise(*mask.shape, seed=seed), noise(*mask.shape, seed=seed + 1)
    other[~mask] = pixels[~mask]
    blanked = blank(pixels, mask)
    assert (blanked == blank(other, mask)).all()
    assert (blanked[~mask] == pixels[~mask]).all()
    if mask.any() and not mask.all():
        assert np.abs(blanked[mask] - pixels[~mask].mean(axis=0)).max() <= 0.5 + 1e-9
    elif mask.all():
        assert (blanked == 128).all()


# --- the composite ---


@given(mask=masks(), feather=FEATHERS, channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_inside_is_drawn_outside_is_source_and_between_they_blend(mask, feather, channels, seed):
    source, drawn = noise(*mask.shape, channels, seed), noise(*mask.shape, channels, seed + 1)
    kept = source.copy()
    result = composite(source, drawn, mask, feather=feather)
    distance = distances(mask)
    assert result.dtype == np.uint8
    assert (source == kept).all()
    assert (result[mask] == drawn[mask]).all()
    outside = distance > feather
    assert (result[outside] == source[outside]).all()
    assert (outside == ~dilate(mask, feather)).all()
    ring = ~mask & ~outside
    weight = np.cos(np.pi / 2 * distance[ring] / (feather + 1))[:, None] ** 2
    expected = weight * drawn[ring] + (1 - weight) * source[ring]
    assert not ring.any() or np.abs(result[ring] - expected).max() <= 0.5 + 1e-3


@given(mask=masks(), feather=FEATHERS)
def test_what_was_drawn_as_it_was_stays_as_it_was(mask, feather):
    source = noise(*mask.shape)
    assert (composite(source, source.copy(), mask, feather=feather) == source).all()


@given(size=st.tuples(SIDES, SIDES), feather=FEATHERS)
def test_an_empty_region_changes_nothing(size, feather):
    source, drawn = noise(*size), noise(*size, seed=1)
    assert (composite(source, drawn, np.zeros(size, bool), feather=feather) == source).all()
    assert (composite(source, drawn, np.ones(size, bool), feather=feather) == drawn).all()


@given(
    mask=masks(),
    model=st.tuples(SIDES, SIDES),
    policy=st.sampled_from(["cover", "contain", "stretch"]),
    feather=FEATHERS,
)
def test_through_the_model_and_back_the_outside_is_bit_equal(mask, model, policy, feather):
    source = noise(*mask.shape)
    placed, placement = place(blank(source, mask), size=model, policy=policy)
    drawn = noise(*placed.shape, seed=7)
    result = composite(source, restore_onto(source, drawn, placement), mask, feather=feather)
    outside = distances(mask) > feather
    assert (result[outside] == source[outside]).all()
    if not placement.crops:
        assert (result[mask] == restore(drawn, placement)[mask]).all()


def test_pictures_that_do_not_match_are_a_bug():
    mask = np.zeros((4, 5), bool)
    for source, drawn in ((noise(4, 5), noise(4, 6)), (noise(5, 4), noise(5, 4))):
        with pytest.raises(ValueError, match="don't match"):
            composite(source, drawn, mask)
