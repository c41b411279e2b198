"""Tiles: they cover, overlap, share one noise field and blend into one image, whatever order they come in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.data.geometry import restore
from boomerang_batch.data.images import to_model_values, to_pixels
from boomerang_batch.data.tiles import Mosaic, canvas_size, check_overlap, cut, place_on_canvas, plan, weights
from boomerang_batch.diffusion.noise import Purpose, key_words, normal, normal_window
from boomerang_batch.errors import ConfigError


@st.composite
def plans(draw, largest=40):
    """A tiling, with the overlap that was asked for and the multiple."""
    multiple = draw(st.sampled_from([1, 2, 4, 8]))
    tile = tuple(multiple * draw(st.integers(2, 3 + 12 // multiple)) for _ in range(2))
    size = canvas_size(tuple(draw(st.integers(1, largest)) for _ in range(2)), tile, multiple)
    overlap = draw(st.integers(1, min(tile) - multiple))
    return plan(size, tile=tile, overlap=overlap, multiple=multiple), overlap, multiple


def picture(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def blended(tiling, values, order=None):
    mosaic = Mosaic(tiling, len(values))
    for index in order or range(len(tiling)):
        assert not mosaic.complete
        mosaic.add(index, cut(values, tiling, index))
    return mosaic.image()


# --- the plan ---


@given(planned=plans(largest=80))
def test_tiles_cover_overlap_and_end_at_the_edges(planned):
    tiling, overlap, multiple = planned
    covered = np.zeros(tiling.size, bool)
    for index, (top, left) in enumerate(tiling.corners):
        assert (top % multiple, left % multiple) == (0, 0)
        tile = cut(covered, tiling, index)
        assert tile.shape == tiling.tile
        tile[:] = True
    assert covered.all()
    for starts, side, length in zip((tiling.tops, tiling.lefts), tiling.tile, tiling.size, strict=True):
        assert starts[0] == 0
        assert starts[-1] == length - side
        gaps = np.diff(starts)
        assert (gaps > 0).all()
        assert (side - gaps >= overlap).all()
        assert not gaps.size or gaps.max() - gaps.min() <= multiple  # evenly spread


@given(planned=plans(largest=80))
def test_no_fewer_tiles_would_do(planned):
    tiling, overlap, multiple = planned
    for starts, side, length in zip((tiling.tops, tiling.lefts), tiling.tile, tiling.size, strict=True):
        longest = (side - overlap) // multiple * multiple
        assert (len(starts) - 2) * longest < length - side or len(starts) == 1


def test_one_tile_is_enough_for_its_own_size():
    tiling = plan((32, 48), tile=(32, 48), overlap=8)
    assert tiling.corners == ((0, 0),)
    assert all((weight == 1).all() for weight in weights(tiling))


def test_tiles_are_numbered_row_by_row():
    tiling = plan((48, 64), tile=(32, 32), overlap=16)
    assert tiling.corners == ((0, 0), (0, 16), (0, 32), (16, 0), (16, 16), (16, 32))


def test_where_tiles_lie_is_a_promise():
    """Each tile's noise and neighbours follow from it, and so every byte of the output."""
    assert plan((32, 75), tile=(32, 32), overlap=8).lefts == (0, 21, 43)
    assert plan((72, 96), tile=(32, 32), overlap=8, multiple=8).tops == (0, 16, 40)


@pytest.mark.parametrize(("overlap", "multiple", "named"), [(32, 1, "at most 31"), (25, 8, "at most 24")])
def test_an_overlap_without_room_to_advance_is_refused(overlap, multiple, named):
    check_overlap(overlap - 1, (32, 64), multiple)
    with pytest.raises(ConfigError, match=rf"images\.tiles\.overlap.*64x32.*{named}"):
        check_overlap(overlap, (32, 64), multiple)
    with pytest.raises(ConfigError, match=r"images\.tiles"):
        plan((64, 64), tile=(32, 64), overlap=overlap, multiple=multiple)


def test_tiles_no_larger_than_one_cell_are_refused():
    with pytest.raises(ConfigError, match="leave tiles out"):
        check_overlap(1, (8, 8), 8)


@pytest.mark.parametrize(("size", "multiple"), [((31, 64), 1), ((33, 64), 2)])
def test_a_canvas_that_tiles_do_not_fill_is_a_bug(size, multiple):
    with pytest.raises(ValueError, match="can't be filled"):
        plan(size, tile=(32, 32), overlap=4, multiple=multiple)


# --- the canvas ---


@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    multiple=st.sampled_from([1, 3, 8]),
)
def test_nothing_on_the_canvas_is_scaled_and_all_of_it_comes_back(size, cells, multiple):
    tile = (cells[0] * multiple, cells[1] * multiple)
    pixels = picture(*size)
    canvas, placement = place_on_canvas(pixels, tile=tile, multiple=multiple)
    assert canvas.shape == (*canvas_size(size, tile, multiple), 3)
    for length, side, full in zip(size, tile, canvas.shape, strict=False):
        assert full == side if length <= side else length <= full < length + multiple
        assert (full - side) % multiple == 0
    assert not placement.crops
    assert (restore(canvas, placement) == pixels).all()


