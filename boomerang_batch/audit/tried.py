"""Records made for a trial: chosen samples drawn by a recipe, beside their sources, as an audit has them."""

from __future__ import annotations

from collections.abc import Sequence

from boomerang_batch.audit.records import Gathering, Records
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import MeasureError
from boomerang_batch.run.trial import Chosen, Rig, fresh_noise


def tried(rig: Rig, recipe: Recipe, samples: Sequence[Chosen]) -> Records:
    """Draw the samples by the recipe under fresh noise. Raises MeasureError where nothing comes of any.

    Held in memory, for some thousand samples at most.
    """
    anew, secret = fresh_noise(recipe)
    by_name = {(sample.stem, sample.key): sample for sample in samples}
    made = [outcome for outcome in rig.run(anew, samples, secret=secret) if outcome.image is not None]
    if not made:
        raise MeasureError("no output came of any sample tried; run one shard to see why")
    gathering = Gathering(recipe, (outcome.row for outcome in made), folder=None)
    for outcome in made:
        chosen = by_name[outcome.stem, outcome.key]
        drawn = images.decode(outcome.image or b"", field=outcome.field or "", channels=3, policy=recipe.images)
        place = gathering.output(chosen.stem, outcome.row, drawn.pixels)
        sample = Sample(key=chosen.key, fields=chosen.fields, offset=0)
        gathering.source([place], chosen.stem, sample)
    return gathering.records()
