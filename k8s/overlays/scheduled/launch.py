"""One tick of the schedule: copy the template RayJob, wait for the copy's end, exit with the run's exit code.

Runs as the CronJob's pod, on the standard library and the pod's service account alone. It can die and be
started again at any time: it waits for a RayJob of this template that is running, whoever made it, and makes
one only if there is none, so that no two ever write to one OUT.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import ssl
import sys
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TEMPLATE_LABEL = "boomerang-batch/template"
JOB_LABEL = "boomerang-batch/job"
ATTEMPT_LABEL = "boomerang-batch/attempt"
POLL_S = 15.0
PATIENCE_S = 600.0

FAILED, CONFIGURATION, STOPPED = 1, 2, 75
FINAL = frozenset({0, CONFIGURATION, 3, 4, STOPPED})
"""Exit codes of a run that running it again at once would not change."""


class LaunchError(Exception):
    """This tick can't go on; `exit_code` tells the Job whether another try makes sense."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Api:
    """The Kubernetes API as this pod's account sees it."""

    host: str
    port: int
    account: Path = ACCOUNT
    poll_s: float = POLL_S
    patience_s: float = PATIENCE_S

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer to one call; None for 404, and for a 409, which says that the object is there already.

        An API server that is out of reach or busy is asked again for `patience_s`. Raises LaunchError.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                status, answer = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:  # unreachable, refused, timed out, cut off
                told = f"{method} {path}: {error}"
            else:
                if status in (404, 409):
                    return None
                if status < 300:
                    return json.loads(answer)
                told = f"{method} {path}: {status} {answer[:500].decode(errors='replace')}"
                if status != 429 and status < 500:
                    raise LaunchError(told, CONFIGURATION)
            if time.monotonic() > deadline:
                raise LaunchError(f"{told}; gave up after {self.patience_s:g} s")
            print(f"{told}; asking again", file=sys.stderr, flush=True)
            time.sleep(self.poll_s)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        # Both are read anew each time: Kubernetes replaces them while a pod lives.
        token = (self.account / "token").read_text().strip()
        trusted = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=30, context=trusted)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What this pod was started for."""

    template: str
    namespace: str
    job: str
    job_uid: str

    @property
    def path(self) -> str:
        """Where the RayJobs of this namespace are."""
        return f"/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"


def verdict(rayjob: Mapping[str, Any]) -> int | None:
    """The exit code of the run behind a RayJob, None while it is not over.

    Only a job that Ray and the operator both call a success is one. A stopped job is `Complete` to the operator
    but is not done, and of a failed one the operator keeps Ray's message, which begins with the exit code.
    """
    status = rayjob.get("status", {})
    deployment, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
    if deployment not in ("Complete", "Failed", "ValidationFailed"):
        return None
    if deployment == "Complete" and job == "SUCCEEDED":
        return 0
    if job == "STOPPED" or status.get("reason") == "DeadlineExceeded":
        return STOPPED
    if deployment == "ValidationFailed":
        return CONFIGURATION
    told = re.match(r"Job entrypoint command failed with exit code (\d+)\b", status.get("message", ""))
    code = int(told[1]) if told else FAILED
    return code if code in FINAL - {0} else FAILED


def copy_of(template: Mapping[str, Any], tick: Tick, attempt: int) -> dict[str, Any]:
    """A RayJob like the template, that runs, and that goes when this Job goes."""
    labels = {TEMPLATE_LABEL: tick.template, JOB_LABEL: tick.job, ATTEMPT_LABEL: str(attempt)}
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {
            # Not the Job's own name: the operator makes a Job named as the RayJob.
            "name": f"{tick.job}-{attempt}",
            "namespace": tick.namespace,
            "labels": {**template["metadata"].get("labels", {}), **labels},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": tick.job, "uid": tick.job_uid}
            ],
        },
        "spec": {**template["spec"], "suspend": False},
    }


def launch(api: Api, tick: Tick) -> str:
    """The name of the RayJob to wait for: one that runs, this Job's own if that has decided, or a new one."""
    selector = urllib.parse.quote(f"{TEMPLATE_LABEL}={tick.template}")
    listed = api.call("GET", f"{tick.path}?labelSelector={selector}")
    if listed is None:
        raise LaunchError("the API server knows no RayJobs: install KubeRay", CONFIGURATION)
    found = sorted(listed["items"], key=lambda rayjob: rayjob["metadata"]["creationTimestamp"])
    for rayjob in found:
        if verdict(rayjob) is None:
            return str(rayjob["metadata"]["name"])
    own = [rayjob for rayjob in found if rayjob["metadata"]["labels"].get(JOB_LABEL) == tick.job]
    if own and verdict(own[-1]) in FINAL:
        return str(own[-1]["metadata"]["name"])
    template = api.call("GET", f"{tick.path}/{tick.template}")
    if template is None:
        raise LaunchError(f"there is no RayJob {tick.template} to copy: apply the overlay anew", CONFIGURATION)
    attempts = [int(rayjob["metadata"]["labels"].get(ATTEMPT_LABEL, 0)) for rayjob in own]
    copy = copy_of(template, tick, max(attempts, default=0) + 1)
    api.call("POST", tick.path, copy)
    return str(copy["metadata"]["name"])


def wait(api: Api, tick: Tick, name: str) -> int:
    """The exit code of the run behind RayJob `name`, once it is over."""
    shown = ""
    while True:
        rayjob = api.call("GET", f"{tick.path}/{name}")
        if rayjob is None:
            print(f"{name}: deleted while it ran; the next tick resumes", file=sys.stderr)
            return STOPPED
        status = rayjob.get("status", {})
        deployment, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
        now = f"{name}: {deployment or 'new'}, job {job or 'not begun'}"
        if now != shown:
            print(now, flush=True)
            shown = now
        code = verdict(rayjob)
        if code is not None:
            reason = status.get("message", "").partition("\n")[0]
            print(f"{name}: exit code {code}. {reason}".rstrip(), flush=True)
            return code
        time.sleep(api.poll_s)


def main() -> int:
    """Do one tick with what the pod was given; returns the exit code."""
    # A container's first process ignores what it has no handler for. The run goes on; another pod takes over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    api = Api(host=os.environ["KUBERNETES_SERVICE_HOST"], port=int(os.environ["KUBERNETES_SERVICE_PORT"]))
    tick = Tick(
        template=os.environ["TEMPLATE"],
        namespace=os.environ["NAMESPACE"],
        job=os.environ["JOB_NAME"],
        job_uid=os.environ["JOB_UID"],
    )
    try:
        return wait(api, tick, launch(api, tick))
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
