"""Which bucket an image goes to, and which buckets a model can draw at."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.data.buckets import check_sizes, choose_bucket
from boomerang_batch.errors import ConfigError

SIDES = st.integers(1, 5000)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8)


@given(source=st.tuples(SIDES, SIDES), sizes=SIZES)
def test_no_bucket_has_closer_proportions(source, sizes):
    """In logarithms, where the module works in fractions."""
    height, width = choose_bucket(source, sizes)
    assert (width, height) in sizes
    shape = math.log(source[0] / source[1])
    misfits = [abs(shape - math.log(h / w)) for w, h in sizes]
    assert abs(shape - math.log(height / width)) <= min(misfits) + 1e-9


@given(source=st.tuples(SIDES, SIDES), sizes=SIZES, seed=st.randoms())
def test_the_order_of_the_list_only_settles_true_ties(source, sizes, seed):
    shuffled = list(sizes)
    seed.shuffle(shuffled)
    (height, width), (other_height, other_width) = choose_bucket(source, sizes), choose_bucket(source, shuffled)
    if (height, width) != (other_height, other_width):
        # Mirror images of one another around the source's proportions, or around its area.
        proportions = (height * other_height * source[1] ** 2, width * other_width * source[0] ** 2)
        same = height * other_width == width * other_height
        assert same or proportions[0] == proportions[1]


def test_proportions_go_before_area_and_area_before_order():
    sizes = [(512, 512), (64, 64), (640, 384), (384, 640)]
    assert choose_bucket((480, 800), sizes) == (384, 640)
    assert choose_bucket((800, 480), sizes) == (640, 384)
    assert choose_bucket((70, 71), sizes) == (64, 64)
    assert choose_bucket((700, 710), sizes) == (512, 512)


def test_ties_go_to_the_first():
    assert choose_bucket((100, 100), [(200, 100), (100, 200)]) == (100, 200)
    assert choose_bucket((100, 100), [(100, 200), (200, 100)]) == (200, 100)
    # An area of 100 lies between 50 and 200 by the same factor: 10x10 against 5x10 and 10x20, all told.
    assert choose_bucket((20, 20), [(10, 10), (40, 40)]) == (10, 10)
    assert choose_bucket((20, 20), [(40, 40), (10, 10)]) == (40, 40)


def test_buckets_a_model_can_draw_at_pass():
    check_sizes([], multiple=None, trained=(64, 32))
    check_sizes([(32, 64)], multiple=None, trained=(64, 32))
    check_sizes([(512, 768), (8, 16)], multiple=8, trained=(512, 512))


@pytest.mark.parametrize(
    ("sizes", "multiple", "named"),
    [
        ([(64, 32)], None, r"images\.sizes: 64x32 .*\[\[32, 64\]\]"),
        ([(32, 64), (64, 64)], None, "images.sizes: 64x64"),
        ([(512, 512), (500, 512)], 64, "images.sizes: 500x512: .*multiples of 64; use 512x512"),
        ([(512, 3)], 8, "images.sizes: 512x3: .*use 512x8"),
    ],
)
def test_others_are_refused_with_the_fix(sizes, multiple, named):
    with pytest.raises(ConfigError, match=named):
        check_sizes(sizes, multiple=multiple, trained=(64, 32))
