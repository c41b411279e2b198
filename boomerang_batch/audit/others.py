"""Real images that no output was made from: what the model was trained on, and a hold-out of real ones.

They are read from a manifest of shards as any other, a bounded number from all over it, and brought to the size
at which outputs and sources are compared. None of their names goes further than an error message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.audit.records import Records, room, source_picture
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.manifest import Manifest
from boomerang_batch.data.spread import Unread, spread_samples
from boomerang_batch.errors import ManifestError, SampleError, StorageError


@dataclass(frozen=True, kw_only=True)
class Others:
    """Real images beside the records, (m, H, W, 3) of the records' size; None where none were given."""

    training: NDArray[np.uint8] | None = None
    holdout: NDArray[np.uint8] | None = None


NONE = Others()
_FEW = 100


@dataclass(frozen=True, kw_only=True)
class Given:
    """What came of the images that one flag gave."""

    pictures: NDArray[np.uint8]
    """(m, H, W, 3)."""
    unread: int
    """What of its shards could not be read: pictures, and whatever makes no sample."""
    sources: int
    """Audited sources that are among them."""
    left_out: tuple[str, ...]
    """The same in words, and whether there are enough."""


def read_others(
    manifest: Manifest, flag: str, *, recipe: Recipe, records: Records, samples: int, folder: Path
) -> Given:
    """Up to `samples` images of a manifest that `flag` gave, on disk.

    An image that is the source of a record is left out: near it is near that source, which is told apart. Under
    anonymize what is left out is not named. Raises ManifestError where nothing is left, StorageError where a
    shard can't be read.
    """
    named = recipe.purpose != "anonymize"
    kept = room((samples, *records.sources.shape[1:]), folder, flag.strip("-"))
    ours = {_digest(picture) for picture in records.sources}
    count = ours_too = 0
    unread, unreadable = Unread(), []
    try:
        for _, sample in spread_samples(manifest.shards, samples, unread):
            try:
                picture = source_picture(sample, recipe)
            except SampleError as error:
                unreadable.append(str(error) if named else error.reason)
                continue
            pixels = images.resize(picture, records.sources.shape[1:3])
            if _digest(pixels) in ours:
                ours_too += 1
            else:
                kept[count] = pixels
                count += 1
    except StorageError as error:
        raise type(error)(f"{flag} {manifest.name}: {error}") from error
    left_out = []
    if unread:
        left_out.append(f"{flag}: what can't be read in {unread.told(manifest, named=named)} is left out")
    if unreadable:
        left_out.append(f"{flag}: {len(unreadable)} of the images looked at can't be read and are left out")
    if ours_too:
        left_out.append(f"{flag}: {ours_too} of the images looked at are audited sources and are left out")
    if 0 < count < _FEW:
        left_out.append(f"{flag}: {count} images hardly tell what is near; give {_FEW} or more")
    if not count:
        why = "; ".join([*left_out, *unreadable[:1]]) or "its shards hold no sample"
        raise ManifestError(f"{flag} {manifest.name}: no image is left to compare with ({why}); give others")
    return Given(
        pictures=kept[:count],
        unread=len(unread) + len(unreadable),
        sources=ours_too,
        left_out=tuple(left_out),
    )


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
