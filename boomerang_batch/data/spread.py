"""A few samples from all over a manifest, the same ones each time, and what of its shards could not be read."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

from boomerang_batch import storage
from boomerang_batch.data.manifest import Manifest, ShardEntry
from boomerang_batch.data.shards import Sample, Unreadable, read_samples

_SHARDS = 8
_SAID = 5

_T = TypeVar("_T")


class Unread:
    """What was met in shards that makes no sample: each of it once, however often its shard is read."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, int], str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, entry: ShardEntry, item: Unreadable) -> None:
        """Count it."""
        self._reasons[entry.stem, item.offset] = item.reason

    def told(self, manifest: Manifest, *, named: bool) -> str:
        """In which shards of the manifest it was, and why, in words; empty where all could be read.

        Not `named`, a shard goes by its place in the order of their names, which quotes nothing.
        """
        counts: dict[str, Counter[str]] = {}
        for (stem, _), reason in self._reasons.items():
            counts.setdefault(stem, Counter())[reason] += 1
        places = {entry.stem: place for place, entry in enumerate(manifest.shards, 1)}
        said = [
            (f"shard {stem}" if named else f"shard {places[stem]} of {len(places)}")
            + f" ({', '.join(_times(reason, count) for reason, count in sorted(reasons.items()))})"
            for stem, reasons in sorted(counts.items())
        ]
        more = f" and {len(said) - _SAID} more" if len(said) > _SAID else ""
        return ", ".join(said[:_SAID]) + more


def spread_samples(
    shards: Sequence[ShardEntry], wanted: int, unread: Unread
) -> Iterator[tuple[ShardEntry, Sample]]:
    """`wanted` readable samples, if there are so many, with their shards; what else is met goes to `unread`.

    The same share of each of some shards all over the list; more of others where those have too few.
    """
    return itertools.islice(_spread(shards, wanted, unread), wanted)


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of them, evenly spaced."""
    kept = min(count, len(items))
    return [items[index * len(items) // kept] for index in range(kept)]


def _spread(shards: Sequence[ShardEntry], wanted: int, unread: Unread) -> Iterator[tuple[ShardEntry, Sample]]:
    first = evenly(shards, _SHARDS)
    share = math.ceil(wanted / len(first))
    for entry in first:
        yield from itertools.islice(samples_of(entry, unread), share)
    for entry in shards:
        yield from itertools.islice(samples_of(entry, unread), share if entry in first else 0, None)


def samples_of(entry: ShardEntry, unread: Unread) -> Iterator[tuple[ShardEntry, Sample]]:
    """Every readable sample of a shard; what else is met goes to `unread`."""
    with storage.open_read(entry.url) as stream:
        for item in read_samples(stream, shard=entry.stem):
            if isinstance(item, Sample):
                yield entry, item
            else:
                unread.add(entry, item)


def _times(reason: str, count: int) -> str:
    return reason if count == 1 else f"{reason}, {count} times"
