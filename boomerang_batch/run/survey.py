"""What storage says is done of a run, and what is left to do: one listing, and the markers not known yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from boomerang_batch import storage
from boomerang_batch.errors import RunMismatchError
from boomerang_batch.run.appendix import appendices, current_counts
from boomerang_batch.run.commit import MARKER_SUFFIX
from boomerang_batch.run.markers import Markers
from boomerang_batch.run.tasks import ShardReport, Task


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One look at OUT."""

    done: Sequence[ShardReport]
    """Of the shards that are done, with their rows as appendices have mended them."""
    todo: Sequence[Task]
    committed: frozenset[str]
    """Every shard and appendix with a marker."""


def survey(out: str, markers: Markers, tasks: Sequence[Task], recipe_digest: str) -> Survey:
    """Look at OUT now. Raises StorageError, and RunMismatchError for a shard that another recipe made."""
    found = storage.list_sizes(out, MARKER_SUFFIX)
    sizes = {name.removesuffix(MARKER_SUFFIX): size_bytes for name, size_bytes in found.items()}
    markers.forget_all_but(sizes)
    more = appendices(found)
    wanted = [task.name for task in tasks if task.name in sizes]
    told = markers.read({each: sizes[each] for name in wanted for each in (name, *more.get(name, ()))})
    done, todo = [], []
    for task in tasks:
        if task.name not in told:
            todo.append(task)
        elif told[task.name].recipe_digest != recipe_digest:
            raise RunMismatchError(f"{out} holds shard {task.name} of another recipe; use an empty OUT")
        else:
            counts = told[task.name].counts
            if task.name in more:
                appended = (told[name].counts for name in more[task.name] if name in told)
                counts = current_counts(counts, appended)
            done.append(ShardReport(name=task.name, status="there", counts=counts))
    return Survey(done=done, todo=todo, committed=frozenset(sizes))
