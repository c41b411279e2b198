"""Tensors that one phase of a run leaves for the next: a safetensors file, and a marker that is written last.

The marker NAME.json says what they were made of, by which recipe, and the file's digest; it tells people what
else is worth knowing. Without a marker that says the right things there is nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from boomerang_batch import storage
from boomerang_batch.errors import ObjectMissingError, StorageError

MARKER_SUFFIX = ".json"
DATA_SUFFIX = ".safetensors"
_FORMAT_VERSION = 1


def publish(
    home: str,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    made_of: str,
    recipe_digest: str,
    told: Mapping[str, Any],
    holding: Callable[[], None],
) -> None:
    """Publish tensors, equal ones in equal bytes, and their marker.

    `holding` is called before each publication, and raises when the run is no longer ours.
    """
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    url = storage.join(home, name + DATA_SUFFIX)
    holding()
    storage.publish_bytes(data, url)
    marker = {
        "format_version": _FORMAT_VERSION,
        "made_of": made_of,
        "recipe_digest": recipe_digest,
        "sha256": _sha256(data),
        "told": told,
    }
    if _sha256(storage.read_bytes(url)) != marker["sha256"]:
        raise StorageError(f"{url} reads back other bytes than were written; the disk or the store is failing")
    holding()
    text = json.dumps(marker, indent=1, sort_keys=True) + "\n"
    storage.publish_bytes(text.encode(), storage.join(home, name + MARKER_SUFFIX))


def is_there(home: str, name: str, *, made_of: str, recipe_digest: str) -> bool:
    """Whether there is a marker that says this."""
    return _marker(home, name, made_of, recipe_digest) is not None


def read(home: str, name: str, *, made_of: str | None, recipe_digest: str) -> dict[str, Tensor]:
    """The tensors. Raises StorageError where there are none that were made of this, or they were harmed.

    `made_of` None: whatever they were made of.
    """
    marker = _marker(home, name, made_of, recipe_digest)
    url = storage.join(home, name + DATA_SUFFIX)
    if marker is None:
        raise StorageError(
            f"{url} is missing, or was not made by this run of what is there now; remove {name}{MARKER_SUFFIX} "
            "beside it, if it is there, and run the same command again"
        )
    try:
        data = storage.read_bytes(url)
        if _sha256(data) == marker["sha256"]:
            return load(data)
    except (ObjectMissingError, SafetensorError):
        pass
    raise StorageError(
        f"{url} is not what its marker says; remove {name}{MARKER_SUFFIX} beside it and run the same command "
        "again, and it is made anew"
    )


def problem(home: str, name: str) -> str | None:
    """What is wrong with the artefact of this name, whatever it was made of; None where nothing is."""
    try:
        marker = json.loads(storage.read_bytes(storage.join(home, name + MARKER_SUFFIX)))
        read(home, name, made_of=marker["made_of"], recipe_digest=marker["recipe_digest"])
    except StorageError as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return f"{storage.join(home, name + MARKER_SUFFIX)} is no marker"
    return None


def _marker(home: str, name: str, made_of: str | None, recipe_digest: str) -> Mapping[str, Any] | None:
    """The marker, if it is one that says this."""
    try:
        marker = json.loads(storage.read_bytes(storage.join(home, name + MARKER_SUFFIX)))
        said = tuple(marker[key] for key in ("format_version", "recipe_digest"))
        fits = said == (_FORMAT_VERSION, recipe_digest) and made_of in (None, marker["made_of"])
        return marker if fits and isinstance(marker["sha256"], str) else None
    except (ObjectMissingError, ValueError, KeyError, TypeError):
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
