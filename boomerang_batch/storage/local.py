"""Writing to a local disk so that a power cut leaves the old state or the new one.

Content goes to a temporary file in the same folder, is synced, gets its name by an atomic rename or link, and
the folder is synced. A temporary file tells its owner, so that those of the dead can be swept away.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY_SUFFIX = ".tmp"
_serial = itertools.count()


def replace(final: Path, content: BinaryIO) -> None:
    """Put `content` under `final`, replacing what was there."""
    with _staged(final, content) as staged:
        staged.replace(final)


def create(final: Path, content: BinaryIO) -> None:
    """Put `content` under `final`. Raises FileExistsError when the name is taken."""
    with _staged(final, content) as staged:
        os.link(staged, final)


def sweep(folder: Path) -> None:
    """Remove unfinished files that dead processes of this machine left."""
    for name in filter(is_temporary, os.listdir(folder)):  # noqa: PTH208 (of many files, few)
        path = folder / name
        owner = path.name.removesuffix(_TEMPORARY_SUFFIX).rsplit("@", 1)[-1]
        # Host names may hold hyphens themselves, and one may be the beginning of another.
        host, _, process = owner.rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def sizes(folder: Path, suffix: str) -> dict[str, int]:
    """Size in bytes of each file directly below `folder` whose name ends with `suffix`, by name."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):  # gone again
                    found[entry.name] = entry.stat().st_size
    return found


def is_temporary(name: str) -> bool:
    """Whether a file of this name is an unfinished one."""
    return name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX) and "@" in name


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
