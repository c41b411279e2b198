"""Slots by themselves, without threads: what they keep, what they let go, and what waits for a device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from boomerang_batch.diffusion.draws import Finished
from boomerang_batch.diffusion.outbox import Outbox
from boomerang_batch.diffusion.slot_groups import SlotGroups
from boomerang_batch.diffusion.slots import Slots
from boomerang_batch.diffusion.transfer import Mark, to_device, to_host, upload
from tests.engines import CHANNELS, SIZE, Tiny, alone_once, draw, order_of, planned, walk_at

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_the_engine_does():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def slots_for(sampler: str = "ddpm", *, size: int = 4, **options) -> tuple[Slots, Tiny]:
    model = Tiny(sampler, **options)
    return Slots(model, batch_size=size, device=CPU, order=order_of(sampler)), model


def finish(slots: Slots) -> list[Finished]:
    finished = []
    while slots.busy:
        finished += slots.advance()
    return finished


@pytest.mark.parametrize("sampler", ["ddpm", "2m"])
@pytest.mark.parametrize("method", ["denoise", "jump", "step"])
def test_an_iteration_that_fails_has_changed_nothing(sampler, method, monkeypatch):
    """It may be done again, to the same bits: at the network, at the step, and at a cascade's next pass."""
    from boomerang_batch.diffusion import slots as module

    plans = {
        i: {"timestep": (1, 6, 14)[i], "passes": 3 - i, "emit_all": True, "limited": i == 1} for i in range(3)
    }
    slots, model = slots_for(sampler)
    slots.admit([planned(sampler, False, number=i, **plan) for i, plan in plans.items()])
    broken = []

    def fail_once(*_: object) -> None:
        if not broken:
            broken.append(True)
            raise MemoryError

    def failing(real):
        return lambda *args: fail_once() or real(*args)

    finished = []
    while slots.busy:
        with monkeypatch.context() as patch:
            broken.clear()
            patch.setattr(model, "fault", fail_once if method == "denoise" else model.fault)
            if method != "denoise":
                patch.setattr(module, method, failing(getattr(module, method)))
            try:
                finished += slots.advance()
            except MemoryError:
                finished += slots.advance()
    for one in finished:
        expected = alone_once(sampler, False, 4, 1, number=one.draw.tag, **plans[one.draw.tag])
        assert torch.equal(one.x_0, expected[one.pass_number])
    assert len(finished) == 3 + 2 + 1


@pytest.mark.parametrize("sampler", ["ddpm", "2m"])
def test_what_is_parked_keeps_its_own_rows_alone(sampler):
    """A view would keep the tensor of the size that did not fit."""
    slots, _ = slots_for(sampler, size=8)
    slots.admit([planned(sampler, False, number=i, timestep=20, limited=i == 2) for i in range(8)])
    slots.advance()
    slots.resize(2)
    assert (slots.size, slots.busy) == (2, 8)
    for parked in slots._parked:
        assert parked.rows.keys() == {"x", "key", "known", "mask"} | ({"before"} if sampler == "2m" else set())
        assert all(row.untyped_storage().nbytes() == row.nbytes for row in parked.rows.values())
    slots.resize(8)
    finished = finish(slots)
    assert sorted(one.draw.tag for one in finished) == list(range(8))
    assert all(one.batch_size == 8 for one in finished)  # nothing was computed at 2
    for one in finished:
        plan = {"timestep": 20, "limited": one.draw.tag == 2}
        assert torch.equal(one.x_0, alone_once(sampler, False, 8, 1, number=one.draw.tag, **plan)[1])


def test_a_slot_says_the_smallest_shape_of_its_own_steps():
    slots, _ = slots_for(size=4)
    slots.admit([draw(0, timestep=20)])
    slots.advance()
    slots.resize(2)
    slots.advance()
    slots.resize(4)
    slots.admit([draw(1, timestep=6)])
    assert {one.draw.tag: one.batch_size for one in finish(slots)} == {0: 2, 1: 4}


def test_a_parked_draw_without_a_region_comes_back_without_one():
    """Though others had regions since, in the row that it comes back to."""
    slots, _ = slots_for(size=4)
    slots.admit([draw(i, timestep=14) for i in range(4)])
    slots.resize(2)
    slots.drop(lambda one: one.tag < 2)
    slots.admit([planned("ddpm", False, number=i, timestep=1, limited=True) for i in (4, 5)])
    finished = finish(slots)
    assert sorted(one.draw.tag for one in finished) == [2, 3, 4, 5]
    for one in finished:
        limited = one.draw.tag > 3
        plan = {"timestep": 1, "limited": True} if limited else {"timestep": 14}
        expected = alone_once("ddpm", False, 4, 1, number=one.draw.tag, **plan)[1]
        assert torch.allclose(one.x_0, expected, rtol=0, atol=1e-4)


