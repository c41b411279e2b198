"""What the markers of OUT say, each read once: a marker never changes.

An index under OUT/logs keeps it for the runs to come, which then need a listing and that one object instead of
a request for each shard, of which there may be a hundred thousand. The index proves nothing: a shard is done if
its marker is listed, and the index only spares reading it again as long as it has the size it had. It may be
deleted at any time.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from boomerang_batch import storage
from boomerang_batch.errors import ObjectMissingError
from boomerang_batch.run.commit import read_marker
from boomerang_batch.run.record import LOGS_NAME

INDEX_NAME = "markers.json"
_FORMAT_VERSION = 1
_READERS = 16
_AT_ONCE = 4096


class Told(NamedTuple):
    """What a marker tells of its shard: the recipe that made it, and how many rows have which status."""

    recipe_digest: str
    counts: Mapping[str, int]
    size_bytes: int
    """Of the marker."""


class Markers:
    """The markers of one OUT, for one thread. `compared`: no key is in two of the shards known here."""

    def __init__(self, out: str) -> None:
        """Raises StorageError where the index can't be read; one that is no index counts as none."""
        self._out = out
        self._known: dict[str, Told] = {}
        self.compared = False
        try:
            index = json.loads(storage.read_bytes(self._url))
            if index["format_version"] == _FORMAT_VERSION:
                self._known = {
                    name: Told(digest, dict(counts), int(size_bytes))
                    for digest, shards in index["told"].items()
                    for name, (size_bytes, counts) in shards.items()
                }
                self.compared = bool(index["compared"])
        except (ObjectMissingError, ValueError, KeyError, TypeError, AttributeError):
            self._known = {}

    @property
    def _url(self) -> str:
        return storage.join(self._out, LOGS_NAME, INDEX_NAME)

    def read(self, sizes: Mapping[str, int]) -> Mapping[str, Told]:
        """What the markers of these shards say, which have these sizes.

        Nothing of one that is torn, gone again or another shard's.
        """
        for name in [name for name in sizes if name in self._known]:
            if self._known[name].size_bytes != sizes[name]:
                del self._known[name]
        unknown = iter(sorted(sizes.keys() - self._known.keys()))
        with ThreadPoolExecutor(_READERS) as readers:
            while block := list(itertools.islice(unknown, _AT_ONCE)):
                for name, marker in zip(block, readers.map(self._read, block), strict=True):
                    if marker is not None:
                        self.remember(name, marker)
        return {name: self._known[name] for name in sizes if name in self._known}

    def remember(self, name: str, told: Told) -> None:
        """A marker is known, because whoever committed it says so."""
        if self._known.get(name) != told:
            self._known[name] = told
            self.compared = False

    def forget_all_but(self, there: Collection[str]) -> None:
        """Forget the markers that OUT has no more, in storage too, before others may take their place."""
        gone = self._known.keys() - set(there)
        for name in gone:
            del self._known[name]
        if gone:
            self.save()

    def save(self) -> None:
        """Publish the index. Raises StorageError."""
        told: dict[str, dict[str, tuple[int, Mapping[str, int]]]] = defaultdict(dict)
        for name, one in sorted(self._known.items()):
            told[one.recipe_digest][name] = (one.size_bytes, one.counts)
        index = {"format_version": _FORMAT_VERSION, "compared": self.compared, "told": told}
        storage.make_folder(storage.join(self._out, LOGS_NAME))
        storage.publish_bytes(json.dumps(index, separators=(",", ":")).encode(), self._url)

    def _read(self, name: str) -> Told | None:
        marker = read_marker(self._out, name)
        return None if marker is None else Told(marker.recipe_digest, marker.counts, len(marker.to_bytes()))
