"""A model that lies in a store: copied once to this machine, whole, and used from there ever after.

The copy's name is a digest of the folder's URL and of the state of every file in it, so a model that changed in
the store is copied anew and the old copy is never touched. Workers of one machine that start together may each
copy it; the first to finish gives the others theirs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from boomerang_batch import storage
from boomerang_batch.errors import ModelError, StorageError

_FOLDER_VARIABLE = "BOOMERANG_MODELS"

_log = logging.getLogger(__name__)


def fetch(url: str, *, patterns: Sequence[str]) -> Path:
    """The local copy of the model folder `url`: its files that match `patterns`.

    It lies under BOOMERANG_MODELS, else under the user's cache folder. Raises ModelError when there is nothing
    of a model, or no room for it.
    """
    shown = storage.without_secrets(url)
    try:
        found = storage.list_tree(url)
        wanted = {name: state for name, state in found.items() if _is_wanted(name, patterns)}
        if not wanted:
            raise ModelError(f"model.source {shown}: nothing of a model is there; give a diffusers folder")
        lines = "".join(f"{name} {wanted[name]}\n" for name in sorted(wanted))
        copy = _cache() / hashlib.sha256(f"{url}\n{lines}".encode()).hexdigest()[:32]
        if not copy.is_dir():
            _copy(url, sorted(wanted), copy)
    except (StorageError, OSError) as error:
        raise ModelError(
            f"model.source {shown}: {error}; {_FOLDER_VARIABLE} names another folder for copies of models"
        ) from error
    return copy


def _copy(url: str, names: Sequence[str], copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    _log.info("copying %d files of %s to %s", len(names), storage.without_secrets(url), copy)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=copy.parent) as unfinished:
        whole = Path(unfinished) / "model"
        for name in names:
            path = whole / name
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.download(storage.join(url, name), path)
        try:
            whole.rename(copy)
        except OSError:
            if not copy.is_dir():  # another worker's came first: that one is as good
                raise


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute():
        return False
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _cache() -> Path:
    if _FOLDER_VARIABLE in os.environ:
        return Path(os.environ[_FOLDER_VARIABLE])
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "boomerang-batch" / "models"
