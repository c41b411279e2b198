"""The sources of a finished run's outputs, found by the names that the run gave.

Whole shards are drawn, in an order of their own that everyone can repeat, until there are enough records; for a
shard's records are known to be together, so they are each other's candidates. Names are the run's own, under
the private dir's secret where it anonymized, and a source must have the digest that its row tells of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from boomerang_batch import storage
from boomerang_batch.audit.origin import is_private, read_rows_of, require_links
from boomerang_batch.audit.records import Gathering, Records
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import ConfigError, ManifestError, MeasureError, PrivateDirError, VerificationError
from boomerang_batch.run.appendix import appendices
from boomerang_batch.run.commit import MARKER_SUFFIX, TAR_SUFFIX
from boomerang_batch.run.naming import Naming, member_key
from boomerang_batch.run.record import RunRecord, recorded_recipe
from boomerang_batch.run.trial import Chosen, own_secret


class Pairing:
    """One run's outputs and where their sources are."""

    def __init__(self, out: str, record: RunRecord, manifest: Manifest, *, private_dir: str | None) -> None:
        """Raises PrivateDirError for a private dir that is missing or another's, ManifestError likewise."""
        self.out, self.record = out, record
        self.recipe = recorded_recipe(out, record)
        if private_dir is not None and not is_private(record):
            raise ConfigError(
                f"--private-dir: the run in {out} has the purpose {self.recipe.purpose} and keeps nothing "
                "private; leave it out"
            )
        home = require_links(out, record, private_dir)
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
        for stem in sorted(self.entries, key=shuffled):
            for name in (stem, *more.get(stem, ())):
                left = samples - sum(len(rows) for _, rows in chosen)
                if left <= 0:
                    return chosen
                if not storage.exists(storage.join(self.out, name + MARKER_SUFFIX)):
                    continue
                good = [row for row in read_rows_of(self.out, name) if row.status == "ok"]
                rows = sorted(good, key=lambda row: shuffled(f"{row.key} {row.variant}"))[:left]
                if rows:
                    chosen.append((name, rows))
        if not chosen:
            raise MeasureError(f"{self.out}: no shard of the manifest has an output yet")
        return chosen

    def outputs(self, name: str, rows: Sequence[Row]) -> Iterator[tuple[Row, images.Pixels]]:
        """Each row's output of a shard of OUT: (H, W, 3). Raises VerificationError where one is gone."""
        wanted = {member_key(self.recipe, row.key or "", row.variant): row for row in rows}
        url = storage.join(self.out, name + TAR_SUFFIX)
        with storage.open_read(url) as stream:
            for item in read_samples(stream, shard=url):
                row = wanted.pop(item.key, None) if isinstance(item, Sample) else None
                if isinstance(item, Sample) and row is not None:
                    yield row, _output(item, row, self.recipe)
        if wanted:
            raise VerificationError(
                f"{url} lacks {len(wanted)} output(s) that its provenance tells of; run verify"
            )

    def sources(self, stem: str, rows: Sequence[Row]) -> Iterator[tuple[Sample, list[Row]]]:
        """Each sample that outputs `rows` of the shard `stem` were made from, with these.

        Raises ManifestError where one is gone, or is another picture by now.
        """
        wanted: dict[tuple[str, int], Row] = {(row.key or "", row.variant): row for row in rows}
        entry = self.entries[stem]
        shown = storage.without_secrets(entry.url)
        with storage.open_read(entry.url) as stream:
            for item in read_samples(stream, shard=shown):
                if not wanted:
                    return
                if not isinstance(item, Sample):
                    continue
                places = [
                    (self.naming.row_key(shard=entry.stem, key=item.key, variant=number), number)
                    for number in range(self.recipe.outputs)
                ]
                made = [wanted.pop(place) for place in places if place in wanted]
                if made:
                    self._require_same(item, made, shown)
                    yield item, made
        if wanted:
            raise ManifestError(
                f"{shown} lacks {len(wanted)} sample(s) that outputs were made from; give the manifest and the "
                "shards as the run read them"
            )

    def _require_same(self, sample: Sample, made: Sequence[Row], shown: str) -> None:
        """Other pictures under the same names would pass for perfect anonymity."""
        image = sample.fields[fields.image_field(sample, self.recipe.images)]
        for row in made:
            if self.naming.source_digest(image, row_key=row.key or "") != row.source_digest:
                raise ManifestError(
                    f"{shown}: sample {sample.key} is not the picture that OUT was made from; give the "
                    "manifest and the shards as the run read them"
                )


def gather(pairing: Pairing, *, samples: int, folder: Path) -> Records:
    """Bring up to `samples` outputs and their sources into `folder`. Raises what reading them does."""
    chosen = pairing.choose(samples)
    gathering = Gathering(pairing.recipe, (row for _, rows in chosen for row in rows), folder=folder)
    for name, rows in chosen:
        place = {
            (row.key, row.variant): gathering.output(name, row, pixels)
            for row, pixels in pairing.outputs(name, rows)
        }
        stem = name.partition("~")[0]
        for sample, made in pairing.sources(stem, rows):
            places = [place[row.key, row.variant] for row in made]
            gathering.source(places, pairing.entries[stem].stem, sample)
    return gathering.records()


def chosen_samples(pairing: Pairing, records: Records, wanted: Sequence[int]) -> Iterator[Chosen]:
    """The samples of the records `wanted`, each once and with these records' outputs, for a trial."""
    by_shard: dict[str, list[Row]] = {}
    for index in wanted:
        by_shard.setdefault(records.shards[index].partition("~")[0], []).append(records.rows[index])
    for stem, rows in by_shard.items():
        for sample, made in pairing.sources(stem, rows):
            numbers = tuple(row.variant for row in made)
            yield Chosen(stem=pairing.entries[stem].stem, key=sample.key, fields=sample.fields, numbers=numbers)


def shuffled(name: str) -> bytes:
    """What to sort names by for an order that has nothing to do with them, and is the same every time."""
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"bmg-audit").digest()


def _output(item: Sample, row: Row, recipe: Recipe) -> images.Pixels:
    for name, data in item.fields.items():
        if hashlib.sha256(data).hexdigest() == row.output_digest:
            return images.decode(data, field=name, channels=3, policy=recipe.images).pixels
    raise VerificationError(
        f"no field of sample {item.key} has the output digest of its row; run verify --deep"
    )
