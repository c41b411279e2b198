"""Between the engine and the transform: pieces put together to outputs.

The engine hands out pieces in any order; an output is whole when its last piece is there. A second engine, made
when it is first asked for, has the network in float32, for what half precision could not do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from boomerang_batch.diffusion.batch_size import is_out_of_memory
from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine
from boomerang_batch.errors import ModelError
from boomerang_batch.run.stages import Made, PieceTag


@dataclass(kw_only=True)
class _Parts:
    images: dict[int, Tensor] = field(default_factory=dict)
    codes: dict[int, Code] = field(default_factory=dict)
    batch_size: int = 1 << 30


class Drawing:
    """Draws outputs on one engine, for any number of threads."""

    def __init__(self, engine: Engine, *, dtype: str) -> None:
        """`dtype` is what the engine's network computes in."""
        self._engine = engine
        self._dtype = dtype
        self._exact: Engine | None = None
        self._no_exact: str | None = None
        """Why there can't be one."""
        self._making = threading.Lock()

    def run(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """Every output whose pieces are among `draws`, in the order in which they are whole.

        Raises StoppedError some seconds after `stopped` says so.
        """
        return self._whole(self._engine, draws, stopped, dtype=self._dtype)

    def run_in_float32(self, draws: Iterable[Draw], *, stopped: Callable[[], bool]) -> Iterator[Made]:
        """The same with the network in float32.

        Raises ModelError where memory can't hold that beside the other, and ever after.
        """
        engine = self._exact_engine()
        try:
            yield from self._whole(engine, draws, stopped, dtype="float32")
        except ModelError as error:
            with self._making:
                self._exact, self._no_exact = None, str(error)
            engine.close()
            raise

    @property
    def exact(self) -> bool:
        """Whether the network computes in float32 as it is."""
        return self._dtype == "float32"

    @property
    def stalled_s(self) -> float:
        """How long the device has been at the step it is at; 0 between steps."""
        exact = self._exact
        return max(self._engine.stalled_s, 0.0 if exact is None else exact.stalled_s)

    @property
    def totals(self) -> dict[str, float]:
        """What both engines have done so far, and what waits for them."""
        exact = self._exact
        more = {} if exact is None else exact.totals
        return {name: value + more.get(name, 0.0) for name, value in self._engine.totals.items()}

    def close(self) -> None:
        """Let the device go."""
        self._engine.close()
        if self._exact is not None:
            self._exact.close()

    def _whole(
        self, engine: Engine, draws: Iterable[Draw], stopped: Callable[[], bool], *, dtype: str
    ) -> Iterator[Made]:
        unfinished: dict[tuple[int, int, int, int], _Parts] = {}
        for drawn in engine.run(draws, stopped=stopped):
            tag: PieceTag = drawn.draw.tag
            place = (tag.prepared.source.offset, tag.variant, tag.trial, drawn.pass_number)
            parts = unfinished.setdefault(place, _Parts())
            parts.images[tag.index] = drawn.image
            if drawn.code is not None:
                parts.codes[tag.index] = drawn.code
            parts.batch_size = min(parts.batch_size, drawn.batch_size)
            if len(parts.images) == len(tag.prepared.canvas.pieces):
                yield _made(drawn, unfinished.pop(place), dtype)

    def _exact_engine(self) -> Engine:
        with self._making:
            if self._exact is None and self._no_exact is None:
                try:
                    self._exact = self._engine.with_denoiser(self._engine.denoiser.in_float32())
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._no_exact = "memory can't hold the model in float32 beside itself"
            if self._exact is None:
                raise ModelError(self._no_exact)
            return self._exact


def _made(drawn: Drawn, parts: _Parts, dtype: str) -> Made:
    tag: PieceTag = drawn.draw.tag
    return Made(
        prepared=tag.prepared,
        variant=tag.variant,
        pass_number=drawn.pass_number,
        pieces=[parts.images[index] for index in range(len(parts.images))],
        batch_size=parts.batch_size,
        dtype=dtype,
        codes=[parts.codes[index] for index in range(len(parts.codes))],
        trial=tag.trial,
    )
