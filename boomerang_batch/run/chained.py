"""Draws made of what other draws gave: an output refined, or the best found of several codes of one image.

What one drawer makes is fed to another as it comes, so that both stay busy and no more waits between them than
the engines' queues hold.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.errors import SampleError
from boomerang_batch.run.stages import Made

Again = Callable[[Made], Iterable[Draw]]
"""The draws that go on from an output, at least one."""

Worth = tuple[float, ...]
"""How good an output is: the larger, the better, and what comes first counts first."""


class Drawer(Protocol):
    """What draws outputs, as `Drawing` does."""

    def run(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """Every output whose pieces are among `draws`."""
        ...

    def run_in_float32(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """The same with the network in float32."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the network computes in float32 as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Refining:
    """What `drawing` makes, drawn on by the same."""

    drawing: Drawer
    again: Again
    check: Callable[[Made], None]
    """Raises SampleError for what may not be refined. It is all the same, and refused then."""

    def run(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """See Drawer."""
        return self._refined(functools.partial(self.drawing.run, stopped=stopped), draws)

    def run_in_float32(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """See Drawer."""
        return self._refined(functools.partial(self.drawing.run_in_float32, stopped=stopped), draws)

    @property
    def exact(self) -> bool:
        """See Drawer."""
        return self.drawing.exact

    def _refined(
        self, drawn: Callable[[Iterable[Draw]], Iterator[Made]], draws: Iterable[Draw]
    ) -> Iterator[Made]:
        for before, after in chained(drawn(draws), self.again, drawn):
            refused = _refusal(self.check, before)
            yield replace(after, batch_size=min(before.batch_size, after.batch_size), refused=refused)


def _refusal(check: Callable[[Made], None], made: Made) -> SampleError | None:
    try:
        check(made)
    except SampleError as error:
        return error
    return None


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Of all codes that `encoding` draws of a variant the one that `decoding` makes the best image of."""

    encoding: Drawer
    decoding: Drawer
    again: Again
    """The draws that decode."""
    worth: Callable[[Made], Worth]
    """Of what was decoded. What compares as nothing, for it is no number, is the worst. Raises SampleError
    where nobody can tell; then nobody knows the best either, and the variant is refused."""
    trials: int

    def run(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """See Drawer."""
        return self._best(self.encoding.run(draws, stopped=stopped), stopped)

    def run_in_float32(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """See Drawer. To judge them by, codes are decoded as ever."""
        return self._best(self.encoding.run_in_float32(draws, stopped=stopped), stopped)

    @property
    def exact(self) -> bool:
        """See Drawer."""
        return self.encoding.exact

    def _best(self, codes: Iterator[Made], stopped: Callable[[], bool]) -> Iterator[Made]:
        races: dict[tuple[int, int], _Race] = {}
        decoded = functools.partial(self.decoding.run, stopped=stopped)
        for code, image in chained(codes, self.again, decoded):
            place = (code.prepared.source.offset, code.variant)
            race = races.setdefault(place, _Race())
            try:
                race.enter(code, self.worth(image))
            except SampleError as error:
                race.enter(replace(code, refused=error), ())
            if race.entered == self.trials:
                yield races.pop(place).winner()


@dataclass(kw_only=True)
class _Race:
    """The trials of one variant so far, whatever their order."""

    entered: int = 0
    _best: tuple[Worth, Made] | None = None
    _refused: Made | None = None

    def enter(self, made: Made, worth: Worth) -> None:
        # Of equals the first one drawn, whichever came first.
        self.entered += 1
        if made.refused is not None:
            if self._refused is None or made.trial < self._refused.trial:
                self._refused = made
            return
        at = (*(number if number == number else float("-inf") for number in worth), -made.trial)
        if self._best is None or at > self._best[0]:
            self._best = (at, made)

    def winner(self) -> Made:
        if self._refused is not None:
            return self._refused
        if self._best is None:
            raise RuntimeError("a race that nobody entered")
        return self._best[1]


def chained(
    first: Iterator[Made], again: Again, second: Callable[[Iterable[Draw]], Iterator[Made]]
) -> Iterator[tuple[Made, Made]]:
    """Each output of `first` beside what `second` made of it, in the order in which that is there."""
    waiting: dict[tuple[int, int, int], Made] = {}

    def draws() -> Generator[Draw]:
        # Whoever has enough closes this generator, which is to end the first drawer's work too.
        with contextlib.ExitStack() as closing:
            if isinstance(first, Generator):
                closing.callback(first.close)
            for made in first:
                waiting[_place(made)] = made
                yield from again(made)

    for after in second(draws()):
        yield waiting.pop(_place(after)), after


def _place(made: Made) -> tuple[int, int, int]:
    return made.prepared.source.offset, made.variant, made.trial
