"""The engine's threads: whoever is slow, leaves or fails, the others go on and nothing is left behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boomerang_batch.diffusion import streams
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine
from boomerang_batch.diffusion.streams import Stream
from boomerang_batch.errors import StoppedError
from tests.engines import SIZE, Tiny, draw, walk_at

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BATCH = 4
LONG_S = 20
"""Longer than anything here takes: whoever waits for it hangs."""


class Quick(Tiny):
    """A network that says nothing much, fast."""

    def denoise(self, x_t: Tensor, tau: Tensor, conditions: object) -> Tensor:
        self.fault("denoise", x_t.shape)
        self.calls.append(x_t.shape)
        return x_t


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    """Engines that are closed in the end, and leave no thread behind."""
    before = set(threading.enumerate())
    made = []

    def engine(model=None, **options) -> Engine:
        made.append(Engine(model or Quick(), **{"batch_size": BATCH, "threads": 1} | options))
        return made[-1]

    yield engine
    for one in made:
        one.close()
    assert not [one.name for one in set(threading.enumerate()) - before if one.name.startswith("boomerang")]


def within(seconds: float, function: Callable[[], object]) -> object:
    """What `function` gives; fails when that takes longer."""
    result: list[object] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    if error:
        raise error[0]
    return result[0]


@dataclass
class Caller:
    """How one caller of the engine behaves, and what became of it."""

    count: int
    size: int
    timesteps: list[int]
    read_s: float
    take_s: float
    leaves_after: int | None
    breaks_at: int | None
    closed: bool = False
    ends: str = ""

    def draws(self) -> Iterator[Draw]:
        try:
            for i in range(self.count):
                if i == self.breaks_at:
                    raise OSError("the disk is gone")
                time.sleep(self.read_s)
                yield draw(i, size=self.size, timestep=self.timesteps[i % len(self.timesteps)])
        finally:
            self.closed = True

    def run(self, engine: Engine) -> None:
        tags = []
        try:
            results = engine.run(self.draws())
            for drawn in results:
                tags.append(drawn.draw.tag)
                time.sleep(self.take_s)
                if len(tags) == self.leaves_after:
                    results.close()
                    self.ends = "left"
                    return
            assert sorted(tags) == list(range(self.count))
            self.ends = "done"
        except (OSError, RuntimeError) as error:
            self.ends = str(error)


CALLERS = st.builds(
    Caller,
    count=st.integers(0, 20),
    size=st.sampled_from([SIZE, SIZE, 12]),
    timesteps=st.lists(st.sampled_from([0, 1, 10, 20]), min_size=1, max_size=3),
    read_s=st.sampled_from([0, 0, 0.001]),
    take_s=st.sampled_from([0, 0, 0.001]),
    leaves_after=st.none() | st.integers(1, 10),
    breaks_at=st.none() | st.integers(0, 10),
)


@given(
    callers=st.lists(CALLERS, min_size=1, max_size=5),
    method=st.sampled_from(["none", "none", "denoise", "encode", "decode", "close"]),
    when=st.integers(0, 12),
    elastic=st.booleans(),
    behind=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_whatever_callers_and_networks_do_everyone_comes_to_an_end(callers, method, when, elastic, behind):
    model, calls = Quick(latent=True), itertools.count()
    before = threading.active_count()
    engine = Engine(model, batch_size=BATCH, encode_batch=2, elastic=elastic, threads=1)
    engine._outbox._behind = behind  # 1 as on CUDA

    def fault(name: str, shape: torch.Size) -> None:
        if name == method and next(calls) == when:
            raise RuntimeError("device lost")

    model.fault = fault
    threads = [threading.Thread(target=one.run, args=(engine,), daemon=True) for one in callers]
    for thread in threads:
        thread.start()
    if method == "close":
        time.sleep(when / 1000)
        engine.close()
    for thread in threads:
        thread.join(LONG_S)
    assert not any(thread.is_alive() for thread in threads), "hangs"
    engine.close()
    assert threading.active_count() == before
    failed = {"device lost"} if method in ("denoise", "encode", "decode") else set()
    failed |= {"the engine is closed"} if method == "close" else set()
    for one in callers:
        expected = {"the disk is gone"} if one.breaks_at is not None and one.breaks_at < one.count else {"done"}
        expected |= {"left"} if one.leaves_after is not None else set()
        assert one.ends in expected | failed
        assert one.closed or one.ends in failed or not one.count  # a draws() that never began has no finally


# --- callers who leave ---


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
    assert len(list(engine.run(draw(i) for i in range(5)))) == 5
    assert threading.active_count() <= before + 1  # the engine's own


def test_draws_that_were_in_slots_when_their_caller_left_go_no_further(make):
    engine = make()
    engine.denoiser.fault = lambda method, shape: time.sleep(0.02)
    leaving = engine.run(draw(i, timestep=20 * (i > 0)) for i in range(BATCH))
    next(leaving)  # the first went nowhere and came at once, or with the others' first step
    leaving.close()
    assert len(list(engine.run([draw(9, timestep=0)]))) == 1
    time.sleep(0.3)  # enough for all five steps
    assert len(engine.denoiser.calls) <= 2


def test_draws_that_were_picked_when_their_caller_left_are_not_drawn(make):
    """While the engine waits for another reader before it begins."""
    engine = make()
    late, came, offered = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Iterator[Draw]:
        late.wait(LONG_S)
        yield draw(0, timestep=0)

    def draws() -> Iterator[Draw]:
        yield draw(1, timestep=0)
        came.wait(LONG_S)
        yield draw(2, timestep=20)
        offered.set()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: list(engine.run(slow())))
        leaving = engine.run(draws())
        next(leaving)
        came.set()
        offered.wait(LONG_S)
        time.sleep(0.1)  # within the second that the engine waits for company at first
        leaving.close()
        late.set()
        assert len(other.result()) == 1
    assert engine.denoiser.calls == []


def test_draws_that_fail_to_close_leave_no_one_waiting(make):
    def draws() -> Iterator[Draw]:
        try:
            yield from map(draw, itertools.count())
        finally:
            raise OSError("can't close the file")

    leaving = make().run(draws())
    next(leaving)
    within(LONG_S, leaving.close)  # and no error in a thread that pytest would tell of


class _Hook(torch.Tensor):
    """An image that calls `_Hook.hook` when first asked for its shape: on the engine's thread, at work."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    @property
    def shape(self) -> torch.Size:
        hook, _Hook.hook = _Hook.hook, staticmethod(lambda: None)
        hook()
        return super().shape


