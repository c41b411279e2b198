"""Between the engine and the transform: pieces put together to outputs, and drawn again if need be.

The engine hands out pieces in any order; an output is whole when its last piece is there. What half precision
could not do is done once more in float32, with the same noise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.diffusion.engine import Draw, Drawn, Engine
from boomerang_batch.run.stages import Made, PieceTag
from boomerang_batch.run.transform import Transform


@dataclass(kw_only=True)
class _Parts:
    images: dict[int, Tensor] = field(default_factory=dict)
    batch_size: int = 1 << 30


class Drawing:
    """Draws outputs on one engine, for any number of threads."""

    def __init__(self, engine: Engine, recipe: Recipe, transform: Transform) -> None:
        self._engine = engine
        self._recipe = recipe
        self._transform = transform
        self._exact: Engine | None = None
        self._making = threading.Lock()

    def run(self, draws: Iterable[Draw]) -> Iterator[Made]:
        """Every output whose pieces are among `draws`, in the order in which they are whole."""
        return self._whole(self._engine, draws, dtype=self._recipe.model.dtype)

    def again(self, made: Made) -> Made | None:
        """The same output with the network in float32; None where it was in float32 already."""
        if made.dtype == "float32":
            return None
        draws = (draw for draw in self._transform.draws(made.prepared) if draw.tag.variant == made.variant)
        outputs = self._whole(self._exact_engine(), draws, dtype="float32")
        return next(one for one in list(outputs) if one.pass_number == made.pass_number)

    def close(self) -> None:
        """Let the device go."""
        self._engine.close()
        if self._exact is not None:
            self._exact.close()

    def _whole(self, engine: Engine, draws: Iterable[Draw], *, dtype: str) -> Iterator[Made]:
        unfinished: dict[tuple[int, int, int], _Parts] = {}
        for drawn in engine.run(draws):
            tag: PieceTag = drawn.draw.tag
            place = (tag.prepared.source.offset, tag.variant, drawn.pass_number)
            parts = unfinished.setdefault(place, _Parts())
            parts.images[tag.index] = drawn.image
            parts.batch_size = min(parts.batch_size, drawn.batch_size)
            if len(parts.images) == len(tag.prepared.canvas.pieces):
                yield _made(drawn, unfinished.pop(place), dtype)

    def _exact_engine(self) -> Engine:
        with self._making:
            if self._exact is None:
                self._exact = self._engine.with_denoiser(self._engine.denoiser.in_float32())
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
    )
