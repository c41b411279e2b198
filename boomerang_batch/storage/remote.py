"""Stores behind fsspec: requests bounded in time, tried again while that may help, and whole or not at all.

Nothing is written through `fs.open(url, "wb")`: leaving such a file by an error publishes what was written so
far, on S3, GCS and Azure alike. A finished local file goes up in parts, a few of them in memory at a time
(uploads.py).
"""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from boomerang_batch.errors import StorageError
from boomerang_batch.storage.reader import BLOCK_BYTES, BlockReader
from boomerang_batch.storage.retries import (
    FIRST_PATIENCE_S,
    PATIENCE_S,
    IncompleteReadError,
    is_missing,
    patiently,
)
from boomerang_batch.storage.s3 import read_times_fast
from boomerang_batch.storage.uploads import ANSWER_S, upload, upload_file
from boomerang_batch.storage.urls import at_endpoint, holds_credentials, split_endpoint, without_secrets

_CONNECT_S = 10
_READ_ONLY = ("http", "https")
_IDENTITY = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "Last-Modified", "size")
"""What tells, in one store or another, that an object is not the one it was."""

_T = TypeVar("_T")
_reached: set[str] = set()


def reached() -> frozenset[str]:
    """The places of stores that this process has had an answer from."""
    return frozenset(_reached)


def count_on(places: Iterable[str]) -> None:
    """Take `places` for reached: another process of the same run has had an answer from there."""
    _reached.update(places)


