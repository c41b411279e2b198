"""HTTP/1.1 messages as the bytes they are on a socket: heads and bodies, passed on without changing any."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader

_PIECE_BYTES = 1 << 16
_LINE_BYTES = 1 << 16


class BrokenMessageError(Exception):
    """The other side ended within a message, or sent what is none."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Everything before a body. `raw` is what came, to the last byte; `first` its first line."""

    raw: bytes
    first: str
    fields: tuple[tuple[str, str], ...]

    def field(self, name: str) -> str | None:
        """The first field of this name, whatever its case."""
        return next((value for known, value in self.fields if known.lower() == name.lower()), None)

    @property
    def status(self) -> int:
        """Of a response: its status."""
        return int(self.first.split()[1])

    @property
    def length(self) -> int | None:
        """The length of the body where the head tells it, in bytes."""
        length = self.field("Content-Length")
        return None if length is None or self.chunked else int(length)

    @property
    def chunked(self) -> bool:
        """Whether the body tells its own length, chunk by chunk."""
        return "chunked" in (self.field("Transfer-Encoding") or "").lower()

    @property
    def waits_for_leave(self) -> bool:
        """Whether the body comes only once the other side has said to go on."""
        return "100-continue" in (self.field("Expect") or "").lower()


def read_head(stream: BufferedReader) -> Head | None:
    """The next head, or None when the other side has ended instead."""
    first = stream.readline(_LINE_BYTES)
    if not first:
        return None
    lines = [first]
    while lines[-1] not in (b"\r\n", b"\n"):
        lines.append(_line(stream))
    try:
        text = [line.decode("latin-1").strip() for line in lines[:-1]]
        fields = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in text[1:]))
        return Head(raw=b"".join(lines), first=text[0], fields=fields)
    except IndexError as error:
        raise BrokenMessageError("an empty line where a head should begin") from error


def final_head(stream: BufferedReader) -> Head | None:
    """The next head that is an answer and no leave to go on, or None when the other side has ended instead."""
    while (head := read_head(stream)) is not None and head.status == 100:
        pass
    return head


def request_body(stream: BufferedReader, head: Head) -> Iterator[bytes]:
    """The body of a request, in the framing it came in. Raises BrokenMessageError when it ends too soon."""
    if head.chunked:
        return _chunks(stream)
    return _exactly(stream, head.length or 0)


def response_body(stream: BufferedReader, head: Head, *, method: str) -> Iterator[bytes]:
    """The body of a response to `method`, in the framing it came in; without one, up to the end."""
    if method == "HEAD" or head.status in (204, 304) or head.status < 200:
        return iter(())
    if head.chunked:
        return _chunks(stream)
    if head.length is None:
        return iter(lambda: stream.read1(_PIECE_BYTES), b"")
    return _exactly(stream, head.length)


def with_length(head: Head, length: int) -> bytes:
    """`head` as bytes, but for another Content-Length."""
    lines = head.raw.splitlines(keepends=True)
    return b"".join(
        b"Content-Length: %d\r\n" % length if line.lower().startswith(b"content-length:") else line
        for line in lines
    )


def pass_on(
    client: socket.socket,
    stream: BufferedReader,
    request: Head,
    upstream: socket.socket,
    answers: BufferedReader,
) -> tuple[bool, Head | None]:
    """Send a request on: whether all of it went, and the head of the final answer, None if none came."""
    upstream.sendall(request.raw)
    response = None
    if request.waits_for_leave:
        response = read_head(answers)
        if response is None or response.status != 100:
            return False, response  # the client need not send what it offered
        client.sendall(response.raw)
    whole = True
    body = request_body(stream, request)
    for piece in body:
        try:
            upstream.sendall(piece)
        except OSError:
            whole = False  # the store may have answered before it had read everything
            break
    return whole, final_head(answers)


def send(connection: socket.socket, pieces: Iterable[bytes]) -> None:
    """Send one piece after the other."""
    for piece in pieces:
        connection.sendall(piece)


def first(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The first `count` bytes."""
    while count > 0 and (piece := next(pieces, b"")):
        yield piece[:count]
        count -= len(piece)


def _line(stream: BufferedReader) -> bytes:
    line = stream.readline(_LINE_BYTES)
    if not line.endswith(b"\n"):
        raise BrokenMessageError("the other side ended within a line, or sent one without end")
    return line


def _exactly(stream: BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read1(min(size, _PIECE_BYTES))
        if not piece:
            raise BrokenMessageError(f"the other side ended {size} bytes too soon")
        size -= len(piece)
        yield piece


def _chunks(stream: BufferedReader) -> Iterator[bytes]:
    """Sizes, data and trailer alike, up to the empty line that ends the trailer."""
    while True:
        line = _line(stream)
        yield line
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError as error:
            raise BrokenMessageError("a chunk without a size") from error
        if not size:
            break
        yield from _exactly(stream, size)
        yield _line(stream)
    while True:
        line = _line(stream)
        yield line
        if line in (b"\r\n", b"\n"):
            return
