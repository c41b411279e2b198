"""One job as the cluster tells of it, and the exit code that this means.

Ray's own `ray job submit` exits with 1 whatever went wrong. Here a job has its driver's exit code, so that a
caller can tell a quarantined sample from a wrong recipe, and either from a stop.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from boomerang_batch.errors import BoomerangError, StoppedError

TOOL = "boomerang-batch"
_ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
_ID = re.compile(r"(bb-[0-9a-f]{12})(?:-([1-9][0-9]*))?")
_TERMINATED = frozenset({-signal.SIGTERM, 128 + signal.SIGTERM})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job. Times are those of the cluster's clock, in seconds."""

    id: str
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    metadata: Mapping[str, str]
    driver_exit_code: int | None = None
    message: str = ""
    began_s: float | None = None
    ended_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in _ENDED

    @property
    def run_id(self) -> str:
        """What was asked for, whichever attempt at it this is."""
        return self.metadata.get("run", "")

    @property
    def out(self) -> str:
        """The OUT it writes to, as the cluster names it."""
        return self.metadata.get("out", "")

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.metadata.get("recipe", "")

    @property
    def exit_code(self) -> int | None:
        """What `run` would have exited with here: 75 for a stop, 1 for a death; None while it runs."""
        if not self.ended:
            return None
        if self.state == "STOPPED" or self.driver_exit_code in _TERMINATED:
            return StoppedError.exit_code
        if self.driver_exit_code is not None and self.driver_exit_code >= 0:
            # A shell tells a kill by a code above 128, and neither it nor a missing command is ours to explain.
            return self.driver_exit_code if self.driver_exit_code < 126 else BoomerangError.exit_code
        return 0 if self.state == "SUCCEEDED" else BoomerangError.exit_code


def is_id(text: str) -> bool:
    """Whether `text` is a job's id; paths and URLs are not."""
    return _ID.fullmatch(text) is not None


def nth_id(run_id: str, number: int) -> str:
    """The id of the `number`-th job for one run: bb-..., bb-...-2, bb-...-3."""
    return run_id if number == 1 else f"{run_id}-{number}"


def next_number(run_id: str, jobs: Iterable[Job]) -> int:
    """The number that the next job for `run_id` gets."""
    found = [_ID.fullmatch(job.id) for job in jobs]
    return 1 + max((int(match[2] or 1) for match in found if match and match[1] == run_id), default=0)


def newest(jobs: Iterable[Job]) -> Job | None:
    """The job that began last; None of none."""
    return max(jobs, key=lambda job: (job.began_s or 0.0, job.id), default=None)
