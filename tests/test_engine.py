"""The engine on a real small UNet: a sample's bits depend on the sample, never on its company.

The reference of every test is the same draw alone, in slots that are otherwise empty.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine, Region, Walk
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import build_schedule
from tests.oracles import linear_levels

BATCH = 4
CLASSES = 5
SIZE = 8
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "half": (0.5, 1), "2m": (0.0, 2)}
Outcome = tuple[object, int, Tensor]


class SmallUNet:
    """An untrained UNet with attention and group norm, class-conditional, as a Denoiser."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._network = UNet2DModel(
                sample_size=SIZE,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
                attention_head_dim=4,
                num_class_embeds=CLASSES,
            ).eval()
        self.shapes: list[torch.Size] = []
        self.spec = DenoiserSpec(
            channels=1,
            height=SIZE,
            width=SIZE,
            value_range=(-1.0, 1.0),
            levels=linear_levels(),
            prediction="epsilon",
            clip_range=1.0,
            fractional_tau=True,
            conditioning="label",
            classes=CLASSES,
            digest="0" * 64,
        )

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        self.shapes.append(x_t.shape)
        with torch.no_grad():
            return self._network(x_t, tau.float(), class_labels=torch.tensor(conditions)).sample


DENOISER = SmallUNet()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def walk_at(timestep: int, sampler: str = "ddpm") -> Walk:
    eta, order = SAMPLERS[sampler]
    schedule = build_schedule(
        DENOISER.spec.levels, grid="linspace", steps=8, t=("timestep", timestep), start="exact"
    )
    return Walk(schedule, build_solver(schedule, prediction="epsilon", eta=eta, clip_range=1.0, order=order))