def test_a_parked_draw_goes_on_before_encoded_ones():
    """However many new draws come, each micro-batch a little more than slots are free."""
    model = Tiny(latent=True)
    groups = SlotGroups(model, batch_size=8, device=CPU, order=1, encode_batch=4, elastic=True)
    draws = (draw(i, timestep=6) for i in itertools.count())
    slots = groups.of(next(draws))
    groups.admit({slots: list(itertools.islice(draws, 5))}, dry=False)
    slots.resize(4)
    groups.batch_size = 4
    assert len(slots._parked) == 1
    finished = []
    for _ in range(4 * walk_at(6).n):
        groups.admit({slots: list(itertools.islice(draws, groups.room(slots)))}, dry=False)
        finished += [one.draw.tag for one in groups.advance(dry=False)]
    assert not slots._parked
    assert sorted(finished)[:5] == [1, 2, 3, 4, 5]


def test_shapes_take_turns_though_one_has_encoded_draws_waiting():
    groups = SlotGroups(Tiny(latent=True), batch_size=4, device=CPU, order=1, encode_batch=4, elastic=False)
    long = {size: [draw(10 * size + i, timestep=20, size=size) for i in range(7)] for size in (SIZE, 12)}
    taken = {groups.of(draws[0]): draws for draws in long.values()}
    first, second = taken
    groups.admit({first: taken[first], second: taken[second][:4]}, dry=False)
    assert (first.busy, second.busy) == (7, 4)
    turns = []
    for slots in (first, second):
        slots.advance = lambda slots=slots: turns.append(slots) or []  # type: ignore[method-assign]
    for _ in range(6):
        groups.advance(dry=False)
    assert turns.count(first) == turns.count(second) == 3


def test_draws_that_are_dropped_are_gone_parked_or_not():
    slots, _ = slots_for(size=8)
    slots.admit([draw(i) for i in range(8)])
    slots.resize(4)
    slots.drop(lambda one: one.tag % 2 == 0)
    assert slots.busy == 4
    assert sorted(one.draw.tag for one in finish(slots)) == [1, 3, 5, 7]


def test_idle_slots_settle_at_zero_beside_busy_ones():
    slots, model = slots_for(size=3)
    slots.admit([draw(0, timestep=1), draw(1, timestep=20)])
    seen = []
    model.fault = lambda method, shape: seen.append(slots._rows["x"].clone())
    finish(slots)
    assert all(float(x[2].abs().max()) == 0 for x in seen)
    assert all(float(x[0].abs().max()) == 0 for x in seen[walk_at(1).n + 1 :])


