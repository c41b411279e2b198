"""Scratch folders on the local disk: each holds a task's spool, and those that killed workers left are removed.

A folder belongs to whoever holds the lock on the file in it. The system lets go of a dead process's locks, so
what can be locked has no owner any more, whatever became of its process number.
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

_PREFIX = "boomerang-"
_LOCK_NAME = "lock"
_YOUNG_S = 60.0


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below TMPDIR; it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, (Path(name) / _LOCK_NAME).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inside = Path(name) / "task"
        inside.mkdir()
        yield inside


def sweep_scratch() -> None:
    """Remove the scratch folders below TMPDIR that nobody owns. What can't be removed stays."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            # A young one may be about to get its lock.
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                _remove_unowned(folder)


def _remove_unowned(folder: Path) -> None:
    with (folder / _LOCK_NAME).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
