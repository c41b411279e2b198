"""The pool without Ray: one runner in this process, as many tasks at a time as a worker has."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import DEPTH, RunSpec, ShardReport, Task, WorkerFacts

_POLL_S = 0.5


class InlinePool:
    """Does tasks right here. See `driver.Pool` for the contract."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._runner: Runner | None = None

    def start(self, *, stop: threading.Event) -> WorkerFacts:
        """Load the model. A stop that is asked for meanwhile is heeded after that."""
        self._runner = Runner(self._spec)
        return self._runner.facts

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]:
        """Do `tasks`, begun in order, until `stop` is set."""
        runner = self._runner
        if runner is None:
            raise RuntimeError("run was called before start")
        waiting, over = deque(tasks), threading.Event()
        running: set[Future[ShardReport]] = set()
        counts: dict[str, int] = {}
        with ThreadPoolExecutor(DEPTH) as threads:
            try:
                while running or (waiting and not stop.is_set()):
                    while waiting and len(running) < DEPTH and not stop.is_set():
                        task = waiting.popleft()
                        call = functools.partial(
                            runner.run,
                            stopped=lambda: stop.is_set() or over.is_set(),
                            progress=functools.partial(counts.__setitem__, task.name),
                        )
                        running.add(threads.submit(call, task))
                    finished, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for name, count in counts.copy().items():
                        progress(name, count)
                    for future in finished:
                        report = future.result()
                        counts.pop(report.name, None)
                        yield report
            finally:
                # An error of one task, or a caller who has enough, ends the other.
                over.set()

    def close(self) -> None:
        """Let the model's thread end."""
        if self._runner is not None:
            self._runner.close()
