"""What became of every sample of one shard, while the shard is in work.

Results arrive in the engine's order and may be withdrawn again (a key that turns up twice in a broken tar takes
both its samples with it). Encoded bytes wait in a spool file on local disk, only their places in memory, so
a shard's size never bounds a worker's memory. In the end the ledger gives rows and samples in the final order.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from boomerang_batch.data.provenance import Row


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a row comes from: what the private table tells and OUT does not."""

    key: str | None
    offset: int
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    source: Source
    row: Row
    member_key: str | None = None
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Ledger:
    """The record of one shard, over a spool file open as long as the `with` block. Threads may share it."""

    def __init__(self, spool: Path, *, by_pseudonym: bool) -> None:
        self._spool = spool.open("w+b")
        self._by_pseudonym = by_pseudonym
        self._entries: dict[str | None, dict[tuple[int, int], _Entry]] = defaultdict(dict)
        """By key, then by offset and variant."""
        self._withdrawn: set[str] = set()
        self._writing = threading.Lock()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def add(self, source: Source, row: Row, member_key: str, fields: Mapping[str, bytes]) -> None:
        """Take a finished output, unless its sample has been withdrawn meanwhile."""
        with self._writing:
            if source.key in self._withdrawn:
                return
            places = {}
            self._spool.seek(0, 2)
            for name, data in fields.items():
                places[name] = (self._spool.tell(), len(data))
                self._spool.write(data)
            entry = _Entry(source=source, row=row, member_key=member_key, places=places)
            self._entries[source.key][source.offset, row.variant] = entry

    def refuse(self, source: Source, row: Row) -> None:
        """Record an output that failed."""
        with self._writing:
            if source.key not in self._withdrawn:
                self._entries[source.key][source.offset, row.variant] = _Entry(source=source, row=row)

    def withdraw(self, source: Source, row: Row) -> None:
        """Record bytes that could not be read. If they name a key, whatever that key had given is void."""
        with self._writing:
            if source.key is not None:
                self._entries.pop(source.key, None)
                self._withdrawn.add(source.key)
            self._entries[source.key][source.offset, row.variant] = _Entry(source=source, row=row)

    def rows(self) -> list[tuple[Source, Row]]:
        """Every row in the output's order, with where it came from."""
        return [(entry.source, entry.row) for entry in self._ordered()]

    def samples(self) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Every output sample in the output's order, its bytes read back from the spool."""
        for entry in self._ordered():
            if entry.member_key is not None:
                yield entry.member_key, {name: self._read(*place) for name, place in entry.places.items()}

    def _read(self, start: int, size: int) -> bytes:
        self._spool.seek(start)
        return self._spool.read(size)

    def _ordered(self) -> list[_Entry]:
        entries = [entry for of_key in self._entries.values() for entry in of_key.values()]
        if self._by_pseudonym:
            # The input's order would link back; pseudonyms carry nothing.
            return sorted(
                entries,
                key=lambda entry: (
                    entry.row.key is None,
                    entry.row.key or "",
                    entry.source.offset,
                    entry.row.variant,
                ),
            )
        return sorted(entries, key=lambda entry: (entry.source.offset, entry.row.variant))
