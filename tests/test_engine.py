"""The engine on small real networks: a sample's bits depend on the sample, never on its company.

What a draw must give is computed apart from all engines by `engines.alone`, one sample at a time.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion import watched
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.denoiser import Condition
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine, Region
from boomerang_batch.diffusion.noise import noise_key
from tests import tiny_models
from tests.engines import CHANNELS, CLASSES, SAMPLERS, SIZE, Tiny, alone_once, draw, order_of, planned, walk_at

BATCH = 4
Make = Callable[..., Engine]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make() -> Iterator[Make]:
    """Engines that are closed in the end."""
    made = []

    def engine(model=None, *, sampler: str = "ddpm", batch_size: int = BATCH, **options) -> Engine:
        model = model or Tiny(sampler)
        made.append(Engine(model, batch_size=batch_size, order=order_of(sampler), threads=1, **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def alone(number: int, sampler: str = "ddpm", **options) -> dict[int, Tensor]:
    return alone_once(sampler, False, BATCH, 1, number=number, **options)


def check(results: Sequence[Drawn], expected: dict[int, dict[int, Tensor]]) -> None:
    """Every draw came out once per emitted pass, with these bits."""
    found: dict[int, dict[int, Tensor]] = {}
    for drawn in results:
        passes = found.setdefault(drawn.draw.tag, {})
        assert drawn.pass_number not in passes
        passes[drawn.pass_number] = drawn.image
    assert found.keys() == expected.keys()
    for number, passes in found.items():
        assert passes.keys() == expected[number].keys()
        for pass_number, image in passes.items():
            assert torch.equal(image, expected[number][pass_number]), (number, pass_number)


# --- exactness ---

PLANS = st.fixed_dictionaries(
    {
        "number": st.integers(0, 4),
        "variant": st.integers(0, 2),
        "timestep": st.sampled_from([0, 1, 6, 14, 20]),
        "passes": st.sampled_from([1, 1, 2, 3]),
        "emit_all": st.booleans(),
        "tiled": st.booleans(),
        "limited": st.booleans(),
        "size": st.sampled_from([SIZE, SIZE, 12]),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_bits_depend_on_neither_company_nor_order_nor_time(sampler, data):
    """Mixed t, variants, cascades, regions, tiles, latents, shapes, in streams of any pace: all as if alone."""
    latent = data.draw(st.booleans())
    plans = data.draw(st.lists(PLANS, min_size=1, max_size=9))
    cut = data.draw(st.integers(0, len(plans)))
    pauses = data.draw(st.lists(st.sampled_from([0, 0, 0.002, 0.01]), min_size=9, max_size=9))
    encode_batch = data.draw(st.integers(1, 3)) if latent else 1
    check_against_alone(sampler, plans, [cut], pauses, latent=latent, encode_batch=encode_batch)


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_everything_at_once_is_as_if_alone(sampler, latent):
    """What chance may leave out: every kind of draw, each with other t, in three streams."""
    plain = {"variant": 0, "passes": 1, "emit_all": False, "tiled": False, "limited": False, "size": SIZE}
    plans = [
        plain | {"number": 0, "timestep": 20},
        plain | {"number": 0, "timestep": 20, "variant": 1},
        plain | {"number": 0, "timestep": 6, "variant": 2, "passes": 3, "emit_all": True},
        plain | {"number": 1, "timestep": 14, "passes": 3},
        plain | {"number": 2, "timestep": 20, "tiled": True},
        plain | {"number": 3, "timestep": 14, "limited": True, "passes": 2, "emit_all": True},
        plain | {"number": 4, "timestep": 1, "limited": True, "tiled": True},
        plain | {"number": 5, "timestep": 14, "size": 12},
        plain | {"number": 6, "timestep": 20, "size": 12, "passes": 2, "limited": True},
        plain | {"number": 7, "timestep": 0},
    ]
    pauses = [0, 0.002, 0, 0, 0.002, 0, 0, 0, 0.002, 0]
    check_against_alone(sampler, plans, [3, 7], pauses, latent=latent, encode_batch=3 if latent else 1)


def check_against_alone(
    sampler: str,
    plans: Sequence[dict],
    cuts: Sequence[int],
    pauses: Sequence[float],
    *,
    latent: bool,
    encode_batch: int,
) -> None:
    """Draw `plans`, cut into streams that pause before each, and compare with each one drawn by itself."""

    def stream(places: Sequence[int]) -> Iterator[Draw]:
        for place in places:
            time.sleep(pauses[place])
            yield planned(sampler, latent, tag=place, **plans[place])

    engine = Engine(
        Tiny(sampler, latent=latent),
        batch_size=BATCH,
        order=order_of(sampler),
        encode_batch=encode_batch,
        threads=1,
    )
    places = range(len(plans))
    streams = [places[start:end] for start, end in itertools.pairwise([0, *cuts, len(plans)])]
    with ThreadPoolExecutor(len(streams)) as pool:
        parts = pool.map(lambda part: list(engine.run(stream(part))), streams)
        results = [drawn for part in parts for drawn in part]
    engine.close()
    expected = [alone_once(sampler, latent, BATCH, encode_batch, **plan) for plan in plans]
    check(results, dict(enumerate(expected)))


class UNet(Tiny):
    """An untrained diffusers UNet with attention and group norm, class-conditional."""

    def __init__(self) -> None:
        super().__init__()
        self._unet = tiny_models.network(
            in_channels=CHANNELS, out_channels=CHANNELS, num_class_embeds=CLASSES
        ).requires_grad_(False)
        self._network = lambda x, tau, labels: self._unet(x, tau.float(), class_labels=labels).sample


def test_a_sample_in_every_slot_beside_others(make):
    """On a real UNet, whose reference is the draw alone in an engine."""
    model = UNet()
    (reference,) = make(model).run([draw(3)])
    engine = make(model)
    for position in range(BATCH):
        numbers = [11, 12, 13, 14]
        numbers[position] = 3
        results = {one.draw.tag: one.image for one in engine.run(draw(i) for i in numbers)}
        assert torch.equal(results[3], reference.image)


@pytest.mark.parametrize("sampler", ["2m", "learned", "ddpm"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_neighbour_spoils_no_one_and_no_successor(make, sampler, poison):
    bad = draw(99, sampler=sampler, image=torch.full((CHANNELS, SIZE, SIZE), poison))
    good = [draw(i, sampler=sampler) for i in range(7)]
    results = list(make(sampler=sampler).run([good[0], bad, *good[1:]]))
    check([one for one in results if one.draw.tag != 99], {i: alone(i, sampler) for i in range(7)})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_result_is_boomerangs_own(make, sampler):
    batch = [draw(i, sampler=sampler, timestep=14) for i in range(BATCH)]
    x_0 = torch.stack([one.image for one in batch])
    walk = walk_at(14, sampler)
    out = boomerang(
        x_0,
        Tiny(sampler),
        walk.schedule,
        walk.solver,
        KeyedNoise([one.noise_key for one in batch], x_0),
        [one.condition for one in batch],
    )
    for drawn in make(sampler=sampler).run(batch):
        expected = out[drawn.draw.tag]
        assert float((drawn.image - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_cascade_is_boomerang_after_boomerang_with_fresh_noise(make):
    """Pass 2 starts from pass 1's result; with pass 1's noise it would be what a draw of that result is."""
    passes = {one.pass_number: one.image for one in make().run([draw(2, passes=3, emit_all=True)])}
    check(list(make().run([draw(2)])), {2: {1: passes[1]}})
    check(list(make().run([draw(2, passes=3)])), {2: {3: passes[3]}})
    (again,) = make().run([draw(2, image=passes[1])])
    assert not torch.allclose(again.image, passes[2], atol=1e-2)


def test_label_noise_key_and_t_all_matter(make):
    other_key = noise_key(bytes(32), identity=b"0", variant=1)
    changed = [draw(0, tag="key", noise_key=other_key), draw(0, tag="label", condition=1)]
    changed += [draw(0, tag="t", timestep=12)]
    for drawn in make().run(changed):
        assert not torch.equal(drawn.image, alone(0)[1]), drawn.draw.tag


def test_t_zero_gives_back_the_images_without_a_call(make):
    model = Tiny()
    drawn = list(make(model).run(draw(i, timestep=0, passes=2, emit_all=True) for i in range(6)))
    assert len(drawn) == 12
    assert all(torch.equal(one.image, one.draw.image) for one in drawn)
    assert model.calls == []


def test_outside_its_region_a_draw_is_what_it_was(make):
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, 2:5, 3:7] = True
    plain = [draw(i) for i in range(3)]
    limited = [
        draw(i, tag=100 + i, region=Region(mask=mask, outside=plain[i].image), timestep=16) for i in range(3)
    ]
    for drawn in make().run([*plain, *limited]):
        if drawn.draw.region is None:
            assert torch.equal(drawn.image, alone(drawn.draw.tag)[1])
            continue
        outside = ~mask.expand_as(drawn.image)
        assert torch.equal(drawn.image[outside], drawn.draw.image[outside])
        assert float((drawn.image - drawn.draw.image)[~outside].abs().mean()) > 0.05


def test_other_batch_sizes_agree_within_a_grey_level(make):
    """Bits may differ there, which is why the batch shape belongs to the recipe; images must not."""
    differ = False
    for batch_size in (1, 3, 8):
        for drawn in make(batch_size=batch_size).run(draw(i) for i in range(8)):
            distance = float((drawn.image - alone(drawn.draw.tag)[1]).abs().max())
            assert distance < 1e-3
            differ = differ or distance > 0
            assert drawn.batch_size == batch_size
    assert differ  # else none of this file's comparisons could fail


def test_a_result_keeps_no_other_results_memory_alive(make):
    for drawn in make().run(draw(i) for i in range(BATCH)):
        assert drawn.image.untyped_storage().nbytes() == drawn.image.nbytes


# --- how many calls it takes ---


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9, 16])
def test_equal_draws_take_the_fewest_calls_all_of_one_shape(make, count):
    model = Tiny()
    results = list(make(model).run(draw(i) for i in range(count)))
    check(results, {i: alone(i) for i in range(count)})
    assert model.calls == [torch.Size([BATCH, CHANNELS, SIZE, SIZE])] * (-(-count // BATCH) * walk_at(10).n)


def test_slots_are_filled_up_while_others_are_on_their_way(make):
    """Very uneven t: the total is near the sum of evaluations over slots, not the longest per batch."""
    far, near = walk_at(20), walk_at(1)
    assert far.n == 5 * near.n
    plan = [20 if i % BATCH == 0 else 1 for i in range(40)]
    model = Tiny()
    assert len(list(make(model).run(draw(i, timestep=t) for i, t in enumerate(plan)))) == 40
    evaluations = sum(walk_at(t).n for t in plan)
    assert len(model.calls) <= evaluations / BATCH + 2 * far.n
    assert len(model.calls) < 0.6 * 10 * far.n  # of what ten batches as they come would take


def test_two_streams_share_their_calls(make):
    """Shards of 5 and 3 draws in slots of 4: two batches, not three."""
    model = Tiny()
    model.fault = lambda method, shape: time.sleep(0.01)
    engine = make(model)
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda part: list(engine.run(map(draw, part))), (range(5), range(5, 8)))
        check([one for part in parts for one in part], {i: alone(i) for i in range(8)})
    assert len(model.calls) <= 2 * walk_at(10).n + 1


class Timed(Tiny):
    """Knows when it was at work, which takes it a while."""

    def __init__(self, seconds: float = 0.1) -> None:
        super().__init__()
        self._seconds = seconds
        self.spans: list[tuple[float, float]] = []

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: Sequence[Condition]) -> Tensor:
        started = time.monotonic()
        time.sleep(self._seconds)
        output = super().denoise(x_t, tau, conditions)
        self.spans.append((started, time.monotonic()))
        return output

    def waits(self) -> list[float]:
        return [after[0] - before[1] for before, after in itertools.pairwise(self.spans)]


@pytest.mark.slow
def test_a_slow_reader_is_waited_for_once_and_not_at_every_iteration(make):
    """A draw goes its way without waiting for company before each of its steps."""
    model = Timed()

    def draws() -> Iterator[Draw]:
        yield draw(0, timestep=20)
        time.sleep(2)

    list(make(model).run(draws()))
    assert len(model.waits()) == walk_at(20).n - 1
    assert sum(model.waits()) < 0.15


def test_a_draw_that_comes_within_an_iterations_time_is_waited_for(make):
    """It takes no calls of its own then."""
    model = Timed()

    def draws() -> Iterator[Draw]:
        for number in range(BATCH):
            yield draw(number, timestep=6)
            time.sleep(0.02)

    list(make(model).run(draws()))
    assert len(model.spans) == walk_at(6).n


@pytest.mark.slow
def test_a_stream_whose_caller_is_slow_is_not_waited_for(make):
    """Its draws could not be taken if they came."""
    model = Timed(0.4)
    engine = make(model)
    stuck = engine.run(draw(i, timestep=1) for i in itertools.count())
    next(stuck)
    time.sleep(2)  # its queues are full now
    model.spans.clear()
    started = time.monotonic()
    check(list(engine.run([draw(0, timestep=1)])), {0: alone(0, timestep=1)})
    assert len(model.spans) == 1
    assert model.spans[0][0] - started < 0.2
    stuck.close()


# --- shapes ---


def test_shapes_have_slots_of_their_own(make):
    sizes = {i: (SIZE, 2 * SIZE)[i % 3 == 0] for i in range(10)}
    results = list(make().run(draw(i, size=size) for i, size in sizes.items()))
    check(results, {i: alone(i, size=size) for i, size in sizes.items()})


@pytest.mark.parametrize("rare", [1, BATCH])
def test_a_shape_is_not_starved_by_another_that_keeps_coming(make, rare):
    """Whether a few draws of it are there or as many as it has slots for."""
    engine = make()
    crowd = engine.run(draw(i % 8, timestep=20) for i in itertools.count())
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: list(engine.run(draw(i, size=12, timestep=6) for i in range(rare))))
        next(crowd)
        for _ in itertools.takewhile(lambda _: not other.done(), itertools.islice(crowd, 1000)):
            pass
        assert other.done()
        check(other.result(), {i: alone(i, size=12, timestep=6) for i in range(rare)})
    crowd.close()


@pytest.mark.slow
def test_the_fullest_shape_goes_first(make):
    """Draws of two shapes turn and turn about still take few calls."""
    model = Tiny()
    results = list(make(model).run(draw(i, size=(SIZE, 12)[i % 2]) for i in range(32)))
    check(results, {i: alone(i, size=(SIZE, 12)[i % 2]) for i in range(32)})
    assert len(model.calls) <= 1.25 * 8 * walk_at(10).n


def test_a_device_counts_as_stalled_by_the_step_it_is_at_and_not_by_its_round(make, monkeypatch):
    """Slow encoders of many images would look hung otherwise."""
    clock, seen = [0.0], []
    monkeypatch.setattr(watched, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    model = Tiny(latent=True)

    def slow(method: str, shape: torch.Size) -> None:
        begun = engine.stalled_s
        clock[0] += 100
        seen.append((method, begun, engine.stalled_s))

    model.fault = slow
    engine = make(model)
    assert len(list(engine.run(draw(i) for i in range(2 * BATCH)))) == 2 * BATCH
    assert {(begun, ended) for _, begun, ended in seen} == {(0.0, 100.0)}
    assert Counter(method for method, *_ in seen)["encode"] == 2 * BATCH


# --- latents ---


@pytest.mark.parametrize("encode_batch", [1, 2, 3])
def test_latents_are_decoded_in_full_batches_while_more_are_to_come(make, encode_batch):
    model = Tiny(latent=True)
    counted = []
    model.fault = lambda method, shape: counted.append((method, shape[0]))
    count = 5 * encode_batch + 1
    list(make(model, encode_batch=encode_batch).run(draw(i) for i in range(count)))
    for method in ("encode", "decode"):
        sizes = [size for name, size in counted if name == method]
        assert set(sizes) == {encode_batch}
        assert len(sizes) <= 6 + 2 * (method == "encode")  # encoding takes what has arrived


def test_two_shapes_of_latents_are_decoded_in_full_batches(make):
    model = Tiny(latent=True)
    counted = []
    model.fault = lambda method, shape: counted.append(method)
    list(make(model, encode_batch=3).run(draw(i, size=(SIZE, 12)[i % 2]) for i in range(36)))
    assert counted.count("decode") <= 12 + 2


def test_the_last_latents_of_a_stream_are_not_held_back_by_other_streams(make):
    """Nobody could know when others will fill the batch of the decoder."""
    engine = make(Tiny(latent=True), encode_batch=3)
    crowd = engine.run(draw(i % 8, size=12, timestep=20) for i in itertools.count())
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: list(engine.run([draw(0)])))
        next(crowd)
        for _ in itertools.takewhile(lambda _: not other.done(), itertools.islice(crowd, 500)):
            pass
        assert other.done()
    crowd.close()


@pytest.mark.parametrize("encode_batch", [1, 3])
def test_the_outsides_of_regions_are_encoded_in_batches_too(make, encode_batch):
    model = Tiny(latent=True)
    counted = []
    model.fault = lambda method, shape: counted.append(method)
    plans = {i: {"limited": True, "timestep": 14} for i in range(3)}
    draws = [planned("ddpm", True, number=i, **plan) for i, plan in plans.items()]
    results = list(make(model, encode_batch=encode_batch, batch_size=BATCH).run(draws))
    expected = {i: alone_once("ddpm", True, BATCH, encode_batch, number=i, **plan) for i, plan in plans.items()}
    check(results, expected)
    assert counted.count("encode") == 2 * 3 // encode_batch
