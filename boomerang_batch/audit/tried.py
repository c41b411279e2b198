"""Records made for a trial: chosen samples drawn by a recipe, beside their sources, as an audit has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from boomerang_batch.audit.pairs import LARGEST_SIDE, Records, known_of, label_of, source_picture
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import MeasureError
from boomerang_batch.run.trial import Chosen, Rig, fresh_noise


def tried(rig: Rig, recipe: Recipe, samples: Sequence[Chosen]) -> Records:
    """Draw the samples by the recipe under fresh noise. Raises MeasureError where nothing comes of any.

    Held in memory, for a few hundred samples at most: pictures are LARGEST_SIDE on a side at most.
    """
    anew, secret = fresh_noise(recipe)
    by_name = {(sample.stem, sample.key): index for index, sample in enumerate(samples)}
    rows, outputs, sources, labels, known, identities = [], [], [], [], [], []
    size: tuple[int, int] | None = None
    for outcome in rig.run(anew, samples, secret=secret):
        if outcome.image is None or outcome.field is None:
            continue
        drawn = images.decode(outcome.image, field=outcome.field, channels=3, policy=recipe.images).pixels
        size = size or (min(drawn.shape[0], LARGEST_SIDE), min(drawn.shape[1], LARGEST_SIDE))
        index = by_name[outcome.stem, outcome.key]
        chosen = samples[index]
        sample = Sample(key=chosen.key, fields=chosen.fields, offset=0)
        picture = source_picture(sample, recipe)
        rows.append(outcome.row)
        outputs.append(images.resize(drawn, size))
        sources.append(images.resize(picture, size))
        labels.append(label_of(sample, outcome.row, recipe))
        # In one group wherever they come from: a few samples of each shard are no one's candidates.
        known.append(known_of(sample, outcome.row, picture, recipe, shard=""))
        identities.append(index)
    if not rows:
        raise MeasureError("no output came of any sample tried; run one shard to see why")
    numbers = {what: number for number, what in enumerate(dict.fromkeys(known))}
    return Records(
        rows=tuple(rows),
        shards=("",) * len(rows),
        outputs=np.stack(outputs),
        sources=np.stack(sources),
        labels=np.array(labels, dtype=np.int64),
        groups=np.array([numbers[what] for what in known], dtype=np.int64),
        identities=np.array(identities, dtype=np.int64),
        samples=tuple((sample.stem, sample.key) for sample in samples),
    )
