"""Jobs on a real Ray: one head of our own with token auth on, and once one with it off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from boomerang_batch.cli import main
from boomerang_batch.errors import BoomerangError, ConfigError
from boomerang_batch.run.jobs.cluster import Cluster
from boomerang_batch.run.jobs.request import JobRequest
from boomerang_batch.run.verify import verify
from tests import worlds

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, kw_only=True)
class Head:
    url: str
    token: str
    temporary: str
    pid: int


@contextlib.contextmanager
def head(token: str = "") -> Iterator[Head]:
    """A Ray head on loopback, in a session of its own, so that every process of it can be found and ended."""
    # Sockets lie in it, and a socket's path is short.
    temporary = tempfile.mkdtemp(prefix="bb", dir="/tmp")
    gcs, dashboard, agent, agent_grpc, client = _free_ports(5)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    kept = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "BOOMERANG_SECRET")}
    environment = {
        **kept, **auth, "RAY_TMPDIR": temporary, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
        # 127.0.0.1 would be turned into an address that others can reach.
        "--node-ip-address=127.0.0.2",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    with Path(temporary, "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    found = Head(url=f"http://127.0.0.1:{dashboard}", token=token, temporary=temporary, pid=process.pid)
    try:
        yield found
    finally:
        process.kill()  # or it would restart or report what dies
        for pid in _processes_of(found):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Head]:
    with head(secrets.token_hex(16)) as found:
        yield found


@pytest.fixture
def at(ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> Head:
    """The head, with its token in the environment."""
    enter(ray_head, monkeypatch)
    return ray_head


def enter(found: Head, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("boomerang_batch.run.jobs.cluster._POLL_S", 0.2)
    for name in (*VARIABLES, "BOOMERANG_SECRET"):
        patch.delenv(name, raising=False)
    patch.setenv("RAY_TMPDIR", found.temporary)
    if found.token:
        patch.setenv("RAY_AUTH_TOKEN", found.token)
    until = time.monotonic() + 90
    while True:
        with contextlib.suppress(Exception):
            Cluster(found.url).jobs()
            return
        assert time.monotonic() < until, Path(found.temporary, "head.log").read_text()
        time.sleep(0.5)


@dataclass(frozen=True, kw_only=True)
class World:
    pipeline: Path
    manifest: Path
    out: Path

    def words(self, *more: object) -> list[object]:
        return [self.pipeline, self.manifest, self.out, "--threads", 1, "--device", "cpu", *more]


SLOW = ("--set", "t.fraction=1.0", "--set", "steps=20", "--set", "batch_size=2")


def world(folder: Path, model: Path, *, purpose: str = "augment", shards: int = 2, samples: int = 3) -> World:
    pipeline = folder / "tiny.yaml"
    pipeline.write_text(worlds.recipe_text(model, purpose=purpose))
    manifest = worlds.save_shards(folder / "in", shards=shards, samples=samples)
    return World(pipeline=pipeline, manifest=manifest, out=folder / "out")


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def sleeper(name: str, command: str = "exec sleep 600", out: str = "nowhere") -> JobRequest:
    """A job that does no run: enough to see what Ray does with one."""
    run_id = f"bb-{name.encode().hex():0<12.12}"
    return JobRequest(
        run_id=run_id,
        entrypoint=command,
        files={},
        metadata={"tool": "boomerang-batch", "run": run_id, "out": out},
    )


def eventually(cluster: Cluster, job_id: str, state: str) -> None:
    until = time.monotonic() + 60
    while cluster.job(job_id).state != state:
        assert time.monotonic() < until, cluster.job(job_id)
        time.sleep(0.2)


def test_a_job_does_what_a_run_does_and_its_secret_stays(at: Head, tmp_path: Path, tiny_model: Path):
    here = world(tmp_path, tiny_model, purpose="anonymize")
    private = tmp_path / "private"
    members = [*worlds.sample_members("good", 1), *worlds.sample_members("bad", 2, png=b"no image")]
    worlds.write_tar(here.manifest.parent / "s-001.tar", members)
    result = call("submit", *here.words("--private-dir", private, "--address", at.url, "--wait"))
    assert result.exit_code == 3, result.stderr
    assert "with quarantined samples" in result.stderr
    (job_id,) = result.stdout.split()
    assert verify(str(here.out), deep=True).problems == ()
    # Which would refuse another run's OUT.
    assert call("run", *here.words("--private-dir", private)).exit_code == 3

    told = json.loads(call("status", job_id, "--address", at.url, "--json").stdout)
    assert (told["job"]["state"], told["job"]["exit_code"]) == ("FAILED", 3)
    assert told["shards"] == {"all": 2, "done": 2, "quarantined": 0, "left": 0}
    assert (told["rows"], told["failed"]) == ({"failed": 1, "ok": 4}, 1)
    log = call("logs", "--address", at.url)
    assert "shards 2 done; samples 1 failed, 4 ok" in log.stdout
    listed = call("list", "--address", at.url, "--json")
    assert [job["id"] for job in json.loads(listed.stdout)] == [job_id]
    assert job_id in call("list", "--address", at.url).stdout

    secret = (private / "secret").read_text().strip()
    everything = listed.stdout + log.stdout + json.dumps(_raw(at))
    assert job_id in everything
    for planted in (secret, at.token):
        assert planted not in everything
        assert all(planted.encode() not in path.read_bytes() for path in here.out.rglob("*") if path.is_file())
    assert [path.suffix for path in sorted((here.out / "logs").glob("*-summary.json"))] == [".json"] * 2


def test_asking_twice_gives_one_job_and_a_stopped_one_is_resumed_by_the_next(
    at: Head, tmp_path: Path, tiny_model: Path
):
    here = world(tmp_path, tiny_model, shards=6, samples=6)
    words = here.words(*SLOW, "--address", at.url)
    first = call("submit", *words)
    assert first.exit_code == 0, first.stderr
    job_id = first.stdout.strip()
    assert call("submit", *words, "--workers", 1).stdout.strip() == job_id
    refused = call("submit", *words, "--limit", 2)
    assert refused.exit_code == 2
    assert f"{job_id} is at work" in refused.stderr

    while not list(here.out.glob("*_stats.json")):
        time.sleep(0.05)
    stopped = call("stop", "--address", at.url)
    assert stopped.exit_code == 0, stopped.stderr
    done = len(list(here.out.glob("*_stats.json")))
    assert 1 <= done < 6
    assert f"{done} of 6 shards are done, {6 - done} left" in stopped.stdout
    assert "it had ended before" in call("stop", job_id, "--address", at.url).stdout
    assert call("status", job_id, "--watch", "--address", at.url).exit_code == 75

    again = call("submit", *words, "--follow")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.strip() == f"{job_id}-2"
    assert f"shards {6 - done} done, {done} there" in again.stderr
    calm = tmp_path / "calm"
    assert (
        call("run", here.pipeline, here.manifest, calm, *SLOW, "--threads", 1, "--device", "cpu").exit_code == 0
    )
    assert worlds.tree(here.out) == worlds.tree(calm)


def test_a_refusal_comes_back_with_its_reason(at: Head):
    cluster = Cluster(at.url)
    refused, _ = cluster.submit(sleeper("refused", "exec sh -c 'echo no such recipe; exit 2'"))
    assert cluster.wait(refused.id).exit_code == 2
    assert "no such recipe" in cluster.job(refused.id).message


def test_a_stop_leaves_time_to_come_to_an_end(at: Head):
    cluster = Cluster(at.url)
    drain = """sh -c 'trap "sleep 4; echo drained; exit 75" TERM; while :; do sleep 0.1; done'"""
    job, is_new = cluster.submit(sleeper("drain", f"exec {drain}"))
    assert is_new
    eventually(cluster, job.id, "RUNNING")
    time.sleep(1)
    assert cluster.stop(job.id).exit_code == 75
    assert "drained" in cluster.log(job.id).splitlines()


def test_deaths_of_driver_and_supervisor_are_what_they_are(at: Head):
    cluster = Cluster(at.url)
    killed, terminated = [cluster.submit(sleeper(name, out=name))[0] for name in ("killed", "sigterm")]
    for job in (killed, terminated):
        eventually(cluster, job.id, "RUNNING")
    while not (drivers := _processes_of(at, "sleep", "600", job=terminated.id)):
        time.sleep(0.1)  # a job runs as soon as its supervisor is about to start it
    os.kill(*drivers, signal.SIGTERM)
    assert cluster.wait(terminated.id).exit_code == 75
    while len(supervisors := _processes_of(at, "ray::JobSupervisor")) > 1:
        time.sleep(0.2)  # that of the job that has just ended
    os.kill(*supervisors, signal.SIGKILL)
    dead = cluster.wait(killed.id)
    assert (dead.state, dead.exit_code) == ("FAILED", 1)


def test_an_id_is_given_once(at: Head):
    cluster = Cluster(at.url)
    request = sleeper("once", "exec true", out="once")
    jobs: list[str] = []
    racers = [
        threading.Thread(target=lambda: jobs.append(Cluster(at.url).submit(request)[0].id)) for _ in range(3)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(jobs) == 3
    assert not cluster._hand_over(request.run_id, request)
    assert cluster.wait(request.run_id).exit_code == 0


def test_a_log_is_followed_through_a_cut_line(at: Head, monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster(at.url)
    lines = [f"line {number}" for number in range(4)]
    script = "; ".join(f"echo {line}; sleep 1" for line in lines)
    job, _ = cluster.submit(sleeper("follow", f"sh -c '{script}'", out="follow"))
    real, cuts = cluster._client.tail_job_logs, []

    async def cut(job_id: str):
        async with contextlib.aclosing(real(job_id)) as parts:
            async for part in parts:
                yield part
                if len(cuts) < 2 and "line" in part:
                    cuts.append(part)
                    raise RuntimeError("the line is cut")

    monkeypatch.setattr(cluster._client, "tail_job_logs", cut)
    said: list[str] = []
    assert cluster.follow(job.id, said.append).exit_code == 0
    assert len(cuts) == 2
    assert [line for line in "".join(said).splitlines() if line.startswith("line")] == lines
    assert "".join(said) == cluster.log(job.id)
    with pytest.raises(RuntimeError):  # and no event loop is left behind
        asyncio.get_running_loop()


def test_a_cluster_out_of_reach_is_borne_for_a_while(at: Head, monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster(at.url)
    job, _ = cluster.submit(sleeper("reach", "exec sleep 2", out="reach"))
    real, failures = cluster._client._do_request, iter(range(3))

    def shaky(*words, **more):
        if next(failures, None) is not None:
            raise ConnectionError("no route to the head")
        return real(*words, **more)

    monkeypatch.setattr(cluster._client, "_do_request", shaky)
    assert cluster.wait(job.id).exit_code == 0
    failures = iter(range(10**6))
    monkeypatch.setattr("boomerang_batch.run.jobs.cluster._PATIENCE_S", 0.5)
    with pytest.raises(BoomerangError, match=f"no route to the head.*{job.id} may well go on"):
        cluster.wait(job.id)


def test_only_the_token_opens(at: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    file = tmp_path / "token"
    for token in (None, "wrong"):
        if token is not None:
            file.write_text(token)
        shut = call("list", "--address", at.url, *(["--token-file", file] if token else []))
        assert shut.exit_code == 2, shut.stderr
        assert "it wants its token" in shut.stderr
        assert "Traceback" not in shut.stderr
    file.write_text(at.token + "\n")
    assert call("list", "--address", at.url, "--token-file", file).exit_code == 0
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"Authorization": f"Bearer {at.token}"}))
    assert call("list", "--address", at.url).exit_code == 0
    with pytest.raises(ConfigError, match="no job bb-0123456789ab"):
        Cluster(at.url).job("bb-0123456789ab")


def test_a_head_elsewhere_gets_no_local_paths(at: Head, tmp_path: Path, tiny_model: Path, monkeypatch):
    assert Cluster(at.url).runs_here()
    here = world(tmp_path, tiny_model)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # as where the dashboard's port is only forwarded to us
    refused = call("submit", *here.words("--address", at.url))
    assert refused.exit_code == 2
    assert "--shared-files" in refused.stderr


def test_a_cluster_without_token_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with head() as found:
        enter(found, monkeypatch)
        monkeypatch.setenv("RAY_ADDRESS", found.url)
        job, _ = Cluster(None).submit(sleeper("open", "exec echo hello", out=str(tmp_path)))
        assert "hello" in call("logs", "--follow").stdout.splitlines()
        assert f"{job.id}  succeeded" in call("status").stdout
        assert call("status", "--watch").stdout.startswith("succeeded  0/? shards")


def _raw(found: Head) -> list[Mapping]:
    """Everything that the cluster tells of its jobs."""
    return [job.model_dump(mode="json") for job in Cluster(found.url)._client.list_jobs()]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _processes_of(found: Head, *words: str, job: str = "") -> list[int]:
    """Processes of a head: those of its session, and by their environment the jobs' own, which leave it."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            environment = (folder / "environ").read_bytes()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            ours = session == found.pid or f"RAY_TMPDIR={found.temporary}\0".encode() in environment
            if ours and title.startswith(" ".join(words)) and job.encode() in environment:
                pids.append(int(folder.name))
    return pids
