"""A reverse proxy that breaks requests on purpose: by rule, by a seeded share, counted, changed while it runs.

A client takes the proxy for the store. It signs the proxy's address as the Host, and the store checks the
signature over the Host that it is sent; so a request goes on byte for byte, its Host too, and nothing is added.
The store's answer comes back the same way, unless a rule has other plans.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from types import TracebackType
from urllib.parse import urlsplit

from tests.lanes.faults import Answer, Cut, Delay, Fault, Hold, Rule, Seen, Shorten, Stall
from tests.lanes.wire import (
    BrokenMessageError,
    Head,
    final_head,
    first,
    pass_on,
    read_head,
    request_body,
    response_body,
    send,
    with_length,
)

_CONNECT_TIMEOUT_S = 10.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class FaultProxy:
    """Between a client, which is given `url`, and the server at `upstream`, a URL. Use as a context manager.

    `rules` may be replaced at any moment; the first that fits and hits decides. Whether a rule with a share
    hits depends on the seed, the request's line and how often that line has come, and so on no thread's luck.
    """

    def __init__(self, upstream: str, rules: Iterable[Rule] = (), *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._seed = seed
        self._lock = threading.Lock()
        self._rules = tuple(rules)
        self._used: Counter[int] = Counter()
        self._came: Counter[tuple[str, str]] = Counter()
        self._seen: list[Seen] = []
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultProxy:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        with self._lock:
            for each in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join()
        self._listener.close()

    @property
    def rules(self) -> Sequence[Rule]:
        """What happens to requests from now on. Setting it makes used-up rules new."""
        return self._rules

    @rules.setter
    def rules(self, rules: Iterable[Rule]) -> None:
        with self._lock:
            self._rules = tuple(rules)
            self._used.clear()

    def seen(self, *, method: str | None = None, path: str = "", faults: bool = False) -> list[Seen]:
        """Requests so far: of one method, of targets in which the expression `path` is found, broken ones."""
        with self._lock:
            requests = list(self._seen)
        wanted = Rule(fault=Delay(seconds=0), method=method, path=path)
        return [
            each
            for each in requests
            if wanted.fits(each.method, each.target) and (each.fault is not None or not faults)
        ]

    def forget(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._seen.clear()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """All requests of one connection."""
        broken = contextlib.suppress(OSError, BrokenMessageError)
        with self._watched(client), client.makefile("rb") as stream, broken:
            while not self._closing.is_set() and (request := read_head(stream)) is not None:
                if not self._exchange(client, stream, request):
                    return

    def _exchange(self, client: socket.socket, stream: BufferedReader, request: Head) -> bool:
        """One request and its answer; whether the connection can serve another."""
        method, target = request.first.split()[:2]
        fault = self._decide(method, target)
        if isinstance(fault, Answer):
            return _answer(client, stream, request, fault)
        if isinstance(fault, Delay):
            self._closing.wait(fault.seconds)
        if isinstance(fault, Stall) and fault.of == "request":
            self._closing.wait(fault.seconds)
            return False
        if isinstance(fault, Hold):
            return self._hold(client, stream, request, fault)
        with self._store() as (upstream, answers):
            if isinstance(fault, Cut) and fault.of == "request":
                if request.waits_for_leave:
                    client.sendall(_CONTINUE)
                upstream.sendall(request.raw)
                send(upstream, first(request_body(stream, request), fault.after_bytes or 0))
                return _end(client, reset=fault.reset)
            whole, response = pass_on(client, stream, request, upstream, answers)
            if response is None:
                return False
            body = response_body(answers, response, method=method)
            kept = self._return(client, response, body, fault)
            ends = "close" in (response.field("Connection") or request.field("Connection") or "").lower()
            framed = (
                response.chunked
                or response.length is not None
                or method == "HEAD"
                or response.status in (204, 304)
            )
            return whole and kept and framed and not ends

    def _return(
        self, client: socket.socket, response: Head, body: Iterator[bytes], fault: Fault | None
    ) -> bool:
        """The store's answer, or what the fault leaves of it; whether the connection can go on."""
        if isinstance(fault, Cut | Stall):
            if fault.after_bytes is not None:
                client.sendall(response.raw)
                send(client, first(body, fault.after_bytes))
            if isinstance(fault, Stall):
                self._closing.wait(fault.seconds)
                return False
            return _end(client, reset=fault.reset)
        if isinstance(fault, Shorten) and response.length:
            length = max(0, response.length - fault.missing_bytes)
            client.sendall(with_length(response, length))
            send(client, first(body, length))
            return False
        client.sendall(response.raw)
        send(client, body)
        return True

    def _hold(self, client: socket.socket, stream: BufferedReader, request: Head, fault: Hold) -> bool:
        """Take the request now and send it on later; the connection ends with it."""
        if request.waits_for_leave:
            client.sendall(_CONTINUE)
        body = list(request_body(stream, request))
        fault.taken.set()
        while not fault.release.wait(0.05):
            if self._closing.is_set():
                return False
        with self._store() as (upstream, answers):
            upstream.sendall(request.raw)
            send(upstream, body)
            response = final_head(answers)
            if response is not None:
                fault.status.put(response.status)
                client.sendall(response.raw)
                send(client, response_body(answers, response, method=request.first.split()[0]))
        return False

    def _decide(self, method: str, target: str) -> Fault | None:
        """Note the request, and say what is to happen to it."""
        with self._lock:
            self._came[method, target] += 1
            draw = random.Random(f"{self._seed} {method} {target} {self._came[method, target]}").random()
            fault = None
            for number, rule in enumerate(self._rules):
                left = rule.times is None or self._used[number] < rule.times
                if left and rule.fits(method, target) and draw < rule.share:
                    self._used[number] += 1
                    fault = rule.fault
                    break
            self._seen.append(Seen(method=method, target=target, fault=fault))
            return fault

    @contextlib.contextmanager
    def _store(self) -> Iterator[tuple[socket.socket, BufferedReader]]:
        """A connection to the server, and the stream of its answers."""
        upstream = socket.create_connection(self._upstream, timeout=_CONNECT_TIMEOUT_S)
        upstream.settimeout(None)
        with self._watched(upstream), upstream.makefile("rb") as answers:
            yield upstream, answers

    @contextlib.contextmanager
    def _watched(self, connection: socket.socket) -> Iterator[None]:
        """`connection` closed in the end, and shut down from outside when the proxy closes."""
        with connection:
            with self._lock:
                self._open.add(connection)
                late = self._closing.is_set()
            if late:
                connection.shutdown(socket.SHUT_RDWR)
            try:
                yield
            finally:
                with self._lock:
                    self._open.discard(connection)


def _answer(client: socket.socket, stream: BufferedReader, request: Head, fault: Answer) -> bool:
    """An error document in the form of S3, after the request was read, so that its sender gets to see it."""
    offered = request.waits_for_leave
    if not offered:
        for _ in request_body(stream, request):
            pass
    text = f"<Error><Code>{fault.code}</Code><Message>by rule</Message></Error>"
    head = f"HTTP/1.1 {fault.status} {fault.code}\r\nContent-Type: application/xml\r\n"
    head += f"Content-Length: {len(text)}\r\n" + ("Connection: close\r\n" if offered else "")
    body = "" if request.first.startswith("HEAD ") else text
    client.sendall(f"{head}\r\n{body}".encode())
    return not offered


def _end(client: socket.socket, *, reset: bool) -> bool:
    """Have the connection end on closing, with a reset where asked for."""
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
