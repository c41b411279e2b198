"""One recipe at several t, on a few samples: what each t costs and brings, before a dataset is spent on one.

The model is loaded once, and every t gets the same samples. The grid shows sources, so it belongs where they
do.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.pairs import shuffled
from boomerang_batch.audit.records import Records
from boomerang_batch.audit.tried import Level, Trials
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.data.spread import Unread, samples_of
from boomerang_batch.errors import ManifestError
from boomerang_batch.run.trial import Chosen, Rig, at_t

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What came of all, and the pictures."""

    name: str
    samples: int
    levels: tuple[Level, ...]
    warnings: tuple[str, ...]
    grid: bytes
    """PNG: a row for each image, its source first, then one column for each t, which stands above it."""

    def facts(self) -> dict[str, object]:
        """All but the pictures, as JSON has it."""
        about = {"format_version": FORMAT_VERSION, "name": self.name, "samples": self.samples}
        levels = [plain(asdict(level)) for level in self.levels]
        return about | {"warnings": list(self.warnings), "levels": levels}


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them; a number that is none is null."""
    found: dict[str, Any] = json.loads(json.dumps(facts), parse_constant=lambda name: None)
    return found


def choose(
    manifest: Manifest, count: int, *, parts: int = 1, named: bool
) -> tuple[list[list[Chosen]], tuple[str, ...]]:
    """About `count` samples in disjoint parts, and what was left out; the first variant of each is enough.

    Whole shards, as an audit takes them, since a shard's records are each other's candidates; of a single shard
    every part gets some, and so fewer candidates than there will be. `named`: whether damaged shards may be.
    Raises ManifestError where there are too few samples that can be read.
    """
    found: list[list[Chosen]] = [[] for _ in range(parts)]
    share, unread = math.ceil(count / parts), Unread()
    for number, entry in enumerate(sorted(manifest.shards, key=lambda entry: shuffled(entry.stem))):
        part = found[number % parts]
        part += itertools.islice(_chosen(entry, unread), share - len(part))
        if all(len(part) == share for part in found):
            break
    if not all(found):
        every = (sample for entry in manifest.shards for sample in _chosen(entry, unread))
        whole = list(itertools.islice(every, count))
        found = [whole[number::parts] for number in range(parts)]
    damaged = unread.told(manifest, named=named)
    if not all(found):
        raise ManifestError(
            f"manifest {manifest.name}: its shards hold too few samples that can be read for {parts} part(s)"
            + (f": there is what can't be in {damaged}" if damaged else "")
        )
    left_out = f"manifest {manifest.name}: what can't be read in {damaged} is left out"
    return found, (left_out,) if damaged else ()


def _chosen(entry: ShardEntry, unread: Unread) -> Iterator[Chosen]:
    for _, sample in samples_of(entry, unread):
        yield Chosen(stem=entry.stem, key=sample.key, fields=sample.fields, numbers=(0,))


def sweep(
    rig: Rig,
    recipe: Recipe,
    samples: Sequence[Chosen],
    levels: Sequence[tuple[str, float]],
    *,
    embedders: Sequence[str],
    shown: int,
    left_out: Sequence[str] = (),
) -> Sweep:
    """Draw the samples at every (unit, value) of t and measure them. Raises RecipeError for a bad t.

    `left_out`: what `choose` has to say of the samples.
    """
    for unit, value in levels:
        at_t(recipe, unit, value)  # before any is drawn
    trials = Trials(rig, recipe, embedders=embedders)
    came = [trials.at(unit, value, samples) for unit, value in levels]
    heads = [f"{'t' if unit == 'fraction' else unit} {value:g}" for unit, value in levels]
    grid = _grid([records for records, _ in came], heads=("source", *heads), shown=shown)
    measured = tuple(level for _, level in came)
    return Sweep(
        name=recipe.name,
        samples=len(samples),
        levels=measured,
        warnings=(*left_out, *trials.warnings(measured)),
        grid=grid,
    )


def _grid(columns: Sequence[Records], *, heads: Sequence[str], shown: int) -> bytes:
    """Sources, then each t, for the first samples that came out at every t."""
    pictures = [_by_sample(records, records.outputs) for records in columns]
    sources = _by_sample(columns[0], columns[0].sources)
    everywhere = [sample for sample in sources if all(sample in column for column in pictures)]
    rows = [[sources[sample], *(column[sample] for column in pictures)] for sample in everywhere[:shown]]
    return images.contact_sheet(rows, heads=heads)


def _by_sample(records: Records, shown: NDArray[np.uint8]) -> Mapping[tuple[str, str], images.Pixels]:
    names = (records.samples[identity] for identity in records.identities)
    return dict(zip(names, shown, strict=True))
