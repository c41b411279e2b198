"""Folders of unfinished work on a local disk, and the end of those whose owner was killed.

A folder belongs to whoever holds the lock on the file in it. The system lets go of a dead process's locks, so
what can be locked has no owner any more, whatever became of its process number, its container or its host name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_LOCK_NAME = "lock"
_YOUNG_S = 60.0


@contextlib.contextmanager
def owned_folder(parent: Path, *, prefix: str) -> Iterator[Path]:
    """An empty folder in one below `parent` that begins with `prefix`; both are gone after the block."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name,
        (Path(name) / _LOCK_NAME).open("wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        inside = Path(name) / "work"
        inside.mkdir()
        yield inside


def sweep_owned(parent: Path, *, prefix: str) -> None:
    """Remove such folders that nobody owns. What can't be removed stays."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            # A young one may be about to get its lock.
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                _remove_unowned(folder)


def _remove_unowned(folder: Path) -> None:
    with (folder / _LOCK_NAME).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
