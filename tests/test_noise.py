"""Keyed noise: the cipher's known answers, golden bytes, independence of everything but the name, normality."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomerang_batch.diffusion.noise import (
    Purpose,
    key_words,
    noise_key,
    normal,
    normal_window,
    philox4x32,
    seed_material,
)
from tests.oracles import normal_cdf

SECRET = bytes(range(32))
WORD = st.integers(0, 2**32 - 1)


def key_of(identity: bytes = b"a", variant: int = 0, material: bytes = SECRET) -> bytes:
    return noise_key(material, identity=identity, variant=variant)


def draw(keys, shape=(8,), *, purpose=Purpose.REVERSE, node=1, pass_index=0):
    nodes = torch.full((len(keys),), node, dtype=torch.int64)
    return normal(key_words(keys), shape, purpose=purpose, node=nodes, pass_index=pass_index)


def words(values) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


def python_philox(counter, key) -> tuple[int, ...]:
    """Philox4x32-10 in whole numbers, as its paper states it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


# --- the cipher ---


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_known_answers(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert [int(word) for word in philox4x32(words(counter), words(key))] == answer
    assert python_philox(counter, key) == tuple(answer)


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_is_the_same_in_whole_numbers(counter, key):
    assert tuple(int(word) for word in philox4x32(words(counter), words(key))) == python_philox(counter, key)


def test_philox_broadcasts_and_does_not_touch_its_inputs():
    counter = tuple(torch.arange(6).view(2, 3) + i for i in range(4))
    key = (torch.tensor([[1], [2]]), torch.tensor([[3], [4]]))
    before = [tensor.clone() for tensor in (*counter, *key)]
    result = philox4x32(counter, key)
    assert {word.shape for word in result} == {torch.Size([2, 3])}
    for row, column in itertools.product(range(2), range(3)):
        expected = python_philox([int(c[row, column]) for c in counter], [int(k[row, 0]) for k in key])
        assert tuple(int(word[row, column]) for word in result) == expected
    assert all(torch.equal(a, b) for a, b in zip(before, (*counter, *key), strict=True))


# --- from words to normals ---


@given(
    identity=st.binary(max_size=20),
    purpose=st.sampled_from(Purpose),
    node=st.integers(0, 65535),
    pass_index=st.integers(0, 255),
    element=st.integers(0, 40),
)
@settings(max_examples=60)
def test_an_element_is_box_muller_of_its_own_counter(identity, purpose, node, pass_index, element):
    """Against whole-number Philox and 30-digit logarithms: the layout the module documents is the format."""
    key = key_of(identity)
    k0, k1, c2, c3 = struct.unpack("<4I", key)
    block, position = divmod(element, 4)
    drawn = python_philox((block, purpose << 24 | pass_index << 16 | node, c2, c3), (k0, k1))
    with mpmath.workdps(30):
        first, second = (drawn[0], drawn[1]) if position < 2 else (drawn[2], drawn[3])
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(first + 1) / 2**32))
        angle = 2 * mpmath.pi * second / 2**32
        expected = float(radius * (mpmath.cos(angle) if position % 2 == 0 else mpmath.sin(angle)))
    actual = draw([key], (element + 1,), purpose=purpose, node=node, pass_index=pass_index)[0, -1]
    assert float(actual) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("identity", "variant", "material", "digest"),
    [
        (b"000001", 0, SECRET, "1c65b1c44a350498f0e2dc9e7c906dada9db4058ff9008c39179116413f33b23"),
        (b"000001", 1, SECRET, "456ec604ba1e9420f5b0aa2e54ceda897541c970d710462f101c6d1a85e097cc"),
        (
            b"nested/key",
            0,
            seed_material(0),
            "607437f8b9f517b1a43733309c422857e19014d30d79ce8b659aced8035fb974",
        ),
    ],
    ids=["first", "second-variant", "public-seed"],
)
def test_golden_noise(identity, variant, material, digest):
    """These bytes are a promise: a change here changes every output ever made with this tool."""
    key = noise_key(material, identity=identity, variant=variant)
    forward = draw([key], (3, 16, 16), purpose=Purpose.FORWARD, node=0)
    reverse = draw([key], (3, 16, 16), purpose=Purpose.REVERSE, node=7, pass_index=1)
    data = forward.numpy().astype("<f4").tobytes() + reverse.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == digest


