"""The launcher of the scheduled overlay, against an API server with TLS, a token, and RayJobs that move on."""

from __future__ import annotations

import functools
import http.server
import json
import ssl
import threading
import urllib.parse
from itertools import pairwise, product

import pytest

from tests import certificates
from tests.kustomized import by_role, environment, launcher, only

launch = launcher()
Api = launch.Api

TOKEN = "the-account's-token"
PATH = "/apis/ray.io/v1/namespaces/boomerang/rayjobs"
TEMPLATE = "boomerang-template"


def ended(deployment, job, message="", reason=""):
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message, "reason": reason}


def failed(code):
    """What the operator keeps of a driver that ended with `code`."""
    told = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):"
    )
    return ended("Failed", "FAILED", f"{told}\nsomething about exit code 0 and exit code 75\n", "AppFailed")


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = ended("Complete", "SUCCEEDED")
DELETED = None


class ApiServer(http.server.ThreadingHTTPServer):
    """RayJobs of one namespace. A RayJob's statuses come one after another, one each time somebody looks."""

    def __init__(self, certificate):
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        template = only("scheduled", "RayJob")
        template["metadata"] |= {
            "uid": "u-1",
            "resourceVersion": "7",
            "finalizers": ["ray.io/rayjob-finalizer"],
        }
        template["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        template["status"] = {"jobDeploymentStatus": "Suspended", "jobStatus": ""}
        self.rayjobs = {TEMPLATE: template}
        self.course = {}
        self.next_course = [RUNNING, DONE]
        self.made = []
        self.trouble = []
        """What the next calls come to instead of an answer: a status code, or 'cut'."""
        self.lose_next_answer = False
        """Make the next RayJob, but do not say so."""

    def add(self, body, course):
        body["metadata"]["creationTimestamp"] = f"2026-01-01T00:{len(self.rayjobs):02}:00Z"
        self.rayjobs[body["metadata"]["name"]] = body
        self.course[body["metadata"]["name"]] = list(course)

    def look(self, name):
        left = self.course.get(name)
        if left:
            status = left.pop(0) if len(left) > 1 else left[0]
            if status is DELETED:
                del self.rayjobs[name]
            else:
                self.rayjobs[name]["status"] = status
        return self.rayjobs.get(name)

    def handle_error(self, request, client_address):
        pass  # a client that refuses the certificate is one of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def in_trouble(self):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"reason": "Unauthorized"})
            return True
        if not self.server.trouble:
            return False
        what = self.server.trouble.pop(0)
        if what == "cut":
            self.close_connection = True
            self.connection.close()
        else:
            self.answer(what, {"reason": "trouble"})
        return True

    def do_GET(self):
        if self.in_trouble():
            return
        url = urllib.parse.urlsplit(self.path)
        name = url.path.removeprefix(PATH).removeprefix("/")
        if name:
            found = self.server.look(name)
            self.answer(200 if found else 404, found or {"reason": "NotFound"})
            return
        key, value = urllib.parse.parse_qs(url.query)["labelSelector"][0].split("=")
        items = [each for each in self.server.rayjobs.values() if each["metadata"]["labels"].get(key) == value]
        self.answer(200, {"items": items})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.in_trouble():
            return
        name = body["metadata"]["name"]
        if name in self.server.rayjobs:
            self.answer(409, {"reason": "AlreadyExists"})
            return
        self.server.made.append(name)
        self.server.add(body, self.server.next_course)
        lost, self.server.lose_next_answer = self.server.lose_next_answer, False
        self.answer(503 if lost else 201, body)


@pytest.fixture(scope="module")
def trusted():
    return certificates.authority("the cluster")


@pytest.fixture(scope="module")
def certificate(trusted, tmp_path_factory):
    """The server's certificate and key in a file."""
    made = certificates.vouched(trusted, "the API server")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(made.certificate + made.key)
    return path


@pytest.fixture
def server(certificate):
    server = ApiServer(certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def account(trusted, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_bytes(trusted.certificate)
    return tmp_path


@pytest.fixture
def tick(server, account, monkeypatch):
    """`tick(job)` does one tick as the pod would, in the overlay's environment, and gives its exit code."""
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    host, port = server.server_address
    given = {
        "metadata.namespace": "boomerang",
        "metadata.labels['batch.kubernetes.io/controller-uid']": "job-uid",
    }

    def run(job="boomerang-1", patience_s=20):
        api = functools.partial(Api, account=account, poll_s=0.01, patience_s=patience_s)
        monkeypatch.setattr(launch, "Api", api)
        given["metadata.labels['batch.kubernetes.io/job-name']"] = job
        for name, value in environment(by_role("scheduled", "launcher").main).items():
            monkeypatch.setenv(name, value if isinstance(value, str) else given[value["fieldRef"]["fieldPath"]])
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        return launch.main()

    return run


# --- what a RayJob's end means ---

DEPLOYMENTS = (
    "",
    "Initializing",
    "Running",
    "Waiting",
    "Suspending",
    "Suspended",
    "Retrying",
    "Complete",
    "Failed",
)
JOBS = ("", "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")


@pytest.mark.parametrize(
    ("deployment", "job"), list(product((*DEPLOYMENTS, "ValidationFailed", "New kind"), JOBS))
)
def test_nothing_but_success_reads_as_success(deployment, job):
    for message in ("", "exit code 0", "Job entrypoint command failed with exit code 0, last"):
        code = launch.verdict({"status": ended(deployment, job, message)})
        assert (code == 0) == ((deployment, job) == ("Complete", "SUCCEEDED"))
        assert (code is None) == (deployment not in ("Complete", "Failed", "ValidationFailed"))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((failed(code), code) for code in (1, 2, 3, 4, 75)),
        *((failed(code), 1) for code in (134, 137, 255)),
        (ended("Complete", "STOPPED"), 75),
        (ended("Failed", "RUNNING", "Job submission has failed.", "SubmissionFailed"), 1),
        (ended("Failed", "RUNNING", "too late", "DeadlineExceeded"), 75),
        (ended("ValidationFailed", ""), 2),
        ({}, None),
    ],
)
def test_the_driver_s_exit_code_comes_through(status, code):
    assert launch.verdict({"status": status}) == code
    assert launch.verdict({}) is None


# --- ticks ---


def test_a_tick_copies_the_template_and_waits_for_the_copy_s_end(server, tick, capsys):
    server.next_course = [{}, {"jobDeploymentStatus": "Initializing", "jobStatus": ""}, RUNNING, RUNNING, DONE]
    assert tick() == 0
    assert server.made == ["boomerang-1-1"]
    template, copy = server.rayjobs[TEMPLATE], server.rayjobs["boomerang-1-1"]
    assert copy["spec"] == {**template["spec"], "suspend": False}
    assert template["spec"]["suspend"] is True
    assert copy["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "boomerang-1", "uid": "job-uid"}
    ]
    assert not {"uid", "resourceVersion", "finalizers"} & set(copy["metadata"])
    assert copy["metadata"]["labels"].items() >= template["metadata"]["labels"].items()
    shown = capsys.readouterr().out.splitlines()
    assert all(before != after for before, after in pairwise(shown)), "each change once"
    assert shown[-1] == "boomerang-1-1: exit code 0."


@pytest.mark.parametrize("code", [1, 2, 3, 4, 75])
def test_a_tick_ends_as_its_run_ended(server, tick, code):
    server.next_course = [RUNNING, failed(code)]
    assert tick() == code


def test_a_second_pod_of_a_job_goes_on_with_the_first_one_s_run(server, tick):
    server.next_course = [RUNNING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "wait", lambda *_: 1)  # the first pod is taken away while it waits
        assert tick() == 1
    server.course["boomerang-1-1"] = [RUNNING, RUNNING, DONE]
    assert tick() == 0
    assert server.made == ["boomerang-1-1"]


def test_a_tick_never_runs_beside_the_run_of_another(server, tick):
    server.next_course = [RUNNING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "wait", lambda *_: 1)
        tick("boomerang-1")
    server.course["boomerang-1-1"] = [RUNNING, failed(3)]
    assert tick("boomerang-2") == 3
    assert server.made == ["boomerang-1-1"]


@pytest.mark.parametrize("code", [2, 3, 4, 75])
def test_what_a_job_s_run_has_decided_stays_so(server, tick, code):
    server.next_course = [failed(code)]
    assert [tick(), tick()] == [code, code]
    assert server.made == ["boomerang-1-1"]


def test_a_success_is_not_run_again_by_a_pod_that_comes_late(server, tick):
    server.next_course = [DONE]
    assert [tick(), tick()] == [0, 0]
    assert server.made == ["boomerang-1-1"]


def test_a_failure_that_may_pass_is_tried_again_and_the_next_tick_begins_anew(server, tick):
    server.next_course = [failed(1)]
    assert [tick(), tick()] == [1, 1]
    server.next_course = [DONE]
    assert [tick(), tick("boomerang-2")] == [0, 0]
    assert server.made == ["boomerang-1-1", "boomerang-1-2", "boomerang-1-3", "boomerang-2-1"]


def test_other_rayjobs_are_none_of_its_business(server, tick):
    server.add({"metadata": {"name": "other", "labels": {}}, "spec": {}}, [RUNNING])
    assert tick() == 0
    assert server.made == ["boomerang-1-1"]


# --- trouble ---


@pytest.mark.parametrize("trouble", [[503, 500, 429], ["cut"], ["cut", 502, "cut"]])
def test_an_api_server_that_is_away_for_a_while_ends_nothing(server, tick, trouble):
    server.trouble = list(trouble)
    assert tick() == 0
    assert server.made == ["boomerang-1-1"]


def test_a_run_whose_making_was_not_answered_is_not_made_twice(server, tick):
    server.lose_next_answer = True
    assert tick() == 0
    assert server.made == ["boomerang-1-1"]


def test_an_api_server_that_stays_away_is_a_failure(server, tick, capsys):
    server.trouble = [503] * 1000
    assert tick(patience_s=0.1) == 1
    assert "gave up" in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 403, 422])
def test_a_refusal_is_a_matter_of_configuration(server, tick, capsys, status):
    server.trouble = [status]
    assert tick() == 2
    assert str(status) in capsys.readouterr().err


def test_without_operator_or_template_it_says_what_is_missing(server, tick, capsys):
    del server.rayjobs[TEMPLATE]
    assert tick() == 2
    assert "apply the overlay" in capsys.readouterr().err
    server.trouble = [404]
    assert tick() == 2
    assert "install KubeRay" in capsys.readouterr().err


def test_a_run_that_is_deleted_under_way_has_stopped(server, tick):
    server.next_course = [RUNNING, DELETED]
    assert tick() == 75


def test_a_server_that_the_cluster_did_not_vouch_for_gets_no_token(server, tick, account):
    (account / "ca.crt").write_bytes(certificates.authority("another").certificate)
    assert tick(patience_s=0.1) == 1
    assert server.made == []
