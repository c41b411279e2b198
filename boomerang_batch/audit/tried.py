"""A recipe at one t after another, on chosen samples: what comes of each, measured as an audit measures.

Every t gets the same samples, under noise of its own that nobody has used before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from boomerang_batch.audit import compare
from boomerang_batch.audit.bounding import cautions, certified
from boomerang_batch.audit.findings import Reading
from boomerang_batch.audit.records import Gathering, Records
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import MeasureError
from boomerang_batch.measures import embedders as known
from boomerang_batch.measures.embedders import Embedder
from boomerang_batch.measures.intervals import bootstrap
from boomerang_batch.measures.likeness import psnr
from boomerang_batch.run.trial import Chosen, Rig, at_t, fresh_noise

DISTANCE = "median-distance"
"""The root of the mean squared difference of an output's pixels to its source's, 0 to 1; of the median pair."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """What came of one t."""

    t: str
    """With its unit: fraction=0.4."""
    sigma: float | None
    """The noise there, relative to the clean signal."""
    evaluations: int
    """The most network calls that any output took."""
    failed: int = 0
    """Samples that came to nothing, and are in no reading."""
    readings: tuple[Reading, ...]


class Trials:
    """A recipe on a loaded model, measured in features that are fitted on the first samples drawn."""

    def __init__(self, rig: Rig, recipe: Recipe, *, embedders: Sequence[str]) -> None:
        """`embedders` by their names."""
        self.rig, self.recipe, self._names = rig, recipe, embedders
        self._embedders: list[Embedder] = []

    def warnings(self, levels: Iterable[Level]) -> Iterator[str]:
        """What must be known before the levels' numbers are believed."""
        yield from cautions(self.recipe)
        for level in levels:
            if level.failed:
                yield f"{level.t}: nothing came of {level.failed} sample(s), which are in none of its numbers"

    def at(self, unit: str, value: float, samples: Sequence[Chosen]) -> tuple[Records, Level]:
        """Draw the samples at a t. Raises RecipeError for one that can't be, MeasureError without an output."""
        recipe = at_t(self.recipe, unit, value)
        records = tried(self.rig, recipe, samples, released=self.recipe)
        self._embedders = self._embedders or [known.load(name, fit_on=records.sources) for name in self._names]
        sigmas = [row.sigma for row in records.rows if row.sigma is not None]
        found = Level(
            t=f"{unit}={value:g}",
            sigma=float(np.median(sigmas)) if sigmas else None,
            evaluations=max(row.evaluations or 0 for row in records.rows),
            failed=len(samples) - len(records.rows),
            readings=(*certified(self.rig, recipe, samples, records), *_readings(records, self._embedders)),
        )
        return records, found


def tried(rig: Rig, recipe: Recipe, samples: Sequence[Chosen], *, released: Recipe) -> Records:
    """Draw the samples by the recipe under fresh noise. Raises MeasureError where nothing comes of any.

    Candidates are those that agree in all that outputs of `released` tell of their sources. `recipe` is that at
    one t; at t 0 it releases less, and would be compared among others than at every other t. Held in memory,
    for some thousand samples at most.
    """
    anew, secret = fresh_noise(recipe)
    by_name = {(sample.stem, sample.key): sample for sample in samples}
    made = [outcome for outcome in rig.run(anew, samples, secret=secret) if outcome.image is not None]
    if not made:
        raise MeasureError("no output came of any sample tried; run one shard to see why")
    gathering = Gathering(released, (outcome.row for outcome in made), folder=None)
    for outcome in made:
        chosen = by_name[outcome.stem, outcome.key]
        drawn = images.decode(outcome.image or b"", field=outcome.field or "", channels=3, policy=recipe.images)
        place = gathering.output(chosen.stem, outcome.row, drawn.pixels)
        sample = Sample(key=chosen.key, fields=chosen.fields, offset=0)
        gathering.source([place], chosen.stem, sample)
    return gathering.records()


def _readings(records: Records, embedders: Sequence[Embedder]) -> Iterator[Reading]:
    yield _distance(records)
    yield from compare.pictures(records)
    for embedder in embedders:
        seen = compare.Seen.by(embedder, records)
        yield from compare.links(records, seen)  # which refuses an embedder that sees nothing
        for part in (compare.learned_links, compare.copied, compare.kept):
            try:
                yield from part(records, seen)
            except MeasureError:
                continue  # too few samples for this one; the others are told


def _distance(records: Records) -> Reading:
    apart = 10 ** (-psnr(records.outputs, records.sources) / 20)
    found = bootstrap(lambda index: float(np.median(apart[index])), len(apart), resamples=200)
    return Reading(measure=DISTANCE, value=found.value, low=found.low, high=found.high, count=len(apart))
