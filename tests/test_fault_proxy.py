"""lanes/fault_proxy.py: what it passes on is untouched, what it breaks is broken by rule, and counted."""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import FORBIDDEN, SLOW_DOWN, Cut, Delay, Hold, Rule, Shorten, Stall

BODY = bytes(range(256)) * 800


class Store(ThreadingHTTPServer):
    """A server that answers every GET with BODY and keeps what is PUT, as far as it came."""

    daemon_threads = False  # so that server_close waits for them

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Keeper)
        self.put: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what these tests make."""


class Keeper(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        self.answer(BODY)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_PUT(self) -> None:
        self.server.put[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"kept")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def store() -> Iterator[Store]:
    server = Store()
    with served(server):
        yield server


@pytest.fixture
def proxy(store: Store) -> Iterator[FaultProxy]:
    with FaultProxy(store.url) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: FaultProxy, *, timeout: float = 30) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout)
    try:
        yield connection
    finally:
        connection.close()


def ask(
    proxy: FaultProxy,
    method: str = "GET",
    target: str = "/b/key",
    body: bytes | None = None,
    *,
    timeout: float = 30,
) -> tuple[int, bytes]:
    with connected(proxy, timeout=timeout) as connection:
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, response.read()


# --- what is passed on ---


REQUESTS = {
    "get": b"GET /b/a%20key?x-id=GetObject&versionId= HTTP/1.1\r\nhOST: the.name:signed\r\nX: 1\r\nX: 2\r\n"
    b"X-Amz-Date:  20260101T000000Z \r\nAuthorization: AWS4-HMAC-SHA256 Signature=00ff\r\n\r\n",
    "put": b"PUT /b/key HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\n\x00\xff\r\n\r\n0\r\n\r\n",
    "put of nothing": b"PUT /b/key HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
    "put in chunks": b"PUT /b/key HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTE: aws-chunked\r\n\r\n"
    b"5;chunk-signature=ab\r\nhel\r\n\r\nA\r\n0123456789\r\n0\r\nx-amz-checksum-crc32:AAAA\r\nother: x\r\n\r\n",
    "head": b"HEAD /b/key HTTP/1.1\r\nHost: h\r\n\r\n",
}
ANSWERS = {
    "sized": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: \"x\"\r\nx-odd:  y \r\n\r\n\r\n\r\n",
    "in chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\nEnd: 1\r\n\r\n",
    "to the end": b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nup to the end",
    "empty": b"HTTP/1.1 204 No Content\r\n\r\n",
    "refused": b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 2\r\n\r\nno",
}  # fmt: skip


class Scripted(socketserver.ThreadingTCPServer):
    """Reads so many bytes of each connection, keeps them, and answers what it was told to."""

    daemon_threads = False

    def __init__(self, size: int, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Reciting)
        self.size, self.answer, self.came = size, answer, b""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Reciting(socketserver.StreamRequestHandler):
    server: Scripted

    def handle(self) -> None:
        self.server.came = self.rfile.read(self.server.size)
        self.wfile.write(self.server.answer)


def dialled(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port), timeout=10)


def answer_bytes(proxy: FaultProxy, request: bytes, size: int) -> bytes:
    """What comes back for raw bytes, `size` of it."""
    with dialled(proxy) as client:
        client.sendall(request)
        with client.makefile("rb") as stream:
            return stream.read(size)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("answer_name", ANSWERS)
def test_a_request_and_its_answer_pass_byte_for_byte(request_name: str, answer_name: str):
    request, answer = REQUESTS[request_name], ANSWERS[answer_name]
    if request_name == "head":
        answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    server = Scripted(len(request), answer)
    with served(server), FaultProxy(server.url) as proxy:
        assert answer_bytes(proxy, request, len(answer)) == answer
    assert server.came == request


def test_a_body_that_waits_for_leave_gets_it_from_the_store():
    head = b"PUT /b/key HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    leave, answer = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    class Polite(Reciting):
        def handle(self) -> None:
            self.server.came = self.rfile.read(len(head))
            self.wfile.write(leave)
            self.server.came += self.rfile.read(3)
            self.wfile.write(answer)

    server = Scripted(0, b"")
    server.RequestHandlerClass = Polite
    with served(server), FaultProxy(server.url) as proxy, dialled(proxy) as client:
        client.sendall(head)
        with client.makefile("rb") as stream:
            assert stream.read(len(leave)) == leave
            client.sendall(b"abc")
            assert stream.read(len(answer)) == answer
    assert server.came == head + b"abc"


def test_one_connection_serves_many_requests(proxy: FaultProxy, store: Store):
    with connected(proxy) as connection:
        connection.connect()
        port = connection.sock.getsockname()[1]
        for number in range(3):
            connection.request("PUT", f"/b/{number}", b"x" * number)
            assert connection.getresponse().read() == b"kept"
            connection.request("HEAD", "/b/0")
            assert connection.getresponse().read() == b""
            connection.request("GET", "/b/0")
            assert connection.getresponse().read() == BODY
            assert connection.sock.getsockname()[1] == port
    assert store.put == {"/b/0": b"", "/b/1": b"x", "/b/2": b"xx"}


def test_a_store_that_is_gone_ends_the_connection_and_one_that_is_back_answers():
    first = Store()
    with FaultProxy(first.url) as proxy:
        with served(first):
            assert ask(proxy) == (200, BODY)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(proxy)
        with served(Store(first.server_address)):
            assert ask(proxy) == (200, BODY)


# --- what is broken ---


def test_an_error_comes_without_the_store_being_asked(proxy: FaultProxy, store: Store):
    proxy.rules = [Rule(fault=SLOW_DOWN, method="PUT")]
    with connected(proxy) as connection:
        connection.request("PUT", "/b/key", b"x" * 1_000_000)
        response = connection.getresponse()
        assert response.status == 503
        assert b"<Code>SlowDown</Code>" in response.read()
        connection.request("GET", "/b/key")  # the connection still serves
        assert connection.getresponse().read() == BODY
    assert store.put == {}


def test_a_head_request_is_refused_without_a_body(proxy: FaultProxy):
    proxy.rules = [Rule(fault=FORBIDDEN)]
    assert ask(proxy, "HEAD") == (403, b"")


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_is_cut_within_its_body(proxy: FaultProxy, reset: bool):
    proxy.rules = [Rule(fault=Cut(after_bytes=100_000, reset=reset))]
    with pytest.raises(ConnectionResetError if reset else http.client.IncompleteRead) as caught:
        ask(proxy)
    if not reset:
        assert caught.value.partial == BODY[:100_000]


def test_an_answer_that_never_comes_was_given_all_the_same(proxy: FaultProxy, store: Store):
    proxy.rules = [Rule(fault=Cut())]
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "PUT", body=b"marker")
    assert store.put == {"/b/key": b"marker"}


def test_a_request_is_cut_within_its_body(proxy: FaultProxy, store: Store):
    proxy.rules = [Rule(fault=Cut(after_bytes=1000, of="request", reset=True))]
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", body=b"x" * 10_000_000)
    deadline = time.monotonic() + 10
    while not store.put and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.put == {"/b/key": b"x" * 1000}


def test_a_stalled_request_never_reaches_the_store(store: Store):
    rule = Rule(fault=Stall(seconds=60, of="request"))
    with FaultProxy(store.url, [rule]) as proxy, pytest.raises(TimeoutError):
        ask(proxy, "PUT", body=b"x", timeout=0.2)
    assert store.put == {}


def test_a_request_that_waits_for_leave_is_cut_within_its_body_too(proxy: FaultProxy):
    proxy.rules = [Rule(fault=Cut(after_bytes=1000, of="request"))]
    with dialled(proxy) as client:
        client.sendall(
            b"PUT /b/key HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 9999\r\n\r\n"
        )
        leave = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert client.recv(len(leave), socket.MSG_WAITALL) == leave
        client.sendall(b"x" * 1000)
        assert client.recv(1) == b""


def test_a_shortened_answer_looks_whole(proxy: FaultProxy):
    proxy.rules = [Rule(fault=Shorten(missing_bytes=7))]
    assert ask(proxy) == (200, BODY[:-7])


@pytest.mark.parametrize("after_bytes", [None, 0, 1000])
def test_a_stall_outlasts_its_client_and_not_the_proxy(store: Store, after_bytes: int | None):
    rule = Rule(fault=Stall(seconds=60, after_bytes=after_bytes))
    with FaultProxy(store.url, [rule]) as proxy:
        with pytest.raises(TimeoutError):
            ask(proxy, timeout=0.2)
        closing = time.monotonic()
    assert time.monotonic() - closing < 5


def test_a_delayed_answer_is_the_right_one(proxy: FaultProxy):
    proxy.rules = [Rule(fault=Delay(seconds=0.3))]
    begun = time.monotonic()
    assert ask(proxy) == (200, BODY)
    assert time.monotonic() - begun >= 0.3


# --- which, and how many ---


def refused(proxy: FaultProxy, targets: list[str]) -> set[str]:
    with connected(proxy) as connection:
        found = set()
        for target in targets:
            connection.request("HEAD", target)
            response = connection.getresponse()
            response.read()
            found |= {target} if response.status == 503 else set()
        return found


@pytest.mark.slow
def test_a_share_is_drawn_by_the_seed_and_not_by_who_comes_first(store: Store):
    targets = [f"/b/{number}" for number in range(200)]
    rules = [Rule(fault=SLOW_DOWN, share=0.3)]

    def storm(seed: int, lanes: int) -> set[str]:
        with FaultProxy(store.url, rules, seed=seed) as proxy, ThreadPoolExecutor(lanes) as threads:
            parts = threads.map(lambda lane: refused(proxy, targets[lane::lanes]), range(lanes))
            return set().union(*parts)

    alone = storm(1, 1)
    assert 35 <= len(alone) <= 85
    assert storm(1, 4) == alone
    assert storm(2, 1) != alone


def test_a_request_that_comes_again_is_drawn_again(proxy: FaultProxy):
    proxy.rules = [Rule(fault=SLOW_DOWN, share=0.5)]
    fates = {ask(proxy, "HEAD")[0] for _ in range(20)}
    assert fates == {200, 503}


def test_rules_are_about_methods_and_paths_and_the_first_decides(proxy: FaultProxy):
    proxy.rules = [
        Rule(fault=FORBIDDEN, method="GET", path=r"\.tar$"),
        Rule(fault=SLOW_DOWN, path=r"^/b/"),
    ]
    assert ask(proxy, target="/b/x.tar")[0] == 403
    assert ask(proxy, "HEAD", target="/b/x.tar")[0] == 503
    assert ask(proxy, target="/c/x.json") == (200, BODY)


def test_a_rule_is_used_up_and_replaced_while_requests_come(proxy: FaultProxy):
    proxy.rules = [Rule(fault=SLOW_DOWN, times=2)]
    assert [ask(proxy, "HEAD")[0] for _ in range(4)] == [503, 503, 200, 200]
    proxy.rules = [Rule(fault=FORBIDDEN, times=1)]
    assert [ask(proxy, "HEAD")[0] for _ in range(2)] == [403, 200]
    proxy.rules = []
    assert ask(proxy)[0] == 200


@pytest.mark.parametrize("expect", [{}, {"Expect": "100-continue"}])
def test_a_request_that_is_held_reaches_the_store_late_though_its_sender_has_gone(
    store: Store, proxy: FaultProxy, expect: dict[str, str]
):
    hold = Hold()
    proxy.rules = [Rule(fault=hold, method="PUT", times=1)]
    parts = urlsplit(proxy.url)
    with socket.create_connection((parts.hostname, parts.port)) as sender:
        fields = {"Host": parts.netloc, "Content-Length": str(len(BODY))} | expect
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        sender.sendall(f"PUT /b/late HTTP/1.1\r\n{head}\r\n".encode() + BODY)
        assert hold.taken.wait(10)
    assert ask(proxy, "PUT", target="/b/late", body=b"in the meantime")[0] == 200
    assert store.put["/b/late"] == b"in the meantime"
    hold.release.set()
    assert hold.status.get(timeout=10) == 200
    assert store.put["/b/late"] == BODY


def test_a_request_that_is_held_is_answered_when_it_is_released(store: Store, proxy: FaultProxy):
    hold = Hold()
    proxy.rules = [Rule(fault=hold, times=1)]
    threading.Timer(0.3, hold.release.set).start()
    begun = time.monotonic()
    assert ask(proxy) == (200, BODY)
    assert time.monotonic() - begun >= 0.3


def test_requests_are_counted(proxy: FaultProxy):
    proxy.rules = [Rule(fault=SLOW_DOWN, method="PUT")]
    ask(proxy, "PUT", target="/b/x.tar?partNumber=1", body=b"x")
    ask(proxy, "GET", target="/b/x.tar")
    ask(proxy, "GET", target="/b/y.json")
    assert len(proxy.seen()) == 3
    assert [each.target for each in proxy.seen(method="GET", path=r"\.tar$")] == ["/b/x.tar"]
    assert [(each.method, each.fault) for each in proxy.seen(faults=True)] == [("PUT", SLOW_DOWN)]
    proxy.forget()
    assert proxy.seen() == []


def test_a_closed_proxy_leaves_no_thread_and_no_port(store: Store):
    def own() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.endswith(("(_accept)", "(_serve)"))]

    proxy = FaultProxy(store.url)
    with connected(proxy) as idle:
        with proxy:
            idle.request("HEAD", "/")
            idle.getresponse().read()
            assert len(own()) == 2
        assert own() == []
        with pytest.raises(ConnectionRefusedError):
            ask(proxy)
