"""A shard of OUT as the loader reads it: rows and tar in step, appendices beside it, in the order of the input.

Memory holds one sample's outputs and a row group. Whatever does not fit together, originals with rows or rows
with the tar, is an error that names shard and key: copies beside wrong originals would train on wrong labels.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.provenance import ROW_GROUP_ROWS, Marker
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import ConfigError, RunMismatchError, VerificationError
from boomerang_batch.run.appendix import appendices
from boomerang_batch.run.commit import PROVENANCE_SUFFIX, TAR_SUFFIX, read_marker
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.record import recorded_recipe, require_record


@dataclass(frozen=True, kw_only=True)
class Out:
    """What an OUT is, as far as a loader has to know."""

    url: str
    recipe: Recipe
    stems: Sequence[str]
    appended: Mapping[str, Sequence[str]]
    """The appendices of each shard that has some."""

    def marker(self, stem: str) -> Marker:
        """A shard's marker. Raises RunMismatchError when there is none."""
        marker = read_marker(self.url, stem)
        if marker is None:
            known = "is not done there; finish the run" if stem in self.stems else "is none of its shards"
            raise RunMismatchError(
                f"shard {stem} has no copies in {self.url}: it {known}, or leave it out of training"
            )
        return marker

    def names(self, stem: str) -> tuple[str, ...]:
        """A shard and its appendices."""
        return stem, *self.appended.get(stem, ())


class OutputRow(NamedTuple):
    """What provenance says of one output."""

    key: str | None
    variant: int
    status: str
    source_digest: str | None

    @property
    def good(self) -> bool:
        """Whether the tar has it."""
        return self.status in ("ok", "original")


class Output(NamedTuple):
    """One output, and the SHA-256 of the image it was made of."""

    source_digest: str | None
    fields: Mapping[str, bytes]

    @property
    def image(self) -> tuple[str, bytes]:
        """The image's field and its bytes: it comes first in every output."""
        return next(iter(self.fields.items()))


def open_out(out: str) -> Out:
    """Look at OUT. Raises ConfigError when its outputs can't be told to belong to anything."""
    record = require_record(out)
    recipe = recorded_recipe(out, record)
    if recipe.purpose == "anonymize":
        raise ConfigError(
            f"{out} is anonymized: which original an output was made of is for nobody to know. Train on it "
            "alone, or make copies with purpose: augment"
        )
    url = storage.absolute(out)
    return Out(url=url, recipe=recipe, stems=record.shards, appended=appendices(storage.list_names(url)))


def read_rows(out: Out, name: str) -> Generator[OutputRow, None, None]:
    """The rows of a shard of OUT, in order. Raises VerificationError when that is no provenance."""
    url = storage.join(out.url, name + PROVENANCE_SUFFIX)
    try:
        with storage.open_read(url) as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(ROW_GROUP_ROWS, columns=list(OutputRow._fields)):
                yield from (OutputRow(**row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise VerificationError(f"{url} is not a provenance file: {error}") from error


class ShardOutputs:
    """The outputs of one shard, sample by sample. Close it."""

    def __init__(self, out: Out, stem: str) -> None:
        """Raises RunMismatchError when the shard is not there, or not done."""
        self._out, self._stem = out, stem
        self._unreadable: frozenset[str | None] = frozenset()
        if out.marker(stem).counts.get("unreadable"):
            self._unreadable = frozenset(row.key for row in read_rows(out, stem) if row.status == "unreadable")
        self._first: str | None = None
        with contextlib.ExitStack() as files:
            self._shard, *self._appendices = [_Part(out, name, files) for name in out.names(stem)]
            self._files = files.pop_all()

    def begins_with(self, key: str) -> bool:
        """Whether `key` is the first that was taken, so that the shard begins anew."""
        return key == self._first and key not in self._unreadable

    def take(self, key: str) -> dict[int, Output]:
        """The outputs of the next sample by their numbers, those that failed left out.

        Of what was unreadable there is none. Raises RunMismatchError where the next sample of OUT is another.
        """
        self._first = key if self._first is None else self._first
        if key in self._unreadable:
            return {}
        if self._shard.key != key:
            there = "ends there" if self._shard.key is None else f"has {self._shard.key} there"
            raise RunMismatchError(f"shard {self._stem}: the originals go on with {key}, {self._fix(there)}")
        found = self._shard.take()
        for appendix in self._appendices:
            if appendix.key == key:
                found |= appendix.take()
        return found

    def finish(self) -> None:
        """Raise RunMismatchError where OUT has samples that were not taken."""
        for part in (self._shard, *self._appendices):
            if part.key is not None:
                raise RunMismatchError(f"shard {self._stem}: the originals end, {self._fix(f'has {part.key}')}")
            part.finish()

    def close(self) -> None:
        """Let the files go."""
        self._files.close()

    def _fix(self, there: str) -> str:
        return (
            f"and {self._out.url} {there}; give the shards that it was made of, and put Augment right behind "
            "the reader, before anything that shuffles, selects or slices samples"
        )


class _Part:
    """One tar of OUT with its rows: a shard or an appendix."""

    def __init__(self, out: Out, name: str, files: contextlib.ExitStack) -> None:
        self._recipe = out.recipe
        self._url = storage.join(out.url, name + TAR_SUFFIX)
        rows = files.enter_context(contextlib.closing(read_rows(out, name)))
        readable = (row for row in rows if row.status != "unreadable")
        self._groups = itertools.groupby(readable, key=lambda row: row.key)
        self._samples = read_samples(files.enter_context(storage.open_read(self._url)), shard=self._url)
        self._rows: Sequence[OutputRow] = ()
        self.key: str | None = None
        """The key of the next sample; None at the end."""
        self._go_on()

    def take(self) -> dict[int, Output]:
        """The next sample's outputs."""
        key, found = self.key or "", {}
        for row in self._rows:
            if not row.good:
                continue
            expected = member_key(self._recipe, key, row.variant)
            item = next(self._samples, None)
            if not isinstance(item, Sample) or item.key != expected:
                raise self._contradiction(f"{expected} is not where its provenance says")
            found[row.variant] = Output(row.source_digest, item.fields)
        self._go_on()
        return found

    def finish(self) -> None:
        """Raise VerificationError where the tar has more than its rows."""
        item = next(self._samples, None)
        if item is not None:
            raise self._contradiction(f"{item.key} is in no row of its provenance")

    def _go_on(self) -> None:
        self.key, rows = next(self._groups, (None, iter(())))
        self._rows = list(rows)

    def _contradiction(self, what: str) -> VerificationError:
        return VerificationError(f"{self._url}: {what}; look with `boomerang-batch verify --deep`")
