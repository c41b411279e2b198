"""The one door to storage: local paths and any fsspec URL, read by streaming, written whole or not at all.

Two ways to write, nothing else. `publish` puts a finished local file under its final name, replacing what was
there: readers see the old file or the new one. `create_only` puts a small object only if the name is free, and
of many racing writers exactly one succeeds: that is what makes a marker a commit. On a local disk both go
through a temporary file in the same folder, fsync, an atomic rename or link, and fsync of the folder, so a
power cut leaves the old state or the new one. Every failure is a StorageError naming the URL.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from boomerang_batch.errors import ObjectExistsError, StorageError

_TEMPORARY_SUFFIX = ".tmp"
_serial = itertools.count()


def is_local(url: str) -> bool:
    """Whether `url` is a plain path or a file: URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local `url`."""
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """A local `url` as an absolute path, for processes that run in another folder; others as they are."""
    return os.path.abspath(local_path(url)) if is_local(url) else url  # noqa: PTH100 (keep links)


def join(base: str, *names: str) -> str:
    """`base` with `names` below it."""
    root = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return root + "/".join(names)


def lies_in(url: str, folder: str) -> bool:
    """Whether `url` is below `folder`, by its name or by what its links lead to."""
    if is_local(url) and is_local(folder):
        path, root = local_path(url), local_path(folder).resolve()
        return any(place.is_relative_to(root) for place in (path.parent.resolve(), path.resolve()))
    return url.startswith(join(folder, ""))


def exists(url: str) -> bool:
    """Whether an object or folder is there now (never answered from a listing cache)."""
    with _named("look for", url):
        if is_local(url):
            return local_path(url).exists()
        filesystem, path = _remote(url)
        return bool(filesystem.exists(path))


def size(url: str) -> int:
    """Size in bytes of an object. Raises StorageError when there is none."""
    with _named("look at", url):
        if is_local(url):
            return local_path(url).stat().st_size
        filesystem, path = _remote(url)
        return int(filesystem.size(path))


def open_read(url: str) -> BinaryIO:
    """Open an object for streaming. Raises StorageError when it can't be opened."""
    with _named("read", url):
        if is_local(url):
            return local_path(url).open("rb")
        filesystem, path = _remote(url)
        return filesystem.open(path, "rb")


def read_bytes(url: str) -> bytes:
    """A small object, whole."""
    with _named("read", url), open_read(url) as stream:
        return stream.read()


def list_names(folder: str) -> list[str]:
    """Names directly below `folder`, sorted; none when it is not there. Unfinished files don't count."""
    with _named("list", folder):
        if is_local(folder):
            path = local_path(folder)
            names = os.listdir(path) if path.is_dir() else []  # noqa: PTH208 (names, not paths, are wanted)
        else:
            filesystem, remote = _remote(folder)
            try:
                found = filesystem.ls(remote, detail=False)
            except FileNotFoundError:
                found = []
            names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]
        return sorted(name for name in names if not _is_temporary(name))


def glob(pattern: str) -> list[str]:
    """URLs matching a glob pattern, sorted, with the protocol `pattern` has."""
    with _named("list", pattern):
        if is_local(pattern):
            filesystem = fsspec.filesystem("file")
            return sorted(str(path) for path in filesystem.glob(str(local_path(pattern))))
        filesystem, path = _remote(pattern)
        return sorted(str(filesystem.unstrip_protocol(found)) for found in filesystem.glob(path))


def make_folder(url: str) -> None:
    """Make a local folder and its parents; object stores have no folders to make."""
    if is_local(url):
        with _named("create", url):
            local_path(url).mkdir(parents=True, exist_ok=True)


def publish(source: Path, url: str) -> None:
    """Put the finished local file `source` under `url`, replacing what was there, atomically."""
    with _named("write", url):
        if is_local(url):
            with source.open("rb") as reader, _staged(local_path(url), reader) as staged:
                staged.replace(local_path(url))
        else:
            filesystem, path = _remote(url)
            filesystem.put_file(str(source), path)


def publish_bytes(data: bytes, url: str) -> None:
    """`publish` for small content made in memory."""
    with _named("write", url):
        if is_local(url):
            with _staged(local_path(url), io.BytesIO(data)) as staged:
                staged.replace(local_path(url))
        else:
            filesystem, path = _remote(url)
            filesystem.pipe_file(path, data)


def create_only(url: str, data: bytes) -> None:
    """Put `data` under `url` if the name is free. Raises ObjectExistsError if it is not."""
    with _named("write", url):
        try:
            if is_local(url):
                with _staged(local_path(url), io.BytesIO(data)) as staged:
                    os.link(staged, local_path(url))
            else:
                _create_remote(*_remote(url), data)
        except FileExistsError as error:
            raise ObjectExistsError(f"{url} exists already") from error


def _create_remote(filesystem: Any, path: str, data: bytes) -> None:
    try:
        filesystem.pipe_file(path, data, mode="create")
    except OSError as error:
        # Some S3 servers answer 412 without naming the condition, which s3fs reports as EINVAL.
        if error.errno == errno.EINVAL and filesystem.exists(path):
            raise FileExistsError(path) from error
        raise


def delete(url: str) -> None:
    """Remove one object if it is there."""
    with _named("delete", url):
        if is_local(url):
            local_path(url).unlink(missing_ok=True)
            return
        filesystem, path = _remote(url)
        if filesystem.exists(path):
            filesystem.rm_file(path)


def sweep(folder: str) -> None:
    """Remove unfinished files that dead processes of this machine left in a local `folder`."""
    if not is_local(folder) or not local_path(folder).is_dir():
        return
    with _named("clean", folder):
        for path in local_path(folder).iterdir():
            if not _is_temporary(path.name):
                continue
            owner = path.name.removesuffix(_TEMPORARY_SUFFIX).rsplit("@", 1)[-1]
            # Host names may hold hyphens themselves, and one may be the beginning of another.
            host, _, process = owner.rpartition("-")[0].rpartition("-")
            if host == socket.gethostname() and process.isdecimal() and not _alive(int(process)):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _staged(final: Path, content: BinaryIO) -> Iterator[Path]:
    """`content`, safely on disk under a name beside `final` that tells its owner, to be renamed or linked.

    On leaving, the temporary name is gone whatever happened, and the folder's new state is on disk too.
    """
    owner = f"{socket.gethostname()}-{os.getpid()}-{next(_serial)}"
    path = final.with_name(f".{final.name}@{owner}{_TEMPORARY_SUFFIX}")
    try:
        with path.open("wb") as writer:
            shutil.copyfileobj(content, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX) and "@" in name


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remote(url: str) -> tuple[Any, str]:
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, path


@contextlib.contextmanager
def _named(verb: str, url: str) -> Iterator[None]:
    """Turn what the system says into a StorageError that names the URL."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"can't {verb} {url}: there is nothing at that path") from error
    except PermissionError as error:
        raise StorageError(f"can't {verb} {url}: permission denied") from error
    except OSError as error:
        raise StorageError(f"can't {verb} {url}: {error.strerror or error}") from error
    except ImportError as error:
        extras = "the extras s3, gcs and azure bring the clients: pip install 'boomerang-batch[s3]'"
        raise StorageError(f"can't {verb} {url}: {error}; {extras}") from error
    except ValueError as error:  # an unknown protocol
        raise StorageError(f"can't {verb} {url}: {error}") from error
    except Exception as error:
        if is_local(url):
            raise
        # The clients of HTTP, GCS and Azure have errors of their own, with no parent in common.
        raise StorageError(f"can't {verb} {url}: {type(error).__name__}: {error}") from error
