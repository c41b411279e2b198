"""One caller's draws on their way in and results on their way out, between its threads and the engine's.

A stream belongs to an engine's condition: every field is read and written under it alone.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from torch import Tensor

from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.draws import Draw
from boomerang_batch.diffusion.threads import use_threads
from boomerang_batch.errors import StoppedError

_LOOK_EVERY_S = 0.5
_STOP_WITHIN_S = 8.0
"""What comes out of slots so soon after a stop is taken; a walk may take minutes more."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What became of a draw, or of one pass of it."""

    draw: Draw
    pass_number: int
    """1 for the first pass of a cascade."""
    image: Tensor
    """(C, H, W) float32 on the CPU, in the denoiser's value range."""
    batch_size: int
    """The smallest batch shape that any step of it was computed in."""
    code: Code | None = None
    """What a draw with a path was drawn for, on the CPU; its image is the one that it came with."""


class Stream:
    """The queues of one caller. No more than `ahead` draws wait for a slot, the longest in front.

    Were they taken as they came, a long one taken last would keep a batch to itself (longest processing time
    first: Graham, Bounds on multiprocessing timing anomalies, 1969).

    While 2 * ahead results are not taken yet, no further draws are. Those in slots still go to their end, so
    there may be as many results more as they have passes to emit.
    """

    def __init__(
        self, changed: threading.Condition, *, ahead: int, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._changed = changed
        self._ahead = ahead
        self._stopped = stopped
        self._stopped_at: float | None = None
        self.waiting: deque[Draw] = deque()
        self.results: deque[Drawn] = deque()
        self.inside = 0
        """Draws taken out of `waiting` whose last result is not in `results` yet."""
        self.exhausted = False
        self.cancelled = False
        self.error: BaseException | None = None

    @property
    def held_back(self) -> bool:
        """Whether the caller is so slow that no more draws are to be taken."""
        return len(self.results) >= 2 * self._ahead

    @property
    def late(self) -> bool:
        """Whether the reader is so slow that draws would be taken if there were any."""
        return not (self.exhausted or self.waiting or self.held_back)

    def read(self, draws: Iterable[Draw]) -> None:
        """Take everything in, as fast as slots come free. For a thread of its own."""
        use_threads(1)  # lest preparing draws contend with the engine's calls
        error = None
        try:
            for draw in draws:
                if not self._offer(draw):
                    break
            if isinstance(draws, Generator):
                draws.close()
        except BaseException as caught:  # it is raised again on the caller's thread
            error = caught
        with self._changed:
            self.error = error if self.error is None else self.error
            self.exhausted = True
            self._changed.notify_all()

    def next_result(self) -> Drawn | None:
        """The next result, or None after the last. Raises what went wrong with the draws or the engine.

        Raises StoppedError when a stop has been asked for and what is in slots takes long to come out.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: self.error is not None or self.results or self._over, timeout=_LOOK_EVERY_S
            ):
                self._mind_stop()
            self._mind_stop()
            if self.error is not None:
                raise self.error
            if not self.results:
                return None
            self._changed.notify_all()
            return self.results.popleft()

    def cancel(self) -> None:
        """Nobody wants anything of this any more."""
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()

    def _mind_stop(self) -> None:
        if not self._stopped():
            return
        self._stopped_at = self._stopped_at or time.monotonic()
        if time.monotonic() - self._stopped_at > _STOP_WITHIN_S:
            raise StoppedError("stopped while draws were on their way; run the same command to resume")

    @property
    def _over(self) -> bool:
        return self.exhausted and not self.waiting and not self.inside

    def _offer(self, draw: Draw) -> bool:
        """Put a draw into the queue when there is room; False when nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled or len(self.waiting) < self._ahead)
            if not self.cancelled:
                bisect.insort(self.waiting, draw, key=lambda waiting: -waiting.evaluations)
                self._changed.notify_all()
            return not self.cancelled
