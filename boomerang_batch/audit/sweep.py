"""One recipe at several t, on a few samples: what each t costs and brings, before a dataset is spent on one.

The model is loaded once, and every t gets the same samples, under noise of its own. The grid shows sources, so
it belongs where they do.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit import compare
from boomerang_batch.audit.findings import Reading
from boomerang_batch.audit.pairs import shuffled
from boomerang_batch.audit.records import Records
from boomerang_batch.audit.tried import tried
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.data.spread import samples_of
from boomerang_batch.errors import ManifestError, MeasureError
from boomerang_batch.measures import embedders as known
from boomerang_batch.measures.embedders import Embedder
from boomerang_batch.run.trial import Chosen, Rig, at_t

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Level:
    """What came of one t."""

    t: str
    """With its unit: fraction=0.4."""
    sigma: float | None
    """The noise there, relative to the clean signal."""
    evaluations: int
    """The most network calls that any output took."""
    readings: tuple[Reading, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What came of all, and the pictures."""

    name: str
    samples: int
    levels: tuple[Level, ...]
    grid: bytes
    """PNG: a row for each image, its source first, then one column for each t."""

    def facts(self) -> dict[str, object]:
        """All but the pictures, as JSON has it."""
        levels = [json.loads(json.dumps(asdict(level))) for level in self.levels]
        return {"format_version": FORMAT_VERSION, "name": self.name, "samples": self.samples, "levels": levels}


def choose(manifest: Manifest, count: int, *, parts: int = 1) -> list[list[Chosen]]:
    """About `count` samples in disjoint parts; the first variant of each is enough.

    Whole shards, as an audit takes them, since a shard's records are each other's candidates; of a single shard
    every part gets some, and so fewer candidates than there will be.
    """
    found: list[list[Chosen]] = [[] for _ in range(parts)]
    share = math.ceil(count / parts)
    for number, entry in enumerate(sorted(manifest.shards, key=lambda entry: shuffled(entry.stem))):
        part = found[number % parts]
        part += [
            Chosen(stem=entry.stem, key=sample.key, fields=sample.fields, numbers=(0,))
            for _, sample in itertools.islice(samples_of(entry), share - len(part))
        ]
        if all(len(part) == share for part in found):
            break
    if not all(found):
        whole = [sample for part in found for sample in part]
        found = [whole[number::parts] for number in range(parts)]
    if not all(found):
        raise ManifestError(
            f"manifest {manifest.name}: its shards hold too few samples that can be read for {parts} part(s)"
        )
    return found


def sweep(
    rig: Rig,
    recipe: Recipe,
    samples: Sequence[Chosen],
    levels: Sequence[tuple[str, float]],
    *,
    embedders: Sequence[str],
    shown: int,
) -> Sweep:
    """Draw the samples at every (unit, value) of t and measure them. Raises RecipeError for a bad t."""
    recipes = [at_t(recipe, unit, value) for unit, value in levels]
    found: list[Level] = []
    columns: list[Records] = []
    ready: list[Embedder] = []
    for (unit, value), one in zip(levels, recipes, strict=True):
        records = tried(rig, one, samples)
        ready = ready or [known.load(name, fit_on=records.sources) for name in embedders]
        found.append(level(f"{unit}={value:g}", records, ready))
        columns.append(records)
    return Sweep(name=recipe.name, samples=len(samples), levels=tuple(found), grid=_grid(columns, shown=shown))


def level(t: str, records: Records, embedders: Sequence[Embedder]) -> Level:
    """Measure what came of one t."""
    sigmas = [row.sigma for row in records.rows if row.sigma is not None]
    return Level(
        t=t,
        sigma=float(np.median(sigmas)) if sigmas else None,
        evaluations=max(row.evaluations or 0 for row in records.rows),
        readings=tuple(_readings(records, embedders)),
    )


def _readings(records: Records, embedders: Sequence[Embedder]) -> Iterator[Reading]:
    yield from compare.pictures(records)
    for embedder in embedders:
        seen = compare.Seen.by(embedder, records)
        yield from compare.links(records, seen)  # which refuses an embedder that sees nothing
        for part in (compare.learned_links, compare.copied, compare.kept):
            try:
                yield from part(records, seen)
            except MeasureError:
                continue  # too few samples for this one; the others are told


def _grid(columns: Sequence[Records], *, shown: int) -> bytes:
    """Sources, then each t, for the first samples that came out at every t."""
    pictures = [_by_sample(records, records.outputs) for records in columns]
    sources = _by_sample(columns[0], columns[0].sources)
    everywhere = [sample for sample in sources if all(sample in column for column in pictures)]
    rows = [[sources[sample], *(column[sample] for column in pictures)] for sample in everywhere[:shown]]
    return images.contact_sheet(rows)


def _by_sample(records: Records, shown: NDArray[np.uint8]) -> Mapping[tuple[str, str], images.Pixels]:
    names = (records.samples[identity] for identity in records.identities)
    return dict(zip(names, shown, strict=True))
