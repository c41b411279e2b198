"""Continuous batching: draws of any t from several streams in, drawn images out, the device never waiting.

One thread owns the device. It fills free slots from whatever stream has a draw ready, the oldest stream first,
takes all slots one node further, hands out what has arrived, and fills up again. So samples of different t,
variants, cascades and the ends of shards share every network call. A stream's draws are prepared on a thread
of its own and its results taken on the caller's, with bounded queues between them.

Each shape of image has its own `Slots`. The fullest goes next. Where slots are free and a stream may still
bring draws, the engine waits for it, but no longer than one iteration takes: longer costs more than it saves.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from boomerang_batch.diffusion.batch_size import is_out_of_memory, largest_that_fits
from boomerang_batch.diffusion.denoiser import Denoiser
from boomerang_batch.diffusion.slots import Draw, Finished, Region, Slots, Walk, Window, in_fixed_batches
from boomerang_batch.diffusion.streams import Drawn, Stream
from boomerang_batch.errors import ModelError

__all__ = ["Draw", "Drawn", "Engine", "Region", "Walk", "Window"]

_FIRST_PATIENCE_S = 1.0

_log = logging.getLogger(__name__)


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
        `threads`: PyTorch's intra-op threads; `elastic`: smaller batches when the last draws leave slots empty,
        and once when memory runs out.
        """
        self.denoiser = denoiser
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._order = order
        self._encode_batch = encode_batch
        self._threads = threads
        self._elastic = elastic
        self._may_halve = elastic
        self._slots: dict[tuple[int, ...], Slots] = {}
        self._streams: list[Stream] = []
        self._undecoded: list[Finished] = []
        self._patience_s = _FIRST_PATIENCE_S
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failure: BaseException = RuntimeError("the engine is closed")

    def run(self, draws: Iterable[Draw]) -> Iterator[Drawn]:
        """Yield what becomes of each draw, in the order of arrival, which is not that of `draws`.

        `draws` is iterated on a thread of its own, a little ahead of what the slots take. What it raises is
        raised here, at once. Results wait for the caller, and too many of them hold back further draws.
        Raises ModelError when memory runs out, and whatever the denoiser raises.
        """
        stream = Stream(self._changed, ahead=self.batch_size)
        with self._changed:
            self._start()
            self._streams.append(stream)
        reader = threading.Thread(target=stream.read, args=(draws,), name="boomerang-read", daemon=True)
        reader.start()
        try:
            while (drawn := stream.next_result()) is not None:
                yield drawn
        finally:
            with self._changed:
                stream.cancelled = True
                self._streams.remove(stream)
                self._changed.notify_all()
            reader.join()

    def with_denoiser(self, denoiser: Denoiser) -> Engine:
        """Another engine with the same settings and its own thread."""
        return Engine(
            denoiser,
            batch_size=self.batch_size,
            device=self.device,
            order=self._order,
            encode_batch=self._encode_batch,
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

    # All below runs on the engine's own thread.

    def _start(self) -> None:
        if self._closed:
            raise self._failure
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="boomerang-engine", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # OpenMP keeps the count per calling thread
        try:
            with torch.inference_mode():
                while self._work():
                    pass
        except BaseException as error:  # whatever it is, the callers must hear of it
            self._failure = error
        with self._changed:
            self._closed = True
            for stream in self._streams:
                stream.error = stream.error or self._failure
            self._changed.notify_all()

    def _work(self) -> bool:
        """Fill up, and take the fullest slots one node further; False once the engine is closed."""
        taken = self._take()
        if taken is None:
            return False
        for slots, draws in taken.items():
            self._fit(slots, slots.busy + len(draws))
            self._deliver(slots.admit(draws))
        ready = [slots for slots in self._slots.values() if slots.busy]
        if not ready:
            self._deliver([], flush=True)
            return True
        slots = max(ready, key=lambda one: one.busy)
        self._fit(slots, slots.busy)
        started = time.monotonic()
        finished = self._advance(slots)
        self._patience_s = time.monotonic() - started
        self._deliver(finished)
        return True

    def _take(self) -> dict[Slots, list[Draw]] | None:
        """Draws for free slots, once there are enough or waiting is over; None when the engine is closed."""
        taken: dict[Slots, list[Draw]] = {}
        with self._changed:
            deadline = time.monotonic() + self._patience_s
            while not self._closed:
                self._drop_cancelled()
                self._pick(taken)
                idle = not taken and not self._undecoded and not any(s.busy for s in self._slots.values())
                if idle:
                    self._changed.wait()
                    deadline = time.monotonic() + self._patience_s
                    continue
                left_s = deadline - time.monotonic()
                if self._full(taken) or left_s <= 0 or all(stream.exhausted for stream in self._streams):
                    return taken
                self._changed.wait(left_s)
        return None

    def _pick(self, taken: dict[Slots, list[Draw]]) -> None:
        """Move draws that fit a free slot from `waiting` to `taken`, the oldest stream first."""
        moved = False
        for stream in self._streams:
            kept: deque[Draw] = deque()
            while stream.waiting and len(stream.results) < 2 * self.batch_size:
                draw = stream.waiting.popleft()
                slots = self._slots_of(draw)
                draws = taken.setdefault(slots, [])
                if len(draws) < self.batch_size - slots.busy:
                    draws.append(dataclasses.replace(draw, tag=_Ticket(draw, stream)))
                    stream.inside += 1
                    moved = True
                else:
                    kept.append(draw)
            stream.waiting.extendleft(reversed(kept))
        for slots in [slots for slots, draws in taken.items() if not draws]:
            del taken[slots]
        if moved:
            self._changed.notify_all()

    def _full(self, taken: dict[Slots, list[Draw]]) -> bool:
        """Whether any slots have none free."""
        return any(slots.busy + len(taken.get(slots, ())) >= self.batch_size for slots in self._slots.values())

    def _slots_of(self, draw: Draw) -> Slots:
        shape = tuple(draw.image.shape)
        if shape not in self._slots:
            self._slots[shape] = Slots(
                self.denoiser,
                batch_size=self.batch_size,
                device=self.device,
                order=self._order,
                encode_batch=self._encode_batch,
            )
        return self._slots[shape]

    def _drop_cancelled(self) -> None:
        for slots in self._slots.values():
            slots.drop(lambda draw: draw.tag.stream.cancelled)
        self._undecoded = [one for one in self._undecoded if not one.draw.tag.stream.cancelled]

    def _fit(self, slots: Slots, wanted: int) -> None:
        """Give `slots` the size for `wanted` draws: the full one, or halves of it at an elastic run's end."""
        size = self.batch_size
        if self._elastic:
            with self._changed:
                dry = all(stream.exhausted and not stream.waiting for stream in self._streams)
            while dry and size > 1 and wanted <= size // 2:
                size //= 2
        if size != slots.size:
            slots.resize(size)

    def _advance(self, slots: Slots) -> list[Finished]:
        """One iteration. When memory runs out, once more with half the slots where the run is elastic."""
        try:
            return slots.advance()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Out of the except clause, whose traceback would keep the failed call's tensors alive.
        if self._may_halve and self.batch_size > 1:
            self._may_halve = False
            self.batch_size //= 2
            _log.warning("memory ran out; going on with batches of %d", self.batch_size)
            slots.resize(self.batch_size)
            return slots.advance()
        fitting = largest_that_fits(slots.try_size, slots.size // 2)
        advice = f"batch_size: {fitting} fits" if fitting else "not even 1 fits: use a smaller size"
        raise ModelError(f"memory ran out with batch_size: {slots.size}; {advice}, on {self.device}")

    def _deliver(self, finished: list[Finished], *, flush: bool = False) -> None:
        """Decode what has arrived, in batches of one shape, and hand it to its streams."""
        self._undecoded += finished
        size = self._encode_batch if self.denoiser.spec.latent else 1
        count = len(self._undecoded) if flush else len(self._undecoded) // size * size
        ready, self._undecoded = self._undecoded[:count], self._undecoded[count:]
        for shape in dict.fromkeys(one.x_0.shape for one in ready):
            alike = [one for one in ready if one.x_0.shape == shape]
            images = torch.stack([one.x_0 for one in alike])
            if self.denoiser.spec.latent:
                images = in_fixed_batches(self.denoiser.decode, images, size)
            self._hand_out(alike, images.cpu())

    def _hand_out(self, finished: list[Finished], images: Tensor) -> None:
        with self._changed:
            for one, image in zip(finished, images, strict=True):
                ticket: _Ticket = one.draw.tag
                drawn = Drawn(
                    draw=ticket.draw, pass_number=one.pass_number, image=image, batch_size=one.batch_size
                )
                ticket.stream.results.append(drawn)
                ticket.stream.inside -= one.pass_number == one.draw.passes
            self._changed.notify_all()
