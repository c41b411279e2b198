"""storage while requests break: what passes is waited out, what doesn't ends at once, no byte is wrong."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from boomerang_batch import storage
from boomerang_batch.errors import ObjectExistsError, StorageError
from tests.lanes.fault_proxy import FaultProxy
from tests.lanes.faults import FORBIDDEN, INTERNAL_ERROR, SLOW_DOWN, Answer, Cut, Fault, Rule, Shorten, Stall
from tests.lanes.seaweedfs import SeaweedFS

pytestmark = [pytest.mark.lane, pytest.mark.timeout(180)]

SIZE = 40_000_000
HANG_S = 600.0
"""Longer than any test may last."""


@pytest.fixture
def proxy(seaweed: SeaweedFS, reach: Callable[[Mapping[str, str]], None]) -> Iterator[FaultProxy]:
    """Between this process and the server."""
    with FaultProxy(seaweed.url, seed=1) as proxy:
        reach(seaweed.environment_at(proxy.url))
        yield proxy


@pytest.fixture
def home(bucket: str, proxy: FaultProxy) -> str:
    """The URL of an empty folder, reached once, so that the store counts as one that was there."""
    assert storage.list_names(f"s3://{bucket}/out") == []
    proxy.forget()
    return f"s3://{bucket}/out"


@pytest.fixture
def content() -> bytes:
    """Five blocks of a reader, none like another."""
    return hashlib.shake_256(b"content").digest(SIZE)


def read(url: str) -> bytes:
    with storage.open_read(url) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


BREAKS: dict[str, Fault] = {
    "reset in mid-body": Cut(after_bytes=1_000_000, reset=True),
    "ended in mid-body": Cut(after_bytes=1_000_000),
    "ended at once": Cut(),
    "shortened": Shorten(missing_bytes=100_000),
    "slow down": SLOW_DOWN,
    "internal error": INTERNAL_ERROR,
    "bad gateway": Answer(status=502, code="BadGateway"),
    "too many requests": Answer(status=429, code="TooManyRequests"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_reader_gets_every_byte_right_whatever_breaks(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, content: bytes, broken: str
):
    seaweed.put(bucket, "out/a.tar", content)
    proxy.rules = [Rule(fault=BREAKS[broken], method="GET", path=r"a\.tar", times=3)]
    assert read(f"{home}/a.tar") == content
    assert len(proxy.seen(faults=True)) == 3


def test_a_small_object_is_never_taken_for_a_shorter_one(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str
):
    seaweed.put(bucket, "out/a.json", b'{"whole": true} ' * 100)
    proxy.rules = [Rule(fault=Cut(after_bytes=15), method="GET", path=r"a\.json", times=2)]
    assert storage.read_bytes(f"{home}/a.json") == b'{"whole": true} ' * 100
    assert len(proxy.seen(faults=True)) == 2


UPLOADS: dict[str, Fault] = {
    "request reset in mid-body": Cut(of="request", after_bytes=1_000_000, reset=True),
    "answer lost": Cut(),
    "slow down": SLOW_DOWN,
    "internal error": INTERNAL_ERROR,
}


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("broken", UPLOADS)
def test_an_upload_in_parts_ends_whole_whatever_breaks(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, content: bytes, tmp_path: Path, broken: str,
    method: str,
):  # fmt: skip
    """PUT is a part, POST what begins and completes the upload."""
    (tmp_path / "a").write_bytes(content)
    proxy.rules = [Rule(fault=UPLOADS[broken], method=method, times=2)]
    storage.publish(tmp_path / "a", f"{home}/a.tar")
    assert len(proxy.seen(faults=True)) == 2
    assert seaweed.tree(bucket, "out") == {"a.tar": content}


def test_an_upload_that_fails_leaves_nothing_visible_and_nothing_to_pay_for(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, content: bytes, tmp_path: Path
):
    (tmp_path / "a").write_bytes(content)
    proxy.rules = [Rule(fault=FORBIDDEN, method="PUT", path="partNumber=2")]
    with pytest.raises(StorageError, match="permission denied"):
        storage.publish(tmp_path / "a", f"{home}/a.tar")
    assert proxy.seen(faults=True)
    assert seaweed.names(bucket) == []
    assert seaweed.unfinished_uploads(bucket) == []


@pytest.mark.parametrize("broken", UPLOADS)
def test_a_marker_is_created_once_though_answers_are_lost(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, broken: str
):
    proxy.rules = [Rule(fault=UPLOADS[broken], method="PUT", times=1)]
    storage.create_only(f"{home}/a_stats.json", b"mine")
    with pytest.raises(ObjectExistsError):
        storage.create_only(f"{home}/a_stats.json", b"another's")
    assert seaweed.tree(bucket, "out") == {"a_stats.json": b"mine"}
    assert len(proxy.seen(faults=True)) == 1


def test_a_storm_of_refusals_is_waited_out(seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str):
    proxy.rules = [Rule(fault=SLOW_DOWN, share=0.5)]
    for number in range(20):
        storage.publish_bytes(b"x" * number, f"{home}/{number:02d}.json")
        assert storage.read_bytes(f"{home}/{number:02d}.json") == b"x" * number
    assert storage.list_names(home) == [f"{number:02d}.json" for number in range(20)]
    broken, all_of_them = len(proxy.seen(faults=True)), len(proxy.seen())
    assert 0.3 < broken / all_of_them < 0.7
    assert seaweed.tree(bucket, "out") == {f"{number:02d}.json": b"x" * number for number in range(20)}


@pytest.mark.parametrize("after_bytes", [None, 1000])
def test_a_stall_ends_in_a_retry_and_not_in_a_hang(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, content: bytes, after_bytes: int | None
):
    """With the timeouts that storage has by itself."""
    seaweed.put(bucket, "out/a.tar", content)
    proxy.rules = [
        Rule(fault=Stall(seconds=HANG_S, after_bytes=after_bytes), method="GET", path="a.tar", times=1)
    ]
    begun = time.monotonic()
    assert read(f"{home}/a.tar") == content
    assert len(proxy.seen(faults=True)) == 1
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize("of", ["request", "response"])
def test_a_stalled_upload_ends_in_a_retry_too(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, content: bytes, tmp_path: Path, of: str
):
    """A part is sent only once the store has given leave, and that may not come either."""
    (tmp_path / "a").write_bytes(content)
    proxy.rules = [Rule(fault=Stall(seconds=HANG_S, of=of), method="PUT", times=1)]
    begun = time.monotonic()
    storage.publish(tmp_path / "a", f"{home}/a.tar")
    assert time.monotonic() - begun < 120
    assert seaweed.tree(bucket, "out") == {"a.tar": content}


def test_a_server_that_comes_back_is_waited_for(
    tmp_path: Path, reach: Callable[[Mapping[str, str]], None], content: bytes
):
    with SeaweedFS(tmp_path / "own") as server:
        server.make_bucket("own")
        server.put("own", "a.tar", content)
        reach(server.environment)
        with storage.open_read("s3://own/a.tar") as stream:
            first = stream.read(10_000_000)
            server.kill()
            server.start()
            assert first + stream.read() == content


CALLS: dict[str, Callable[[str], object]] = {
    "read_bytes": storage.read_bytes,
    "read": read,
    "size": storage.size,
    "exists": storage.exists,
    "list_names": storage.list_names,
    "publish_bytes": lambda url: storage.publish_bytes(b"x", url),
    "create_only": lambda url: storage.create_only(url, b"x"),
    "delete": storage.delete,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_ends_at_once(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, name: str, status: int
):
    seaweed.put(bucket, "out/a.tar", b"content")
    proxy.rules = [Rule(fault=Answer(status=status, code="AccessDenied"))]
    begun = time.monotonic()
    with pytest.raises(StorageError, match="permission denied") as caught:
        CALLS[name](f"{home}/a.tar")
    assert time.monotonic() - begun < 5
    assert f"{home}/a.tar" in str(caught.value)
    asked = Counter((each.method, each.target) for each in proxy.seen())
    assert asked.total() <= 2, asked
    assert set(asked.values()) == {1}, asked
    for secret in (seaweed.access_key, seaweed.secret_key, "Signature", "Authorization"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("name", ["read_bytes", "read", "size"])
def test_what_is_not_there_is_not_asked_for_again(proxy: FaultProxy, home: str, name: str):
    with pytest.raises(StorageError, match="nothing at that path"):
        CALLS[name](f"{home}/missing.tar")
    asked = Counter((each.method, each.target) for each in proxy.seen())
    assert asked.total() <= 3, asked
    assert set(asked.values()) == {1}, asked


def test_an_address_where_nobody_listens_is_told_in_time(
    seaweed: SeaweedFS, bucket: str, reach: Callable[[Mapping[str, str]], None]
):
    with FaultProxy(seaweed.url) as gone:
        url = gone.url
    reach(seaweed.environment_at(url))
    begun = time.monotonic()
    with pytest.raises(StorageError, match=f"s3://{bucket}/a"):
        storage.read_bytes(f"s3://{bucket}/a")
    assert time.monotonic() - begun < 60


def test_the_warnings_of_a_storm_name_no_secret(
    seaweed: SeaweedFS, bucket: str, proxy: FaultProxy, home: str, caplog: pytest.LogCaptureFixture
):
    seaweed.put(bucket, "out/a.tar", b"content")
    for fault in (SLOW_DOWN, INTERNAL_ERROR, Cut(), Cut(after_bytes=2, reset=True)):
        proxy.rules = [Rule(fault=fault, times=6)]  # more often than a client asks again by itself
        assert storage.read_bytes(f"{home}/a.tar") == b"content"
    assert caplog.records
    for secret in (seaweed.access_key, seaweed.secret_key, "Signature"):
        assert secret not in caplog.text
