"""The pool without Ray: one runner in this process, one task after another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence

from boomerang_batch.errors import ShardError, StoppedError
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import RunSpec, ShardReport, Task, WorkerFacts


class InlinePool:
    """Does tasks right here. See `driver.Pool` for the contract."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._runner: Runner | None = None

    def start(self, *, stop: threading.Event) -> WorkerFacts:
        """Load the model, which nothing interrupts."""
        self._runner = Runner(self._spec)
        return self._runner.facts

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]:
        """Do `tasks` in order until `stop` is set."""
        if self._runner is None:
            raise RuntimeError("run was called before start")
        for task in tasks:
            if stop.is_set():
                return
            try:
                yield self._runner.run(task, stop=stop, progress=functools.partial(progress, task.name))
            except StoppedError as error:
                yield ShardReport(name=task.name, status="stopped", reason=str(error))
            except ShardError as error:
                yield ShardReport(name=task.name, status="quarantined", reason=str(error))

    def close(self) -> None:
        """Nothing outlives the process."""
