"""Reading an object of a store as a stream: block by block, the next one fetched while this one is used.

Every block is a request of its own, so a connection that breaks costs a block and not the object, and memory
holds two blocks whatever the object's size.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

BLOCK_BYTES = 8 << 20


class BlockReader(io.RawIOBase):
    """An object of `size` bytes. One thread at a time.

    `fetch(start, end)` gives the bytes of a range, whole, or raises; it is called by a thread of the reader's.
    """

    def __init__(
        self, fetch: Callable[[int, int], bytes], size: int, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self._fetch = fetch
        self._size = size
        self._block_bytes = block_bytes
        self._position = 0
        self._held: tuple[int, bytes] = (-1, b"")
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="boomerang-fetch")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere; nothing is fetched before the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one block goes; 0 at the end."""
        if self._position >= self._size:
            return 0
        number, inside = divmod(self._position, self._block_bytes)
        view = memoryview(buffer).cast("B")
        piece = memoryview(self._block(number))[inside : inside + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Let the fetching thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        held, data = self._held
        if number == held:
            return data
        if self._ahead is not None and self._ahead[0] == number:
            data = self._ahead[1].result()
        else:
            data = self._get(number)
        self._ahead = None
        # Only who reads on is fetched for: a seek to a footer wants nothing behind it.
        if number in (0, held + 1) and (number + 1) * self._block_bytes < self._size:
            self._ahead = number + 1, self._thread.submit(self._get, number + 1)
        self._held = number, data
        return data

    def _get(self, number: int) -> bytes:
        start = number * self._block_bytes
        return self._fetch(start, min(start + self._block_bytes, self._size))
