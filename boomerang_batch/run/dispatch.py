"""The pool on Ray: workers come and go, tasks get done.

Every worker is wanted at once and holds up to `DEPTH` tasks. When one dies its tasks go back to the queue,
unless storage says that they were committed before the death. A task that shared its worker with another may
not be to blame, so from then on it runs alone; only a death that a task met alone, and without having got
further than any time before, counts as an attempt. After `max_attempts` of those it is quarantined. Ray's own
restarts and retries are off: they would repeat a poisoned task for ever and could not tell the innocent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from boomerang_batch.errors import BoomerangError, RunMismatchError, StoppedError
from boomerang_batch.run.commit import read_marker
from boomerang_batch.run.tasks import DEPTH, RunSpec, ShardReport, Task, WorkerFacts
from boomerang_batch.run.worker import Worker

_POLL_S = 0.5
_LOAD_DEATHS_ALLOWED = 3
_DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError)

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
    finished: Mapping[str, int] = field(default_factory=dict)


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
        self._load_deaths = 0
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
        self._connect()
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self._spec.device != "cpu" else 0
        wanted = self._workers or max(gpus, 1)
        if gpus and wanted > gpus:
            _log.warning("%d workers wanted but Ray has %d GPUs; going on with %d", wanted, gpus, gpus)
            wanted = gpus
        self._options = {"num_gpus": 1 if gpus else 0, "num_cpus": 0, "scheduling_strategy": "SPREAD"}
        probing = self._spec.recipe.batch_size == "auto" and self._spec.batch_size is None
        for _ in range(1 if probing else wanted):
            self._hire()
        while self._facts is None:
            if stop.is_set():
                raise StoppedError("stopped before any worker was ready; run the same command to begin again")
            ready, _ = ray.wait([member.loading for member in self._members], timeout=_POLL_S)
            for member in [member for member in self._members if member.loading in ready]:
                self._welcome(member)
        if probing:
            self._spec = dataclasses.replace(self._spec, batch_size=int(self._facts.stack["batch_size"]))
            for _ in range(wanted - 1):
                self._hire()
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
                self._hand_out()
            yield from self._settle(stopping)
            self._ask_progress(progress)

    def close(self) -> None:
        """End the workers, and Ray where it is ours."""
        for member in list(self._members):
            self._dismiss(member)
        if self._owns_ray:
            ray.shutdown()

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        self._owns_ray = True
        # Ray installs signal handlers of its own; ours decide how a run ends.
        main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        if self._address == "local":
            # A throwaway token keeps other users of this machine out, and Ray from writing one to HOME.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            options["include_dashboard"] = False
        try:
            ray.init(address=self._address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BoomerangError(f"can't reach a Ray cluster at {self._address}: {error}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _hire(self) -> None:
        actor = self._worker.options(**self._options).remote(self._spec)
        self._members.append(_Member(actor=actor, loading=actor.load.remote()))

    def _welcome(self, member: _Member) -> None:
        """A worker has answered its `load` call: it is ready, or dead, or what it loads is bad."""
        try:
            facts: WorkerFacts = _answer(member.loading)
        except _DEATHS as error:
            self._dismiss(member)
            self._load_deaths += 1
            told = f"{self._load_deaths} worker(s) in a row died while loading the model; is memory short?"
            if self._load_deaths < _LOAD_DEATHS_ALLOWED:
                self._hire()
            elif self._members:
                # One bad machine must not end what the others can do.
                _log.warning("%s Going on with %d worker(s)", told, len(self._members))
            else:
                raise BoomerangError(f"{told} ({_first_line(error)})") from error
            return
        self._load_deaths = 0
        if self._facts is not None and facts != self._facts:
            raise RunMismatchError(
                f"workers differ, so their outputs would: {self._facts.stack} and {facts.stack}; "
                "use machines with one stack"
            )
        self._facts = facts
        member.loading = None

    def _hand_out(self) -> None:
        for member in self._members:
            if member.loading is not None:
                continue
            if self._solo and not member.tasks:
                self._give(member, self._solo.popleft(), alone=True)
            while self._queue and not member.alone and len(member.tasks) < DEPTH and not self._solo:
                self._give(member, self._queue.popleft(), alone=False)

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
            return
        ready, _ = ray.wait(pending, num_returns=1, timeout=_POLL_S)
        for reference in ready:
            member = next(m for m in self._members if reference in m.tasks or reference == m.loading)
            if reference == member.loading:
                self._welcome(member)
                continue
            task = member.tasks[reference]
            try:
                report: ShardReport = _answer(reference)
            except _DEATHS as error:
                yield from self._bury(member, f"its worker died: {_first_line(error)}", hire=not stopping)
                continue
            except RayTaskError as error:
                _log.error("task %s failed unexpectedly", task.name, exc_info=error)
                # A worker may be broken for good by now, as CUDA errors break a process, and would fail every
                # further task at once: it is replaced as if it had died.
                yield from self._bury(
                    member, f"unforeseen error: {_first_line(error.cause)}", hire=not stopping
                )
                continue
            del member.tasks[reference]
            member.alone = False
            yield report

    def _bury(self, member: _Member, why: str, *, hire: bool) -> Iterator[ShardReport]:
        """A worker is lost: sort out what it leaves and hire another."""
        self._dismiss(member)
        victims = list(member.tasks.values())
        _log.warning("a worker is lost with %d task(s) in flight; %s", len(victims), why)
        for task in victims:
            there = read_marker(self._spec.out, task.name)
            got = member.finished.get(task.name, 0)
            if there is not None:
                yield ShardReport(name=task.name, status="there", counts=there.counts)
            elif len(victims) > 1 or got > self._furthest.get(task.name, 0):
                self._furthest[task.name] = max(got, self._furthest.get(task.name, 0))
                self._solo.append(task)
            else:
                yield from self._blame(task, why)
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

    def _ask_progress(self, progress: Callable[[str, int], None]) -> None:
        for member in self._members:
            if member.loading is not None or not member.tasks:
                continue
            if member.asked is None:
                member.asked = member.actor.progress.remote()
            elif ray.wait([member.asked], timeout=0)[0]:
                with contextlib.suppress(*_DEATHS):  # its tasks' references will tell
                    member.finished = ray.get(member.asked)
                    for task in member.tasks.values():
                        if task.name in member.finished:
                            progress(task.name, member.finished[task.name])
                member.asked = None


def _answer(reference: Any) -> Any:
    """What a call returned. An error of ours comes as it was raised, not with Ray's traceback for its words."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BoomerangError):
            raise error.cause from None
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
