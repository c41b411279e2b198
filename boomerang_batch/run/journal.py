"""A shard's journal: finished outputs, kept while the shard is in work, lest a lost worker cost much.

Every `journal_every` samples, and when a run is stopped, what has been finished since goes up as one segment.
Who does the shard next takes a sample from there if all its outputs are there and were made of the very same
input; everything else is drawn again. The shard's own files come out the same, byte by byte.

Segments lie under OUT/logs, or under anonymize in the private dir: entries come in the order of the input,
which the output's own order hides. That an entry belongs to an input is proved by a hash under the noise key.
Segments are removed when the shard is committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.data.provenance import Row
from boomerang_batch.errors import StorageError
from boomerang_batch.run.stages import Output

FOLDER = "journal"
OF_CODES = "~codes"
"""What follows a shard's name in that of the journal of its codes."""
_BUFFER_BYTES = 8 << 20
_LARGEST_BYTES = 1 << 30
"""An output of more bytes is not kept: a column of Arrow holds no two billion."""
_SCHEMA = pa.schema(
    [
        pa.field("proof", pa.binary(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
        pa.field("member_key", pa.string(), nullable=False),
        pa.field("names", pa.list_(pa.string()), nullable=False),
        pa.field("contents", pa.list_(pa.binary()), nullable=False),
        pa.field("digests", pa.list_(pa.binary()), nullable=False),
    ]
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Where an output of an earlier attempt is: the bytes of its fields lie in one piece in a local file."""

    row: Row
    member_key: str
    digests: tuple[bytes | None, ...]
    start: int
    sizes: Mapping[str, int]


class Journal:
    """The journal of one shard. `add` and `flush` are for one thread, `find` for another."""

    def __init__(self, home: str, name: str, *, scratch: Path, copies: BinaryIO, every: int) -> None:
        self._url = folder_of(home, name)
        self._scratch = scratch
        self._every = every
        self._buffer: list[dict[str, Any]] = []
        self._buffered_bytes = self._in_segment = 0
        self._segment: pq.ParquetWriter | None = None
        self._kept: dict[bytes, _Kept] = {}
        self._copies = copies
        for segment in storage.list_names(self._url):
            self._load(segment)

    def find(self, proof: bytes) -> Output | None:
        """The output of an earlier attempt that has this proof."""
        kept = self._kept.get(proof)
        if kept is None:
            return None
        self._copies.seek(kept.start)
        fields = {name: self._copies.read(size) for name, size in kept.sizes.items()}
        return Output(row=kept.row, member_key=kept.member_key, fields=fields, digests=kept.digests)

    def add(self, output: Output, proof: bytes) -> None:
        """Keep a finished output."""
        if sum(map(len, output.fields.values())) > _LARGEST_BYTES:
            return
        self._buffer.append(
            {
                "proof": proof,
                "row": json.dumps(dataclasses.asdict(output.row)),
                "member_key": output.member_key,
                "names": list(output.fields),
                "contents": list(output.fields.values()),
                "digests": list(output.digests),
            }
        )
        self._buffered_bytes += sum(map(len, output.fields.values()))
        self._in_segment += 1
        if self._in_segment >= self._every:
            self.flush()
        elif self._buffered_bytes >= _BUFFER_BYTES:
            self._write()

    def flush(self) -> None:
        """Publish what was added since the last time. One that can't be written costs nothing but itself."""
        if not self._in_segment:
            return
        self._write()
        if self._segment is not None:
            self._segment.close()
        self._segment, self._in_segment = None, 0
        try:
            # A name of its own: segments are never replaced, and two attempts may be at it.
            storage.make_folder(self._url)
            name = f"{time.time_ns():020d}.parquet"
            storage.publish(self._scratch / "segment", storage.join(self._url, name))
        except StorageError as error:
            _log.warning("the journal goes on without a segment: %s", error)

    def _write(self) -> None:
        if self._segment is None:
            self._segment = pq.ParquetWriter(self._scratch / "segment", _SCHEMA, compression="none")
        self._segment.write_table(pa.Table.from_pylist(self._buffer, schema=_SCHEMA))
        self._buffer, self._buffered_bytes = [], 0

    def _load(self, segment: str) -> None:
        copy = self._scratch / "loaded"
        try:
            storage.download(storage.join(self._url, segment), copy)
            with pq.ParquetFile(copy) as file:
                for batch in file.iter_batches(batch_size=16):
                    for entry in batch.to_pylist():
                        self._keep(entry)
        except (StorageError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            _log.warning("%s: a segment of the journal is of no use: %s", self._url, error)
        copy.unlink(missing_ok=True)

    def _keep(self, entry: dict[str, Any]) -> None:
        names, contents = entry["names"], entry["contents"]
        start = self._copies.seek(0, 2)
        for content in contents:
            self._copies.write(content)
        self._kept[entry["proof"]] = _Kept(
            row=Row(**json.loads(entry["row"])),
            member_key=entry["member_key"],
            digests=tuple(entry["digests"]),
            start=start,
            sizes={name: len(content) for name, content in zip(names, contents, strict=True)},
        )


@contextlib.contextmanager
def opened(home: str, name: str, *, scratch: Path, every: int) -> Iterator[Journal | None]:
    """The journal of shard `name`, with what earlier attempts kept copied to the local folder `scratch`.

    `every`: outputs in a segment; with 0 there is no journal.
    """
    if not every:
        yield None
        return
    with (scratch / "kept").open("w+b") as copies:
        yield Journal(home, name, scratch=scratch, copies=copies, every=every)


def home(purpose: str, out: str, private_dir: str | None) -> str:
    """Where a run's journals lie: OUT, or the private dir under anonymize."""
    return private_dir if purpose == "anonymize" and private_dir is not None else out


def folder_of(home: str, name: str) -> str:
    """Where the journal of shard `name` lies."""
    return storage.join(home, "logs", FOLDER, name)


def remove(home: str, name: str) -> None:
    """Remove a shard's journal, for the shard is committed. What can't be removed does no harm."""
    folder = folder_of(home, name)
    with contextlib.suppress(StorageError):
        storage.sweep(folder)
        for segment in storage.list_names(folder):
            storage.delete(storage.join(folder, segment))
        storage.remove_folder(folder)


def sweep(home: str, done: Collection[str]) -> None:
    """Remove the journals of committed shards, which a kill after the commit leaves behind."""
    for name in storage.list_names(storage.join(home, "logs", FOLDER)):
        if name.removesuffix(OF_CODES) in done:
            remove(home, name)
