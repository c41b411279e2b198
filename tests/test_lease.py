"""lease.py: one run at a time, whoever is killed, frozen or late."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boomerang_batch import storage
from boomerang_batch.errors import LeaseError, StoppedError
from boomerang_batch.run import lease


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_EVERY_S", 0.05)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.6)


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
    else:
        url = f"memory://lease/{tmp_path.name}"
        yield url
        for name in storage.list_tree(url):
            storage.delete(storage.join(url, name))


def hold(out: str, **options) -> contextlib.AbstractContextManager[lease.Lease]:
    return lease.held(out, **{"wait": False, "stop": threading.Event()} | options)


def test_epochs_rise_and_a_clean_end_costs_no_waiting(out):
    started = time.monotonic()
    for epoch in (1, 2, 3):
        with hold(out) as holding:
            assert holding == lease.Lease(epoch=epoch, taken_over_at=None)
            lease.require(out, epoch)
    assert time.monotonic() - started < 0.5


def test_a_second_run_is_told_who_is_at_work_and_since_when(out):
    with hold(out), pytest.raises(LeaseError) as caught, hold(out):
        pass
    assert caught.value.exit_code == 75
    assert f"process {os.getpid()}" in str(caught.value)
    assert "since 20" in str(caught.value)
    with hold(out) as holding:
        assert holding.epoch == 2


def told_of(out: str) -> list[dict]:
    """What the epochs in OUT say, in order."""
    folder = storage.join(out, "logs", "lease")
    names = [name for name in storage.list_names(folder) if name.startswith("epoch-")]
    return [json.loads(storage.read_bytes(storage.join(folder, name))) for name in sorted(names)]


def test_who_has_let_go_is_not_named_any_more(out):
    with hold(out):
        assert told_of(out)[0]["process"] == os.getpid()
        assert told_of(out)[0]["host"] == socket.gethostname()
    (left,) = told_of(out)
    assert {name: value for name, value in left.items() if value} == {
        "token": left["token"],
        "since": left["since"],
    }


@pytest.mark.slow
def test_a_second_run_waits_for_the_first_ones_end_if_asked_to(out):
    entered, epochs = threading.Event(), []

    def second():
        entered.set()
        with hold(out, wait=True) as holding:
            epochs.append(holding)

    with hold(out):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        time.sleep(1)  # longer than it takes to find a silent holder dead
        assert epochs == []
    thread.join(10)
    assert epochs == [lease.Lease(epoch=2, taken_over_at=None)]


def test_waiting_can_be_stopped(out):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with hold(out), pytest.raises(LeaseError, match="stopped while waiting"), hold(out, wait=True, stop=stop):
        pass


@pytest.mark.slow
def test_of_many_that_begin_at_once_one_holds_it(out):
    ready, results = threading.Barrier(8), []

    def enter():
        ready.wait()
        try:
            with hold(out):
                results.append("held")
                time.sleep(0.5)
        except LeaseError:
            results.append("refused")

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held"] + ["refused"] * 7


HOLD = """
import sys, threading, time
from boomerang_batch.run import lease
lease.BEAT_EVERY_S = 0.05
with lease.held(sys.argv[1], wait=False, stop=threading.Event()) as holding:
    print(holding.epoch, flush=True)
    sys.stdin.readline()
    try:
        lease.require(sys.argv[1], holding.epoch)
        print("still mine", flush=True)
    except lease.LeaseError as error:
        print(error, flush=True)
"""


@contextlib.contextmanager
def another(out: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease until it is written to."""
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "1\n"
            yield process
        finally:
            process.kill()


def test_one_that_died_on_this_machine_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_AFTER_S", 3600)
    with another(str(tmp_path)) as process:
        process.kill()
        process.wait()
        with hold(str(tmp_path)) as holding:
            assert holding.epoch == 2
            assert holding.taken_over_at is not None
            assert [one["process"] for one in told_of(str(tmp_path))] == [0, os.getpid()]


def test_a_process_number_that_is_used_again_is_not_taken_for_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_AFTER_S", 3600)
    with another(str(tmp_path)) as process:
        process.kill()
        process.wait()
        epoch = tmp_path / "logs" / "lease" / "epoch-000001.json"
        epoch.write_text(json.dumps(json.loads(epoch.read_text()) | {"process": os.getpid()}))
        with hold(str(tmp_path)) as holding:
            assert holding.epoch == 2


@pytest.mark.slow
def test_one_of_another_machine_is_taken_over_when_it_has_been_silent_for_long(tmp_path):
    with another(str(tmp_path)) as process:
        process.kill()
        process.wait()
        epoch = tmp_path / "logs" / "lease" / "epoch-000001.json"
        epoch.write_text(json.dumps(json.loads(epoch.read_text()) | {"machine": "elsewhere"}))
        started = time.monotonic()
        with hold(str(tmp_path)) as holding:
            assert holding.epoch == 2
        assert 0.5 < time.monotonic() - started < 5


@pytest.mark.slow
def test_a_frozen_holder_finds_out_when_it_thaws(tmp_path):
    with another(str(tmp_path)) as process:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with hold(str(tmp_path)) as holding:
                assert holding.epoch == 2
                os.kill(process.pid, signal.SIGCONT)
                told, _ = process.communicate("\n", timeout=20)
                assert "another run has taken over" in told
                lease.require(str(tmp_path), 2)  # and it takes nothing away
        finally:
            process.send_signal(signal.SIGCONT)
    with hold(str(tmp_path)) as holding:
        assert holding.epoch == 3
        assert not holding.waited_out  # what the first holder was uploading may still be on its way


def test_one_that_lives_goes_on(tmp_path):
    with another(str(tmp_path)) as process:
        with pytest.raises(LeaseError, match="is at work"), hold(str(tmp_path)):
            pass
        told, _ = process.communicate("\n", timeout=20)
        assert told == "still mine\n"


def test_who_looks_while_another_takes_over_is_not_kept_waiting(tmp_path, monkeypatch):
    """It finds an epoch whose holder is forgotten and never let go, and then the one that came after."""
    monkeypatch.setattr(lease, "STALE_AFTER_S", 3600)
    with another(str(tmp_path)) as process:
        process.kill()
        process.wait()
        real, taken = lease._holder, []

        def holder(out: str, epoch: int) -> lease.Holder:
            if not taken:
                taken.append(hold(out))
                with monkeypatch.context() as patch:
                    patch.setattr(lease, "_holder", real)
                    taken[0].__enter__()
            return real(out, epoch)

        monkeypatch.setattr(lease, "_holder", holder)
        with pytest.raises(LeaseError, match="is at work"), hold(str(tmp_path)):
            pass
        taken[0].__exit__(None, None, None)


def test_uploads_of_an_ousted_holder_are_waited_for(monkeypatch):
    monkeypatch.setattr(lease, "UPLOADS_END_AFTER_S", 0.3)
    started = time.monotonic()
    lease.Lease(epoch=1, taken_over_at=None).let_uploads_end(threading.Event())
    assert time.monotonic() - started < 0.1
    lease.Lease(epoch=2, taken_over_at=started).let_uploads_end(threading.Event())
    assert time.monotonic() - started >= 0.3
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        lease.Lease(epoch=2, taken_over_at=time.monotonic()).let_uploads_end(stop)


@pytest.mark.slow
def test_an_epoch_that_can_not_be_read_is_still_one(tmp_path):
    storage.make_folder(str(tmp_path / "logs" / "lease"))
    (tmp_path / "logs" / "lease" / "epoch-000041.json").write_text("{")
    with hold(str(tmp_path)) as holding:
        assert holding.epoch == 42
