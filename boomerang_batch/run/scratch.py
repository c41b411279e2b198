"""Scratch folders on the local disk: each holds a task's spool, and what killed workers left is removed."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from boomerang_batch import storage

_PREFIX = "boomerang-"


def scratch_folder() -> AbstractContextManager[Path]:
    """An empty folder below TMPDIR; it is gone after the block."""
    return storage.owned_folder(Path(tempfile.gettempdir()), prefix=_PREFIX)


def sweep_scratch() -> None:
    """Remove the scratch folders below TMPDIR that nobody owns. What can't be removed stays."""
    storage.sweep_owned(Path(tempfile.gettempdir()), prefix=_PREFIX)
