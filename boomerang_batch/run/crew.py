"""The crew of workers on Ray: who is hired, who is ready, who is let go, as machines join and leave.

Every worker is wanted at once; those that find no GPU free wait for one, and are what makes an autoscaler add
machines. One that can't load the model, or not as the others did, is turned away and replaced, sooner or later.
What the ready ones do is `dispatch`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from boomerang_batch.errors import BoomerangError, RunMismatchError, StoppedError
from boomerang_batch.run import ray_cluster
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.member import Member
from boomerang_batch.run.ray_cluster import DEATHS, answer, first_line, why
from boomerang_batch.run.tasks import RunSpec, WorkerFacts

_POLL_S = 0.5
_LOOK_EVERY_S = 2.0
"""How often the cluster is asked for machines that join or leave."""
_LEAVE_BEFORE_S = 20.0
"""So long before its machine is shut down a worker gives its tasks back."""
_TELL_AFTER_S = 20.0
_TELL_EVERY_S = 60.0
"""When nobody is ready it is told for what they wait; but a process with PyTorch takes a while to start."""
_LOAD_FAILURES_ALLOWED = 3
_HIRE_AGAIN_S = 5.0
_FORGIVEN_AFTER_S = 600.0

_log = logging.getLogger(__name__)


class Crew:
    """The workers of one pool: `members` holds those that are hired and not lost."""

    def __init__(self, spec: RunSpec, *, workers: int | None, worker: Any) -> None:
        """`worker` is the actor to hire; None `workers`: as many as there are GPUs, at least one."""
        self.members: list[Member] = []
        self._spec = spec
        self._workers = workers
        self._worker = worker
        self._owns_ray = False
        self._options: dict[str, Any] = {}
        self._needs = ""
        self._wanted = 1
        self._facts: WorkerFacts | None = None
        self._load_failures = 0
        self._load_failed_at = -math.inf
        self._looked_at = 0.0
        self._tell_at = math.inf

    def gather(self, address: str, *, stop: threading.Event) -> WorkerFacts:
        """Connect, ask for every worker, and wait until the first has loaded the model.

        With `batch_size: auto`, not known yet, the first worker probes alone, and the others are told. Raises
        StoppedError when `stop` is set meanwhile, or the recipe's `run.start_timeout_s` is over.
        """
        self._owns_ray = ray_cluster.connect(address)
        gpus = ray_cluster.gpus() if self._spec.device != "cpu" else 0
        self._wanted = wanted = self._workers or max(gpus, 1)
        if gpus and wanted > gpus:
            _log.warning("%d workers wanted but Ray has %d GPUs; the others join as GPUs do", wanted, gpus)
        elsewhere = address != "local"
        on_gpus = bool(gpus) or (self._spec.device == "cuda" and elsewhere)  # GPUs that are still to come
        self._options = {
            "num_gpus": 1 if on_gpus else 0,
            # A cluster's head has no CPUs to give, so that nothing but the driver runs there.
            "num_cpus": 0 if on_gpus or not elsewhere else 1,
            "scheduling_strategy": "SPREAD",
        }
        self._needs = "GPU" if self._options["num_gpus"] else "CPU" if self._options["num_cpus"] else ""
        probing = self._spec.recipe.batch_size == "auto" and self._spec.batch_size is None
        self.hire(1 if probing else wanted)
        began, limit_s = time.monotonic(), self._spec.recipe.run.start_timeout_s
        while self._facts is None:
            if stop.is_set():
                raise StoppedError("stopped before any worker was ready; run the same command to begin again")
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise StoppedError(
                    f"no worker was ready within {limit_s:g} s (run.start_timeout_s): {self._standing()}; "
                    "run the same command to try again"
                )
            ready = ray_cluster.answered([member.loading for member in self.members], timeout_s=_POLL_S)
            for member in [member for member in self.members if member.loading in ready]:
                self.welcome(member)
            self._watch_loading()
        if probing:
            self._spec = dataclasses.replace(self._spec, batch_size=int(self._facts.stack["batch_size"]))
            self.hire(wanted - 1)
        return self._facts

    def hire(self, count: int = 1) -> None:
        """Ask for more workers."""
        for _ in range(max(count, 0)):
            actor = self._worker.options(**self._options).remote(self._spec)
            self.members.append(Member(actor=actor, loading=actor.load.remote()))

    def welcome(self, member: Member) -> None:
        """A worker has answered its `load` call: it is ready, or dead, or what it loads is bad."""
        try:
            facts: WorkerFacts = answer(member.loading)
            if self._facts is not None and facts != self._facts:
                raise RunMismatchError(
                    f"workers differ, so their outputs would: {self._facts.stack} and {facts.stack}; "
                    "use machines with one stack"
                )
        except DEATHS as error:
            self._turn_away(member, f"{why(error)}; is memory short?", error)
        except Exception as error:
            if self._facts is None:
                raise  # nobody can do it, as it seems
            self._turn_away(member, first_line(error), error)
        else:
            self._load_failures = 0
            self._facts = facts
            member.loaded()

    def look_round(self, *, waiting: int) -> None:
        """Use GPUs that have joined, and let machines go that are leaving, or not needed any more.

        `waiting` is the number of tasks that nobody has in hand.
        """
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        self._watch_loading()
        if self._workers is None and self._options["num_gpus"]:
            self._wanted = max(ray_cluster.gpus(), 1)
        failures = self._load_failures
        again_s = (
            0.0 if failures < _LOAD_FAILURES_ALLOWED else min(_HIRE_AGAIN_S * 2.0**failures, _FORGIVEN_AFTER_S)
        )
        if time.monotonic() - self._load_failed_at >= again_s:
            self.hire(min(self._wanted - len(self.members), waiting))
        if not waiting:
            # Workers that wait for a GPU are what makes an autoscaler add machines; idle ones keep machines.
            for member in [member for member in self.members if not member.tasks]:
                self.dismiss(member)
        left_s = ray_cluster.leaving()
        for member in [member for member in self.members if member.state.node in left_s]:
            member.leaving = True
            if not member.tasks:
                _log.info("a worker leaves with its machine")
                self.dismiss(member)
                self.hire()
            elif not member.stopping and left_s[member.state.node] < _LEAVE_BEFORE_S:
                member.stop()

    def ask(self, progress: Callable[[str, int], None]) -> Iterator[tuple[Member, str]]:
        """Ask all at work how they are, and tell `progress`. Yields those that can't go on, and why."""
        at_work = [member for member in self.members if member.loading is None and member.tasks]
        for member in self._hear(at_work):
            for task in member.tasks.values():
                if task.name in member.state.finished:
                    progress(task.name, member.state.finished[task.name])
        for member in at_work:
            trouble = member.trouble(self._spec.recipe.run)
            if trouble:
                yield member, trouble

    def dismiss(self, member: Member) -> None:
        """Let a worker go. One that seems dead is killed too: it may only be out of reach, and hold its GPU."""
        self.members.remove(member)
        with contextlib.suppress(Exception):  # the dead can't be killed again
            ray_cluster.end(member.actor)

    def close(self) -> None:
        """End the workers, and Ray where it is ours."""
        for member in list(self.members):
            self.dismiss(member)
        if self._owns_ray:
            ray_cluster.leave()

    def _hear(self, members: Sequence[Member]) -> list[Member]:
        """Those of them that have answered how they are; others are asked, or given time."""
        asked = {member.asked: member for member in members if member.asked is not None}
        answered = [asked[reference] for reference in ray_cluster.answered([*asked], timeout_s=0)]
        for member in answered:
            member.hear()
        for member in members:
            member.ask(len(self.members))
        return answered

    def _watch_loading(self) -> None:
        """Turn away those that hang, and say what is waited for while nobody is ready."""
        loading = [member for member in self.members if member.loading is not None]
        self._hear(loading)
        for member in loading:
            trouble = member.trouble(self._spec.recipe.run)
            if trouble:
                self._turn_away(member, trouble)
        now = time.monotonic()
        if any(member.loading is None for member in self.members) or not self._unplaced():
            self._tell_at = math.inf
        elif self._tell_at == math.inf:
            self._tell_at = now + _TELL_AFTER_S
        elif now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY_S
            _log.warning(
                "waiting for %ss: %s; others start as machines join or become free",
                self._needs,
                self._standing(),
                extra=PLAIN,
            )

    def _unplaced(self) -> int:
        """How many workers have no process yet, as far as they need something to get one."""
        return sum(not member.started for member in self.members) if self._needs else 0

    def _standing(self) -> str:
        """How many workers have come how far, and what the others could have."""
        started = sum(member.started for member in self.members)
        told = f"{started} of {len(self.members)} workers have started"
        return f"{told}; {ray_cluster.offer(self._needs)}" if self._unplaced() else told

    def _turn_away(self, member: Member, reason: str, error: Exception | None = None) -> None:
        """A worker can't load the model, or not as the others did: one bad machine must not end what they do.

        Another is hired at once while nobody is ready; later on `look_round` does so, at growing intervals.
        """
        self.dismiss(member)
        now = time.monotonic()
        if self._facts is not None and now - self._load_failed_at > _FORGIVEN_AFTER_S:
            self._load_failures = 0
        self._load_failures, self._load_failed_at = self._load_failures + 1, now
        told = f"{self._load_failures} worker(s) in a row could not load the model"
        if self._load_failures >= _LOAD_FAILURES_ALLOWED and not self.members:
            raise BoomerangError(f"{told}, the last because {reason}") from error
        # No worker has seen an input before it has loaded the model.
        _log.warning("%s, the last because %s; going on with %d", told, reason, len(self.members), extra=PLAIN)
        if self._load_failures < _LOAD_FAILURES_ALLOWED:
            self.hire()
