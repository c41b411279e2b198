"""Shards from plain web servers, read-only: with ranges and without, open and behind a query, and broken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from boomerang_batch import storage
from boomerang_batch.errors import StorageError
from tests import worlds
from tests.lanes.commands import Place, run_words
from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import INTERNAL_ERROR, Cut, Rule, Shorten
from tests.lanes.file_server import FileServer

pytestmark = [pytest.mark.lane, pytest.mark.timeout(300)]

CONTENT = hashlib.shake_256(b"http").digest(50_000_000)
QUERY = "X-Amz-Signature=Zqcanarysignature0123456789abcdefKx"


@pytest.fixture
def folder(tmp_path: Path, reach: Callable[[Mapping[str, str]], None]) -> Path:
    """A folder to serve, with one large file in it."""
    reach({})
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    return folder


def read(url: str) -> bytes:
    with storage.open_read(url) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


@pytest.mark.parametrize("query", ["", QUERY])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_is_read_to_its_end(folder: Path, ranges: bool, query: str):
    with FileServer(folder, ranges=ranges, query=query) as server:
        url = f"{server.url}/a.tar{'?' + query if query else ''}"
        assert read(url) == CONTENT
        assert storage.size(url) == len(CONTENT)
        assert storage.exists(url)
        assert not storage.exists(url.replace("a.tar", "b.tar"))
        # Without ranges every request brings everything: one or two are right, one for each block is not.
        assert ranges or server.asked.count("GET /a.tar") <= 3


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "fault",
    [Cut(after_bytes=700_000, reset=True), Cut(after_bytes=700_000), Shorten(missing_bytes=99), INTERNAL_ERROR],
    ids=["reset", "ended", "shortened", "internal error"],
)
def test_a_broken_request_costs_no_byte(folder: Path, fault: object, ranges: bool):
    with FileServer(folder, ranges=ranges) as server, FaultProxy(server.url) as proxy:
        assert storage.size(f"{proxy.url}/a.tar") == len(CONTENT)
        proxy.rules = [Rule(fault=fault, method="GET", times=2)]
        assert read(f"{proxy.url}/a.tar") == CONTENT
        assert len(proxy.seen(faults=True)) == 2


def test_nothing_is_written_over_http(folder: Path):
    with FileServer(folder) as server:
        url = f"{server.url}/new.tar"
        for call in (
            lambda: storage.publish_bytes(b"x", url),
            lambda: storage.create_only(url, b"x"),
            lambda: storage.publish(folder / "a.tar", url),
        ):
            with pytest.raises(StorageError, match=rf"can't write {url}: .*for reading only"):
                call()
        assert not [line for line in server.asked if not line.startswith(("GET", "HEAD"))]


@pytest.mark.parametrize("call", [read, storage.read_bytes, storage.size])
def test_a_refused_query_is_not_repeated(folder: Path, call: Callable[[str], object]):
    with FileServer(folder, query="another") as server, pytest.raises(StorageError) as caught:
        call(f"{server.url}/a.tar?{QUERY}")
    assert "/a.tar" in str(caught.value)
    assert "Zqcanary" not in str(caught.value)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_run_over_http_gives_the_same_bytes(
    tiny_inputs: Path, tiny_here: Mapping[str, bytes], tmp_path: Path, ranges: bool
):
    """Manifest, recipe and shards from the web, OUT on local disk."""
    place = Place(work=tmp_path / "work", environment={})
    with FileServer(tiny_inputs, ranges=ranges) as server:
        words = run_words(
            f"{server.url}/recipe.yaml", f"{server.url}/manifest.yaml", str(tmp_path / "out"), place
        )
        place.call(*words).expect(0)
    assert worlds.tree(tmp_path / "out") == tiny_here
