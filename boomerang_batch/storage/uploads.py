"""Uploads that end: sent, or given up when nothing of them gets anywhere.

The clients bound how long an answer may take, but not the sending before it, and S3's waits for leave to send.
So an upload is bounded from here in two ways: by how long all of it may take, which the lease relies on, and by
how long one part of it may, lest a large file that is stuck is waited for as long as a large file may take.
"""

from __future__ import annotations

import asyncio
from typing import Any

import fsspec.asyn
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

ANSWER_S = 60.0
"""How long a store may take to answer."""
SLOWEST_BYTES_PER_S = 512 << 10
PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 2


def upload_file(filesystem: Any, protocol: str, source: str, path: str, *, size: int) -> None:
    """Put a local file of `size` bytes under `path`, in parts. Raises TimeoutError when it takes too long."""
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a", "az", "abfs", "abfss"):
        options["max_concurrency"] = _PARTS_AT_ONCE
    if protocol in ("s3", "s3a", "gs", "gcs"):
        options["chunksize"] = PART_BYTES
        options["callback"] = _Parts()  # Azure's client sends up to 64 MiB in one piece
    upload(filesystem, "put_file", source, path, size=size, **options)


def upload(filesystem: Any, method: str, *words: Any, size: int, **options: Any) -> None:
    """Call a method of the client that sends `size` bytes. Raises TimeoutError when it takes too long."""
    if not isinstance(filesystem, AsyncFileSystem):
        getattr(filesystem, method)(*words, **options)
        return
    parts = options.get("callback")

    async def bounded() -> None:
        # Cancelled in time: a call that was only waited for no longer would go on sending.
        async with asyncio.timeout(_longest_s(size)) as clock:
            if isinstance(parts, _Parts):
                parts.watch(clock)
            await getattr(filesystem, f"_{method}")(*words, **options)

    fsspec.asyn.sync(filesystem.loop, bounded)


class _Parts(Callback):
    """Hears of each part that was taken, and gives the next one its time."""

    def __init__(self) -> None:
        super().__init__()
        self._clock: asyncio.Timeout | None = None
        self._end = 0.0

    def watch(self, clock: asyncio.Timeout) -> None:
        """Bound each part from now on, and all of them by what `clock` says now."""
        self._clock, self._end = clock, clock.when() or 0.0
        self.relative_update()

    def relative_update(self, inc: int = 1) -> None:
        """A part was taken, or the first one begins."""
        if self._clock is not None:
            part_end = asyncio.get_running_loop().time() + _longest_s(PART_BYTES)
            self._clock.reschedule(min(part_end, self._end))

    def absolute_update(self, value: int) -> None:
        """The same, of a client that counts otherwise."""
        self.relative_update()


def _longest_s(size: int) -> float:
    return ANSWER_S + size / SLOWEST_BYTES_PER_S
