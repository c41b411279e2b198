"""storage.py: whole files or nothing, one winner of a create-only race, and errors that name the URL."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from boomerang_batch import storage
from boomerang_batch.errors import ObjectExistsError, StorageError


class NamelessRefusal(MemoryFileSystem):
    """A store that refuses a second create-only put with EINVAL, as some S3 servers make s3fs do."""

    protocol = "nameless"
    store: dict = {}  # noqa: RUF012 (fsspec's own form)
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and (self.exists(path) or b"broken" in value):
            raise OSError(errno.EINVAL, "At least one of the pre-conditions did not hold")
        super().pipe_file(path, value, **kwargs)


fsspec.register_implementation("nameless", NamelessRefusal, clobber=True)


@pytest.fixture(params=["path", "file", "memory", "nameless"])
def folder(request, tmp_path):
    """An empty folder, as a plain path, a file: URL, or on a remote store."""
    if request.param in ("path", "file"):
        yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"
    else:
        filesystem = fsspec.filesystem(request.param)
        filesystem.store.clear()
        yield f"{request.param}://bucket/out"
        filesystem.store.clear()


@pytest.fixture
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("spool") / "made.tar"
    path.write_bytes(b"finished" * 1000)
    return path


# --- what every store does alike ---


def test_publish_puts_the_whole_file_and_keeps_the_source(folder, source):
    url = storage.join(folder, "a.tar")
    storage.make_folder(folder)
    storage.publish(source, url)
    assert storage.read_bytes(url) == source.read_bytes() == b"finished" * 1000
    assert storage.size(url) == 8000
    assert storage.exists(url)
    assert storage.list_names(folder) == ["a.tar"]


def test_publish_replaces_what_was_there(folder, source):
    url = storage.join(folder, "a.tar")
    storage.publish_bytes(b"old and longer " * 1000, url)
    storage.publish(source, url)
    assert storage.read_bytes(url) == source.read_bytes()
    storage.publish_bytes(b"short", url)
    assert storage.read_bytes(url) == b"short"


def test_the_second_create_only_is_refused_and_changes_nothing(folder):
    url = storage.join(folder, "a_stats.json")
    storage.create_only(url, b"first")
    with pytest.raises(ObjectExistsError) as caught:
        storage.create_only(url, b"second")
    assert url in str(caught.value)
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(folder) == ["a_stats.json"]


def test_a_deleted_name_is_free_again(folder):
    url = storage.join(folder, "a_stats.json")
    storage.create_only(url, b"first")
    storage.delete(url)
    assert not storage.exists(url)
    storage.delete(url)  # twice is no error
    storage.create_only(url, b"second")
    assert storage.read_bytes(url) == b"second"


def test_reading_streams(folder, source):
    url = storage.join(folder, "a.tar")
    storage.publish(source, url)
    with storage.open_read(url) as stream:
        assert stream.read(8) == b"finished"
        assert len(stream.read()) == 7992


def test_names_are_listed_sorted_and_only_those_directly_below(folder):
    for name in ("b.tar", "a.tar", "c_stats.json"):
        storage.publish_bytes(b"x", storage.join(folder, name))
    storage.make_folder(storage.join(folder, "logs"))
    storage.publish_bytes(b"x", storage.join(folder, "logs", "deep.json"))
    assert storage.list_names(folder) == ["a.tar", "b.tar", "c_stats.json", "logs"]
    assert storage.list_names(storage.join(folder, "nowhere")) == []


def test_glob_finds_urls_that_can_be_read(folder):
    for name in ("b.tar", "a.tar", "c.json"):
        storage.publish_bytes(name.encode(), storage.join(folder, name))
    found = storage.glob(storage.join(folder, "*.tar"))
    assert [storage.read_bytes(url) for url in found] == [b"a.tar", b"b.tar"]


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_read, storage.size])
def test_reading_what_is_not_there_names_the_url(folder, read):
    url = storage.join(folder, "missing.tar")
    with pytest.raises(StorageError) as caught:
        read(url)
    assert url in str(caught.value)
    assert "there is nothing at that path" in str(caught.value)


def test_a_put_that_fails_for_its_own_reason_is_not_taken_for_an_existing_object():
    with pytest.raises(StorageError, match="pre-conditions") as caught:
        storage.create_only("nameless://bucket/free.json", b"broken")
    assert not isinstance(caught.value, ObjectExistsError)


@pytest.mark.parametrize(
    ("base", "names", "joined"),
    [
        ("/data/out", ("a.tar",), "/data/out/a.tar"),
        ("/data/out/", ("logs", "a.json"), "/data/out/logs/a.json"),
        ("out", ("a.tar",), "out/a.tar"),
        ("/", ("a.tar",), "/a.tar"),
        ("s3://bucket", ("a.tar",), "s3://bucket/a.tar"),
        ("s3://bucket/out//", ("a.tar",), "s3://bucket/out/a.tar"),
        ("memory://", ("a.tar",), "memory://a.tar"),
    ],
)
def test_join(base, names, joined):
    assert storage.join(base, *names) == joined


def test_an_unknown_protocol_is_told():
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.list_names,
        lambda url: storage.create_only(url, b""),
    ):
        with pytest.raises(StorageError, match=r"nosuch://bucket/a: Protocol not known"):
            call("nosuch://bucket/a")


def test_a_protocol_whose_client_is_missing_names_the_extra():
    fsspec.register_implementation("clientless", "no_such_module.Store", clobber=True, errtxt="Install x")
    with pytest.raises(
        StorageError, match=r"clientless://b/a: Install x; .*pip install 'boomerang-batch\[s3\]'"
    ):
        storage.read_bytes("clientless://b/a")


# --- local disk: atomic, durable, and clean after failures ---


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    url = str(tmp_path / "a.tar")
    contents = [bytes([letter]) * 500_000 for letter in (65, 66)]
    storage.publish_bytes(contents[0], url)
    done = threading.Event()

    def write():
        for turn in range(60):
            storage.publish_bytes(contents[turn % 2], url)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(storage.read_bytes(url))
    writer.join()
    assert seen <= set(contents)


@pytest.mark.parametrize(
    ("put", "moves"),
    [
        (storage.publish_bytes, ("replace",)),
        (lambda data, url: storage.create_only(url, data), ("link",)),
    ],
)
def test_content_is_on_disk_before_the_name_and_the_name_before_success(tmp_path, monkeypatch, put, moves):
    events = []

    def recorded(name, real):
        def call(*args, **kwargs):
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")  # noqa: PTH112
            events.append("fsync folder" if is_folder else name)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "link", "rename", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    put(b"data", str(tmp_path / "a"))
    assert events == ["fsync", *moves, "fsync folder"]


ROUNDS = 1000
RACERS = 6


def race(folder, racer, start, wins):
    """One racer: in every round, meet the others and try to create the round's marker."""
    for number in range(ROUNDS):
        start.wait(timeout=60)
        with contextlib.suppress(ObjectExistsError):
            storage.create_only(storage.join(folder, f"{number}.json"), f"racer {racer}".encode())
            wins.put((number, racer))


