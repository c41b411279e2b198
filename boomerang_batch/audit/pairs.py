"""Outputs and their sources, in step: what an audit looks at.

Whole shards are drawn, in an order of their own that everyone can repeat, until there are enough records; for a
shard's records are known to be together, so they are each other's candidates. A source is found by the names
that the run gave, under the private dir's secret where the run anonymized. Pictures wait on the local disk at
one bounded size: memory does not grow with the dataset, nor with the sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomerang_batch import storage
from boomerang_batch.audit.origin import is_private, require_links
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import (
    ManifestError,
    MeasureError,
    PrivateDirError,
    SampleError,
    VerificationError,
)
from boomerang_batch.run.appendix import appendices
from boomerang_batch.run.commit import MARKER_SUFFIX, PROVENANCE_SUFFIX, TAR_SUFFIX
from boomerang_batch.run.naming import Naming, member_key
from boomerang_batch.run.record import RunRecord, recorded_recipe
from boomerang_batch.run.trial import Chosen, own_secret

LARGEST_SIDE = 256
"""Pixels at which pictures are compared at most, the longer side of either."""
NO_LABEL = -1
LABEL_FIELD = "cls"


@dataclass(frozen=True, kw_only=True)
class Records:
    """n outputs with their sources; row i of everything is record i."""

    rows: tuple[Row, ...]
    shards: tuple[str, ...]
    """The shard of OUT that each is in."""
    outputs: NDArray[np.uint8]
    """(n, H, W, 3), all at one size, on disk."""
    sources: NDArray[np.uint8]
    """(n, H, W, 3), of the same size; of several variants of a sample, equal."""
    labels: NDArray[np.int64]
    """(n,); NO_LABEL where there is none."""
    groups: NDArray[np.int64]
    """(n,): records are of one group that agree in everything that is known of them besides."""
    identities: NDArray[np.int64]
    """(n,): equal for the variants of one sample."""
    samples: tuple[tuple[str, str], ...]
    """(source stem, key) of each identity."""


class Pairing:
    """Finds the sources of one run's outputs. Raises PrivateDirError, or ManifestError for another manifest."""

    def __init__(self, out: str, record: RunRecord, manifest: Manifest, *, private_dir: str | None) -> None:
        self.out, self.record = out, record
        self.recipe = recorded_recipe(out, record)
        home = require_links(out, record, private_dir) if is_private(record) else None
        self.naming = Naming(self.recipe, own_secret(self.recipe, home))
        if self.naming.noise_key_id != record.noise_key_id:
            raise PrivateDirError(
                f"the secret is another one than that of the run in {out}; give the run's own"
            )
        entries = {self.naming.stem(entry.stem): entry for entry in manifest.shards}
        self.entries: Mapping[str, ShardEntry] = {
            stem: entries[stem] for stem in record.shards if stem in entries
        }
        if not self.entries:
            raise ManifestError(
                f"manifest {manifest.name} lists no shard that {out} was made from; give the run's own"
            )

    def choose(self, samples: int) -> list[tuple[str, list[Row]]]:
        """Shards of OUT and their good rows, `samples` rows in all, or fewer where OUT has no more.

        An appendix counts as a shard of its own; the last shard is cut.
        """
        more = appendices(storage.list_names(self.out))
        chosen: list[tuple[str, list[Row]]] = []
        for stem in sorted(self.entries, key=_shuffled):
            for name in (stem, *more.get(stem, ())):
                left = samples - sum(len(rows) for _, rows in chosen)
                if left <= 0:
                    return chosen
                if not storage.exists(storage.join(self.out, name + MARKER_SUFFIX)):
                    continue
                good = [row for row in _rows(self.out, name) if row.status == "ok"]
                rows = sorted(good, key=lambda row: _shuffled(f"{row.key} {row.variant}"))[:left]
                if rows:
                    chosen.append((name, rows))
        if not chosen:
            raise MeasureError(f"{self.out}: no shard of the manifest has an output yet")
        return chosen

    def outputs(self, name: str, rows: Sequence[Row]) -> Iterator[tuple[Row, images.Pixels]]:
        """Each row's output of a shard of OUT, decoded: (H, W, 3)."""
        wanted = {member_key(self.recipe, row.key or "", row.variant): row for row in rows}
        url = storage.join(self.out, name + TAR_SUFFIX)
        with storage.open_read(url) as stream:
            for item in read_samples(stream, shard=url):
                row = wanted.get(item.key or "") if isinstance(item, Sample) else None
                if isinstance(item, Sample) and row is not None:
                    yield row, _output(item, row, self.recipe)

    def sources(self, stem: str, rows: Sequence[Row]) -> Iterator[tuple[Sample, list[Row]]]:
        """Each sample of the input shard that outputs `rows` of the shard `stem` were made from, with these."""
        wanted: dict[tuple[str, int], Row] = {(row.key or "", row.variant): row for row in rows}
        entry = self.entries[stem]
        shown = storage.without_secrets(entry.url)
        with storage.open_read(entry.url) as stream:
            for item in read_samples(stream, shard=shown):
                if not isinstance(item, Sample):
                    continue
                numbers = range(self.recipe.outputs)
                places = [
                    (self.naming.row_key(shard=entry.stem, key=item.key, variant=number), number)
                    for number in numbers
                ]
                made = [wanted.pop(place) for place in places if place in wanted]
                if made:
                    yield item, made
                if not wanted:
                    return
        if wanted:
            raise ManifestError(
                f"{shown} lacks {len(wanted)} sample(s) that outputs were made from; give the manifest and the "
                "shards as the run read them"
            )