@pytest.fixture
def make() -> Iterator[object]:
    """Engines that are closed in the end."""
    made = []

    def engine(denoiser=DENOISER, *, sampler: str = "ddpm", batch_size: int = BATCH, **options) -> Engine:
        made.append(Engine(denoiser, batch_size=batch_size, order=SAMPLERS[sampler][1], threads=1, **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def draw(number: int, *, timestep: int = 400, sampler: str = "ddpm", size: int = SIZE, **options) -> Draw:
    generator = torch.Generator().manual_seed(number)
    settings = {
        "tag": number,
        "image": torch.rand(1, size, size, generator=generator) * 2 - 1,
        "noise_key": noise_key(bytes(32), identity=b"%d" % number, variant=0),
        "walk": walk_at(timestep, sampler),
        "condition": number % CLASSES,
    }
    return Draw(**settings | options)


@functools.cache
def alone(number: int, **options) -> list[Tensor]:
    """What each pass of a draw gives when it has all slots for itself."""
    engine = Engine(DENOISER, batch_size=BATCH, order=SAMPLERS[options.get("sampler", "ddpm")][1], threads=1)
    results = {drawn.pass_number: drawn.image for drawn in engine.run([draw(number, **options)])}
    engine.close()
    return [results[number] for number in sorted(results)]


def check(results: Sequence[Drawn], plan: dict[int, dict]) -> None:
    """Every planned draw came out once per emitted pass, with the bits it has alone."""
    found: dict[int, dict[int, Tensor]] = {}
    for drawn in results:
        passes = found.setdefault(drawn.draw.tag, {})
        assert drawn.pass_number not in passes
        passes[drawn.pass_number] = drawn.image
    assert found.keys() == plan.keys()
    for number, passes in found.items():
        expected = alone(number, **plan[number])
        assert len(passes) == len(expected)
        assert all(torch.equal(passes[i], e) for i, e in zip(sorted(passes), expected, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_bits_depend_on_neither_company_nor_order_nor_time(sampler, data):
    """Mixed t, cascades, streams that come at any pace: all as if alone."""
    options = st.fixed_dictionaries(
        {
            "timestep": st.sampled_from([0, 90, 400, 800]),
            "passes": st.sampled_from([1, 1, 2, 3]),
            "emit_all": st.booleans(),
        }
    )
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9, unique=True))
    plan = {number: {"sampler": sampler, **data.draw(options)} for number in numbers}
    cut = data.draw(st.integers(0, len(numbers)))
    pauses = data.draw(st.lists(st.sampled_from([0, 0, 0.002, 0.02]), min_size=10, max_size=10))

    def stream(part: Sequence[int]) -> Iterator[Draw]:
        for number in part:
            time.sleep(pauses[number])
            yield draw(number, **plan[number])

    engine = Engine(DENOISER, batch_size=BATCH, order=SAMPLERS[sampler][1], threads=1)
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda part: list(engine.run(stream(part))), (numbers[:cut], numbers[cut:]))
        check([drawn for part in parts for drawn in part], plan)
    engine.close()


def test_a_sample_in_every_slot_beside_others(make):
    engine = make()
    for position in range(BATCH):
        numbers = [11, 12, 13, 14]
        numbers[position] = 3
        check(list(engine.run(draw(i) for i in numbers)), {i: {} for i in numbers})


def test_a_poisoned_neighbour_spoils_no_one_and_no_successor(make):
    engine = make(sampler="2m")
    for poison in (float("nan"), float("inf"), 1e30):
        bad = draw(99, sampler="2m", image=torch.full((1, SIZE, SIZE), poison))
        good = [draw(i, sampler="2m") for i in range(7)]
        results = list(engine.run([good[0], bad, *good[1:]]))
        check([one for one in results if one.draw.tag != 99], {i: {"sampler": "2m"} for i in range(7)})


def test_the_result_is_boomerangs_own():
    batch = [draw(i) for i in range(BATCH)]
    x_0 = torch.stack([one.image for one in batch])
    walk = walk_at(400)
    out = boomerang(
        x_0,
        DENOISER,
        walk.schedule,
        walk.solver,
        KeyedNoise([one.noise_key for one in batch], x_0),
        [one.condition for one in batch],
    )
    for i in range(BATCH):
        assert float((out[i] - alone(i)[0]).abs().max()) < 1e-6


def test_a_cascade_is_boomerang_after_boomerang_with_fresh_noise():
    """Pass 2 starts from pass 1's result; with pass 1's noise it would be what a draw of that result is."""
    first, second, third = alone(2, passes=3, emit_all=True)
    assert torch.equal(alone(2)[0], first)
    assert torch.equal(alone(2, passes=3)[0], third)
    again = next(iter(Engine(DENOISER, batch_size=BATCH, threads=1).run([draw(2, image=first)]))).image
    assert not torch.allclose(again, second, atol=1e-2)


def test_label_noise_key_and_t_all_matter(make):
    other_key = noise_key(bytes(32), identity=b"0", variant=1)
    changed = [draw(0, tag="key", noise_key=other_key), draw(0, tag="label", condition=1)]
    changed += [draw(0, tag="t", timestep=500)]
    for drawn in make().run(changed):
        assert not torch.equal(drawn.image, alone(0)[0]), drawn.draw.tag


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
def test_every_draw_comes_back_once_and_every_call_has_one_shape(make, count):
    engine = make()
    DENOISER.shapes.clear()
    results = list(engine.run(draw(i) for i in range(count)))
    shapes = list(DENOISER.shapes)
    check(results, {i: {} for i in range(count)})
    assert set(shapes) <= {torch.Size([BATCH, 1, SIZE, SIZE])}
    waves = -(-count // BATCH)
    assert waves * walk_at(400).n <= len(shapes) <= waves * walk_at(400).n + count


def test_slots_are_filled_up_while_others_are_on_their_way(make):
    """Very uneven t: the total is near the sum of evaluations over slots, not the longest per batch."""
    far, near = walk_at(1000), walk_at(1)
    assert far.n == 8 * near.n
    plan = [1000 if i % BATCH == 0 else 1 for i in range(40)]
    engine = make()
    DENOISER.shapes.clear()
    results = list(engine.run(draw(i, timestep=t) for i, t in enumerate(plan)))
    assert len(results) == 40
    evaluations = sum(walk_at(t).n for t in plan)
    assert len(DENOISER.shapes) <= evaluations / BATCH + 2 * far.n
    assert len(DENOISER.shapes) < 0.6 * 10 * far.n  # of what ten batches as they come would take


def test_draws_are_taken_only_a_little_ahead(make):
    taken = itertools.count()
    last = [0]

    def draws() -> Iterator[Draw]:
        for i in range(1000):
            last[0] = next(taken)
            yield draw(i % 8, timestep=90)

    results = make().run(draws())
    next(results)
    time.sleep(0.5)
    # In the slots, in the queue before them, in the queue behind them, and one in the reader's hand.
    assert last[0] < 6 * BATCH
    results.close()


def test_an_error_among_the_draws_ends_its_stream_and_no_other(make):
    engine = make()

    def broken() -> Iterator[Draw]:
        yield draw(0)
        raise OSError("the disk is gone")

    def steady() -> list[Drawn]:
        return list(engine.run(draw(i) for i in range(9)))

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(steady)
        with pytest.raises(OSError, match="the disk is gone"):
            list(engine.run(broken()))
        check(other.result(), {i: {} for i in range(9)})


def test_a_caller_who_leaves_frees_the_slots_and_the_reader(make):
    engine = make()
    before = threading.active_count()
    closed = threading.Event()

    def endless() -> Iterator[Draw]:
        try:
            for i in itertools.count():
                yield draw(i % 8)
        finally:
            closed.set()

    leaving = engine.run(endless())
    next(leaving)
    leaving.close()
    assert closed.wait(5)
    check(list(engine.run(draw(i) for i in range(5))), {i: {} for i in range(5)})
    assert threading.active_count() <= before + 1  # the engine's own


def test_a_failing_network_fails_every_caller_and_says_so(make):
    class Failing:
        spec = DENOISER.spec

        def encode(self, images: Tensor) -> Tensor:
            return images

        decode = encode

        def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
            raise RuntimeError("device lost")

    engine = make(Failing())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            list(engine.run([draw(0)]))


def test_t_zero_gives_back_the_images_without_a_call(make):
    engine = make()
    DENOISER.shapes.clear()
    drawn = list(engine.run(draw(i, timestep=0, passes=2, emit_all=True) for i in range(6)))
    assert len(drawn) == 12
    assert all(torch.equal(one.image, one.draw.image) for one in drawn)
    assert DENOISER.shapes == []


def test_shapes_have_slots_of_their_own(make):
    sizes = {i: (SIZE, 2 * SIZE)[i % 3 == 0] for i in range(10)}
    results = list(make().run(draw(i, size=size) for i, size in sizes.items()))
    check(results, {i: {"size": size} for i, size in sizes.items()})


def test_outside_its_region_a_draw_is_what_it_was(make):
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, 2:5, 3:7] = True
    plain = [draw(i) for i in range(3)]
    limited = [
        draw(i, tag=100 + i, region=Region(mask=mask, outside=plain[i].image), timestep=600) for i in range(3)
    ]
    for drawn in make().run([*plain, *limited]):
        if drawn.draw.region is None:
            assert torch.equal(drawn.image, alone(drawn.draw.tag)[0])
            continue
        outside = ~mask.expand_as(drawn.image)
        assert torch.equal(drawn.image[outside], drawn.draw.image[outside])
        assert float((drawn.image - drawn.draw.image)[~outside].abs().mean()) > 0.05


def test_other_batch_sizes_agree_within_a_grey_level(make):
    """Bits may differ there, which is why the batch shape belongs to the recipe; images must not."""
    for batch_size in (1, 3, 8):
        for drawn in make(batch_size=batch_size).run(draw(i) for i in range(8)):
            assert float((drawn.image - alone(drawn.draw.tag)[0]).abs().max()) < 1e-3
            assert drawn.batch_size == batch_size


def test_elastic_shrinks_at_the_end_alone_and_says_so(make):
    engine = make(batch_size=8, elastic=True)
    DENOISER.shapes.clear()
    draws = [draw(i, timestep=1000 if i == 9 else 90) for i in range(10)]
    results = {one.draw.tag: one for one in engine.run(draws)}
    sizes = [shape[0] for shape in DENOISER.shapes]
    assert sizes[0] == 8
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert results[0].batch_size == 8
    assert results[9].batch_size == 1
    assert float((results[9].image - alone(9, timestep=1000)[0]).abs().max()) < 1e-3
    DENOISER.shapes.clear()
    list(engine.run(draw(i) for i in range(16)))
    assert DENOISER.shapes[0][0] == 8  # and grows again