@pytest.mark.slow
def test_a_race_of_processes_has_one_winner_in_each_round(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, wins = spawn.Barrier(RACERS), spawn.Queue()
    racers = [
        spawn.Process(target=race, daemon=True, args=(str(tmp_path), racer, start, wins))
        for racer in range(RACERS)
    ]
    for process in racers:
        process.start()
    # Winners are told through a pipe; reading it empty lets the racers end.
    winners = dict(wins.get(timeout=120) for _ in range(ROUNDS))
    for process in racers:
        process.join(timeout=60)
    assert [process.exitcode for process in racers] == [0] * RACERS
    assert wins.empty()
    assert sorted(winners) == list(range(ROUNDS))
    assert storage.list_names(str(tmp_path)) == sorted(f"{number}.json" for number in range(ROUNDS))
    assert len(list(tmp_path.iterdir())) == ROUNDS
    for number, racer in winners.items():
        assert (tmp_path / f"{number}.json").read_text() == f"racer {racer}"
    assert len(Counter(winners.values())) > 1  # it was a race


STOP_BEFORE_THE_NAME = """
import os, sys, time
from pathlib import Path
from boomerang_batch import storage

def stop(*args, **kwargs):
    print("staged", flush=True)
    time.sleep(120)

os.link = os.rename = os.replace = stop
verb, url = sys.argv[1:]
if verb == "publish":
    storage.publish_bytes(b"new" * 100_000, url)
else:
    storage.create_only(url, b"new" * 100_000)
"""


@pytest.mark.parametrize("verb", ["publish", "create_only"])
def test_a_kill_between_writing_and_naming_leaves_nothing_visible(tmp_path, verb):
    url = str(tmp_path / "a.tar")
    if verb == "publish":
        storage.publish_bytes(b"old", url)
    before = storage.list_names(str(tmp_path))
    command = [sys.executable, "-c", STOP_BEFORE_THE_NAME, verb, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "staged\n"
            storage.sweep(str(tmp_path))
            assert len(list(tmp_path.iterdir())) == len(before) + 1  # its owner lives: not swept
        finally:
            writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == len(before) + 1
    assert storage.list_names(str(tmp_path)) == before
    if verb == "publish":
        assert storage.read_bytes(url) == b"old"
    else:
        assert not storage.exists(url)

    storage.sweep(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    storage.publish_bytes(b"new", url)
    assert storage.read_bytes(url) == b"new"


def test_sweep_leaves_other_machines_and_foreign_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node")
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    dead = dead.stdout.decode().strip()
    mine = f".a.tar@node-{dead}-0.tmp"
    foreign = [
        f".a.tar@node-{os.getpid()}-0.tmp",  # alive
        f".a.tar@other-{dead}-0.tmp",
        f".a.tar@node-2-{dead}-0.tmp",  # the machine called node-2
        ".a.tar@node-words-here.tmp",
        ".a.tar@node.tmp",
        "a.tar@node-1-0.tmp",
        ".hidden",
        "a.tar",
    ]
    for name in [mine, *foreign]:
        (tmp_path / name).touch()
    storage.sweep(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)
    storage.sweep(str(tmp_path / "nowhere"))
    storage.sweep("memory://bucket")


@contextlib.contextmanager
def small_disk(folder: Path):
    """A folder that takes little: a small tmpfs where mounting is allowed, else under a limit on file size."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verb", ["publish", "publish_bytes", "create_only"])
def test_a_full_disk_leaves_the_old_state_and_no_leftover(tmp_path, tmp_path_factory, verb):
    large = tmp_path_factory.mktemp("spool") / "large.tar"
    large.write_bytes(bytes(200_000))
    with small_disk(tmp_path):
        url = str(tmp_path / "a.tar")
        if verb != "create_only":
            storage.publish_bytes(b"old", url)
        with pytest.raises(StorageError, match=r"can't write .*a\.tar: (No space left|File too large)"):
            {
                "publish": lambda: storage.publish(large, url),
                "publish_bytes": lambda: storage.publish_bytes(bytes(200_000), url),
                "create_only": lambda: storage.create_only(url, bytes(200_000)),
            }[verb]()
        assert [path.name for path in tmp_path.iterdir()] == ([] if verb == "create_only" else ["a.tar"])
        storage.publish_bytes(b"fits", url)
        assert storage.read_bytes(url) == b"fits"


@contextlib.contextmanager
def unprivileged():
    """As a user whom file modes bind; they don't bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("write", lambda folder: storage.publish_bytes(b"x", f"{folder}/new.tar")),
        ("write", lambda folder: storage.create_only(f"{folder}/new.json", b"x")),
        ("read", lambda folder: storage.read_bytes(f"{folder}/a.tar")),
        ("list", lambda folder: storage.list_names(folder)),
        ("create", lambda folder: storage.make_folder(f"{folder}/below")),
        ("delete", lambda folder: storage.delete(f"{folder}/a.tar")),
        ("look for", lambda folder: storage.exists(f"{folder}/a.tar")),
    ],
)
def test_a_folder_without_permission_is_named(tmp_path, verb, call):
    storage.publish_bytes(b"x", str(tmp_path / "a.tar"))
    tmp_path.chmod(0)
    try:
        with unprivileged(), pytest.raises(StorageError) as caught:
            call(str(tmp_path))
    finally:
        tmp_path.chmod(0o700)
    assert str(caught.value).startswith(f"can't {verb} {tmp_path}")
    assert str(caught.value).endswith(": permission denied")


def test_writing_below_a_missing_folder_or_a_file_names_the_url(tmp_path):
    (tmp_path / "file").touch()
    for parent in ("missing", "file"):
        url = str(tmp_path / parent / "a.tar")
        with pytest.raises(StorageError, match=f"can't write {url}: "):
            storage.publish_bytes(b"x", url)


def test_absolute_paths_mean_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out/a") == str(tmp_path / "out" / "a")
    assert storage.absolute(f"file://{tmp_path}/out") == str(tmp_path / "out")
    assert storage.absolute("s3://bucket/out") == "s3://bucket/out"