def test_a_forgotten_caller_may_be_cleared_away_on_the_engines_own_thread(make):
    """The garbage collector runs wherever it likes, be it on a thread that holds the engine's lock."""
    engine = make()
    forgotten = [engine.run(draw(i % 8) for i in itertools.count())]
    next(forgotten[0])
    _Hook.hook = staticmethod(forgotten.clear)
    hooked = draw(0, image=draw(0).image.as_subclass(_Hook))
    results = within(LONG_S, lambda: list(engine.run([hooked, draw(1)])))
    assert len(results) == 2
    assert not forgotten


def test_an_interrupted_caller_leaves_nothing_behind(make):
    engine = make()
    model_at_work = threading.Event()
    engine.denoiser.fault = lambda method, shape: (model_at_work.set(), time.sleep(0.05))
    closed = threading.Event()

    def draws() -> Iterator[Draw]:
        try:
            yield from (draw(i, timestep=20) for i in itertools.count())
        finally:
            closed.set()

    def interrupt() -> None:
        model_at_work.wait(5)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are begun without
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            list(engine.run(draws()))
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert closed.wait(5)
    assert len(list(engine.run([draw(0)]))) == 1


# --- errors ---


def test_an_error_among_the_draws_ends_its_stream_and_no_other(make):
    engine = make()

    def broken() -> Iterator[Draw]:
        yield draw(0)
        raise OSError("the disk is gone")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: list(engine.run(draw(i) for i in range(9))))
        with pytest.raises(OSError, match="the disk is gone"):
            list(engine.run(broken()))
        assert len(other.result()) == 9


