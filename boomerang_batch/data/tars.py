"""Tar archives as streams: a reader that takes nothing damaged for a normal end, and a USTAR writer.

Python's tarfile does the parsing. Left to itself it treats a damaged header, a missing end mark, or anything
after the end mark as the end, and passes on a cut member's data short; here each is a `TarBrokenError` with
the offset in bytes. Offsets count in the decompressed tar. The writer makes POSIX.1-1988 USTAR with every
varying header field fixed.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

_CHUNK_BYTES = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_FOREIGN_MAGIC = (
    (b"\xfd7zXZ\x00", "xz-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"PK\x03\x04", "a zip file"),
    (b"PAR1", "a Parquet file"),
    (b"<", "HTML or XML, perhaps an error page"),
)

# Long names and pax records take a few hundred bytes; tarfile reads them into memory whole, so bound them.
_MAX_EXTENDED_HEADER_BYTES = 1 << 20
_EXTENDED_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# What tarfile raises on headers that were never meant to be read.
_PARSE_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)


class TarBrokenError(Exception):
    """Where reading on would be guessing. Not a TarError, so that tarfile lets it pass.

    `reason` is one of not-a-tar, truncated-tar, broken-header, broken-gzip, data-after-end.
    """

    def __init__(self, reason: str, detail: str, offset: int | None = None) -> None:
        super().__init__(reason, detail, offset)
        self.reason = reason
        self.detail = detail
        self.offset = offset


@dataclass(frozen=True, kw_only=True)
class Member:
    """One header. `name` may hold surrogates where the bytes were not UTF-8."""

    name: str
    kind: Literal["file", "folder", "link", "special"]
    size_bytes: int
    offset: int
    info: tarfile.TarInfo


class TarStream:
    """A tar, or a gzip-compressed one (told by its bytes), read from front to back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._source = _Source(stream)
        self._archive: tarfile.TarFile | None = None

    def members(self) -> Iterator[Member]:
        """Every member up to an end mark with nothing but zeros after it. Raises TarBrokenError otherwise."""
        try:
            self._archive = archive = tarfile.open(  # noqa: SIM115 (the stream is the caller's to close)
                fileobj=cast("BinaryIO", self._source),
                mode="r|",
                tarinfo=_StrictTarInfo,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except _PARSE_ERRORS as error:
            raise self._not_a_tar() from error
        except TarBrokenError as error:
            raise (self._not_a_tar() if error.reason == "broken-header" else error) from error
        while info := self._next(archive):
            yield Member(name=info.name, kind=_kind(info), size_bytes=info.size, offset=info.offset, info=info)
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
        self._expect_only_zeros()

    def read(self, member: Member) -> bytes:
        """The data of the member yielded last. Raises TarBrokenError when the stream ends inside it."""
        try:
            reader = self._archive.extractfile(member.info) if self._archive else None
            data = reader.read() if reader else b""
        except (tarfile.TarError, TarBrokenError) as error:
            raise self._located(error) from error
        if len(data) != member.size_bytes:
            raise TarBrokenError("truncated-tar", "the file ends inside a member's data", self._position)
        return data

    def _next(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        try:
            info = archive.next()
            if info and info.size < 0:
                raise TarBrokenError("broken-header", "a member claims a negative size")
        except (*_PARSE_ERRORS, TarBrokenError) as error:
            raise self._located(error) from error
        return info

    def _expect_only_zeros(self) -> None:
        """Read to the end: a second tar in the file, or a hole where a header was, must not go unseen."""
        stream = cast("Any", self._archive).fileobj
        while not self._source.ended:
            start = self._position
            try:
                data = stream.read(_CHUNK_BYTES)
            except TarBrokenError as error:
                raise self._located(error) from error
            if rest := data.lstrip(b"\0"):
                offset = start + len(data) - len(rest)
                raise TarBrokenError("data-after-end", "there is data after the end-of-archive mark", offset)

    @property
    def _position(self) -> int:
        return int(cast("Any", self._archive).fileobj.tell())

    def _located(self, error: Exception) -> TarBrokenError:
        """`error` told as what it is, a file that was cut or one that is damaged, with its offset."""
        if self._source.ended:
            return TarBrokenError(
                "truncated-tar", "the file ends without an end-of-archive mark", self._position
            )
        if isinstance(error, TarBrokenError) and error.reason != "broken-header":
            return TarBrokenError(error.reason, error.detail, self._position)
        detail = error.detail if isinstance(error, TarBrokenError) else f"a tar header is damaged ({error})"
        return TarBrokenError("broken-header", detail, cast("Any", self._archive).offset)

    def _not_a_tar(self) -> TarBrokenError:
        head = self._source.head
        looks = next((name for magic, name in _FOREIGN_MAGIC if head.startswith(magic)), "no tar")
        detail = f"the file is {looks if head else 'empty'}; expected .tar or .tar.gz"
        return TarBrokenError("not-a-tar", detail, 0)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, data) pairs, in this order, as bytes that depend on nothing else, and fsync the file.

    mtime, uid and gid are 0, owner names empty, modes 0644. Raises ValueError for a name that doesn't fit.
    """
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
            for name, data in members:
                archive.addfile(_fixed_info(name, len(data)), BytesIO(data))
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
        file.flush()
        os.fsync(file.fileno())


def member_places(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the data of every regular member of an uncompressed tar that is trusted."""
    with tarfile.open(path, "r:", encoding="utf-8") as archive:
        while info := archive.next():
            if info.isreg():
                yield info.name, info.offset_data, info.size
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header


def fits_ustar(name: str) -> bool:
    """Whether USTAR can hold `name`: 100 bytes of UTF-8, or up to 255 where a slash cuts it well."""
    if name.isascii() and len(name) <= tarfile.LENGTH_NAME:
        return True  # nearly all names; the rest is tarfile's to say
    try:
        _fixed_info(name, 0).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError:
        return False
    return True


def _fixed_info(name: str, size_bytes: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # its defaults: regular file, mtime 0, uid and gid 0, no owner names
    info.size = size_bytes
    info.mode = 0o644
    return info


def _kind(info: tarfile.TarInfo) -> Literal["file", "folder", "link", "special"]:
    if info.isdir():
        return "folder"
    if info.issym() or info.islnk():
        return "link"
    # A sparse file's header may claim terabytes that the archive doesn't hold.
    return "file" if info.isreg() and not info.issparse() else "special"


class _StrictTarInfo(tarfile.TarInfo):
    """Makes every damaged header an error; of tarfile's own, only the end mark still means the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # typeshed lacks it
                raise
            raise TarBrokenError("broken-header", f"a tar header is damaged ({error})") from error
        if info.type in _EXTENDED_TYPES and info.size > _MAX_EXTENDED_HEADER_BYTES:
            raise TarBrokenError("broken-header", f"an extended tar header claims {info.size:,} bytes")
        return info


class _Source:
    """What tarfile reads from. Notes that the data ended, and refuses to be asked again after that.

    The refusal matters: tarfile skips a member by reading on, in a loop as long as the size its header
    claims, whether or not data comes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        raw = iter(lambda: stream.read(_CHUNK_BYTES), b"")
        self.head = next(raw, b"")
        self.ended = False
        chunks = _chain(self.head, raw)
        self._chunks = _inflated(chunks) if self.head.startswith(_GZIP_MAGIC) else chunks

    def read(self, size: int) -> bytes:
        """The next piece, of whatever size; tarfile buffers."""
        if self.ended:
            raise TarBrokenError("truncated-tar", "the file ends inside a member's data")
        chunk = next(self._chunks, b"")
        self.ended = not chunk
        return chunk


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _inflated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip, several gzip members in a row too, in bounded pieces and with its checksum checked."""
    engine = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        rest = chunk
        while rest:
            if engine.eof:
                if not rest.strip(b"\0"):
                    break  # padding after the last gzip member
                engine = zlib.decompressobj(wbits=31)
            try:
                data = engine.decompress(rest, _CHUNK_BYTES)
            except zlib.error as error:
                raise TarBrokenError("broken-gzip", f"the gzip data is damaged ({error})", 0) from error
            if data:
                yield data
            rest = engine.unconsumed_tail or engine.unused_data
    if data := engine.flush():
        yield data
    if not engine.eof:
        raise TarBrokenError("truncated-tar", "the gzip data ends too soon", 0)
