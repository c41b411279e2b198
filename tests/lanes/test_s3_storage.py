"""storage on a real S3 server: whole objects, one winner of a race, bounded memory, errors without secrets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from boomerang_batch import storage
from boomerang_batch.errors import ObjectExistsError, StorageError
from boomerang_batch.models.fetch import fetch
from tests.lanes.seaweedfs import SeaweedFS

pytestmark = [pytest.mark.lane, pytest.mark.timeout(300)]


@pytest.fixture
def home(seaweed: SeaweedFS, bucket: str, reach: Callable[[Mapping[str, str]], None]) -> str:
    """The URL of an empty folder on the server, which this process can reach."""
    reach(seaweed.environment)
    return f"s3://{bucket}/out"


def random_file(path: Path, size_bytes: int) -> Path:
    """A file that no block of zeros or repeated part makes easier to get right."""
    dice = random.Random(size_bytes)
    with path.open("wb") as writer:
        while size_bytes:
            piece = dice.randbytes(min(size_bytes, 1 << 20))
            writer.write(piece)
            size_bytes -= len(piece)
    return path


def test_objects_are_written_whole_read_listed_and_deleted(home: str, tmp_path: Path):
    url = storage.join(home, "a.tar")
    assert not storage.exists(url)
    storage.publish(random_file(tmp_path / "a", 300_000), url)
    assert storage.read_bytes(url) == (tmp_path / "a").read_bytes()
    assert storage.size(url) == 300_000
    storage.publish_bytes(b"shorter", url)
    assert storage.read_bytes(url) == b"shorter"
    with storage.open_read(url) as stream:
        assert (stream.read(2), stream.read()) == (b"sh", b"orter")
    storage.publish_bytes(b"", storage.join(home, "b.json"))
    storage.publish_bytes(b"{}", storage.join(home, "logs", "c.json"))
    assert storage.read_bytes(storage.join(home, "b.json")) == b""
    assert storage.list_names(home) == ["a.tar", "b.json", "logs"]
    assert storage.glob(storage.join(home, "*.tar")) == [url]
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)
    assert storage.list_names(home) == ["b.json", "logs"]
    assert storage.list_names(storage.join(home, "nowhere")) == []


def test_what_another_writer_put_is_seen_at_once(seaweed: SeaweedFS, bucket: str, home: str):
    assert storage.list_names(home) == []
    for number in range(5):
        seaweed.put(bucket, f"out/{number}.json", b"{}")
        assert storage.list_names(home) == [f"{each}.json" for each in range(number + 1)]
        assert storage.exists(storage.join(home, f"{number}.json"))


def test_more_names_than_a_page_of_a_listing_holds(seaweed: SeaweedFS, bucket: str, home: str):
    client = seaweed.client()
    for number in range(1100):
        client.put_object(Bucket=bucket, Key=f"out/{number:04d}", Body=b"")
    assert storage.list_names(home) == [f"{number:04d}" for number in range(1100)]


@pytest.mark.parametrize("name", ["a b+c.tar", "größe.tar", "a#b.tar", "a%20b.tar", "s,=@.tar"])
def test_names_that_urls_spell_otherwise(seaweed: SeaweedFS, bucket: str, home: str, name: str):
    storage.publish_bytes(b"x", storage.join(home, name))
    assert seaweed.names(bucket) == [f"out/{name}"]
    assert storage.read_bytes(storage.join(home, name)) == b"x"


def test_a_tar_of_several_parts_reads_back_equal(seaweed: SeaweedFS, bucket: str, home: str, tmp_path: Path):
    source = random_file(tmp_path / "large", 90_000_001)
    url = storage.join(home, "large.tar")
    storage.publish(source, url)
    etag = seaweed.client().head_object(Bucket=bucket, Key="out/large.tar")["ETag"].strip('"')
    assert int(etag.partition("-")[2]) > 1  # it did go up in parts
    assert seaweed.unfinished_uploads(bucket) == []
    with storage.open_read(url) as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == digest(source)


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def test_the_second_create_only_is_refused_and_changes_nothing(home: str):
    url = storage.join(home, "a_stats.json")
    storage.create_only(url, b"first")
    with pytest.raises(ObjectExistsError, match="a_stats"):
        storage.create_only(url, b"second")
    assert storage.read_bytes(url) == b"first"


ROUNDS, PROCESSES, THREADS = 40, 4, 4


def race(folder: str, process: int, start: Any, wins: Any) -> None:
    """A process of the race: in every round its racers meet the others and try to create one marker."""

    def racer(name: str) -> None:
        for number in range(ROUNDS):
            start.wait(timeout=120)
            with contextlib.suppress(ObjectExistsError):
                storage.create_only(f"{folder}/{number}.json", name.encode())
                wins.put((number, name))

    threads = [threading.Thread(target=racer, args=(f"racer {process}.{each}",)) for each in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_sixteen_racers_exactly_one_wins_each_round(home: str):
    spawn = multiprocessing.get_context("spawn")
    start, wins = spawn.Barrier(PROCESSES * THREADS), spawn.Queue()
    processes = [
        spawn.Process(target=race, daemon=True, args=(home, process, start, wins))
        for process in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    won = [wins.get(timeout=200) for _ in range(ROUNDS)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    with pytest.raises(queue.Empty):
        won.append(wins.get(timeout=1))
    assert sorted(number for number, _ in won) == list(range(ROUNDS))
    for number, name in won:
        assert storage.read_bytes(storage.join(home, f"{number}.json")) == name.encode()
    assert len(Counter(name for _, name in won)) > 1  # it was a race


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(seaweed: SeaweedFS, bucket: str, home: str):
    """Half of one object and half of another, of the same size, must never pass for a shard."""
    size = 48 << 20
    seaweed.put(bucket, "out/a.tar", b"a" * size)
    with storage.open_read(f"{home}/a.tar") as stream:
        assert stream.read(1000) == b"a" * 1000
        seaweed.put(bucket, "out/a.tar", b"b" * size)
        with pytest.raises(StorageError, match=r"/out/a\.tar"):
            stream.read()


MEMORY = """
import json, sys
from pathlib import Path
from boomerang_batch import storage

