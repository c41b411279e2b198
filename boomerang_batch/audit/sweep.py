"""One recipe at several t, on a few samples: what each t costs and brings, before a dataset is spent on one.

The model is loaded once, and every t gets the same samples, under noise of its own. The grid shows sources, so
it belongs where they do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from boomerang_batch.audit import compare
from boomerang_batch.audit.findings import Reading
from boomerang_batch.audit.pairs import Records
from boomerang_batch.audit.tried import tried
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.data.spread import spread_samples
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


def choose(recipe: Recipe, manifest: Manifest, count: int) -> list[Chosen]:
    """Samples from all over the manifest; the first variant of each is enough."""
    found = [
        Chosen(stem=entry.stem, key=sample.key, fields=sample.fields, numbers=(0,))
        for entry, sample in spread_samples(manifest.shards, count)
    ]
    if not found:
        raise ManifestError(f"manifest {manifest.name}: its shards hold no sample that can be read")
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
        for part in (compare.links, compare.learned_links, compare.copied, compare.kept):
            try:
                yield from part(records, seen)
            except MeasureError:
                continue  # too few samples for this one; the others are told


def _grid(columns: Sequence[Records], *, shown: int) -> bytes:
    """Sources, then each t, for the first samples that came out at every t."""
    pictures: list[Mapping[int, images.Pixels]] = [
        dict(zip(records.identities.tolist(), records.outputs, strict=True)) for records in columns
    ]
    everywhere = [sample for sample in pictures[0] if all(sample in column for column in pictures)]
    first = columns[0]
    sources = dict(zip(first.identities.tolist(), first.sources, strict=True))
    rows = [[sources[sample], *(column[sample] for column in pictures)] for sample in everywhere[:shown]]
    return images.contact_sheet(rows)