def test_golden_keys():
    assert key_of(b"000001").hex() == "f14f4239d49f1046d1b5c3138a6751a9"
    assert (
        noise_key(seed_material(0), identity=b"000001", variant=0).hex() == "03b13a4f60d5baadb0c9122bf70472bc"
    )


def test_purposes_keep_their_numbers():
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "FORWARD": 1,
        "REVERSE": 2,
        "VAE": 3,
        "T_DRAW": 4,
        "LABEL_DRAW": 5,
        "MIX_COIN": 6,
        "NEW_LATENT": 7,
    }


def test_draws_are_finite_float32_within_box_mullers_bound():
    """The smallest radius word, 0, stands for 2^-32 and not for an infinity."""
    drawn = draw([key_of(struct.pack("<I", i)) for i in range(200)], (4096,))
    assert drawn.dtype == torch.float32
    assert bool(drawn.isfinite().all())
    assert 4.5 < float(drawn.abs().max()) <= math.sqrt(2 * 32 * math.log(2))


# --- a draw depends on its name alone ---


@given(order=st.permutations(range(6)), size=st.integers(1, 6))
@settings(max_examples=30)
def test_a_row_depends_on_neither_batch_nor_order(order, size):
    keys = [key_of(bytes([i])) for i in range(6)]
    alone = {i: draw([keys[i]], (3, 5, 7))[0] for i in range(6)}
    batch = draw([keys[i] for i in order[:size]], (3, 5, 7))
    for row, i in zip(batch, order, strict=False):
        assert torch.equal(row, alone[i])


def test_rows_of_one_batch_may_stand_at_different_nodes():
    keys = [key_of(b"a"), key_of(b"a"), key_of(b"b")]
    mixed = normal(key_words(keys), (9,), purpose=Purpose.REVERSE, node=torch.tensor([3, 65535, 3]))
    for row, (key, node) in enumerate(zip(keys, (3, 65535, 3), strict=True)):
        assert torch.equal(mixed[row], draw([key], (9,), node=node)[0])


@given(count=st.integers(1, 200))
@settings(max_examples=40)
def test_elements_depend_on_neither_length_nor_shape(count):
    longest = draw([key_of()], (200,))
    assert torch.equal(draw([key_of()], (count,))[0], longest[0, :count])
    assert torch.equal(draw([key_of()], (2, 5, 20)).flatten(), longest[0])
    assert torch.equal(draw([key_of()], (count, 1, 1)).flatten(), longest[0, :count])


def test_rows_of_one_batch_may_be_of_different_passes():
    keys = key_words([key_of(b"a"), key_of(b"a"), key_of(b"b")])
    node = torch.tensor([3, 3, 3])
    mixed = normal(keys, (9,), purpose=Purpose.REVERSE, node=node, pass_index=torch.tensor([0, 255, 7]))
    for row, pass_index in enumerate((0, 255, 7)):
        alone = normal(keys[row : row + 1], (9,), purpose=Purpose.REVERSE, node=node[:1], pass_index=pass_index)
        assert torch.equal(mixed[row], alone[0])


