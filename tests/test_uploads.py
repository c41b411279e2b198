"""storage/uploads.py: what gets nowhere is given up in time, what goes on slowly is not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem

from boomerang_batch.storage import uploads


class Store(AsyncFileSystem):
    """A client that takes `parts` parts, each after so many seconds; it tells of each one."""

    cachable = False
    protocol = "store"

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.taken = 0

    async def _put_file(self, lpath: str, rpath: str, *, callback: Any = None, **options: Any) -> None:
        for each in self.seconds:
            await asyncio.sleep(each)
            self.taken += 1
            if callback is not None:
                callback.relative_update(uploads.PART_BYTES)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part may take 0.4 s, five of them 1.2 s together."""
    monkeypatch.setattr(uploads, "ANSWER_S", 0.2)
    monkeypatch.setattr(uploads, "SLOWEST_BYTES_PER_S", 5 * uploads.PART_BYTES)


def upload(store: Store, protocol: str, *, size: int = 5 * uploads.PART_BYTES) -> float:
    begun = time.monotonic()
    try:
        uploads.upload_file(store, protocol, "here", "there", size=size)
    finally:
        took_s = time.monotonic() - begun
    return took_s


@pytest.mark.slow
def test_an_upload_whose_parts_are_slow_but_come_is_waited_for():
    store = Store([0.2] * 4)
    assert upload(store, "s3") >= 0.8
    assert store.taken == 4


@pytest.mark.slow
@pytest.mark.parametrize("stuck_at", [0, 2])
def test_one_that_is_stuck_is_given_up_after_the_time_of_a_part(stuck_at):
    store = Store([0.01] * stuck_at + [60])
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        upload(store, "gs", size=10_000 * uploads.PART_BYTES)
    assert time.monotonic() - begun < 5
    assert store.taken == stuck_at


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["s3", "az"])
def test_all_of_it_is_bounded_too(protocol):
    """The lease counts on that; and of Azure's uploads nothing is told on the way."""
    store = Store([0.3] * 100)
    with pytest.raises(TimeoutError):
        upload(store, protocol)
    assert 2 <= store.taken <= 5
    taken = store.taken
    time.sleep(0.5)
    assert store.taken == taken  # it does not go on where nobody waits