def test_the_margins_are_mirror_images():
    canvas, placement = place_on_canvas(picture(3, 9), tile=(8, 8))
    top = placement.inner[0]
    assert top == 2
    assert (canvas[top - 1] == canvas[top]).all()
    assert (canvas[top - 2] == canvas[top + 1]).all()


# --- the blend ---


@given(planned=plans())
def test_weights_are_positive_and_sum_to_one(planned):
    tiling, _, _ = planned
    vertical, horizontal = weights(tiling)
    assert vertical.dtype == horizontal.dtype == np.float32
    total = np.zeros(tiling.size)
    for index in range(len(tiling)):
        row, column = divmod(index, len(tiling.lefts))
        weight = np.outer(vertical[row], horizontal[column])
        assert (weight > 0).all()
        cut(total, tiling, index)[:] += weight
    assert np.abs(total - 1).max() < 1e-6


def test_weights_are_smooth_and_fade_over_the_whole_overlap():
    tiling = plan((32, 48), tile=(32, 32), overlap=16)
    _, (first, second) = weights(tiling)
    position = (np.arange(16) + 0.5) / 16
    assert np.allclose(first[:16], 1)
    assert np.allclose(first[16:], (1 + np.cos(np.pi * position)) / 2, atol=1e-6)  # a raised cosine
    assert np.allclose(second, first[::-1], atol=1e-6)


def test_weights_stay_smooth_where_more_than_two_tiles_overlap():
    _, horizontal = weights(plan((32, 80), tile=(32, 32), overlap=24))
    assert len(horizontal) == 7
    for weight in horizontal[1:-1]:
        assert max(weight[0], weight[-1]) < 0.01
        assert np.abs(np.diff(weight)).max() < 0.1


@given(planned=plans(), channels=st.sampled_from([1, 3]), seed=st.integers(0, 9))
def test_crops_of_one_image_blend_into_that_image(planned, channels, seed):
    tiling, _, _ = planned
    pixels = picture(*tiling.size, channels, seed)
    values = to_model_values(pixels, (-1.0, 1.0))
    image = blended(tiling, values)
    assert image.dtype == np.float32
    assert np.abs(image - values).max() < 1e-6
    assert (to_pixels(image, (-1.0, 1.0)) == pixels).all()


@given(planned=plans(), seed=st.randoms())
def test_the_order_in_which_tiles_arrive_changes_no_bit(planned, seed):
    tiling, _, _ = planned
    order = list(range(len(tiling)))
    seed.shuffle(order)
    random = np.random.default_rng(1)
    tiles = random.standard_normal((len(tiling), 2, *tiling.tile), dtype=np.float32)
    images = []
    for arriving in (range(len(tiling)), order):
        mosaic = Mosaic(tiling, 2)
        for index in arriving:
            mosaic.add(index, tiles[index])
        images.append(mosaic.image())
    assert np.array_equal(*images)


def test_a_tile_speaks_alone_where_it_lies_alone():
    tiling = plan((32, 48), tile=(32, 32), overlap=16)
    mosaic = Mosaic(tiling, 1)
    mosaic.add(0, np.full((1, 32, 32), 1, np.float32))
    mosaic.add(1, np.full((1, 32, 32), 3, np.float32))
    row = mosaic.image()[0, 7]
    assert (row[:16] == 1).all()
    assert (row[32:] == 3).all()
    assert (np.diff(row[15:33]) > 0).all()


def test_a_mosaic_wants_each_tile_once_and_whole():
    tiling = plan((32, 48), tile=(32, 32), overlap=16)
    mosaic = Mosaic(tiling, 1)
    tile = np.zeros((1, 32, 32), np.float32)
    mosaic.add(1, tile)
    for index in (1, 2, -1):
        with pytest.raises(ValueError, match="unknown or was added"):
            mosaic.add(index, tile)
    with pytest.raises(ValueError, match="tile 0 of 2 is missing"):
        mosaic.image()
    with pytest.raises(ValueError, match="tile 0 is"):
        mosaic.add(0, tile[:, :15])
    mosaic.add(0, tile)
    assert mosaic.complete
    with pytest.raises(ValueError, match="unknown or was added"):
        mosaic.add(0, tile)
    with pytest.raises(ValueError, match="don't fill"):
        cut(tile, tiling, 0)


# --- one noise field ---


@settings(max_examples=25)
@given(planned=plans())
def test_tiles_draw_their_windows_of_one_noise_field(planned):
    tiling, _, multiple = planned
    grid = tiling.in_states(multiple)
    keys = key_words([bytes(range(16))])
    node = torch.tensor([5])
    whole = normal(keys, (2, *grid.size), purpose=Purpose.FORWARD, node=node)[0].numpy()
    count = len(grid)
    drawn = normal_window(
        keys.expand(count, -1),
        (2, *grid.tile),
        corner=torch.tensor(grid.corners),
        field=torch.tensor([grid.size] * count),
        purpose=Purpose.FORWARD,
        node=node.expand(count),
    )
    for index in range(count):
        assert np.array_equal(drawn[index].numpy(), cut(whole, grid, index))


def test_a_tiling_for_another_grid_is_a_bug():
    tiling = plan((36, 36), tile=(32, 32), overlap=4, multiple=4)
    assert tiling.in_states(4).lefts == (0, 1)
    with pytest.raises(ValueError, match="another multiple"):
        tiling.in_states(8)