def test_a_failing_network_fails_every_caller_and_says_so(make):
    def fail(method: str, shape: torch.Size) -> None:
        raise RuntimeError("device lost")

    engine = make()
    engine.denoiser.fault = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            list(engine.run([draw(0)]))


def test_a_closed_engine_refuses_and_closes_again(make):
    engine = make()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(engine.run([draw(0)]))
    engine.close()


# --- bounds ---


@given(
    timesteps=st.lists(st.sampled_from([0, 1, 20]), min_size=1, max_size=5),
    shapes=st.integers(1, 3),
    passes=st.integers(1, 3),
    take_s=st.sampled_from([0, 0.002]),
)
@settings(max_examples=10, deadline=None)
def test_draws_alive_are_bounded_however_uneven_they_are(timesteps, shapes, passes, take_s):
    """Those waiting, those in slots, those done, and one in the reader's hand."""
    read, most = 0, 0
    taken = itertools.count(1)
    last_taken = 0
    engine = Engine(Quick(), batch_size=BATCH, threads=1)

    def draws() -> Iterator[Draw]:
        nonlocal read, most
        for i in range(60):
            read += 1
            most = max(most, read - last_taken // passes)
            yield draw(
                i,
                size=SIZE + 4 * (i % shapes),
                timestep=timesteps[i % len(timesteps)],
                passes=passes,
                emit_all=True,
            )

    for _ in engine.run(draws()):
        last_taken = next(taken)
        time.sleep(take_s)
    engine.close()
    assert last_taken == 60 * passes
    assert most <= BATCH + shapes * BATCH + 3 * BATCH + 2


def test_draws_are_taken_only_a_little_ahead_of_a_caller_who_takes_none(make):
    last = 0

    def draws() -> Iterator[Draw]:
        nonlocal last
        for last in range(1000):
            yield draw(last % 8, timestep=6)

    results = make().run(draws())
    next(results)
    time.sleep(0.5)
    assert last <= 5 * BATCH  # two batches of results, and what was in the slots and the queue before them
    results.close()


def test_an_idle_engine_takes_no_time_of_the_processor(make):
    """Nobody there, a reader that is late, and a caller who is: nothing polls."""
    engine = make()
    late = threading.Event()

    def draws() -> Iterator[Draw]:
        yield from (draw(i, timestep=1) for i in range(60))
        late.wait(LONG_S)

    def spent_s() -> float:
        time.sleep(0.1)  # let it settle
        before = time.process_time()
        time.sleep(0.5)
        return time.process_time() - before

    list(engine.run([draw(0)]))
    assert spent_s() < 0.05
    results = engine.run(draws())
    next(results)  # the caller pauses, the queues fill up
    assert spent_s() < 0.05
    assert len(list(itertools.islice(results, 59))) == 59  # now the reader pauses
    assert spent_s() < 0.05
    late.set()
    assert list(results) == []


def test_a_caller_who_takes_nothing_holds_back_only_itself(make):
    engine = make()
    stuck = engine.run(draw(i, timestep=1) for i in itertools.count())
    next(stuck)
    time.sleep(0.2)
    assert len(within(LONG_S, lambda: list(engine.run(draw(i) for i in range(50))))) == 50
    stuck.close()


def test_a_stream_is_late_when_its_draws_would_be_taken_if_there_were_any():
    stream = Stream(threading.Condition(), ahead=2)
    drawn = Drawn(draw=draw(0), pass_number=1, image=draw(0).image, batch_size=1)
    assert stream.late
    stream.results.extend([drawn] * 4)
    assert stream.held_back
    assert not stream.late
    stream.results.pop()
    assert stream.late
    stream.waiting.append(draw(1))
    assert not stream.late
    stream.waiting.clear()
    stream.exhausted = True
    assert not stream.late


def test_the_longest_of_the_waiting_draws_are_in_front_and_equal_ones_as_they_came():
    stream = Stream(threading.Condition(), ahead=7)
    timesteps = [1, 20, 5, 20, 1, 10]
    cascade = dataclasses.replace(draw(6, timestep=10), passes=3)
    stream.read([draw(i, timestep=t) for i, t in enumerate(timesteps)] + [cascade])
    assert cascade.evaluations == 3 * walk_at(10).n > walk_at(20).n
    assert [waiting.tag for waiting in stream.waiting] == [6, 1, 3, 5, 2, 0, 4]


def test_a_single_draw_is_not_waited_over(make):
    """Neither before its first step, for company that can't come, nor after its last."""
    engine = make()
    started = time.monotonic()
    for i in range(20):
        (drawn,) = engine.run([draw(i)])
        assert isinstance(drawn, Drawn)
    assert time.monotonic() - started < 0.5
    assert len(engine.denoiser.calls) == 20 * walk_at(10).n


def test_a_caller_may_wait_for_each_result_before_the_next_draw(make):
    """In a latent model too, whose decoder would rather have several."""
    engine = make(Quick(latent=True), encode_batch=3)
    came = threading.Semaphore(0)
    crowd = engine.run(draw(i % 8, size=12, timestep=20) for i in itertools.count())

    def draws() -> Iterator[Draw]:
        for i in range(5):
            yield draw(i, timestep=1)
            assert came.acquire(timeout=LONG_S), "the result did not come"

    def step_by_step() -> int:
        tags = []
        for drawn in engine.run(draws()):
            tags.append(drawn.draw.tag)
            came.release()
        return len(tags)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(step_by_step)
        for _ in itertools.takewhile(lambda _: not other.done(), itertools.islice(crowd, 5000)):
            pass
        assert other.done()
        assert other.result() == 5
    crowd.close()


def test_the_network_has_the_threads_it_was_promised_whatever_others_set(make):
    """A thread's first operation in PyTorch takes over what any thread has set last."""
    found = []

    class Asked(Quick):
        def denoise(self, x_t: Tensor, tau: Tensor, conditions: object) -> Tensor:
            found.append(torch.get_num_threads())
            return super().denoise(x_t, tau, conditions)

    def draws() -> Iterator[Draw]:
        torch.set_num_threads(1)
        yield draw(0, timestep=5)

    before = torch.get_num_threads()
    try:
        assert len(list(make(Asked(), threads=3).run(draws()))) == 1
    finally:
        torch.set_num_threads(before)
    assert set(found) == {3}


def test_a_stop_does_not_wait_for_long_walks(make, monkeypatch):
    """The reader is done, all is in slots, and a walk would take half a minute."""
    monkeypatch.setattr(streams, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(streams, "_STOP_WITHIN_S", 0.3)
    engine, stop = make(), threading.Event()
    engine.denoiser.fault = lambda method, shape: time.sleep(0.2 if stop.is_set() else 0)
    assert len(list(engine.run([draw(0)], stopped=stop.is_set))) == 1
    stop.set()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        list(engine.run([draw(i, timestep=19) for i in range(40)], stopped=stop.is_set))
    assert time.monotonic() - started < 3
    stop.clear()
    assert len(list(engine.run([draw(1)], stopped=stop.is_set))) == 1  # and the slots are free again


def test_what_comes_soon_after_a_stop_is_taken(make):
    stop = threading.Event()
    results = []
    for drawn in make().run([draw(i) for i in range(12)], stopped=stop.is_set):
        results.append(drawn)
        stop.set()
    assert len(results) == 12
