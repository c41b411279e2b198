"""Embedders of other makes: installed entry points of the group `boomerang_batch.embedders`.

`--embedder NAME` calls the installed factory NAME as factory(fit_on), which returns an `Embedder`;
docs/embedders.md shows one. It goes by the entry point's name, and its distribution's version becomes part of
its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from boomerang_batch.errors import BoomerangError, ConfigError
from boomerang_batch.measures.embedders.contract import CheckedEmbedder, Embedder, Features
from boomerang_batch.measures.images import Images

GROUP = "boomerang_batch.embedders"


@dataclass(frozen=True, kw_only=True, eq=False)
class InstalledEmbedder:
    """What an installed factory made, by the name and version of where it came from; implements `Embedder`."""

    made: Any
    name: str
    digest: str
    licence: str

    def embed(self, images: Images) -> Features:
        """See Embedder."""
        return cast("Features", self.made.embed(images))


def installed_names() -> list[str]:
    """Every entry point's name in the group, sorted, each once."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load_installed(name: str, fit_on: Images) -> Embedder:
    """What the installed factory `name` makes. Raises ConfigError where it fails or makes no embedder."""
    entry = _the_one(name)
    where = f"--embedder {name}"
    factory = _attempt(entry.load, f"{where}: {entry.value} can't be imported")
    made = _attempt(lambda: factory(fit_on), f"{where}: its factory failed")
    own = CheckedEmbedder(made)
    made_by = [entry.name, entry.value, _distribution(entry), own.digest]
    digest = hashlib.sha256(json.dumps(made_by, separators=(",", ":")).encode()).hexdigest()
    return InstalledEmbedder(made=made, name=name, digest=digest, licence=own.licence)


def _the_one(name: str) -> EntryPoint:
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if len(found) != 1:
        owners = ", ".join(sorted(_distribution(entry) for entry in found))
        raise ConfigError(f"--embedder {name}: several have it: {owners}; uninstall all but one")
    return found[0]


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def _attempt(call: Callable[[], Any], failure: str) -> Any:
    """What `call` gives. Someone else's code may raise anything; it becomes one line with the cause chained."""
    try:
        return call()
    except BoomerangError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{failure}: {type(error).__name__}: {reason}") from error
