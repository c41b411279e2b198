"""Two real runs on one OUT, in a bucket or a folder: one works, whoever is frozen, killed or late."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import worlds
from tests.lanes.commands import Place, ended
from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import Delay, Hold, Rule
from tests.lanes.jobs import Job, job, until
from tests.lanes.seaweedfs import SeaweedFS

pytestmark = [pytest.mark.lane, pytest.mark.timeout(600)]

QUICK = (
    "-c",
    "from boomerang_batch.run import lease; lease.BEAT_EVERY_S, lease.STALE_AFTER_S = 1.0, 6.0; "
    "from boomerang_batch.cli import main; main()",
)
"""The same command, sooner sure that a silent holder is one: only for runs that meet a frozen one."""
TAKEN_OVER = "another run has taken over; this one stops, and what it did counts"


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[FaultProxy]:
    """What the first of two runs takes for the server."""
    with FaultProxy(seaweed.url) as proxy:
        yield proxy


@pytest.fixture(params=["s3", "local"])
def first(
    request: pytest.FixtureRequest,
    seaweed: SeaweedFS,
    proxy: FaultProxy,
    inputs: Mapping[str, bytes],
    tmp_path: Path,
) -> Job:
    """A run on an OUT of either kind; its shards come through the proxy."""
    out = str(tmp_path / "out") if request.param == "local" else None
    return job(seaweed, inputs, tmp_path / "first", proxy.url, out)


@pytest.fixture
def elsewhere(seaweed: SeaweedFS, tmp_path: Path) -> Place:
    """Where the other run of the same words is at home; not behind the proxy."""
    return Place(work=tmp_path / "second", environment=seaweed.environment, program=QUICK)


@contextlib.contextmanager
def begun(place: Place, words: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """A command at work, ended with the block if it has not been before."""
    process = place.begin(*words)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()  # a frozen one too
            ended(process)


def slow_shards(proxy: FaultProxy) -> None:
    """Have the first run last until told otherwise."""
    proxy.rules = [Rule(fault=Delay(seconds=15), method="GET", path=r"/in/s-\d+\.tar")]


def wait_to_be_told(process: subprocess.Popen[str], words: str) -> None:
    """Read what a command says until it says `words`; what it said so far is gone."""
    assert process.stderr is not None
    heard = ""
    while words not in heard:
        line = process.stderr.readline()
        assert line, heard
        heard += line


def holder(process: subprocess.Popen[str]) -> str:
    return f"a run on {socket.gethostname()} (process {process.pid}) since 20"


def check_that_all_is_well(first: Job, place: Place, tiny_here: Mapping[str, bytes]) -> None:
    """OUT is what an undisturbed run makes, verifies, and has nothing left to do."""
    assert first.tree() == tiny_here
    place.call("verify", first.out, "--deep").expect(0)
    again = place.call(*first.words, "--json").expect(0)
    assert json.loads(again.stdout)["shards"]["there"] == 12
    assert first.tree() == tiny_here
    assert first.server.unfinished_uploads(first.bucket) == []


def test_a_frozen_holder_is_replaced_and_stops_when_it_thaws(
    first: Job, elsewhere: Place, tiny_here: Mapping[str, bytes]
):
    with begun(first.place, first.words) as process:
        until(lambda: first.markers() >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        assert 2 <= first.markers() < 12
        second = elsewhere.call(*first.words, "--json").expect(0)
        assert f"taking over from {holder(process)}" in second.stderr
        shards = json.loads(second.stdout)["shards"]
        assert shards["there"] >= 2
        assert shards["there"] + shards["done"] == 12
        assert first.tree() == tiny_here
        links = worlds.tree(first.place.private)
        process.send_signal(signal.SIGCONT)
        thawed = ended(process).expect(75)
    assert thawed.stderr.splitlines()[-1] == f"error: {first.out}: {TAKEN_OVER}"
    assert worlds.tree(first.place.private) == links
    check_that_all_is_well(first, elsewhere, tiny_here)


@pytest.mark.parametrize("first", ["s3"], indirect=True)
@pytest.mark.parametrize(("late", "status"), [(r"\.tar", 200), (r"\.parquet", 200), (r"_stats\.json", 412)])
def test_what_a_replaced_holder_had_on_its_way_does_no_harm(
    first: Job,
    elsewhere: Place,
    proxy: FaultProxy,
    tiny_here: Mapping[str, bytes],
    late: str,
    status: int,
):
    """It reaches the store when the other run has ended; the same bytes again, or a marker that is there."""
    hold = Hold()
    proxy.rules = [Rule(fault=hold, method="PUT", path=rf"/out/[^/]+{late}", times=1)]
    with begun(first.place, first.words) as process:
        until(lambda: hold.taken.is_set() or process.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        assert hold.taken.is_set()
        second = elsewhere.call(*first.words).expect(0)
        assert f"taking over from {holder(process)}" in second.stderr
        assert first.tree() == tiny_here
        hold.release.set()
        assert hold.status.get(timeout=60) == status
        assert first.tree() == tiny_here
        process.send_signal(signal.SIGCONT)
        thawed = ended(process).expect(75)
    assert thawed.stderr.splitlines()[-1] == f"error: {first.out}: {TAKEN_OVER}"
    check_that_all_is_well(first, elsewhere, tiny_here)


def test_a_second_run_is_told_who_is_at_work_and_stops_or_waits(
    first: Job, seaweed: SeaweedFS, proxy: FaultProxy, tiny_here: Mapping[str, bytes], tmp_path: Path
):
    slow_shards(proxy)
    place = Place(work=tmp_path / "others", environment=seaweed.environment)
    with begun(first.place, first.words) as process:
        until(lambda: bool(proxy.seen(path=r"/in/s-\d+\.tar")) or process.poll() is not None)
        refused = place.call(*first.words, "--if-held", "stop").expect(75)
        assert process.poll() is None
        last = refused.stderr.splitlines()[-1]
        assert last.startswith(f"error: {first.out} is held by {holder(process)}")
        assert last.endswith("which is at work; wait for its end, or say --if-held wait")
        with begun(place, (*first.words, "--json", "--if-held", "wait")) as waiting:
            wait_to_be_told(waiting, f"is held by {holder(process)}")
            assert process.poll() is None
            proxy.rules = []
            ended(process).expect(0)
            waited = ended(waiting).expect(0)
    assert json.loads(waited.stdout)["shards"]["there"] == 12
    assert "taking over" not in waited.stderr
    check_that_all_is_well(first, place, tiny_here)


def test_who_waits_takes_over_when_the_holder_is_killed(
    first: Job, seaweed: SeaweedFS, proxy: FaultProxy, tiny_here: Mapping[str, bytes], tmp_path: Path
):
    slow_shards(proxy)
    place = Place(work=tmp_path / "others", environment=seaweed.environment)
    with begun(first.place, first.words) as process:
        until(lambda: bool(proxy.seen(path=r"/in/s-\d+\.tar")) or process.poll() is not None)
        with begun(place, (*first.words, "--if-held", "wait")) as waiting:
            wait_to_be_told(waiting, f"is held by {holder(process)}")
            assert process.poll() is None
            process.kill()
            waited = ended(waiting).expect(0)
    assert f"taking over from {holder(process)}" in waited.stderr
    check_that_all_is_well(first, place, tiny_here)
