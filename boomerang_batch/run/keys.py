"""No key twice: with `identity: key`, equal keys in two shards would be drawn with equal noise.

That is a wrong output and, under anonymize, a leak, so a run ends as soon as it sees one, and verify looks
again. A run that resumes compares what was done before beside its work, for that may be millions of keys.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.errors import RecipeError, StoppedError, VerificationError
from boomerang_batch.run.commit import PROVENANCE_SUFFIX

_READERS = 8
_ASK_STOP_EVERY_S = 0.2


class _Sorted(NamedTuple):
    """Digests in ascending order, and beside each the number of its shard."""

    digests: np.ndarray
    shards: np.ndarray


class KeyRegistry:
    """Every row key of the shards added so far, in 12 bytes each.

    Keys are kept as 64-bit digests in sorted arrays, each more than twice as long as the next, so that few have
    to be searched and each key is moved only a logarithmic number of times. Where digests are equal the keys
    themselves are compared.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._stems: list[str] = []
        self._runs: list[_Sorted] = []

    def add(self, stem: str, keys: Sequence[str]) -> str | None:
        """Add a committed shard's keys; the first that another shard has, in a sentence, or None.

        `keys` must not repeat, and a shard be added once. Raises VerificationError when the provenance of the
        other shard can't be read.
        """
        if not keys:
            return None
        digests = np.frombuffer(b"".join(map(_digest, keys)), dtype=np.uint64)
        for run in self._runs:
            first, end = (np.searchsorted(run.digests, digests, side) for side in ("left", "right"))
            for place in np.flatnonzero(first < end):
                for number in run.shards[first[place] : end[place]]:
                    other, key = self._stems[int(number)], keys[int(place)]
                    if key in read_keys(self._out, other):
                        return (
                            f"key {key} is in shard {other} and in shard {stem}, so both got the same noise; "
                            "set identity: shard+key or content in the recipe and use an empty OUT"
                        )
        shards = np.full(len(keys), len(self._stems), dtype=np.uint32)
        self._runs.append(_Sorted(np.sort(digests), shards))
        self._stems.append(stem)
        while len(self._runs) > 1 and len(self._runs[-2].digests) <= 2 * len(self._runs[-1].digests):
            self._runs.append(_merged(self._runs.pop(), self._runs.pop()))
        return None


class KeyWatch:
    """Compares the keys of done shards on threads of its own, as long as the `with` block lasts."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._registry = KeyRegistry(out)
        self._adding = threading.Lock()
        self._stems: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._problem: Exception | None = None
        self._readers = [
            threading.Thread(target=self._compare, name="boomerang-keys", daemon=True) for _ in range(_READERS)
        ]

    def __enter__(self) -> KeyWatch:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()  # not waited for: a store that is away would keep a stopped run from its end
        for _ in self._readers:
            self._stems.put(None)

    def add(self, stem: str) -> None:
        """Have a committed shard compared. Raises what has been found so far: see `finish`."""
        self._stems.put(stem)
        self._complain()

    def finish(self, stop: threading.Event) -> None:
        """Wait until all is compared.

        Raises StoppedError where `stop` is set before that, RecipeError for a key that is in two shards, and
        StorageError or VerificationError for a provenance file that can't be read.
        """
        for _ in self._readers:
            self._stems.put(None)
        for reader in self._readers:
            while reader.is_alive():
                if stop.is_set():
                    raise StoppedError(
                        "stopped before the keys of all shards were compared; "
                        "run the same command to compare them"
                    )
                reader.join(_ASK_STOP_EVERY_S)
        self._complain()

    def _complain(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _compare(self) -> None:
        while (stem := self._stems.get()) is not None and not self._over.is_set():
            try:
                keys = read_keys(self._out, stem)
                with self._adding:
                    repeated = self._registry.add(stem, keys)
                if repeated:
                    raise RecipeError(repeated)  # which names what OUT names, and may be said anywhere
            except Exception as problem:
                self._problem = self._problem or problem
                self._over.set()


def read_keys(out: str, stem: str) -> list[str]:
    """A committed shard's keys, each once. Raises VerificationError when its provenance can't be read."""
    url = storage.join(out, stem + PROVENANCE_SUFFIX)
    try:
        with storage.open_read(url) as stream:
            keys = pq.read_table(stream, columns=["key"]).column("key").unique().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise VerificationError(f"{url} is not a provenance file: {error}") from error
    return [key for key in keys if key is not None]


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _merged(one: _Sorted, other: _Sorted) -> _Sorted:
    digests = np.concatenate([one.digests, other.digests])
    order = np.argsort(digests, kind="stable")
    return _Sorted(digests[order], np.concatenate([one.shards, other.shards])[order])