def test_whether_a_size_fits_is_tried_on_the_states_own_shape():
    slots, model = slots_for(size=4, latent=True)
    slots.admit([draw(0)])
    model.calls.clear()
    slots.try_size(3)
    assert model.calls == [torch.Size([3, CHANNELS, SIZE // 2, SIZE // 2])]


# --- to the device and back ---


class _NoWaiting(TorchFunctionMode):
    """Refuses what on CUDA would wait for all that was asked before: reading a value, and unpinned copies.

    The meta device stands in for CUDA: it computes shapes alone, so whoever reads a value fails anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned = False
        self.copies = 0

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.pinned, self.copies = True, self.copies + 1
        try:
            return to_device(tensor, device)
        finally:
            self.pinned = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            index = args[1]
            assert isinstance(index, int | slice | tuple) or index.is_meta, f"{func} by {index} copies it"
        if func is torch.tensor:
            assert torch.device(kwargs.get("device") or "cpu") == CPU, "made of values on the device"
        result = func(*args, **kwargs)
        if func is torch.Tensor.to and result.is_meta and not args[0].is_meta:
            assert self.pinned, "copied from ordinary memory"
        return result


class _Shapes(Tiny):
    """No network, so that what is tested are the slots."""

    def encode(self, images):
        return images[..., ::2, ::2] if self.spec.latent else images

    def denoise(self, x_t, tau, conditions):
        assert tau.device == CPU
        return torch.cat([x_t, x_t], 1) if self.spec.learned_variance else x_t * 1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "2m", "learned"])
@pytest.mark.parametrize("latent", [False, True])
def test_nothing_waits_for_the_device(sampler, latent, monkeypatch):
    """From admission to the end: cascades, regions, tiles, parking, all of it."""
    meta = torch.device("meta")
    slots = Slots(
        _Shapes(sampler, latent=latent), batch_size=4, device=meta, order=order_of(sampler), encode_batch=3
    )
    mode = _NoWaiting()
    monkeypatch.setattr("boomerang_batch.diffusion.slots.to_device", mode.to_device)
    monkeypatch.setattr("boomerang_batch.diffusion.slots.upload", mode.to_device)
    monkeypatch.setattr("boomerang_batch.diffusion.slot_noise.to_device", mode.to_device)
    plans = {i: {"timestep": (0, 6, 14)[i % 3], "passes": 1 + i % 2, "limited": i > 4} for i in range(8)}
    draws = [planned(sampler, latent, number=i, tiled=i % 4 == 3, **plan) for i, plan in plans.items()]
    with mode:
        finished = slots.admit(draws[:4])
        finished += slots.advance()
        slots.resize(2)
        finished += slots.advance()
        slots.resize(6)
        finished += slots.admit(draws[4:])
        finished += finish(slots)
    assert sorted(one.draw.tag for one in finished) == list(range(8))
    assert all(one.x_0.is_meta for one in finished)
    assert mode.copies > 8


def test_on_a_cpu_nothing_is_copied_and_nothing_waits():
    floats = torch.rand(3)
    assert to_device(floats, CPU) is floats
    assert to_device(floats.double(), CPU).dtype == torch.float32
    assert to_device(torch.arange(3), CPU).dtype == torch.int64
    assert upload(floats, CPU) is floats
    assert to_host(floats) is floats
    Mark(CPU).wait()


def test_a_micro_batch_is_encoded_whole_though_fewer_slots_are_free():
    model = Tiny(latent=True)
    groups = SlotGroups(model, batch_size=4, device=CPU, order=1, encode_batch=3, elastic=False)
    plans = {number: {"timestep": (6, 14)[number % 2], "limited": number == 5} for number in range(6)}
    draws = [planned("ddpm", True, number=number, **plan) for number, plan in plans.items()]
    slots = groups.of(draws[0])
    assert groups.room(slots) == 6
    encoded = []
    encode = model.encode
    model.encode = lambda images: encoded.append(len(images)) or encode(images)
    groups.admit({slots: draws}, dry=True)
    assert encoded == [3, 3, 3]  # the last one for what stands around the region
    assert (slots.busy, groups.room(slots)) == (6, 0)
    found = {one.draw.tag: model.decode(one.x_0[None].repeat(3, 1, 1, 1))[0] for one in finish(slots)}
    for number, plan in plans.items():
        expected = alone_once("ddpm", True, 4, 3, number=number, **plan)[1]
        assert torch.equal(found[number], expected), number


@pytest.mark.parametrize("behind", [0, 1])
def test_results_leave_in_order_no_more_than_a_round_behind(behind):
    """One round behind is how it goes on CUDA, where the host must not wait for what it has just asked for."""
    outbox = Outbox(Tiny(), decode_batch=1, device=CPU)
    outbox._behind = behind
    came = []
    for number in range(4):
        state = torch.full((CHANNELS, SIZE, SIZE), float(number))
        one = Finished(draw=draw(number), pass_number=1, x_0=state, batch_size=4)
        outbox.send([one] if number != 1 else [], urgent=lambda _: False)
        came.append([(one.draw.tag, float(image.mean())) for one, image in outbox.receive()])
        assert outbox.empty == (behind == 0)
    expected = [[(0, 0.0)], [], [(2, 2.0)], [(3, 3.0)]]
    assert came == (expected if behind == 0 else [[], *expected[:-1]])
    rest = outbox.receive(everything=True)
    assert [one.draw.tag for one, _ in rest] == ([3] if behind else [])
    assert outbox.empty


def test_states_wait_for_a_full_batch_of_their_shape_unless_one_is_urgent():
    model = Tiny(latent=True)
    decoded = []
    model.fault = lambda method, shape: decoded.append(shape)
    outbox = Outbox(model, decode_batch=2, device=CPU)

    def finished(number: int, side: int) -> Finished:
        return Finished(draw=draw(number), pass_number=1, x_0=torch.zeros(CHANNELS, side, side), batch_size=4)

    def sent(*those: Finished, urgent: int | None = None) -> list[int]:
        outbox.send(those, urgent=lambda one: one.draw.tag == urgent)
        return [one.draw.tag for one, _ in outbox.receive()]

    assert sent(finished(0, 4), finished(1, 6)) == []
    assert sent(finished(2, 4)) == [0, 2]
    assert sent(finished(3, 6), finished(4, 6)) == [1, 3]
    assert sent(finished(5, 4), urgent=4) == [4]
    assert not outbox.empty
    outbox.drop(lambda one: one.tag == 5)
    assert outbox.empty
    assert {shape[0] for shape in decoded} == {2}
