"""storage/retries.py: what is tried again, for how long, and what is told of it."""

from __future__ import annotations

import errno
import logging

import aiohttp
import pytest
from yarl import URL

from boomerang_batch.storage import retries
from boomerang_batch.storage.retries import IncompleteReadError, may_pass, patiently, status_of


def answered(status: int, url: str = "https://host/a.tar") -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo(URL(url), "GET", {}, URL(url))
    return aiohttp.ClientResponseError(info, (), status=status, message="so it is")


class ClientError(Exception):
    """As botocore's: what the server said is in a dict."""

    def __init__(self, status: int) -> None:
        super().__init__(f"An error occurred ({status})")
        self.response = {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpResponseError(Exception):
    """As azure's."""

    def __init__(self, status: int) -> None:
        super().__init__("no")
        self.status_code = status


class HttpError(Exception):
    """As gcsfs's, whose codes may be text."""

    def __init__(self, status: int) -> None:
        super().__init__("no")
        self.code = str(status)


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("make", [answered, ClientError, HttpResponseError, HttpError])
@pytest.mark.parametrize(
    ("status", "passes"),
    [(403, False), (404, False), (400, False), (401, False), (412, False), (416, False), (501, False),
     (408, True), (409, True), (429, True), (500, True), (502, True), (503, True), (504, True)],
)  # fmt: skip
def test_a_status_decides(make, status, passes):
    assert may_pass(make(status)) is passes
    assert status_of(make(status)) == status
    # Clients wrap what they get, and a wrapped "not found" may stand for a server that is away.
    assert may_pass(because(FileNotFoundError("a"), make(status))) is passes


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        aiohttp.ClientPayloadError("cut short"),
        aiohttp.ServerDisconnectedError(),
        OSError(errno.EBUSY, "slow down"),
        IncompleteReadError("3 of 4"),
        because(FileNotFoundError("a"), aiohttp.ClientConnectionError()),
    ],
)
def test_what_broke_on_the_way_may_pass(error):
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        FileExistsError(),
        ValueError("bad"),
        OSError(errno.EINVAL, "x"),
        because(FileExistsError(), HttpResponseError(409)),
    ],
)
def test_what_was_refused_does_not(error):
    assert not may_pass(error)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by sleeping alone."""

    class Clock:
        now = 0.0
        slept: list[float] = []  # noqa: RUF012

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            self.now += seconds

    clock = Clock()
    clock.slept = []
    monkeypatch.setattr(retries, "time", clock)
    return clock


def test_it_tries_until_it_works(clock, caplog):
    answers = [answered(503), TimeoutError(), "done"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(call, patience_s=60, doing="can't read s3://b/a") == "done"
    assert len(clock.slept) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "can't read s3://b/a: ClientResponseError: 503" in caplog.text


def test_it_gives_up_in_time_with_the_last_error(clock):
    calls = []

    def call():
        calls.append(clock.now)
        raise answered(503)

    with pytest.raises(aiohttp.ClientResponseError):
        patiently(call, patience_s=100, doing="x")
    assert 95 < clock.now <= 100
    # Waits grow, but none is longer than the longest; with full jitter they come to half of that on average.
    assert max(clock.slept) <= 20
    assert 8 <= len(calls) <= 80


def test_a_refusal_is_final_at_once(clock):
    calls = []

    def call():
        calls.append(1)
        raise answered(403)

    with pytest.raises(aiohttp.ClientResponseError):
        patiently(call, patience_s=100, doing="x")
    assert len(calls) == 1
    assert clock.slept == []


def test_what_is_logged_holds_no_secret(clock, caplog, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-session-token")
    errors = iter(
        [because(TimeoutError("https://h/a?X-Amz-Signature=canary, canary-session-token"), answered(503))]
    )

    def call():
        for error in errors:
            raise error
        return 1

    assert patiently(call, patience_s=100, doing="x") == 1
    assert "canary" not in caplog.text
    assert "<AWS_SESSION_TOKEN>" in caplog.text
