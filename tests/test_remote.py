"""storage/remote.py over real HTTP: ranges or none, servers that stumble, and nothing shown that is secret."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from boomerang_batch import storage
from boomerang_batch.errors import ObjectMissingError, StorageError
from boomerang_batch.storage import remote, retries
from boomerang_batch.storage.reader import BLOCK_BYTES

CONTENT = bytes(range(256)) * (BLOCK_BYTES // 100)
"""Two whole blocks and a bit."""


@dataclass
class Web:
    """A server of one file, and how it behaves."""

    content: bytes = CONTENT
    ranges: bool = True
    says_so: bool = True
    """Whether it tells that it knows no ranges."""
    says_size: bool = True
    tag: str = '"1"'
    refuse: Callable[[str, int], int | None] = lambda method, number: None
    """Status to answer the n-th request of a method with, or None to answer it properly."""
    cut: Callable[[int], int | None] = lambda number: None
    """After how many bytes of the n-th GET's body to hang up."""
    lacks: Callable[[int], int] = lambda number: 0
    """How many bytes the n-th GET's answer lacks in the end, which claims to be whole."""
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method):
        web = self.web
        web.requests[method] += 1
        status = web.refuse(method, web.requests[method])
        body = b"" if status else web.content
        if not status and not self.path.startswith("/a.tar"):
            status, body = 404, b""
        wanted = self.headers.get("Range")
        status = status or 200
        if status == 200 and wanted and web.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1], 206
        if method == "GET":
            body = body[: len(body) - web.lacks(web.requests["GET"])]
        self.send_response(status)
        self.send_header("ETag", web.tag)
        if not web.ranges and web.says_so:
            self.send_header("Accept-Ranges", "none")
        if web.says_size:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if method == "GET":
            stop = web.cut(web.requests["GET"])
            self.wfile.write(body if stop is None else body[:stop])
            if stop is not None:
                self.close_connection = True


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}/a.tar"
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.001)
    yield web
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("says_size", [True, False])
def test_a_file_is_streamed_whole(web, ranges, says_size):
    web.ranges, web.says_size = ranges, says_size
    with storage.open_read(web.url) as stream:
        assert stream.read(10) == CONTENT[:10]
        assert stream.read() == CONTENT[10:]


def test_a_file_is_fetched_block_by_block_each_once(web):
    with storage.open_read(web.url) as stream:
        while stream.read(1 << 20):
            pass
    assert web.requests["GET"] == 4  # and a byte to see whether it knows ranges


def test_a_server_that_ignores_ranges_without_a_word_costs_no_byte_and_one_request_more(web):
    web.ranges, web.says_so = False, False
    with storage.open_read(web.url) as stream:
        assert stream.read() == CONTENT
    assert web.requests["GET"] == 2


def test_bodies_cut_short_and_busy_servers_cost_no_byte(web):
    web.cut = lambda number: 1000 if number in (2, 4) else None
    web.refuse = lambda method, number: 503 if (method, number) == ("GET", 6) else None
    with storage.open_read(web.url) as stream:
        assert stream.read() == CONTENT
    assert web.requests["GET"] == 7


@pytest.mark.parametrize("says_so", [True, False])
def test_a_download_that_claims_to_be_whole_and_is_not_costs_no_byte(web, says_so):
    web.ranges, web.says_so = False, says_so
    web.lacks = lambda number: 99 if number <= 2 else 0
    with storage.open_read(web.url) as stream:
        assert stream.read() == CONTENT


def test_a_file_that_is_replaced_meanwhile_is_noticed(web):
    with storage.open_read(web.url) as stream:
        stream.read(10)
        web.tag = '"2"'
        with pytest.raises(StorageError, match=r"a\.tar: it was replaced while it was read"):
            stream.read()


@pytest.mark.parametrize(
    ("status", "words"), [(403, "permission denied"), (404, "there is nothing at that path")]
)
def test_a_refusal_ends_it_at_once(web, status, words):
    web.refuse = lambda method, number: status
    with pytest.raises(StorageError, match=words) as caught:
        storage.read_bytes(web.url)
    assert isinstance(caught.value, ObjectMissingError) is (status == 404)
    assert web.requests.total() == 1
    with pytest.raises(StorageError, match=words):
        storage.open_read(web.url)
    assert web.requests.total() <= 4  # fsspec asks with HEAD, then with GET


