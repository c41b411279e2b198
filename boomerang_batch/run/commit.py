"""The transaction: a shard is done when its marker is there, and the marker comes last.

Tar and parquet go up whole under their final names, are read back and compared with what was meant, and only
then is the marker created, which succeeds for one writer alone. A kill at any moment leaves either no marker,
and the shard is done again from the start, or a marker whose files are known to be good.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from boomerang_batch import storage
from boomerang_batch.data.provenance import Marker
from boomerang_batch.errors import ObjectExistsError, ObjectMissingError, StorageError
from boomerang_batch.run.discretion import PLAIN

MARKER_SUFFIX = "_stats.json"
TAR_SUFFIX = ".tar"
PROVENANCE_SUFFIX = ".parquet"
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """SHA-256 (hex) and size of a file's bytes."""

    sha256: str
    size_bytes: int


def digest_stream(stream: BinaryIO) -> FileDigest:
    """Digest a stream to its end, a megabyte at a time."""
    sha256, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        sha256.update(chunk)
        size_bytes += len(chunk)
    return FileDigest(sha256=sha256.hexdigest(), size_bytes=size_bytes)


def digest_file(path: Path) -> FileDigest:
    """Digest a local file."""
    with path.open("rb") as stream:
        return digest_stream(stream)


def read_marker(out: str, name: str) -> Marker | None:
    """The marker of shard `name`, or None when the shard is not done.

    One that can't be parsed, or tells of another shard, is none.
    """
    try:
        marker = Marker.from_bytes(storage.read_bytes(storage.join(out, name + MARKER_SUFFIX)))
    except ObjectMissingError:
        return None
    return marker if marker is not None and marker.stem == name else None


def commit(
    out: str, marker: Marker, *, tar: Path, provenance: Path, holding: Callable[[], None] = lambda: None
) -> None:
    """Publish one shard. Raises StorageError when what is in storage is not what was meant.

    `holding` is called before each publication, and raises when OUT is no longer ours to write to.

    A marker that is there already is read back: the same one means that another attempt of the same shard
    came first with the same bytes, and all is well. One that tells of other bytes is an error, and looked for
    before anything is replaced, so that it goes on telling the truth.
    """
    name = marker.stem
    if _is_committed(out, marker):
        return
    for source, suffix, digest in (
        (tar, TAR_SUFFIX, marker.tar_sha256),
        (provenance, PROVENANCE_SUFFIX, marker.parquet_sha256),
    ):
        holding()
        _publish_checked(source, storage.join(out, name + suffix), digest)
    holding()
    url = storage.join(out, name + MARKER_SUFFIX)
    try:
        storage.create_only(url, marker.to_bytes())
    except ObjectExistsError:
        if not _is_committed(out, marker):
            _log.warning("%s was there but unreadable; replaced", url, extra=PLAIN)
            storage.publish_bytes(marker.to_bytes(), url)


def _is_committed(out: str, marker: Marker) -> bool:
    """Whether OUT has this very marker. Raises StorageError when it has another for the same shard."""
    there = read_marker(out, marker.stem)
    if there is not None and there != marker:
        url = storage.join(out, marker.stem + MARKER_SUFFIX)
        raise StorageError(
            f"{url} is there already and tells of other bytes than this run made; two runs that should "
            "agree do not: check that OUT is used by one run at a time and verify it"
        )
    return there is not None


def _digest_at(url: str) -> FileDigest:
    with storage.open_read(url) as stream:
        return digest_stream(stream)


def _publish_checked(source: Path, url: str, sha256: str) -> None:
    storage.publish(source, url)
    try:
        found = _digest_at(url)
    except StorageError:
        # Another attempt at the same shard may just have replaced it, by the same bytes.
        found = _digest_at(url)
    if found.sha256 != sha256:
        raise StorageError(f"{url} reads back other bytes than were written; the disk or the store is failing")
