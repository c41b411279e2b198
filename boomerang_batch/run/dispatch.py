"""The pool on Ray: workers come and go, tasks get done.

Every worker is wanted at once and holds up to `DEPTH` tasks. When one dies its tasks go back to the queue,
unless storage says that they were committed before the death. A task that shared its worker with another may
not be to blame, so from then on it runs alone; only a death that a task met alone, and without having got
further than any time before, counts as an attempt. After `max_attempts` of those it is quarantined. Ray's own
restarts and retries are off: they would repeat a poisoned task for ever and could not tell the innocent.

A worker that does not answer, or whose device has been at one step for too long, counts as dead: Ray does not
notice either. One whose machine is about to leave gives its tasks back in time, which is no attempt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from boomerang_batch.errors import BoomerangError, RunMismatchError, StoppedError
from boomerang_batch.run import ray_cluster
from boomerang_batch.run.commit import read_marker
from boomerang_batch.run.ray_cluster import DEATHS, answer, first_line, why
from boomerang_batch.run.tasks import DEPTH, RunSpec, ShardReport, Task, WorkerFacts, WorkerState
from boomerang_batch.run.worker import Worker

_POLL_S = 0.5
_LOOK_EVERY_S = 2.0
"""How often the cluster is asked for machines that join or leave."""
_ASK_EVERY_S = 0.2
"""How often a worker is asked how it is, and rarer the more there are: a death counts against a shard only if
that got no further than before, so what is known of it must not be old."""
_ASK_S_PER_WORKER = 0.01
_SILENT_S = 60.0
"""A worker that has not answered for so long is frozen or out of reach; an answer needs no device."""
_LEAVE_BEFORE_S = 20.0
"""So long before its machine is shut down a worker gives its tasks back."""
_LOAD_FAILURES_ALLOWED = 3
_HIRE_AGAIN_S = 5.0
_FORGIVEN_AFTER_S = 600.0

_log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Member:
    """One worker as the pool sees it."""

    actor: Any
    loading: Any
    """The reference of its `load` call; None once it is ready."""
    tasks: dict[Any, Task] = field(default_factory=dict)
    alone: bool = False
    """Whether the task it has must not be joined by another."""
    asked: Any = None
    asked_at: float = 0.0
    state: WorkerState = field(default_factory=WorkerState)
    leaving: bool = False
    """Whether its machine is about to be shut down: it gets no more tasks."""
    stopping: bool = False


class RayPool:
    """Does tasks on Ray actors. See `driver.Pool` for the contract."""

    def __init__(
        self, spec: RunSpec, *, address: str, workers: int | None, max_attempts: int, worker: Any = Worker
    ) -> None:
        self._spec = spec
        self._worker = worker
        self._address = address
        self._workers = workers
        self._max_attempts = max_attempts
        self._owns_ray = False
        self._options: dict[str, Any] = {}
        self._members: list[_Member] = []
        self._facts: WorkerFacts | None = None
        self._load_failures = 0
        self._load_failed_at = -math.inf
        self._wanted = 1
        self._looked_at = 0.0
        self._queue: deque[Task] = deque()
        self._solo: deque[Task] = deque()
        self._attempts: Counter[str] = Counter()
        self._furthest: dict[str, int] = {}

    def start(self, *, stop: threading.Event) -> WorkerFacts:
        """Connect, ask for every worker, and wait until the first has loaded the model.

        Workers that find no GPU free wait for one, so this may take long. With `batch_size: auto`, not known
        yet, the first worker probes alone, and the others are told. Raises StoppedError when `stop` is set
        meanwhile.
        """
        self._owns_ray = ray_cluster.connect(self._address)
        gpus = ray_cluster.gpus() if self._spec.device != "cpu" else 0
        self._wanted = wanted = self._workers or max(gpus, 1)
        if gpus and wanted > gpus:
            _log.warning("%d workers wanted but Ray has %d GPUs; the others join as GPUs do", wanted, gpus)
        elsewhere = self._address != "local"
        on_gpus = bool(gpus) or (self._spec.device == "cuda" and elsewhere)  # GPUs that are still to come
        self._options = {
            "num_gpus": 1 if on_gpus else 0,
            # A cluster's head has no CPUs to give, so that nothing but the driver runs there.
            "num_cpus": 0 if on_gpus or not elsewhere else 1,
            "scheduling_strategy": "SPREAD",
        }
        probing = self._spec.recipe.batch_size == "auto" and self._spec.batch_size is None
        self._hire(1 if probing else wanted)
        while self._facts is None:
            if stop.is_set():
                raise StoppedError("stopped before any worker was ready; run the same command to begin again")
            ready, _ = ray.wait([member.loading for member in self._members], timeout=_POLL_S)
            for member in [member for member in self._members if member.loading in ready]:
                self._welcome(member)
        if probing:
            self._spec = dataclasses.replace(self._spec, batch_size=int(self._facts.stack["batch_size"]))
            self._hire(wanted - 1)
        return self._facts

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]:
        """Do `tasks`, in any order, until `stop` is set and the workers have come to a batch boundary."""
        self._queue.extend(tasks)
        stopping = False
        # What is queued when a stop comes, or comes back from a dead worker later, is left undone.
        while any(member.tasks for member in self._members) or (not stopping and (self._queue or self._solo)):
            if stop.is_set() and not stopping:
                stopping = True
                for member in self._members:
                    member.actor.stop.remote()
            if not stopping:
                self._look_round()
                self._hand_out()
            yield from self._settle(stopping)
            yield from self._ask(progress, stopping)

    def close(self) -> None:
        """End the workers, and Ray where it is ours."""
        for member in list(self._members):
            self._dismiss(member)
        if self._owns_ray:
            ray.shutdown()

    def _hire(self, count: int = 1) -> None:
        for _ in range(max(count, 0)):
            actor = self._worker.options(**self._options).remote(self._spec)
            self._members.append(_Member(actor=actor, loading=actor.load.remote()))

    def _welcome(self, member: _Member) -> None:
        """A worker has answered its `load` call: it is ready, or dead, or what it loads is bad."""
        try:
            facts: WorkerFacts = answer(member.loading)
            if self._facts is not None and facts != self._facts:
                raise RunMismatchError(
                    f"workers differ, so their outputs would: {self._facts.stack} and {facts.stack}; "
                    "use machines with one stack"
                )
        except DEATHS as error:
            self._turn_away(member, why(error), error)
        except Exception as error:
            if self._facts is None:
                raise  # nobody can do it, as it seems
            cause = error.cause if isinstance(error, RayTaskError) else error
            self._turn_away(member, first_line(cause), error)
        else:
            self._load_failures = 0
            self._facts = facts
            member.loading = None

    def _turn_away(self, member: _Member, reason: str, error: Exception) -> None:
        """A worker can't load the model, or not as the others did: one bad machine must not end what they do.

        Another is hired at once while nobody is ready; later on `_look_round` does so, at growing intervals.
        """
        self._dismiss(member)
        now = time.monotonic()
        if now - self._load_failed_at > _FORGIVEN_AFTER_S:
            self._load_failures = 0
        self._load_failures, self._load_failed_at = self._load_failures + 1, now
        told = f"{self._load_failures} worker(s) in a row could not load the model"
        if self._load_failures >= _LOAD_FAILURES_ALLOWED and not self._members:
            raise BoomerangError(f"{told}; is memory short? ({reason})") from error
        _log.warning("%s, the last because %s; going on with %d", told, reason, len(self._members))
        if self._load_failures < _LOAD_FAILURES_ALLOWED:
            self._hire()

    def _look_round(self) -> None:
        """Use GPUs that have joined, and let machines go that are leaving, or not needed any more."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        waiting = len(self._queue) + len(self._solo)
        if self._workers is None and self._options["num_gpus"]:
            self._wanted = max(ray_cluster.gpus(), 1)
        failures = self._load_failures
        again_s = (
            0.0 if failures < _LOAD_FAILURES_ALLOWED else min(_HIRE_AGAIN_S * 2.0**failures, _FORGIVEN_AFTER_S)
        )
        if time.monotonic() - self._load_failed_at >= again_s:
            self._hire(min(self._wanted - len(self._members), waiting))
        if not waiting:
            # Workers that wait for a GPU are what makes an autoscaler add machines; idle ones keep machines.
            for member in [member for member in self._members if not member.tasks]:
                self._dismiss(member)
        left_s = ray_cluster.leaving()
        for member in [member for member in self._members if member.state.node in left_s]:
            member.leaving = True
            if not member.tasks:
                self._replace(member)
            elif not member.stopping and left_s[member.state.node] < _LEAVE_BEFORE_S:
                member.stopping = True
                member.actor.stop.remote()

    def _hand_out(self) -> None:
        ready = [member for member in self._members if member.loading is None and not member.leaving]
        for member in ready:
            if self._solo and not member.tasks:
                self._give(member, self._solo.popleft(), alone=True)
            elif self._queue and not member.tasks:
                self._give(member, self._queue.popleft(), alone=False)
        # A second task only where that leaves enough for those who have none yet.
        idle = sum(not member.tasks and not member.leaving for member in self._members)
        for member in ready:
            while len(self._queue) > idle and not member.alone and len(member.tasks) < DEPTH and not self._solo:
                self._give(member, self._queue.popleft(), alone=False)

    def _replace(self, member: _Member) -> None:
        _log.info("a worker leaves with its machine")
        self._dismiss(member)
        self._hire()

    def _dismiss(self, member: _Member) -> None:
        """Let a worker go. One that seems dead is killed too: it may only be out of reach, and hold its GPU."""
        self._members.remove(member)
        with contextlib.suppress(Exception):  # the dead can't be killed again
            ray.kill(member.actor)

    def _give(self, member: _Member, task: Task, *, alone: bool) -> None:
        member.alone = alone
        member.tasks[member.actor.run.remote(task)] = task

    def _settle(self, stopping: bool) -> Iterator[ShardReport]:
        """Wait a moment for answers and act on them."""
        pending = [reference for member in self._members for reference in member.tasks]
        pending += [member.loading for member in self._members if member.loading is not None and not stopping]
        if not pending:
            time.sleep(_POLL_S)  # for a machine, or for the next try at hiring
            return
        ready, _ = ray.wait(pending, num_returns=1, timeout=_POLL_S)
        for reference in ready:
            member = next(m for m in self._members if reference in m.tasks or reference == m.loading)
            if reference == member.loading:
                self._welcome(member)
                continue
            task = member.tasks[reference]
            try:
                report: ShardReport = answer(reference)
            except DEATHS as error:
                yield from self._bury(member, why(error), hire=not stopping)
                continue
            except RayTaskError as error:
                _log.error("task %s failed unexpectedly", task.name, exc_info=error)
                # A worker may be broken for good by now, as CUDA errors break a process, and would fail every
                # further task at once: it is replaced as if it had died.
                reason = f"unforeseen error: {first_line(error.cause)}"
                yield from self._bury(member, reason, hire=not stopping)
                continue
            del member.tasks[reference]
            member.alone = False
            if member.stopping and report.status == "stopped" and not stopping:
                self._queue.appendleft(task)
            else:
                yield report

    def _bury(self, member: _Member, reason: str, *, hire: bool) -> Iterator[ShardReport]:
        """A worker is lost: sort out what it leaves and hire another."""
        self._dismiss(member)
        victims = list(member.tasks.values())
        _log.warning("a worker is lost with %d task(s) in flight; %s", len(victims), reason)
        for task in victims:
            there = read_marker(self._spec.out, task.name)
            got = member.state.finished.get(task.name, 0)
            if there is not None:
                yield ShardReport(name=task.name, status="there", counts=there.counts)
            elif member.leaving:
                self._queue.appendleft(task)  # it was known to end
            elif len(victims) > 1 or got > self._furthest.get(task.name, 0):
                self._furthest[task.name] = max(got, self._furthest.get(task.name, 0))
                self._solo.append(task)
            else:
                yield from self._blame(task, reason)
        if hire:
            self._hire()

    def _blame(self, task: Task, reason: str) -> Iterator[ShardReport]:
        """Count an attempt of a task, and quarantine it when it has had enough."""
        self._attempts[task.name] += 1
        if self._attempts[task.name] < self._max_attempts:
            self._solo.append(task)
            return
        reason = f"gave up on shard {task.name} after {self._max_attempts} attempts; {reason}"
        yield ShardReport(name=task.name, status="quarantined", reason=reason)

    def _ask(self, progress: Callable[[str, int], None], stopping: bool) -> Iterator[ShardReport]:
        """Ask every worker at work how it is; one that is in no state to go on is lost."""
        for member in [member for member in self._members if member.loading is None and member.tasks]:
            if member.asked is None:
                if time.monotonic() - member.asked_at > _ASK_EVERY_S + _ASK_S_PER_WORKER * len(self._members):
                    member.asked, member.asked_at = member.actor.state.remote(), time.monotonic()
            elif ray.wait([member.asked], timeout=0)[0]:
                with contextlib.suppress(*DEATHS):  # its tasks' references will tell
                    member.state = ray.get(member.asked)
                    for task in member.tasks.values():
                        if task.name in member.state.finished:
                            progress(task.name, member.state.finished[task.name])
                member.asked = None
            silent_s = time.monotonic() - member.asked_at if member.asked is not None else 0.0
            stalled_s, limit_s = member.state.stalled_s, self._spec.recipe.run.step_deadline_s
            if silent_s > _SILENT_S:
                yield from self._bury(member, f"no answer from it for {silent_s:.0f} s", hire=not stopping)
            elif stalled_s > limit_s:
                reason = f"its device was at one step for {stalled_s:.0f} s (run.step_deadline_s: {limit_s:g})"
                yield from self._bury(member, reason, hire=not stopping)