def gather(pairing: Pairing, *, samples: int, folder: Path) -> Records:
    """Bring up to `samples` outputs and their sources into `folder`. Raises what reading them does."""
    chosen = pairing.choose(samples)
    count = sum(len(rows) for _, rows in chosen)
    outputs = sources = np.zeros((0, 0, 0, 3), np.uint8)
    rows: list[Row] = []
    shards: list[str] = []
    known: list[tuple[object, ...]] = []
    labels: list[int] = []
    samples_seen: dict[tuple[str, str], int] = {}
    identities: list[int] = []
    for name, wanted in chosen:
        stem = name.partition("~")[0]
        place: dict[tuple[str, int], int] = {}
        for row, pixels in pairing.outputs(name, wanted):
            if not len(outputs):
                height, width = (min(side, LARGEST_SIDE) for side in pixels.shape[:2])
                outputs, sources = (
                    np.lib.format.open_memmap(
                        folder / f"{what}.npy", mode="w+", dtype=np.uint8, shape=(count, height, width, 3)
                    )
                    for what in ("outputs", "sources")
                )
            place[row.key or "", row.variant] = len(rows)
            outputs[len(rows)] = images.resize(pixels, outputs.shape[1:3])
            rows.append(row)
            shards.append(name)
        known += [()] * len(place)
        labels += [NO_LABEL] * len(place)
        identities += [0] * len(place)
        for sample, made in pairing.sources(stem, wanted):
            picture = source_picture(sample, pairing.recipe)
            identity = samples_seen.setdefault((pairing.entries[stem].stem, sample.key), len(samples_seen))
            for row in made:
                index = place[row.key or "", row.variant]
                sources[index] = images.resize(picture, sources.shape[1:3])
                known[index] = known_of(sample, row, picture, pairing.recipe, shard=stem)
                labels[index] = label_of(sample, row, pairing.recipe)
                identities[index] = identity
    numbers = {what: number for number, what in enumerate(dict.fromkeys(known))}
    return Records(
        rows=tuple(rows),
        shards=tuple(shards),
        outputs=outputs,
        sources=sources,
        labels=np.array(labels, dtype=np.int64),
        groups=np.array([numbers[what] for what in known], dtype=np.int64),
        identities=np.array(identities, dtype=np.int64),
        samples=tuple(samples_seen),
    )


def chosen_samples(pairing: Pairing, records: Records, wanted: Sequence[int]) -> Iterator[Chosen]:
    """The samples of the records `wanted`, each once and with these records' variants, for a trial."""
    by_shard: dict[str, list[Row]] = {}
    for index in wanted:
        by_shard.setdefault(records.shards[index].partition("~")[0], []).append(records.rows[index])
    for stem, rows in by_shard.items():
        for sample, made in pairing.sources(stem, rows):
            numbers = tuple(row.variant for row in made)
            yield Chosen(stem=pairing.entries[stem].stem, key=sample.key, fields=sample.fields, numbers=numbers)


def known_of(
    sample: Sample, row: Row, picture: images.Pixels, recipe: Recipe, *, shard: str
) -> tuple[object, ...]:
    """All that is known of a record besides its picture; `config/accounting` lists it in words."""
    return (shard, row.width, row.height, _is_grey(picture), *_shown(sample, recipe))


def _shown(sample: Sample, recipe: Recipe) -> Iterator[object]:
    """What travels with the output, or was told to the model: nobody needs the image to know it."""
    model = recipe.model
    names = [*recipe.fields.fields]
    names += [model.class_labels.field] if model.class_labels else []
    names += [model.prompts.field] if model.prompts and model.prompts.field else []
    yield from (sample.fields.get(name.lower()) for name in names)
    if recipe.fields.json_keys:
        try:
            values = json.loads(sample.fields.get(fields.JSON_FIELD, b"{}"))
        except ValueError:
            values = {}
        yield from (
            json.dumps(values.get(name) if isinstance(values, dict) else None)
            for name in recipe.fields.json_keys
        )


def label_of(sample: Sample, row: Row, recipe: Recipe) -> int:
    """The class of a sample: what the model was told, else what stands in the field `cls`."""
    labels = recipe.model.class_labels
    if row.label is not None:
        return row.label
    try:
        return fields.read_label(sample, labels.field.lower() if labels else LABEL_FIELD)
    except SampleError:
        return NO_LABEL


def _output(item: Sample, row: Row, recipe: Recipe) -> images.Pixels:
    for name, data in item.fields.items():
        if hashlib.sha256(data).hexdigest() == row.output_digest:
            return images.decode(data, field=name, channels=3, policy=recipe.images).pixels
    raise VerificationError(
        f"no field of sample {item.key} has the output digest of its row; run verify --deep"
    )


def source_picture(sample: Sample, recipe: Recipe) -> images.Pixels:
    """The source's image, decoded: (H, W, 3). Raises SampleError."""
    name = fields.image_field(sample, recipe.images)
    return images.decode(sample.fields[name], field=name, channels=3, policy=recipe.images).pixels


def _is_grey(pixels: images.Pixels) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())


def _rows(out: str, name: str) -> list[Row]:
    with storage.open_read(storage.join(out, name + PROVENANCE_SUFFIX)) as stream:
        return read_rows(stream)


def _shuffled(name: str) -> bytes:
    """An order that has nothing to do with names, and is the same every time."""
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"bmg-audit").digest()
