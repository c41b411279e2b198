"""Continuous batching: draws of any t from several streams in, drawn images out, the device never waiting.

One thread owns the device. It fills free slots from whatever stream has a draw ready, the oldest stream and its
longest draw first, takes the slots of one shape one node further, hands out what has arrived, and fills up
again. So samples of different t, variants, cascades and the ends of shards share every network call. A stream's
draws are prepared on a thread of its own, its results taken on the caller's, with bounded queues between them.

Where slots are free and a reader is late the engine waits for it, but until a draw comes no longer in all than
one iteration takes: longer costs more than it saves.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from boomerang_batch.diffusion.batch_size import is_out_of_memory
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.draws import Draw, Region, Walk, Window
from boomerang_batch.diffusion.outbox import Outbox
from boomerang_batch.diffusion.slot_groups import SlotGroups
from boomerang_batch.diffusion.slots import Slots
from boomerang_batch.diffusion.streams import Drawn, Stream
from boomerang_batch.diffusion.threads import use_threads
from boomerang_batch.diffusion.watched import Watched
from boomerang_batch.errors import ModelError

__all__ = ["Draw", "Drawn", "Engine", "Region", "Walk", "Window"]

_LONGEST_WAIT_S = 1.0
"""For a reader that is late; the first iterations of a compiled network may take minutes."""


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A draw's tag inside the engine: the draw as it came, and whose it is."""

    draw: Draw
    stream: Stream


