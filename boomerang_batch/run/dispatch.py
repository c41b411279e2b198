"""The pool on Ray: who gets which task, and what becomes of it.

Every worker of the crew holds up to `DEPTH` tasks. When one dies its tasks go back to the queue, unless storage
says that they were committed before the death. A task that shared its worker with another may not be to blame,
so from then on it runs alone; only a death that a task met alone, and without having got further than any time
before, counts as an attempt. After `max_attempts` of those it is quarantined. Ray's own restarts and retries
are off: they would repeat a poisoned task for ever and could not tell the innocent.

A worker whose machine is about to leave gives its tasks back in time, which is no attempt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from boomerang_batch import storage
from boomerang_batch.run import ray_cluster
from boomerang_batch.run.commit import read_marker
from boomerang_batch.run.crew import Crew
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.member import Member
from boomerang_batch.run.ray_cluster import DEATHS, answer, first_line, why
from boomerang_batch.run.tasks import DEPTH, RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.worker import Worker

_POLL_S = 0.5

_Work = tuple[str, str]
"""A phase and a name: a shard may have a task in each phase."""

_log = logging.getLogger(__name__)


class RayPool:
    """Does tasks on Ray actors. See `driver.Pool` for the contract."""

    def __init__(
        self, spec: RunSpec, *, address: str, workers: int | None, max_attempts: int, worker: Any = Worker
    ) -> None:
        self._out = spec.out
        self._address = address
        self._max_attempts = max_attempts
        self._crew = Crew(spec, workers=workers, worker=worker)
        self._queue: deque[Task] = deque()
        self._solo: deque[Task] = deque()
        self._attempts: Counter[_Work] = Counter()
        self._furthest: dict[_Work, int] = {}

    def start(self, *, stop: threading.Event) -> WorkerFacts:
        """Have a first worker ready; see `Crew.gather`."""
        return self._crew.gather(self._address, stop=stop)

    def run(
        self, tasks: Sequence[Task], *, stop: threading.Event, progress: Callable[[str, int], None]
    ) -> Iterator[ShardReport]:
        """Do `tasks`, in any order, until `stop` is set and the workers have come to a batch boundary."""
        crew = self._crew
        self._queue.extend(tasks)
        stopping = False
        # What is queued when a stop comes, or comes back from a dead worker later, is left undone.
        while any(member.tasks for member in crew.members) or (not stopping and (self._queue or self._solo)):
            if stop.is_set() and not stopping:
                stopping = True
                for member in crew.members:
                    member.stop()
            if not stopping:
                crew.look_round(waiting=len(self._queue) + len(self._solo))
                self._hand_out()
            yield from self._settle(stopping)
            for member, reason in crew.ask(progress):
                yield from self._bury(member, reason, hire=not stopping)

    def close(self) -> None:
        """End the workers, and Ray where it is ours."""
        self._crew.close()

    def _hand_out(self) -> None:
        members = self._crew.members
        ready = [member for member in members if member.ready]
        for member in ready:
            if self._solo and not member.tasks:
                member.give(self._solo.popleft(), alone=True)
            elif self._queue and not member.tasks:
                member.give(self._queue.popleft(), alone=False)
        # A second task only where that leaves enough for those who have none yet.
        idle = sum(not member.tasks and not member.leaving for member in members)
        for member in ready:
            while len(self._queue) > idle and not member.alone and len(member.tasks) < DEPTH and not self._solo:
                member.give(self._queue.popleft(), alone=False)

    def _settle(self, stopping: bool) -> Iterator[ShardReport]:
        """Wait a moment for answers and act on them."""
        members = self._crew.members
        pending = [reference for member in members for reference in member.tasks]
        pending += [member.loading for member in members if member.loading is not None and not stopping]
        if not pending:
            time.sleep(_POLL_S)  # for a machine, or for the next try at hiring
            return
        for reference in ray_cluster.answered(pending, timeout_s=_POLL_S):
            member = next((one for one in members if reference in one.tasks or reference == one.loading), None)
            if member is None:
                continue  # it was buried for another of these answers
            if reference == member.loading:
                self._crew.welcome(member)
                continue
            task = member.tasks[reference]
            try:
                report: ShardReport = answer(reference)
            except DEATHS as error:
                yield from self._bury(member, why(error), hire=not stopping)
                continue
            except ray.exceptions.RayTaskError as error:
                told = {"shard": task.name, **PLAIN}
                _log.error("task %s failed unexpectedly", task.name, exc_info=error, extra=told)
                # A worker may be broken for good by now, as CUDA errors break a process, and would fail every
                # further task at once: it is replaced as if it had died.
                yield from self._bury(member, f"unforeseen error: {first_line(error)}", hire=not stopping)
                continue
            del member.tasks[reference]
            member.alone = False
            if member.stopping and report.status == "stopped" and not stopping:
                self._queue.appendleft(task)
            else:
                yield report

    def _bury(self, member: Member, reason: str, *, hire: bool) -> Iterator[ShardReport]:
        """A worker is lost: sort out what it leaves and hire another."""
        self._crew.dismiss(member)
        victims = list(member.tasks.values())
        # What a worker says of its end is discreet already.
        _log.warning("a worker is lost with %d task(s) in flight; %s", len(victims), reason, extra=PLAIN)
        for task in victims:
            there = read_marker(self._out, task.name) if task.phase == "outputs" else None
            got = sum(done.get(task.name, 0) for done in (member.state.finished, member.state.coded))
            if there is not None:
                yield ShardReport(name=task.name, status="there", counts=there.counts)
            elif member.leaving:
                self._queue.appendleft(task)  # it was known to end
            elif len(victims) > 1 or got > self._furthest.get(_work(task), 0):
                self._furthest[_work(task)] = max(got, self._furthest.get(_work(task), 0))
                self._solo.append(task)
            else:
                yield from self._blame(task, reason)
        if hire:
            self._crew.hire()

    def _blame(self, task: Task, reason: str) -> Iterator[ShardReport]:
        """Count an attempt of a task, and quarantine it when it has had enough."""
        self._attempts[_work(task)] += 1
        if self._attempts[_work(task)] < self._max_attempts:
            self._solo.append(task)
            return
        which = f"shard {task.name} ({storage.without_secrets(task.url)})"
        reason = f"gave up on {which} after {self._max_attempts} attempts; {reason}"
        yield ShardReport(name=task.name, status="quarantined", reason=reason)


def _work(task: Task) -> _Work:
    return task.phase, task.name