def peak_bytes():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

source, url = Path(sys.argv[1]), sys.argv[2]
before = peak_bytes()
storage.publish(source, url)
written = peak_bytes()
size = 0
with storage.open_read(url) as stream:
    while piece := stream.read(1 << 20):
        size += len(piece)
print(json.dumps({"size": size, "written": written - before, "read": peak_bytes() - before}))
"""


def test_a_large_object_passes_through_little_memory(seaweed: SeaweedFS, home: str, tmp_path: Path):
    source = random_file(tmp_path / "large", 300_000_000)
    command = [sys.executable, "-c", MEMORY, str(source), storage.join(home, "large.tar")]
    environment = {**os.environ, **seaweed.environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout)
    assert found["size"] == 300_000_000
    assert found["read"] < 150_000_000, found


@pytest.mark.parametrize(
    "call",
    [storage.read_bytes, storage.open_read, storage.size, lambda url: storage.download(url, Path("/dev/null"))],
)
def test_what_is_not_there_is_named(home: str, call: Callable[[str], object]):
    with pytest.raises(StorageError, match="nothing at that path") as caught:
        call(f"{home}/missing.tar")
    assert f"{home}/missing.tar" in str(caught.value)


@pytest.mark.parametrize("changed", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_told_and_not_shown(
    seaweed: SeaweedFS, bucket: str, reach: Callable[[Mapping[str, str]], None], changed: str
):
    wrong = {**seaweed.environment, changed: "Zq0123456789abcdefghKx"}
    reach(wrong)
    calls: list[Callable[[str], object]] = [
        storage.read_bytes,
        storage.exists,
        storage.list_names,
        lambda url: storage.publish_bytes(b"x", url),
        lambda url: storage.create_only(url, b"x"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="permission denied") as caught:
            call(f"s3://{bucket}/a.tar")
        assert f"s3://{bucket}/a.tar" in str(caught.value)
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert wrong[name] not in str(caught.value)
    assert seaweed.names(bucket) == []


def test_a_bucket_that_is_not_there_is_told(home: str, tmp_path: Path):
    with pytest.raises(StorageError, match="s3://no-such-bucket/a"):
        storage.publish_bytes(b"x", "s3://no-such-bucket/a")
    with pytest.raises(StorageError, match="s3://no-such-bucket/a"):
        storage.create_only("s3://no-such-bucket/a", b"x")
    with pytest.raises(StorageError, match="s3://no-such-bucket/a"):
        storage.read_bytes("s3://no-such-bucket/a")
    with pytest.raises(StorageError, match="s3://no-such-bucket/a"):
        storage.publish(random_file(tmp_path / "large", 70_000_000), "s3://no-such-bucket/a")


def test_a_model_that_is_replaced_by_one_of_the_same_size_while_it_is_copied_is_noticed(
    seaweed: SeaweedFS, bucket: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BOOMERANG_MODELS", str(tmp_path / "copies"))
    names, real = ("config.json", "unet/weights.safetensors"), storage.download
    for name in names:
        seaweed.put(bucket, f"out/{name}", b"old")

    def download(url: str, path: Path) -> None:
        real(url, path)
        monkeypatch.setattr(storage, "download", real)
        for name in names:
            seaweed.put(bucket, f"out/{name}", b"new")

    monkeypatch.setattr(storage, "download", download)
    copy = fetch(home, patterns=["*.json", "*.safetensors"])
    assert {name: (copy / name).read_bytes() for name in names} == dict.fromkeys(names, b"new")