def test_a_server_that_stays_away_ends_it_after_a_while(web, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    monkeypatch.setattr(remote, "FIRST_PATIENCE_S", 0.1)
    web.refuse = lambda method, number: 503
    with pytest.raises(StorageError, match="503"):
        storage.read_bytes(web.url)
    assert web.requests["GET"] > 2


def test_an_address_never_reached_is_given_up_sooner_than_one_that_was(web, monkeypatch):
    given: list[float] = []

    def note(call, *, patience_s, doing):
        given.append(patience_s)
        return call()

    monkeypatch.setattr(remote, "patiently", note)
    monkeypatch.setattr(remote, "_reached", set())
    for _ in range(2):
        storage.read_bytes(web.url)
    assert given == [retries.FIRST_PATIENCE_S, retries.PATIENCE_S]


def test_a_process_is_told_what_another_of_its_run_has_reached(web, monkeypatch):
    """A worker that is hired while a store is away must not take it for one with a wrong address."""
    monkeypatch.setattr(remote, "_reached", set())
    assert storage.read_bytes(web.url) == CONTENT
    told = pickle.loads(pickle.dumps(storage.reached()))
    assert told == {web.url.removesuffix("/a.tar")}
    monkeypatch.setattr(remote, "_reached", set())
    monkeypatch.setattr(remote, "FIRST_PATIENCE_S", 0.0)
    web.refuse = lambda method, number: 503 if number <= 3 else None
    with pytest.raises(StorageError, match="503"):
        storage.read_bytes(web.url)
    storage.count_on(told)
    assert storage.read_bytes(web.url) == CONTENT


@pytest.mark.parametrize(
    "write",
    [
        lambda url: storage.publish_bytes(b"x", url),
        lambda url: storage.create_only(url, b"x"),
        storage.delete,
    ],
)
def test_the_web_is_for_reading_only(web, write):
    with pytest.raises(StorageError, match="http is for reading only"):
        write(web.url)
    assert web.requests.total() == 0


def test_a_signed_urls_query_is_never_shown(web, caplog, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.05)
    monkeypatch.setattr(remote, "FIRST_PATIENCE_S", 0.05)
    url = f"{web.url}?X-Amz-Signature=canary"
    assert storage.read_bytes(url) == CONTENT
    for status in (403, 404, 503):
        web.refuse = lambda method, number, status=status: status
        for call in (storage.read_bytes, storage.open_read, storage.size, storage.delete):
            with pytest.raises(StorageError) as caught:
                call(url)
            assert "canary" not in str(caught.value)
            assert f"{web.url}?..." in str(caught.value)
    assert "canary" not in caplog.text


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(StorageError, match="put them into the environment") as caught:
        storage.read_bytes("s3://key:canary@bucket/a.tar")
    assert "canary" not in str(caught.value)


def test_a_store_that_took_a_create_whose_answer_was_lost(monkeypatch):
    """The same bytes count as ours; other bytes do not."""
    storage.create_only("memory://bucket/lost.json", b"mine")
    storage.create_only("memory://bucket/lost.json", b"mine")
    with pytest.raises(StorageError, match="exists already"):
        storage.create_only("memory://bucket/lost.json", b"other")
    storage.delete("memory://bucket/lost.json")


def test_a_tree_and_its_files(tmp_path):
    for name in ("a.json", "below/b.bin"):
        storage.publish_bytes(name.encode(), f"memory://bucket/model/{name}")
    tree = storage.list_tree("memory://bucket/model")
    assert sorted(tree) == ["a.json", "below/b.bin"]
    storage.download("memory://bucket/model/below/b.bin", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"below/b.bin"
    storage.publish_bytes(b"longer than before", "memory://bucket/model/a.json")
    assert storage.list_tree("memory://bucket/model")["a.json"] != tree["a.json"]
    for name in tree:
        storage.delete(f"memory://bucket/model/{name}")
