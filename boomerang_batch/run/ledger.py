"""What became of every sample of one shard, while the shard is in work.

Results arrive in the engine's order and may be withdrawn again (a key that turns up twice in a broken tar takes
both its samples with it). Encoded bytes and rows wait in a spool file on local disk, only their places in
memory, so a shard's size never bounds a worker's memory. What links back to the input stays in memory too: a
killed worker leaves its spool behind. In the end the ledger gives rows and samples in the final order.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from boomerang_batch.data.provenance import Row


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a row comes from: what the private table tells and OUT does not."""

    key: str | None
    offset: int
    detail: str | None = None


class _Place(NamedTuple):
    """Where in the spool."""

    start: int
    size: int


class _Entry(NamedTuple):
    """What memory keeps of one output. The first three sort entries into the output's order."""

    rank: tuple[bool, str]
    offset: int
    variant: int
    source: Source
    record: _Place
    """(row, member key, places of the fields), as JSON."""


class Ledger:
    """The record of one shard, over a spool file open as long as the `with` block. Threads may share it."""

    def __init__(
        self, spool: Path, *, by_pseudonym: bool, wants: Callable[[str | None, int], bool] | None = None
    ) -> None:
        """`wants` tells which outputs, by key and number, are to be recorded; None: all."""
        self._spool = spool.open("w+b")
        self._wants = wants or (lambda key, number: True)
        self._by_pseudonym = by_pseudonym
        self._entries: dict[str | None, dict[tuple[int, int], _Entry]] = defaultdict(dict)
        """By key, then by offset and variant."""
        self._withdrawn: set[str] = set()
        self._refused: set[tuple[str | None, int, int]] = set()
        self._writing = threading.Lock()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def add(
        self, source: Source, row: Row, member_key: str, fields: Mapping[str, bytes], *, again: bool = False
    ) -> None:
        """Take a finished output, unless its sample has been withdrawn meanwhile.

        Nor one that was refused, for a twin of it may have been found on another thread while it was being
        finished; but `again` says that it was made anew since.
        """
        with self._writing:
            if (source.key, source.offset, row.variant) in self._refused and not again:
                return
            if source.key not in self._withdrawn and self._wants(source.key, row.variant):
                places = {name: self._write(data) for name, data in fields.items()}
                self._enter(source, row, member_key, places)

    def refuse(self, source: Source, row: Row) -> None:
        """Record an output that failed."""
        with self._writing:
            if source.key not in self._withdrawn and self._wants(source.key, row.variant):
                self._refused.add((source.key, source.offset, row.variant))
                self._enter(source, row)

    def withdraw(self, source: Source, row: Row) -> None:
        """Record bytes that could not be read. If they name a key, whatever that key had given is void."""
        with self._writing:
            if source.key is not None:
                self._entries.pop(source.key, None)
                self._withdrawn.add(source.key)
            self._enter(source, row)

    def rows(self) -> Iterator[tuple[Source, Row]]:
        """Every row in the output's order, with where it came from."""
        for entry in self._ordered():
            row, _, _ = self._record(entry)
            yield entry.source, Row(**row)

    def samples(self) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Every output sample in the output's order, its bytes read back from the spool."""
        for entry in self._ordered():
            _, member_key, places = self._record(entry)
            if member_key is not None:
                yield member_key, {name: self._read(*place) for name, place in places.items()}

    def _enter(
        self,
        source: Source,
        row: Row,
        member_key: str | None = None,
        places: Mapping[str, _Place] | None = None,
    ) -> None:
        record = self._write(json.dumps([vars(row), member_key, places]).encode())
        # The input's order would link back under anonymize; pseudonyms carry nothing.
        rank = (row.key is None, row.key or "") if self._by_pseudonym else (False, "")
        entry = _Entry(rank=rank, offset=source.offset, variant=row.variant, source=source, record=record)
        self._entries[source.key][source.offset, row.variant] = entry

    def _ordered(self) -> list[_Entry]:
        return sorted(
            (entry for of_key in self._entries.values() for entry in of_key.values()), key=lambda one: one[:3]
        )

    def _record(self, entry: _Entry) -> Any:
        return json.loads(self._read(*entry.record))

    def _write(self, data: bytes) -> _Place:
        start = self._spool.seek(0, 2)
        self._spool.write(data)
        return _Place(start, len(data))

    def _read(self, start: int, size: int) -> bytes:
        self._spool.seek(start)
        return self._spool.read(size)
