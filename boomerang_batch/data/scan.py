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
        measured = Measured(stream)
        for item in read_samples(cast("BinaryIO", measured), shard=url):
            if isinstance(item, Sample):
                keys[item.key] = None
            else:
                problems.append(f"{item.detail} ({item.reason} at byte {item.offset:,})")
                keys.pop(item.key or "", None)
        measured.finish()
    return ShardScan(size_bytes=measured.size_bytes, digest=measured.digest, keys=list(keys), problems=problems)


class Measured:
    """A shard's stream that counts and digests what passes through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what has passed."""
        return self._sha256.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as the stream gives them."""
        data = self._stream.read(size)
        self._sha256.update(data)
        self.size_bytes += len(data)
        return data

    def finish(self) -> None:
        """Let the rest pass: a broken shard is not read to its end, but its digest is of the whole file."""
        while self.read(1 << 20):
            pass


def contradictions(found: Measured | ShardScan, *, size_bytes: int | None, digest: str | None) -> list[str]:
    """What a manifest claims of a shard's bytes and is not so, in words; `found` was read to its end."""
    claims = (("bytes", size_bytes, found.size_bytes), ("digest", digest, found.digest))
    return [
        f"{name} is {real}, the manifest says {claimed}"
        for name, claimed, real in claims
        if claimed is not None and claimed != real
    ]
