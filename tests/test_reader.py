"""storage/reader.py: an object read in blocks is the object, whoever reads it and however."""

from __future__ import annotations

import io
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.storage.reader import BlockReader


class Served:
    """Fetches from bytes, and remembers what was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, end: int) -> bytes:
        self.asked.append((start, end))
        return self.data[start:end]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 40)),
        st.tuples(st.just("seek"), st.integers(0, 120)),
        st.tuples(st.just("back"), st.integers(0, 30)),
    ),
    max_size=12,
)


@given(data=st.binary(max_size=100), block=st.integers(1, 40), buffer=st.integers(1, 50), steps=STEPS)
def test_it_reads_as_a_file_does(data, block, buffer, steps):
    plain = io.BytesIO(data)
    raw = BlockReader(Served(data), len(data), block_bytes=block)
    with io.BufferedReader(raw, buffer) as reader:
        for verb, amount in steps:
            if verb == "read":
                assert reader.read(amount) == plain.read(amount)
            else:
                for one in (reader, plain):
                    one.seek(*((amount,) if verb == "seek" else (-min(amount, len(data)), io.SEEK_END)))
            assert reader.tell() == plain.tell()
        assert reader.read() == plain.read()


def test_every_block_is_fetched_once_and_the_next_one_meanwhile():
    data = bytes(range(100))
    second = threading.Event()

    class Watched(Served):
        def __call__(self, start, end):
            if start == 30:
                second.set()
            return super().__call__(start, end)

    served = Watched(data)
    with BlockReader(served, len(data), block_bytes=30) as reader:
        assert reader.read(10) == data[:10]
        assert second.wait(10)  # nobody has asked for it yet
        assert reader.read(20) + reader.readall() == data[10:]
    assert sorted(served.asked) == [(0, 30), (30, 60), (60, 90), (90, 100)]


def test_a_look_at_the_end_fetches_the_end_alone():
    served = Served(bytes(100))
    with BlockReader(served, 100, block_bytes=30) as reader:
        reader.seek(-5, io.SEEK_END)
        assert reader.read() == bytes(5)
    assert served.asked == [(90, 100)]


def test_what_fetching_raises_reaches_the_reader():
    def fetch(start, end):
        if start:
            raise OSError("gone")
        return bytes(end)

    with BlockReader(fetch, 30, block_bytes=10) as reader:
        assert reader.read(10) == bytes(10)
        with pytest.raises(OSError, match="gone"):
            reader.read(1)


def test_closing_leaves_no_thread():
    before = threading.active_count()
    for _ in range(5):
        with BlockReader(Served(bytes(100)), 100, block_bytes=10) as reader:
            reader.read(1)
    for thread in threading.enumerate():
        if thread.name.startswith("boomerang-fetch"):
            thread.join(10)
    assert threading.active_count() <= before
