"""A model that lies in a store: copied once to this machine, whole, and used from there ever after.

The copy's name is a digest of the folder's URL and of the state of every file in it, so a model that changed in
the store is copied anew and the old copy is never touched. The state is looked at again when all is copied: a
model that was replaced meanwhile would be half of one and half of another. Workers of one machine that start
together may each copy it; the first to finish gives the others theirs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from boomerang_batch import storage
from boomerang_batch.errors import ModelError, StorageError

_FOLDER_VARIABLE = "BOOMERANG_MODELS"
_UNFINISHED = ".unfinished-"
_TRIES = 2

_log = logging.getLogger(__name__)


def fetch(url: str, *, patterns: Sequence[str]) -> Path:
    """The local copy of the model folder `url`: its files that match `patterns`.

    It lies under BOOMERANG_MODELS, else under the user's cache folder. Raises ModelError when there is nothing
    of a model, when it is being replaced, or where there is no room for it.
    """
    shown = storage.without_secrets(url)
    try:
        for _ in range(_TRIES):
            states = _states(url, patterns)
            if not states:
                raise ModelError(f"model.source {shown}: nothing of a model is there; give a diffusers folder")
            lines = "".join(f"{name} {states[name]}\n" for name in sorted(states))
            copy = _cache() / hashlib.sha256(f"{url}\n{lines}".encode()).hexdigest()[:32]
            if copy.is_dir() or _copy(url, patterns, states, copy):
                return copy
            _log.warning("%s was replaced while it was copied", shown)
    except (StorageError, OSError) as error:
        raise ModelError(
            f"model.source {shown}: {error}; {_FOLDER_VARIABLE} names another folder for copies of models"
        ) from error
    raise ModelError(
        f"model.source {shown}: it was replaced while it was copied, each of {_TRIES} times; run the same "
        "command when nobody writes to it any more"
    )


def _copy(url: str, patterns: Sequence[str], states: Mapping[str, str], copy: Path) -> bool:
    """Copy the files of `states`; False when some of them are not what they were when it began."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    storage.sweep_owned(copy.parent, prefix=_UNFINISHED)
    _log.info("copying %d files of %s to %s", len(states), storage.without_secrets(url), copy)
    with storage.owned_folder(copy.parent, prefix=_UNFINISHED) as unfinished:
        whole = unfinished / "model"
        try:
            for name in sorted(states):
                path = whole / name
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(storage.join(url, name), path)
        except StorageError:  # it may have been taken away to be replaced
            if _states(url, patterns) == states:
                raise
            return False
        if _states(url, patterns) != states:
            return False
        try:
            whole.rename(copy)
        except OSError:
            if not copy.is_dir():  # another worker's came first: that one is as good
                raise
    return True


def _states(url: str, patterns: Sequence[str]) -> dict[str, str]:
    """What tells the state of each file of the model that is in the store now."""
    return {name: state for name, state in storage.list_tree(url).items() if _is_wanted(name, patterns)}


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
