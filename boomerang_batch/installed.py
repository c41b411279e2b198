"""What installed packages bring: entry points, found by group and name, and the factories behind them.

Denoisers, embedders and classifiers of other makes all come this way. The version of what made one becomes part
of its digest, and whatever its code raises becomes one line, as the kind of error that the caller names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from boomerang_batch.errors import BoomerangError


def names(group: str) -> list[str]:
    """Every entry point's name in the group, sorted, each once."""
    return sorted({entry.name for entry in entry_points(group=group)})


def find(group: str, name: str, *, where: str, error: type[BoomerangError]) -> EntryPoint:
    """The one entry point of this name. Raises `error`, listing what there is; `where` the user named it."""
    found = [entry for entry in entry_points(group=group) if entry.name == name]
    if not found:
        others = ", ".join(names(group))
        there = f"installed are {others}" if others else "none is installed"
        raise error(
            f"{where}: no such entry point in the group {group}; {there}. Install the distribution that has it "
            "into every environment that is to use it"
        )
    if len(found) > 1:
        owners = ", ".join(sorted(_distribution(entry) for entry in found))
        raise error(f"{where}: several have it: {owners}; uninstall all but one")
    return found[0]


def make(entry: EntryPoint, *arguments: Any, where: str, error: type[BoomerangError]) -> Any:
    """What the factory behind an entry point makes of the arguments. Raises `error` where it can't."""
    factory = attempt(entry.load, f"{where}: {entry.value} can't be imported", error=error)
    return attempt(lambda: factory(*arguments), f"{where}: its factory failed", error=error)


def digest(entry: EntryPoint, own: str) -> str:
    """The maker's digest together with what made it: a new version may do something else with equal weights."""
    made_by = [entry.name, entry.value, _distribution(entry), own]
    return hashlib.sha256(json.dumps(made_by, separators=(",", ":")).encode()).hexdigest()


def attempt(call: Callable[[], Any], failure: str, *, error: type[BoomerangError]) -> Any:
    """What `call` gives. Someone else's code may raise anything; it becomes one line with the cause chained."""
    try:
        return call()
    except BoomerangError:
        raise  # it knows better what to say
    except (Exception, SystemExit) as cause:  # which would end this program as a success
        reason = " ".join(str(cause).split())
        raise error(f"{failure}: {type(cause).__name__}: {reason}") from cause


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
