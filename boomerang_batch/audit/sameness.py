"""Whether an output that was made again is the one in OUT: by how much its pixels may be off, and what else is.

Facts are compared with the record whether or not they show in the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from boomerang_batch.audit.origin import is_private
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import formats
from boomerang_batch.data.images import Picture
from boomerang_batch.data.provenance import Row
from boomerang_batch.measures.likeness import psnr
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.record import RunRecord
from boomerang_batch.run.tasks import WorkerFacts
from boomerang_batch.run.trial import Outcome

_MADE_ALIKE = (
    "t",
    "node",
    "tau",
    "sigma",
    "evaluations",
    "sampler",
    "eta",
    "passes",
    "batch_size",
    "dtype",
    "flagged",
    "label",
    "width",
    "height",
)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an output may be off on another stack: in levels of 255, or decibels where its encoding is lossy.

    A codec rounds to steps of its own, and what was one level before it may be dozens in a pixel after it: with
    1 % of the pixels one level off jpeg and webp of quality 95 differed by up to 21 levels, and by 44 dB.
    """

    levels: int | None = None
    psnr_db: float | None = None

    def __str__(self) -> str:
        return f"{self.levels} levels" if self.psnr_db is None else f"{self.psnr_db:g} dB"

    def takes(self, difference: int, psnr_db: float) -> bool:
        """Whether it is enough for outputs that differ by so much."""
        return psnr_db >= self.psnr_db if self.psnr_db is not None else difference <= (self.levels or 0)


_EXACT, _HALF = Tolerance(levels=2), Tolerance(levels=8)
_EXACT_LOSSY, _HALF_LOSSY = Tolerance(psnr_db=35), Tolerance(psnr_db=30)


def tolerance_for(row: Row, image: bytes) -> Tolerance:
    """What an output that was computed as `row` tells may be off, by its encoding."""
    exact = row.dtype in (None, "float32")
    kind = formats.sniff(image)
    if kind == "jpeg" or (kind == "webp" and not formats.is_lossless_webp(image)):
        return _EXACT_LOSSY if exact else _HALF_LOSSY
    return _EXACT if exact else _HALF


def distance(made: Picture, truth: Picture) -> tuple[int | None, float | None]:
    """Largest difference in levels, transparency included, and PSNR; None for pictures of different shape."""
    pairs = [(made.pixels, truth.pixels)]
    if (made.alpha is None) != (truth.alpha is None) or made.pixels.shape != truth.pixels.shape:
        return None, None
    if made.alpha is not None and truth.alpha is not None:
        pairs.append((made.alpha, truth.alpha))
    largest = max(int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max()) for one, other in pairs)
    return largest, float(psnr(made.pixels[None], truth.pixels[None])[0])


def differences(
    row: Row, outcome: Outcome, record: RunRecord, recipe: Recipe, naming: Naming, facts: WorkerFacts
) -> Iterator[str]:
    """Whatever is not as the record says: stack, model, recipe, secret or seed, source, and how it was made."""
    if facts.stack not in (record.stack, *record.accepted_stacks):
        yield f"stack: {', '.join(_changed(record.stack, facts.stack))}"
    elif record.accepted_stacks:
        yield (
            f"stack: the run went on with {len(record.accepted_stacks)} other(s), and which of them made this "
            "output is not recorded"
        )
    if row.model_digest != facts.model_digest:
        yield f"model digest: {_short(row.model_digest)} there, {_short(facts.model_digest)} now"
    for digest, where in ((recipe.digest, "run.json's recipe now"), (record.recipe_digest, "run.json")):
        if row.recipe_digest != digest:
            yield f"recipe digest: {_short(row.recipe_digest)} there, {_short(digest)} {where}"
    same_noise = row.noise_key_id == naming.noise_key_id
    if not same_noise:
        kind = "secret" if is_private(record) else "seed"
        yield f"{kind} id: {row.noise_key_id} there, {naming.noise_key_id} now"
    made = outcome.row
    if made.status != "ok":
        yield f"it can't be made again: {made.reason}: {outcome.detail or 'its row has no more to say'}"
        return
    if same_noise and row.source_digest != made.source_digest:
        yield f"source digest: {_short(row.source_digest)} there, {_short(made.source_digest)} now"
    elif not same_noise and is_private(record):
        yield "source digest: it is a MAC under the secret, so under another one it can't be compared"
    for column in _MADE_ALIKE:
        there, now = getattr(row, column), getattr(made, column)
        if there != now:
            yield f"{column}: {there} there, {now} now"


def _changed(there: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(there.keys() | now.keys()):
        if there.get(name) != now.get(name):
            yield f"{name} ({there.get(name, 'none')} there, {now.get(name, 'none')} now)"


def _short(digest: str | None) -> str:
    return (digest or "none")[:12]