@st.composite
def windows(draw):
    """A window's shape, and for each row of a batch the window's corner and its field's size."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 13)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        margins = draw(st.tuples(*[st.integers(0, 11)] * 4))
        rows.append((margins[:2], (margins[0] + shape[1] + margins[2], margins[1] + shape[2] + margins[3])))
    return shape, rows


@pytest.mark.slow
@given(window=windows(), node=st.integers(0, 65535), pass_index=st.integers(0, 255))
def test_windows_are_cut_from_the_field_they_belong_to(window, node, pass_index):
    (channels, height, width), rows = window
    keys = [key_of(bytes([i])) for i in range(len(rows))]
    passes = torch.tensor([(pass_index + i) % 256 for i in range(len(rows))])
    drawn = normal_window(
        key_words(keys),
        (channels, height, width),
        corner=torch.tensor([corner for corner, _ in rows]),
        field=torch.tensor([field for _, field in rows]),
        purpose=Purpose.REVERSE,
        node=torch.full((len(rows),), node),
        pass_index=passes,
    )
    assert drawn.dtype == torch.float32
    for row, ((top, left), field) in enumerate(rows):
        whole = draw([keys[row]], (channels, *field), node=node, pass_index=int(passes[row]))[0]
        assert torch.equal(drawn[row], whole[:, top : top + height, left : left + width])


def test_a_window_over_all_of_its_field_is_the_field():
    keys = [key_of(b"a"), key_of(b"b")]
    drawn = normal_window(
        key_words(keys),
        (3, 6, 7),
        corner=torch.zeros(2, 2, dtype=torch.int64),
        field=torch.tensor([[6, 7], [6, 7]]),
        purpose=Purpose.REVERSE,
        node=torch.tensor([1, 1]),
    )
    assert torch.equal(drawn, draw(keys, (3, 6, 7)))


def test_a_windows_cost_is_its_own_and_not_its_fields():
    """A field of 4 x 60,000 x 60,000 would take 57 GB."""
    key = key_words([key_of()])
    drawn = normal_window(
        key,
        (4, 8, 8),
        corner=torch.tensor([[59_000, 31]]),
        field=torch.tensor([[60_000, 60_000]]),
        purpose=Purpose.REVERSE,
        node=torch.tensor([1]),
    )
    element = (3 * 60_000 + 59_007) * 60_000 + 31 + 7
    blocks = torch.tensor([element // 4])
    words = philox4x32((blocks, torch.tensor([2 << 24 | 1]), key[:, 2], key[:, 3]), (key[:, 0], key[:, 1]))
    first, second = (float(word) for word in words[element % 4 // 2 * 2 :][:2])
    radius, angle = math.sqrt(-2 * math.log((first + 1) * 2.0**-32)), second * 2 * math.pi * 2.0**-32
    expected = radius * (math.sin(angle) if element % 2 else math.cos(angle))
    assert math.isclose(float(drawn[0, 3, 7, 7]), expected, rel_tol=1e-6)


def test_shapes_without_elements_or_rows():
    assert draw([key_of()], (0,)).shape == (1, 0)
    assert draw([], (3, 4)).shape == (0, 3, 4)


# --- draws of different names share nothing ---


def test_no_two_names_share_a_draw():
    seen = {}
    for identity, variant, purpose, node, pass_index in itertools.product(
        (b"a", b"b"),
        (0, 1),
        (Purpose.FORWARD, Purpose.REVERSE, Purpose.VAE),
        (0, 1, 255, 256, 65535),
        (0, 1, 255),
    ):
        key = key_of(identity, variant)
        drawn = draw([key], (4,), purpose=purpose, node=node, pass_index=pass_index).numpy().tobytes()
        name = (identity, variant, purpose, node, pass_index)
        assert seen.setdefault(drawn, name) == name
    assert len(seen) == 2 * 2 * 3 * 5 * 3


def test_draws_are_uncorrelated_across_keys_steps_purposes_variants_and_passes():
    size = 100_000
    base = draw([key_of()], (size,))
    others = {
        "key": draw([key_of(b"b")], (size,)),
        "variant": draw([key_of(variant=1)], (size,)),
        "secret": draw([key_of(material=bytes(32))], (size,)),
        "step": draw([key_of()], (size,), node=2),
        "purpose": draw([key_of()], (size,), purpose=Purpose.FORWARD),
        "pass": draw([key_of()], (size,), pass_index=1),
    }
    for (first, a), (second, b) in itertools.combinations({"base": base, **others}.items(), 2):
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(size), (first, second)
        assert abs(correlation(a**2, b**2)) < 4.5 / math.sqrt(size), (first, second)


def test_elements_of_one_draw_are_uncorrelated():
    """Also within a Box-Muller pair, and in their squares, which share a radius."""
    drawn = draw([key_of()], (400_000,))[0]
    for lag in (1, 2, 3, 4, 5, 8, 28, 784):
        for a, b in ((drawn[:-lag], drawn[lag:]), (drawn[:-lag] ** 2, drawn[lag:] ** 2)):
            assert abs(correlation(a, b)) < 4.5 / math.sqrt(len(a)), lag


def test_neighbouring_keys_give_uncorrelated_rows():
    rows = draw([key_of(struct.pack("<I", i)) for i in range(300)], (1000,)).double()
    matrix = torch.corrcoef(rows) - torch.eye(300, dtype=torch.float64)
    # The largest of 44,850 correlations of 1,000 independent pairs stays below 5 standard errors.
    assert float(matrix.abs().max()) < 5 / math.sqrt(1000)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


# --- the law ---


@pytest.mark.parametrize("position", range(4))
def test_each_position_of_a_block_is_standard_normal(position):
    size = 100_000
    drawn = draw([key_of()], (4 * size,))[0, position::4].double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float((drawn**power).mean()) - moment
        assert abs(error) < 4.5 * math.sqrt(variance / size), power
    assert kolmogorov_distance(drawn) < 1.95 / math.sqrt(size)  # p = .001


def test_a_row_per_key_is_standard_normal_across_keys():
    drawn = draw([key_of(struct.pack("<I", i)) for i in range(20_000)], (1,)).double()
    assert kolmogorov_distance(drawn.flatten()) < 1.95 / math.sqrt(20_000)


def test_tails_are_as_heavy_as_they_should_be():
    drawn = draw([key_of()], (500_000,))
    for level in (2.0, 3.0, 4.0):
        expected = 2 * normal_cdf(-level) * drawn.numel()
        assert abs(int((drawn.abs() > level).sum()) - expected) < 4.5 * math.sqrt(expected)


def kolmogorov_distance(values: torch.Tensor) -> float:
    """The largest gap between the empirical distribution of `values` and the normal one."""
    ordered = values.sort().values
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max())


# --- noise keys ---


@given(
    a=st.tuples(st.binary(max_size=12), st.integers(-5, 5)),
    b=st.tuples(st.binary(max_size=12), st.integers(-5, 5)),
)
def test_different_names_have_different_keys(a, b):
    same = key_of(*a) == key_of(*b)
    assert same == (a == b)


def test_a_field_can_not_lend_bytes_to_the_next():
    """Fields are length-prefixed: moving a byte over a border, or spelling a border out, makes another name."""
    border = struct.pack("<Q", 8)
    names = [
        (b"", 0),
        (b"\0", 0),
        (b"\0" * 8, 0),
        (border + b"\0" * 8, 0),
        (border + b"\0" * 8 + border, 0),
        (b"a", ord("b")),
        (b"ab", 0),
        (b"a" + struct.pack("<q", ord("b")), 0),
    ]
    assert len({key_of(*name) for name in names}) == len(names)


def test_twenty_thousand_keys_do_not_collide():
    keys = {key_of(b"%06d" % i, variant) for i in range(10_000) for variant in range(2)}
    assert len(keys) == 20_000
    assert {len(key) for key in keys} == {16}
    assert len({key[:8] for key in keys}) == 20_000


def test_keys_depend_on_every_bit_of_the_secret():
    keys = {key_of()}
    for bit in range(256):
        flipped = (int.from_bytes(SECRET) ^ (1 << bit)).to_bytes(32)
        keys.add(key_of(material=flipped))
    assert len(keys) == 257


def test_a_seed_is_no_secret_and_seeds_differ():
    assert len({seed_material(seed) for seed in (0, 1, 2**32, 2**63 - 1)}) == 4
    assert len({key_of(material=seed_material(seed)) for seed in (0, 1, 2**32, 2**63 - 1)}) == 4


@pytest.mark.parametrize("size", [0, 1, 15, 65])
def test_material_unfit_for_a_key_is_refused(size):
    """Empty material would silently turn the MAC into a plain hash that anyone can compute."""
    with pytest.raises(ValueError, match="16 to 64 bytes"):
        key_of(material=bytes(size))


def test_key_words_are_little_endian():
    key = bytes(range(16))
    assert key_words([key]).tolist() == [[0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C]]