class Engine:
    """A denoiser with B slots for each shape of image. Any number of threads may `run` streams on it."""

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        order: int = 1,
        encode_batch: int = 1,
        threads: int | None = None,
        elastic: bool = False,
    ) -> None:
        """`order` of the walks' solvers; `encode_batch`: batch shape of a latent model's autoencoder;
        `threads`: PyTorch's intra-op threads, the caller's number if None; `elastic`: smaller batches when the
        last draws leave slots empty, and once when memory runs out.
        """
        self.denoiser = denoiser
        self.device = torch.device(device)
        self._order = order
        self._encode_batch = encode_batch
        self._threads = torch.get_num_threads() if threads is None else threads
        self._elastic = elastic
        self._watched = Watched(denoiser)
        self._groups = SlotGroups(
            self._watched,
            batch_size=batch_size,
            device=self.device,
            order=order,
            encode_batch=encode_batch,
            elastic=elastic,
        )
        self._outbox = Outbox(self._watched, decode_batch=encode_batch, device=self.device)
        self._streams: list[Stream] = []
        self._iteration_s = self._patience_s = _LONGEST_WAIT_S
        self._busy_s = 0.0
        self._evaluations = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failure: BaseException = RuntimeError("the engine is closed")

    @property
    def batch_size(self) -> int:
        """Slots for each shape; half as many as at first once an elastic run's memory ran out."""
        return self._groups.batch_size

    @property
    def stalled_s(self) -> float:
        """How long the device has been at the step it is at; 0 while it waits for draws."""
        return self._watched.stalled_s

    @property
    def totals(self) -> dict[str, float]:
        """What it has done so far, and what waits."""
        with self._changed:
            return {
                "evaluations_total": self._evaluations,
                "device_busy_seconds_total": self._busy_s,
                "draws_waiting": sum(len(stream.waiting) for stream in self._streams),
                "outputs_waiting": sum(len(stream.results) for stream in self._streams),
            }

    def run(self, draws: Iterable[Draw], *, stopped: Callable[[], bool] = lambda: False) -> Iterator[Drawn]:
        """Yield what becomes of each draw, in the order of arrival, which is not that of `draws`.

        `draws` is iterated on a thread of its own, a little ahead of what the slots take. What it raises is
        raised here, at once. Results wait for the caller, and too many of them hold back further draws. To
        leave takes until `draws` has given the one it is at; if it is a generator it is closed.
        Raises ModelError when memory runs out, StoppedError some seconds after `stopped` says so, and whatever
        the denoiser raises.
        """
        stream = Stream(self._changed, ahead=self._groups.most_room, stopped=stopped)
        reader = threading.Thread(target=stream.read, args=(draws,), name="boomerang-read", daemon=True)
        try:
            self._enter(stream)
            reader.start()
            while (drawn := stream.next_result()) is not None:
                yield drawn
        finally:
            stream.cancel()
            # The garbage collector may close a forgotten caller on any thread: on these two it must not wait.
            if reader.ident is not None and threading.current_thread() not in (reader, self._thread):
                reader.join()

    def with_denoiser(self, denoiser: Denoiser, *, encode_batch: int | None = None) -> Engine:
        """Another engine with the same settings, but for the autoencoder's batch, and its own thread."""
        return Engine(
            denoiser,
            batch_size=self.batch_size,
            device=self.device,
            order=self._order,
            encode_batch=encode_batch or self._encode_batch,
            threads=self._threads,
            elastic=self._elastic,
        )

    def close(self) -> None:
        """End the engine's thread. Streams that are still running fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _enter(self, stream: Stream) -> None:
        with self._changed:
            if self._closed:
                raise self._failure
            self._streams.append(stream)
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="boomerang-engine", daemon=True)
                thread.start()
                self._thread = thread

    # All below runs on the engine's own thread.

    def _serve(self) -> None:
        use_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._work():
                    pass
        except BaseException as error:  # whatever it is, the callers must hear of it
            self._failure = error
            if is_out_of_memory(error):
                told = (
                    f"memory ran out on {self.device} beside batch_size: {self.batch_size}; take a smaller one"
                )
                self._failure = ModelError(told)
        with self._changed:
            self._closed = True
            for stream in self._streams:
                stream.error = self._failure if stream.error is None else stream.error
            self._changed.notify_all()

    def _work(self) -> bool:
        """One round: fill up, take some slots one node further, hand out. False once the engine is closed."""
        taken = self._take()
        if taken is None:
            return False
        with self._changed:
            dry = all(stream.exhausted and not stream.waiting for stream in self._streams)
        self._watched.next_step()
        finished = self._groups.admit(taken, dry=dry)
        idle = not self._groups.busy
        started = time.monotonic()
        if not idle:
            finished += self._groups.advance(dry=dry)
        sending = time.monotonic()
        self._outbox.send(finished, urgent=lambda one: idle or not self._more_may_come(one.draw.tag.stream))
        receiving = time.monotonic()
        self._hand_out(everything=idle)
        if not idle:
            # On CUDA to advance is to ask for it; the time it takes passes in waiting for the round before.
            spent_s = sending - started + time.monotonic() - receiving
            self._iteration_s = min(spent_s, _LONGEST_WAIT_S)
            self._busy_s += spent_s
        self._watched.rest()
        return True

    def _take(self) -> dict[Slots, list[Draw]] | None:
        """Draws for free slots, once there are enough or waiting is over; None when the engine is closed."""
        taken: dict[Slots, list[Draw]] = {}
        started = time.monotonic()
        with self._changed:
            while not self._closed:
                self._drop_cancelled(taken)
                self._pick(taken)
                if taken:
                    self._patience_s = self._iteration_s
                elif not self._groups.busy:
                    if not self._outbox.empty:
                        return taken
                    self._changed.wait()
                    started = time.monotonic()
                    continue
                left_s = min(self._patience_s, self._iteration_s) - (time.monotonic() - started)
                if left_s <= 0 or self._groups.full(taken) or not any(one.late for one in self._streams):
                    self._patience_s = max(left_s, 0.0)
                    return taken
                self._changed.wait(left_s)
        return None

    def _pick(self, taken: dict[Slots, list[Draw]]) -> None:
        """Move draws that there is room for from `waiting` to `taken`, the oldest stream first."""
        moved = False
        room: dict[Slots, int] = {}
        for stream in self._streams:
            kept: deque[Draw] = deque()
            while stream.waiting and not stream.held_back:
                draw = stream.waiting.popleft()
                slots = self._groups.of(draw)
                room.setdefault(slots, self._groups.room(slots) - len(taken.get(slots, ())))
                if room[slots] > 0:
                    taken.setdefault(slots, []).append(dataclasses.replace(draw, tag=_Ticket(draw, stream)))
                    room[slots] -= 1
                    stream.inside += 1
                    moved = True
                else:
                    kept.append(draw)
            stream.waiting.extendleft(reversed(kept))
        if moved:
            self._changed.notify_all()

    def _drop_cancelled(self, taken: dict[Slots, list[Draw]]) -> None:
        if not any(stream.cancelled for stream in self._streams):
            return
        self._streams = [stream for stream in self._streams if not stream.cancelled]

        def unwanted(draw: Draw) -> bool:
            return bool(draw.tag.stream.cancelled)

        self._groups.drop(unwanted)
        self._outbox.drop(unwanted)
        for slots, draws in list(taken.items()):
            taken[slots] = [draw for draw in draws if not unwanted(draw)]
            if not taken[slots]:
                del taken[slots]

    def _more_may_come(self, stream: Stream) -> bool:
        """Whether other draws of a stream are on their way, so that what has arrived may wait for them."""
        with self._changed:
            return bool(stream.waiting) or any(draw.tag.stream is stream for draw in self._groups.draws)

    def _hand_out(self, *, everything: bool) -> None:
        arrived = self._outbox.receive(everything=everything)
        with self._changed:
            for one, image in arrived:
                ticket: _Ticket = one.draw.tag
                drawn = Drawn(
                    draw=ticket.draw,
                    pass_number=one.pass_number,
                    image=image,
                    batch_size=one.batch_size,
                    code=one.code,
                )
                ticket.stream.results.append(drawn)
                if one.pass_number == one.draw.passes:
                    ticket.stream.inside -= 1
                    self._evaluations += one.draw.evaluations
            if arrived:
                self._changed.notify_all()
