"""What a shard is, measured in one pass: its bytes, its digest, its keys, and what in it can't be read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from boomerang_batch import storage
from boomerang_batch.data.shards import Sample, read_samples


@dataclass(frozen=True, kw_only=True)
class ShardScan:
    """`digest` is the SHA-256 (hex) of the file, `keys` those of whole samples, in order."""

    size_bytes: int
    digest: str
    keys: Sequence[str]
    problems: Sequence[str]


def scan_shard(url: str) -> ShardScan:
    """Read a shard to its end. Raises StorageError when it can't be opened."""
    keys: dict[str, None] = {}
    problems = []
    with storage.open_read(url) as stream:
        hashing = _Hashing(stream)
        for item in read_samples(cast("BinaryIO", hashing), shard=url):
            if isinstance(item, Sample):
                keys[item.key] = None
            else:
                problems.append(f"{item.detail} ({item.reason} at byte {item.offset:,})")
                keys.pop(item.key or "", None)
        while hashing.read(1 << 20):
            pass  # a broken shard is not read to its end, but its digest is of the whole file
    digest = hashing.sha256.hexdigest()
    return ShardScan(size_bytes=hashing.size_bytes, digest=digest, keys=list(keys), problems=problems)


class _Hashing:
    """A stream that digests what passes through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        self.size_bytes += len(data)
        return data
