"""The one door to storage: local paths and any fsspec URL, read by streaming, written whole or not at all.

Two ways to write, nothing else. `publish` puts a finished local file under its final name, replacing what was
there: readers see the old file or the new one. `create_only` puts a small object only if the name is free, and
of many racing writers exactly one succeeds: that is what makes a marker a commit. On a local disk both survive
a power cut (local.py); a store's passing failures are waited out (remote.py, retries.py). Credentials come from
the environment or the platform alone. Every failure is a StorageError that names the URL, and no secret.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

from boomerang_batch.errors import ObjectExistsError, ObjectMissingError, StorageError
from boomerang_batch.storage import local
from boomerang_batch.storage.owned import owned_folder, sweep_owned
from boomerang_batch.storage.remote import Remote, count_on, reached
from boomerang_batch.storage.retries import is_missing, status_of
from boomerang_batch.storage.urls import (
    ENDPOINT,
    absolute,
    at_endpoint,
    holds_credentials,
    is_local,
    join,
    local_path,
    lying_in,
    split_endpoint,
    without_secrets,
)

__all__ = [
    "ENDPOINT",
    "absolute",
    "at_endpoint",
    "count_on",
    "create_only",
    "delete",
    "download",
    "exists",
    "glob",
    "holds_credentials",
    "is_local",
    "join",
    "list_names",
    "list_sizes",
    "list_tree",
    "local_path",
    "lying_in",
    "make_folder",
    "open_read",
    "owned_folder",
    "publish",
    "publish_bytes",
    "reached",
    "read_bytes",
    "remove_folder",
    "size",
    "sweep",
    "sweep_owned",
    "without_secrets",
]


def exists(url: str) -> bool:
    """Whether an object or folder is there now (never answered from a listing cache)."""
    with _named("look for", url):
        return local_path(url).exists() if is_local(url) else Remote(url).exists()


def size(url: str) -> int:
    """Size in bytes of an object. Raises ObjectMissingError when there is none."""
    with _named("look at", url):
        return local_path(url).stat().st_size if is_local(url) else int(Remote(url).info()["size"])


def open_read(url: str) -> BinaryIO:
    """Open an object for streaming.

    Raises ObjectMissingError when there is none and StorageError when it can't be opened; reading may raise
    StorageError too, where a store goes away for long or the object is replaced meanwhile.
    """
    with _named("read", url):
        if is_local(url):
            return local_path(url).open("rb")
        return Remote(url).open(lambda: _named("read", url))


def read_bytes(url: str) -> bytes:
    """A small object, whole. Raises ObjectMissingError when there is none."""
    with _named("read", url):
        return local_path(url).read_bytes() if is_local(url) else Remote(url).read()


def list_names(folder: str) -> list[str]:
    """Names directly below `folder`, sorted; none when it is not there. Unfinished files don't count."""
    with _named("list", folder):
        if is_local(folder):
            path = local_path(folder)
            names = os.listdir(path) if path.is_dir() else []  # noqa: PTH208 (names, not paths, are wanted)
        else:
            names = Remote(folder).names()
        return sorted(name for name in names if not local.is_temporary(name))


def list_sizes(folder: str, suffix: str) -> dict[str, int]:
    """Size in bytes of every object directly below `folder` whose name ends with `suffix`, by name.

    None when the folder is not there. Unfinished files don't count.
    """
    with _named("list", folder):
        if is_local(folder):
            path = local_path(folder)
            found = local.sizes(path, suffix) if path.is_dir() else {}
        else:
            found = Remote(folder).sizes()
        return {name: found[name] for name in sorted(found) if name.endswith(suffix)}


def list_tree(folder: str) -> dict[str, str]:
    """What tells the state of every object below a store's `folder`, at any depth, by its relative name."""
    with _named("list", folder):
        return Remote(folder).tree()


def glob(pattern: str) -> list[str]:
    """URLs matching a glob pattern, sorted, with the protocol `pattern` has."""
    with _named("list", pattern):
        if is_local(pattern):
            filesystem = fsspec.filesystem("file")
            return sorted(str(path) for path in filesystem.glob(str(local_path(pattern))))
        return Remote(pattern).glob()


def download(url: str, path: Path) -> None:
    """Copy an object to the local file `path`, which is whole once this returns."""
    with open_read(url) as reader, path.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def make_folder(url: str) -> None:
    """Make a local folder and its parents; object stores have no folders to make."""
    if is_local(url):
        with _named("create", url):
            local_path(url).mkdir(parents=True, exist_ok=True)


def publish(source: Path, url: str) -> None:
    """Put the finished local file `source` under `url`, replacing what was there, atomically."""
    with _named("write", url):
        if is_local(url):
            with source.open("rb") as reader:
                local.replace(local_path(url), reader)
        else:
            Remote(url).put(source)


def publish_bytes(data: bytes, url: str) -> None:
    """`publish` for small content made in memory."""
    with _named("write", url):
        if is_local(url):
            local.replace(local_path(url), io.BytesIO(data))
        else:
            Remote(url).put_bytes(data)


def create_only(url: str, data: bytes) -> None:
    """Put `data` under `url` if the name is free. Raises ObjectExistsError if it is not.

    Where a store has those very bytes already they count as written, for the answer to a first request may
    have been lost: writers that must know which of them won each write something of their own.
    """
    with _named("write", url):
        try:
            if is_local(url):
                local.create(local_path(url), io.BytesIO(data))
            else:
                Remote(url).create(data)
        except FileExistsError as error:
            raise ObjectExistsError(f"{without_secrets(url)} exists already") from error


def delete(url: str) -> None:
    """Remove one object if it is there."""
    with _named("delete", url):
        if is_local(url):
            local_path(url).unlink(missing_ok=True)
        else:
            Remote(url).delete()


def remove_folder(url: str) -> None:
    """Remove an empty local folder; object stores have none."""
    if is_local(url):
        with contextlib.suppress(OSError):
            local_path(url).rmdir()


def sweep(folder: str) -> None:
    """Remove unfinished files that dead processes of this machine left in a local `folder`."""
    if is_local(folder) and local_path(folder).is_dir():
        with _named("clean", folder):
            local.sweep(local_path(folder))


@contextlib.contextmanager
def _named(verb: str, url: str) -> Iterator[None]:
    """Turn what the system or a store's client says into a StorageError that names the URL."""
    failed = f"can't {verb} {without_secrets(split_endpoint(url)[0])}"
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if is_missing(error):
            raise ObjectMissingError(f"{failed}: there is nothing at that path") from error
        raise StorageError(f"{failed}: {_reason(error)}") from error
    except ImportError as error:
        extras = "the extras s3, gcs and azure bring the clients: pip install 'boomerang-batch[s3]'"
        raise StorageError(f"{failed}: {error}; {extras}") from error
    except Exception as error:
        if is_local(url) and not isinstance(error, OSError):
            raise
        raise StorageError(f"{failed}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong, in words fit to be shown."""
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "permission denied" if status is None else f"permission denied ({_words(error)})"
    if isinstance(error, OSError | ValueError):  # ValueError: an unknown protocol
        return _words(error)
    return f"{type(error).__name__}: {_words(error)}"


def _words(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return without_secrets(str(strerror or error).strip().partition("\n")[0])
