"""The cluster's Jobs API: ask for a job, look at it, follow it, stop it.

Ray's own client does the talking. It is given what it lacks: an end to every wait, patience while a head is
out of reach (a job goes on without us), and an address that no environment variable overrules.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import ray.exceptions
from ray.job_submission import JobSubmissionClient

from boomerang_batch.errors import BoomerangError, ConfigError
from boomerang_batch.run.jobs.access import (
    HEADERS_VARIABLE,
    TOKEN_PATH_VARIABLE,
    TOKEN_VARIABLE,
    auth_headers,
    overruling_environment,
)
from boomerang_batch.run.jobs.job import TOOL, Job, newest, next_number, nth_id
from boomerang_batch.run.jobs.request import STOP_WAIT_S, JobRequest

_TIMEOUT_S = (10, 120)  # to connect, and for the answer to begin: a cluster may be slow to take a job
_POLL_S = 2.0
_PATIENCE_S = 300.0
_GRACE_S = 30.0
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class _Client(JobSubmissionClient):
    """Ray's client, whose requests would otherwise wait for ever."""

    def __init__(self, address: str | None, *, headers: dict[str, str]) -> None:
        super().__init__(address, headers=headers)
        if getattr(self, "_ssl_context", None) is None:
            self._ssl_context: Any = True  # None is deprecated where the log is followed

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **more)

    def session_name(self) -> str:
        """What the cluster calls its session; its head has a folder of that name."""
        return str(self._do_request("GET", "/api/version").json().get("session_name", ""))