class Remote:
    """One URL's store, and the object's path in it. Raises what the store's client raises."""

    def __init__(self, url: str) -> None:
        url, endpoint = split_endpoint(url)
        protocol = url.partition("://")[0]
        self._url = url
        self._endpoint = endpoint
        self._host = url.partition("://")[2].partition("/")[0]
        if holds_credentials(url):
            shown = without_secrets(url)
            raise StorageError(
                f"{shown}: a URL must not hold credentials; put them into the environment, "
                "as the store's own tools want them"
            )
        self._place = at_endpoint(f"{protocol}://{self._host}", endpoint)
        self._read_only = protocol in _READ_ONLY
        self._protocol = protocol
        self._filesystem, self._path = fsspec.core.url_to_fs(url, **_options(protocol, endpoint))
        if protocol in ("s3", "s3a"):
            read_times_fast(self._filesystem)

    def exists(self) -> bool:
        """Whether there is an object or folder."""
        try:
            self.info()
        except FileNotFoundError as error:
            if is_missing(error):
                return False
            raise
        return True

    def info(self) -> dict[str, Any]:
        """What the store tells about the object."""
        return self._ask(lambda: dict(self._filesystem.info(self._path)), "look at")

    def read(self) -> bytes:
        """A small object, whole."""
        return self._ask(lambda: bytes(self._filesystem.cat_file(self._path)), "read")

    def open(self, naming: Callable[[], AbstractContextManager[None]]) -> BinaryIO:
        """The object as a stream. What goes wrong with reading it later passes through `naming`."""
        info = self.info()
        size = info.get("size")
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if size is None or info.get("partial") is False or not self._knows_ranges(int(size)):
            return self._download(None if size is None else int(size))
        identity = _identity(info)

        def fetch(start: int, end: int) -> bytes:
            with naming():
                data = self._ask(lambda: self._range(start, end), "read")
                # An object that is one block came by one request, and can't be two halves of two.
                if end == size and start and _identity(self.info()) != identity:
                    raise OSError(errno.ESTALE, "it was replaced while it was read")
                return data

        raw = BlockReader(fetch, int(size))
        return cast(BinaryIO, io.BufferedReader(raw, 1 << 20))

    def names(self) -> list[str]:
        """Names directly below."""
        try:
            found = self._ask(lambda: self._filesystem.ls(self._path, detail=False), "list")
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

    def sizes(self) -> dict[str, int]:
        """The same of objects alone, each with its size in bytes."""
        try:
            found = self._ask(lambda: self._filesystem.ls(self._path, detail=True), "list")
        except FileNotFoundError:
            return {}
        files = [info for info in found if info["type"] == "file"]
        return {str(info["name"]).rsplit("/", 1)[-1]: int(info["size"]) for info in files}

    def tree(self) -> dict[str, str]:
        """What is below, at any depth: what tells an object's state, by its name relative to this one."""
        found = self._ask(lambda: self._filesystem.find(self._path, detail=True), "list")
        root = self._path.rstrip("/") + "/"
        return {path.removeprefix(root): repr(_identity(info)) for path, info in found.items()}

    def glob(self) -> list[str]:
        """URLs that match."""
        found = self._ask(lambda: self._filesystem.glob(self._path), "list")
        # Not by the client's name for its protocol: Azure's has two, and a manifest's digest tells them apart.
        urls = (path if "://" in path else f"{self._protocol}://{path.lstrip('/')}" for path in map(str, found))
        return [at_endpoint(url, self._endpoint) for url in sorted(urls)]

    def put(self, source: Path) -> None:
        """Upload a finished local file, replacing what was there."""
        self._writable()
        size = source.stat().st_size
        words = self._filesystem, self._protocol, str(source), self._path
        self._ask(lambda: upload_file(*words, size=size), "write")

    def put_bytes(self, data: bytes) -> None:
        """Put small content, replacing what was there."""
        self._writable()
        self._ask(lambda: upload(self._filesystem, "pipe_file", self._path, data, size=len(data)), "write")

    def create(self, data: bytes) -> None:
        """Put `data` if the name is free. Raises FileExistsError when something else is there.

        The same bytes count as ours: a store may have taken them though its answer was lost.
        """
        self._writable()
        try:
            self._ask(lambda: self._create_once(data), "write")
        except FileExistsError:
            if self.read() != data:
                raise

    def delete(self) -> None:
        """Remove the object if it is there."""
        self._writable()
        try:
            self._ask(lambda: self._filesystem.rm_file(self._path), "delete")
        except FileNotFoundError:
            return

    def _create_once(self, data: bytes) -> None:
        try:
            upload(self._filesystem, "pipe_file", self._path, data, size=len(data), mode="create")
        except OSError as error:
            # Some S3 servers answer 412 without naming the condition, which s3fs reports as EINVAL.
            if error.errno == errno.EINVAL and self._filesystem.exists(self._path):
                raise FileExistsError(self._path) from error
            raise

    def _knows_ranges(self, size: int) -> bool:
        """Whether a block of an object comes alone; a web server may answer with everything, and not say so."""
        if not self._read_only or size <= BLOCK_BYTES:
            return True

        def look() -> bool:
            with self._filesystem.open(self._path, "rb", cache_type="none", size=size) as file:
                try:
                    file.seek(size - 1)
                    file.read(1)
                except ValueError:
                    return False
                return True

        return self._ask(look, "read")

    def _range(self, start: int, end: int) -> bytes:
        data = bytes(self._filesystem.cat_file(self._path, start=start, end=end))
        if len(data) > end - start:  # a web server that knows no ranges sends everything
            data = data[start:end]
        if len(data) != end - start:
            raise IncompleteReadError(f"{len(data)} bytes came of {end - start}")
        return data

    def _download(self, size: int | None) -> BinaryIO:
        """The object as an unnamed local file, for servers that give no size or no ranges."""
        stream = tempfile.TemporaryFile(prefix="boomerang-")  # noqa: SIM115 (the caller closes it)

        def download() -> None:
            stream.seek(0)
            stream.truncate()
            self._filesystem.get_file(self._path, stream)
            if size not in (None, stream.tell()):
                raise IncompleteReadError(f"{stream.tell()} bytes came of {size}")

        try:
            self._ask(download, "read")
            stream.seek(0)
        except BaseException:
            stream.close()
            raise
        return cast(BinaryIO, stream)

    def _writable(self) -> None:
        if self._read_only:
            raise OSError(errno.EROFS, "http is for reading only")

    def _ask(self, request: Callable[[], _T], verb: str) -> _T:
        patience_s = PATIENCE_S if self._place in _reached else FIRST_PATIENCE_S
        doing = f"can't {verb} {without_secrets(self._url)}"
        try:
            answer = patiently(request, patience_s=patience_s, doing=doing)
        except FileNotFoundError as error:
            if is_missing(error):
                _reached.add(self._place)
            raise
        _reached.add(self._place)
        return answer


def _options(protocol: str, endpoint: Mapping[str, str]) -> dict[str, Any]:
    """How a store's client is to be made: with bounded requests, and without a memory of listings.

    What the user's own fsspec configuration says stands. Raises ValueError for an endpoint that the store's
    client can't be given.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if endpoint and protocol not in ("s3", "s3a"):
        raise ValueError(
            f"{protocol} takes no endpoint_url or region; its client reads them from the environment"
        )
    if "endpoint_url" in endpoint:
        options["endpoint_url"] = endpoint["endpoint_url"]
    if "region" in endpoint:
        options["client_kwargs"] = {"region_name": endpoint["region"]}
    if protocol in ("s3", "s3a"):
        # s3fs and botocore each try again by themselves; one of them is enough.
        bounds = {"connect_timeout": _CONNECT_S, "read_timeout": ANSWER_S, "retries": {"max_attempts": 0}}
        options["config_kwargs"] = bounds | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    elif protocol in ("gs", "gcs"):
        options["requests_timeout"] = _timeout()
    elif protocol in ("az", "abfs", "abfss"):
        options |= {"connection_timeout": _CONNECT_S, "read_timeout": ANSWER_S}
    elif protocol in _READ_ONLY:
        options["client_kwargs"] = {"timeout": _timeout()}
    return options


def _timeout() -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=ANSWER_S)


def _identity(info: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(info.get(name) for name in _IDENTITY)
