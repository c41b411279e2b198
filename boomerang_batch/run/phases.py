"""Methods with phases: what is to be done before any output is made, by the driver's pool like all the rest.

What is done, storage tells: a shard's latents and what they add by a marker, the fit by another.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from boomerang_batch import storage
from boomerang_batch.errors import ConfigError
from boomerang_batch.run import artefacts
from boomerang_batch.run.commit import MARKER_SUFFIX
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.kept_codes import codes_home
from boomerang_batch.run.request import RunRequest
from boomerang_batch.run.tasks import ShardReport, Task
from boomerang_batch.run.unseen import FIT, MOMENTS_SUFFIX, digest_of_names

_log = logging.getLogger(__name__)


class _Pool(Protocol):
    """What of `driver.Pool` it takes."""

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]: ...


def refuse(request: RunRequest) -> None:
    """Raise ConfigError for what phases can't be asked for."""
    if request.recipe.method == "unseen" and request.extend:
        raise ConfigError(
            "--extend: more shards would change the fit that method unseen accepts new latents by, and what is "
            "there was made by another; take an empty OUT for all of them"
        )


def before_outputs(
    request: RunRequest, pool: _Pool, tasks: Sequence[Task], *, stop: threading.Event
) -> Generator[ShardReport, None, bool]:
    """Do all that must be there before outputs are made of `tasks`, all shards of the run.

    Yields the reports of what did not come to its end, and returns whether outputs can be made. Raises
    ConfigError where the shards have no fit.
    """
    recipe, names = request.recipe, tuple(task.name for task in tasks)
    if recipe.method != "unseen":
        return True
    home = codes_home(recipe, request.out, request.private_dir)
    if artefacts.is_there(home, FIT, made_of=digest_of_names(names), recipe_digest=recipe.digest):
        return True
    there = set(storage.list_names(home))
    todo = [
        dataclasses.replace(task, phase="latents")
        for task in tasks
        # Of latents that are gone, what they added says nothing any more.
        if not {task.name + MARKER_SUFFIX, task.name + MOMENTS_SUFFIX + artefacts.MARKER_SUFFIX} <= there
    ]
    bad = 0
    for report in pool.run(todo, stop=stop, progress=_nobody_asked):
        if report.status not in ("done", "there"):
            bad += 1
            yield report
        else:
            _log.info("shard %s: latents there", report.name, extra={"shard": report.name, **PLAIN})
    if bad or stop.is_set():
        if bad and not stop.is_set():
            _log.warning(
                "no outputs are made: the fit is one of all shards, and %d could not be read; mend them and "
                "run again, or leave them out of the manifest and take an empty OUT",
                bad,
                extra=PLAIN,
            )
        return False
    reduce = Task(name=FIT, url=home, source_stem=FIT, phase="fit", of=names)
    for report in pool.run([reduce], stop=stop, progress=_nobody_asked):
        if report.status == "quarantined":
            raise ConfigError(report.reason)
        if report.status not in ("done", "there"):
            yield report
    return not stop.is_set()


def _nobody_asked(name: str, finished: int) -> None:
    """Progress counts outputs, and these make none."""
