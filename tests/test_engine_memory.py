"""Batches that shrink: at an elastic run's end, and where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from boomerang_batch.diffusion.engine import Drawn, Engine
from boomerang_batch.errors import ModelError
from tests.engines import SIZE, Tiny, alone_once, draw, order_of, planned, walk_at

Make = Callable[..., Engine]
Fault = Callable[[str, torch.Size], None]


@pytest.fixture
def make() -> Iterator[Make]:
    """Engines that are closed in the end."""
    made = []

    def engine(model: Tiny, *, sampler: str = "ddpm", **options) -> Engine:
        settings = {"batch_size": 8, "elastic": True, "threads": 1}
        made.append(Engine(model, order=order_of(sampler), **settings | options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def memory_for(rows: int, *, from_call: int = 0, method: str = "denoise") -> Fault:
    """A fault that lets batches of no more than `rows` through, from some call on."""
    calls = 0

    def fault(name: str, shape: torch.Size) -> None:
        nonlocal calls
        if name == method:
            calls += 1
            if calls > from_call and shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return fault


def assert_close(results: list[Drawn], sampler: str = "ddpm", **plans: dict) -> None:
    """All there, each as it is alone to rounding, which differs by batch shape."""
    seen = set()
    for drawn in results:
        number, passes = drawn.draw.tag, drawn.pass_number
        seen.add((number, passes))
        expected = alone_once(sampler, False, 8, 1, number=number, **plans[f"n{number}"])[passes]
        assert torch.allclose(drawn.image, expected, rtol=0, atol=1e-3), (number, passes)
    assert len(seen) == len(results)


# --- elastic ---


def test_elastic_shrinks_at_the_end_alone_and_says_so(make):
    model = Tiny()
    engine = make(model)
    draws = [draw(i, timestep=20 if i == 9 else 6) for i in range(10)]
    results = {one.draw.tag: one for one in engine.run(draws)}
    sizes = [shape[0] for shape in model.calls]
    assert sizes[0] == 8
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert results[0].batch_size == 8
    assert results[9].batch_size == 1
    assert_close(list(results.values()), **{f"n{i}": {"timestep": 20 if i == 9 else 6} for i in range(10)})
    model.calls.clear()
    list(engine.run(draw(i) for i in range(16)))
    assert model.calls[0][0] == 8  # and grows again


def test_a_batch_that_shrank_grows_again_under_draws_on_their_way(make):
    model = Tiny()
    engine = make(model)
    shrunk, late = threading.Event(), []

    def fault(method: str, shape: torch.Size) -> None:
        if method == "denoise" and shape[0] == 1 and not late:
            late.append(threading.Thread(target=second))
            late[0].start()
            assert shrunk.wait(5)

    def second() -> None:
        def draws():
            shrunk.set()
            yield from (draw(i, timestep=14) for i in range(1, 8))

        others.extend(engine.run(draws()))

    others: list[Drawn] = []
    model.fault = fault
    (first,) = engine.run([draw(0, timestep=20)])
    late[0].join(10)
    assert first.batch_size == 1
    assert max(shape[0] for shape in model.calls) == 8
    assert_close([first, *others], n0={"timestep": 20}, **{f"n{i}": {"timestep": 14} for i in range(1, 8)})


# --- out of memory ---


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "2m", "learned"])
@pytest.mark.parametrize("from_call", [0, 1, 3])
def test_elastic_halves_once_and_goes_on_with_what_was_under_way(make, sampler, from_call):
    """More are busy than the half has slots for: the others wait with region, history, tile and pass."""
    plans = {
        f"n{i}": {
            "timestep": (14, 20)[i % 2] if sampler != "zero-snr" else 14,
            "passes": 1 + i % 3,
            "emit_all": i % 2 == 0,
            "limited": i in (1, 4, 6),
            "tiled": i in (2, 4, 7),
            "size": 12 if i in (3, 9) else SIZE,
        }
        for i in range(12)
    }
    model = Tiny(sampler)
    model.fault = memory_for(4, from_call=from_call)
    draws = [planned(sampler, False, number=i, **plans[f"n{i}"]) for i in range(12)]
    results = list(make(model, sampler=sampler).run(draws))
    assert len(results) == sum(plan["passes"] if plan["emit_all"] else 1 for plan in plans.values())
    assert_close(results, sampler, **plans)
    assert max(shape[0] for shape in model.calls[from_call:]) <= 4
    assert all(one.batch_size <= 4 for one in results)  # none was done before


def test_a_draw_that_was_done_before_the_halving_says_the_full_size(make):
    model = Tiny()
    model.fault = memory_for(4, from_call=walk_at(6).n)
    results = {one.draw.tag: one for one in make(model).run(draw(i, timestep=(6, 20)[i % 2]) for i in range(8))}
    assert [results[i].batch_size for i in range(0, 8, 2)] == [8] * 4
    assert all(results[i].batch_size <= 4 for i in range(1, 8, 2))


def test_a_shape_without_history_or_region_takes_in_others_while_some_are_parked(make):
    """A mask made for a later draw is not for those that waited without one."""
    plans = {f"n{i}": {"timestep": 20, "limited": i >= 8} for i in range(12)}
    model = Tiny()
    model.fault = memory_for(4, from_call=2)
    draws = [planned("ddpm", False, number=i, **plans[f"n{i}"]) for i in range(12)]
    assert_close(list(make(model).run(draws)), **plans)


def test_callers_who_leave_take_their_parked_draws_with_them(make):
    model = Tiny()
    model.fault = memory_for(4, from_call=2)
    engine = make(model)
    leaving = engine.run(draw(i, timestep=20) for i in range(8))
    next(leaving)
    leaving.close()
    results = list(engine.run(draw(i, timestep=6) for i in range(6)))
    assert_close(results, **{f"n{i}": {"timestep": 6} for i in range(6)})


def test_memory_that_runs_out_in_a_batch_that_had_shrunk_halves_that_one(make):
    """It did not fit at 4, so 4, the half of what the recipe says, is no way out."""
    model = Tiny()
    model.fault = memory_for(2, from_call=walk_at(6).n)
    draws = [draw(i, timestep=6 if i < 4 else 20) for i in range(8)]
    results = list(make(model).run(draws))
    assert_close(results, **{f"n{i}": {"timestep": 6 if i < 4 else 20} for i in range(8)})


def test_memory_that_runs_out_a_second_time_stops_the_run_with_the_size_that_fits(make):
    model = Tiny()
    model.fault = memory_for(1)
    with pytest.raises(ModelError, match="batch_size: 4; batch_size: 1 fits"):
        list(make(model).run(draw(i) for i in range(8)))


@pytest.mark.parametrize(
    ("rows", "told"), [(5, "batch_size: 4 fits"), (1, "batch_size: 1 fits"), (0, "not even 1 fits")]
)
def test_a_fixed_batch_stops_with_the_size_that_fits(make, rows, told):
    model = Tiny()
    model.fault = memory_for(rows, from_call=2)
    with pytest.raises(ModelError, match=told) as caught:
        list(make(model, elastic=False).run(draw(i) for i in range(12)))
    assert "memory ran out with batch_size: 8" in str(caught.value)


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize(("rows", "told"), [(2, "batch_size: 2 fits"), (0, "not even 1 fits")])
def test_an_autoencoder_that_needs_too_much_is_told_apart(make, elastic, method, rows, told):
    """Smaller batches of the network would not help it."""
    model = Tiny(latent=True)
    model.fault = memory_for(rows, method=method)
    with pytest.raises(ModelError, match=told) as caught:
        list(make(model, elastic=elastic, encode_batch=4).run(draw(i) for i in range(8)))
    assert "autoencoder" in str(caught.value)


def test_memory_that_runs_out_elsewhere_is_told_as_such(make, monkeypatch):
    """In the noise of the way out, say."""

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("boomerang_batch.diffusion.slots.jump", no_memory)
    with pytest.raises(ModelError, match="memory ran out"):
        list(make(Tiny()).run([draw(0)]))


def test_an_iteration_that_ran_out_of_memory_late_is_done_again_from_its_start(make, monkeypatch):
    """When the network was through and a cascade's next pass began: nothing may have moved."""
    from boomerang_batch.diffusion import slots

    real, jumps = slots.jump, []

    def fault(rows, x_0, eps):
        jumps.append(len(x_0))
        if len(jumps) == 2:  # the first is the admission's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, x_0, eps)

    monkeypatch.setattr(slots, "jump", fault)
    plans = {f"n{i}": {"timestep": (6, 14)[i % 2], "passes": 2, "emit_all": True} for i in range(8)}
    draws = [planned("ddpm", False, number=i, **plans[f"n{i}"]) for i in range(8)]
    results = list(make(Tiny()).run(draws))
    assert len(results) == 16
    assert_close(results, **plans)