class Cluster:
    """A cluster that answers. Every failure is a BoomerangError naming the address."""

    def __init__(self, address: str | None, *, token_file: str | None = None) -> None:
        """Connect. `address` is the dashboard's, such as http://head:8265; None leaves the search to Ray."""
        self.address = address or "the address that Ray finds by itself"
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._told("reach"), overruling_environment(address):
            self._client = _Client(address, headers=dict(auth_headers(token_file)))
            self._session = self._client.session_name()
        self.address = self._client.get_address()

    def runs_here(self) -> bool:
        """Whether the head runs on this machine. A local address proves nothing: it may be a forwarded port."""
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 (Ray's own)
        name = self._session
        return bool(name) and Path(name).name == name and (Path(temporary) / "ray" / name).is_dir()

    def jobs(self) -> list[Job]:
        """This tool's jobs, the newest first."""
        with self._told("list the jobs of"):
            found = [_job(job) for job in self._client.list_jobs() if job.submission_id]
        ours = [job for job in found if job.metadata.get("tool") == TOOL]
        return sorted(ours, key=lambda job: (job.began_s or 0.0, job.id), reverse=True)

    def job(self, job_id: str) -> Job:
        """One job. Raises ConfigError when there is none of that id."""
        with self._told("look at a job of"):
            try:
                return _job(self._client.get_job_info(job_id))
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
                raise ConfigError(
                    f"no job {job_id} at {self.address}; `boomerang-batch list` shows those there are, and "
                    "`boomerang-batch status OUT` needs no cluster"
                ) from None

    def patient_job(self, job_id: str) -> Job:
        """`job`, from a cluster that may be out of reach for some minutes: the job goes on meanwhile."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self.job(job_id)
            except ConfigError:
                raise
            except BoomerangError as error:
                if time.monotonic() > until:
                    raise BoomerangError(f"{error}; {job_id} may well go on without us") from error
            time.sleep(_POLL_S)

    def submit(self, request: JobRequest) -> tuple[Job, bool]:
        """The job that does what is asked for, and whether it is a new one.

        One that still runs is that job; once it has ended a new one resumes. Raises ConfigError when another
        kind of job is at work on the same OUT.
        """
        jobs = self.jobs()
        at_work = [job for job in jobs if not job.ended and job.out == request.metadata["out"]]
        same = newest(job for job in at_work if job.run_id == request.run_id)
        if same is not None:
            return same, False
        if at_work:
            raise ConfigError(
                f"{at_work[0].id} is at work on {at_work[0].out} with another recipe, manifest or limit; wait "
                f"for its end, or end it by `boomerang-batch stop {at_work[0].id}`"
            )
        number = next_number(request.run_id, jobs)
        while not self._hand_over(nth_id(request.run_id, number), request):
            # Somebody else asked for the same in this very moment.
            there = self.job(nth_id(request.run_id, number))
            if not there.ended:
                return there, False
            number += 1
        return self.job(nth_id(request.run_id, number)), True

    def stop(self, job_id: str) -> Job:
        """Ask a job to stop, and wait until it has: its workers come to a batch boundary first."""
        with self._told("stop a job of"):
            self._client.stop_job(job_id)
        return self.wait(job_id, limit_s=STOP_WAIT_S + _GRACE_S)

    def wait(
        self, job_id: str, *, limit_s: float | None = None, told: Callable[[Job], None] | None = None
    ) -> Job:
        """Wait for a job's end, at most `limit_s`; each new state is `told`."""
        began, state = time.monotonic(), ""
        while True:
            job = self.patient_job(job_id)
            if told is not None and job.state != state:
                told(job)
            state = job.state
            if job.ended:
                return job
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise BoomerangError(f"{job_id} has not ended after {limit_s:.0f} s; look again with status")
            time.sleep(_POLL_S)

    def log(self, job_id: str) -> str:
        """What the job's driver has said so far."""
        with self._told("read the log of a job of"):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """`write` what the driver says as it says it, until the job has ended. A cut line is joined again."""
        said = 0

        async def tail() -> None:
            nonlocal said
            seen = 0
            async with contextlib.aclosing(self._parts(job_id)) as parts:
                async for part in parts:
                    write(part[max(said - seen, 0) :])
                    seen += len(part)
                    said = max(said, seen)

        while True:
            asyncio.run(tail())
            job = self.patient_job(job_id)
            if job.ended:
                with contextlib.suppress(BoomerangError):  # its machine may be gone with the log
                    write(self.log(job_id)[said:])
                return job
            time.sleep(_POLL_S)

    async def _parts(self, job_id: str) -> AsyncGenerator[str, None]:
        """The log from its beginning, in parts, until it ends or the line is cut."""
        async with contextlib.aclosing(self._client.tail_job_logs(job_id)) as parts:
            try:
                async for part in parts:
                    yield part
            except (OSError, RuntimeError, aiohttp.ClientError):
                return  # the job's state decides what comes next

    def _hand_over(self, job_id: str, request: JobRequest) -> bool:
        """Start the job; False when one of that id is there already."""
        with self._told("submit to"), tempfile.TemporaryDirectory(prefix="boomerang-job-") as folder:
            for name, data in request.files.items():
                (Path(folder) / name).write_bytes(data)
            runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
            if request.files:
                runtime_env["working_dir"] = folder
            try:
                # No entrypoint resources: any of them would let the driver leave the head for a machine that
                # may be taken away, and a GPU for the driver is one less for the workers.
                self._client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=job_id,
                    metadata=dict(request.metadata),
                    runtime_env=runtime_env,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False
        return True

    @contextlib.contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Turn what client and network say into one error that names the cluster and the fix."""
        try:
            yield
        except BoomerangError:
            raise
        except ray.exceptions.AuthenticationError as error:
            raise ConfigError(
                f"can't {verb} the cluster at {self.address}: it wants its token, or another than it got. Put "
                f"the token in a file and name that by --token-file or {TOKEN_PATH_VARIABLE}, or set "
                f"{TOKEN_VARIABLE}, or {HEADERS_VARIABLE} where a proxy wants headers of its own"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0]
            raise BoomerangError(
                f"can't {verb} the cluster at {self.address}: {said}. --address is its dashboard's, such as "
                "http://HEAD:8265"
            ) from error


def _job(details: Any) -> Job:
    """A job, of what Ray's client returns."""
    return Job(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),
        metadata=details.metadata or {},
        driver_exit_code=details.driver_exit_code,
        message=details.message or "",
        began_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
    )
