"""One worker as the pool sees it: what it has in hand, how it said it is, and whether it can go on.

A worker that does not answer, takes too long to load, or whose device has been at one step for too long is as
good as dead: Ray notices none of these.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from boomerang_batch.config.blocks import RunOptions
from boomerang_batch.run import ray_cluster
from boomerang_batch.run.tasks import Task, WorkerState

_ASK_EVERY_S = 0.2
"""How often a worker is asked how it is, and rarer the more there are: a death counts against a shard only if
that got no further than before, so what is known of it must not be old."""
_ASK_S_PER_WORKER = 0.01
_SILENT_S = 60.0
"""A worker that has not answered for so long is frozen or out of reach; an answer needs no device."""


@dataclass(eq=False, kw_only=True)
class Member:
    """A hired worker."""

    actor: Any
    loading: Any
    """The reference of its `load` call; None once it is ready."""
    tasks: dict[Any, Task] = field(default_factory=dict)
    """What it has in hand, by the reference of its call."""
    alone: bool = False
    """Whether the task it has must not be joined by another."""
    started: bool = False
    """Whether it has a process by now; before it has no place on any machine, or is on its way there."""
    state: WorkerState = field(default_factory=WorkerState)
    """Its last answer."""
    leaving: bool = False
    """Whether its machine is about to be shut down: it gets no more tasks."""
    stopping: bool = False
    asked: Any = None
    asked_at: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether it has loaded the model and may be given tasks."""
        return self.loading is None and not self.leaving

    def loaded(self) -> None:
        """It has answered its `load` call."""
        self.loading, self.started = None, True
        self.asked_at = time.monotonic()  # what it was asked before it had a process is answered only now

    def give(self, task: Task, *, alone: bool) -> None:
        """Have it do a task."""
        self.alone = alone
        self.tasks[self.actor.run.remote(task)] = task

    def stop(self) -> None:
        """Have it end what it does at its next batch boundary."""
        self.stopping = True
        self.actor.stop.remote()

    def ask(self, workers: int) -> None:
        """Ask it how it is, if it is time to. `workers` are all there are."""
        due_s = _ASK_EVERY_S + _ASK_S_PER_WORKER * workers
        if self.asked is None and time.monotonic() - self.asked_at > due_s:
            self.asked, self.asked_at = self.actor.state.remote(), time.monotonic()

    def hear(self) -> None:
        """Take its answer, which is there."""
        reference, self.asked = self.asked, None
        with contextlib.suppress(*ray_cluster.DEATHS):  # its other calls' references will tell
            self.state, self.started = ray_cluster.answer(reference), True

    def trouble(self, limits: RunOptions) -> str:
        """Why it is in no state to go on; nothing if it is."""
        silent_s = time.monotonic() - self.asked_at if self.asked is not None and self.started else 0.0
        if silent_s > _SILENT_S:
            return f"no answer from it for {silent_s:.0f} s"
        loading_s, limit_s = self.state.loading_s, limits.load_deadline_s
        if self.loading is not None and loading_s > limit_s:
            return f"it was loading the model for {loading_s:.0f} s (run.load_deadline_s: {limit_s:g})"
        stalled_s, limit_s = self.state.stalled_s, limits.step_deadline_s
        if stalled_s > limit_s:
            return f"its device was at one step for {stalled_s:.0f} s (run.step_deadline_s: {limit_s:g})"
        return ""
