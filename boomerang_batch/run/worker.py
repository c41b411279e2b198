"""The Ray actor: one runner, pinned to one GPU where there are GPUs.

Methods of the `work` group do tasks, two at a time, so that one can read or publish while the other's batch is
on the device; those of the `ctl` group answer at any time. The model is loaded by `load`, not by the
constructor, because an error in a constructor reaches the driver only as a dead actor.
"""

from __future__ import annotations

import functools
import logging
import threading
import time

import ray

from boomerang_batch.errors import BoomerangError
from boomerang_batch.run import log_lines
from boomerang_batch.run.logs import discretion_of_worker
from boomerang_batch.run.metrics import Exporter
from boomerang_batch.run.runner import Runner
from boomerang_batch.run.tasks import DEPTH, RunSpec, ShardReport, Task, WorkerFacts, WorkerState

_log = logging.getLogger(__name__)


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"work": DEPTH, "ctl": 1})
class Worker:
    """One model on one device. The driver replaces dead workers; Ray's own restarts are off."""

    def __init__(self, spec: RunSpec) -> None:
        discretion = discretion_of_worker(spec)
        log_lines.set_up(spec.log_format, discretion)
        log_lines.speak_for("ray")
        self._spec = spec
        self._runner: Runner | None = None
        self._load_began: float | None = None
        self._stop = threading.Event()
        self._finished: dict[str, int] = {}
        self._coded: dict[str, int] = {}
        self._metrics = Exporter()

    @ray.method(concurrency_group="work")
    def load(self) -> WorkerFacts:
        """Load the model, once. Raises what the runner raises."""
        if self._runner is None:
            self._load_began = time.monotonic()
            self._runner = Runner(self._spec)
            self._load_began = None
        return self._runner.facts

    @ray.method(concurrency_group="work")
    def run(self, task: Task) -> ShardReport:
        """Do one task."""
        if self._runner is None:
            raise RuntimeError("run was called before load")

        try:
            return self._runner.run(
                task,
                stopped=self._stop.is_set,
                progress=functools.partial(self._finished.__setitem__, task.name),
                coded=functools.partial(self._coded.__setitem__, task.name),
            )
        except Exception as error:
            if not log_lines.hides(error):
                raise
            # Ray shows what a call raised to everyone who may look at the cluster.
            _log.error("a task failed", exc_info=error)
            kind = type(error) if isinstance(error, BoomerangError) else RuntimeError
            failure = kind(log_lines.words(error))
        finally:
            self._finished.pop(task.name, None)
            self._coded.pop(task.name, None)
            self._metrics.export(self._runner.totals)  # nobody may ask it again
        raise failure

    @ray.method(concurrency_group="ctl")
    def state(self) -> WorkerState:
        """How it is. Exports its metrics too."""
        if self._runner is not None:
            self._metrics.export(self._runner.totals)
        began = self._load_began
        return WorkerState(
            finished=dict(self._finished),
            coded=dict(self._coded),
            loading_s=0.0 if began is None else time.monotonic() - began,
            stalled_s=0.0 if self._runner is None else self._runner.stalled_s,
            node=ray.get_runtime_context().get_node_id(),
        )

    @ray.method(concurrency_group="ctl")
    def stop(self) -> None:
        """End the tasks in flight at their next batch boundary."""
        self._stop.set()
