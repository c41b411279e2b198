"""A few samples from all over a manifest, the same ones each time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from boomerang_batch import storage
from boomerang_batch.data.manifest import ShardEntry
from boomerang_batch.data.shards import Sample, read_samples

_SHARDS = 8

_T = TypeVar("_T")


def spread_samples(shards: Sequence[ShardEntry], wanted: int) -> Iterator[tuple[ShardEntry, Sample]]:
    """`wanted` readable samples, if there are so many, with their shards.

    The same share of each of some shards all over the list; more of others where those have too few.
    """
    return itertools.islice(_spread(shards, wanted), wanted)


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of them, evenly spaced."""
    kept = min(count, len(items))
    return [items[index * len(items) // kept] for index in range(kept)]


def _spread(shards: Sequence[ShardEntry], wanted: int) -> Iterator[tuple[ShardEntry, Sample]]:
    first = evenly(shards, _SHARDS)
    share = math.ceil(wanted / len(first))
    for entry in first:
        yield from itertools.islice(samples_of(entry), share)
    for entry in shards:
        yield from itertools.islice(samples_of(entry), share if entry in first else 0, None)


def samples_of(entry: ShardEntry) -> Iterator[tuple[ShardEntry, Sample]]:
    """Every readable sample of a shard."""
    with storage.open_read(entry.url) as stream:
        for item in read_samples(stream, shard=entry.stem):
            if isinstance(item, Sample):
                yield entry, item
