"""models/fetch.py: a model in a store is copied once, whole, and anew when it has changed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from boomerang_batch import storage
from boomerang_batch.errors import ModelError
from boomerang_batch.models import load_denoiser
from boomerang_batch.models.fetch import fetch
from boomerang_batch.storage import owned
from tests import worlds

URL = "memory://models/tiny"
PATTERNS = ["*.json", "*.safetensors"]


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BOOMERANG_MODELS", str(tmp_path / "copies"))
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


def put(**files: bytes) -> None:
    for name, data in files.items():
        storage.publish_bytes(data, storage.join(URL, name.replace("__", "/").replace("_", ".")))


def test_a_model_loads_from_a_store_as_from_a_folder(tiny_model):
    for path in Path(tiny_model).rglob("*"):
        if path.is_file():
            storage.publish_bytes(path.read_bytes(), storage.join(URL, path.relative_to(tiny_model).as_posix()))
    spec = worlds.recipe(tiny_model).model
    near = load_denoiser(spec, device="cpu", threads=1)
    far = load_denoiser(spec.model_copy(update={"source": URL}), device="cpu", threads=1)
    assert far.spec.digest == near.spec.digest


def test_only_what_is_wanted_is_copied_and_only_once(tmp_path, monkeypatch):
    put(config_json=b"{}", below__weights_safetensors=b"w", evil_bin=b"pickle")
    copy = fetch(URL, patterns=PATTERNS)
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()) == [
        "below/weights.safetensors",
        "config.json",
    ]
    monkeypatch.setattr(storage, "download", lambda url, path: pytest.fail("copied twice"))
    assert fetch(URL, patterns=PATTERNS) == copy
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [copy.name]


def test_a_model_that_changed_is_another_one():
    put(config_json=b"{}")
    first = fetch(URL, patterns=PATTERNS)
    put(config_json=b"{ }")
    second = fetch(URL, patterns=PATTERNS)
    assert first != second
    assert (first / "config.json").read_bytes() == b"{}"
    assert (second / "config.json").read_bytes() == b"{ }"


def test_workers_that_start_together_end_with_one_copy(tmp_path):
    put(config_json=b"{}", weights_safetensors=b"w" * 1000)
    ready, found = threading.Barrier(6), []

    def work():
        ready.wait()
        found.append(fetch(URL, patterns=PATTERNS))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [found[0].name]


def test_a_copy_that_fails_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    put(config_json=b"{}", weights_safetensors=b"w")
    real = storage.download

    def fail(url, path):
        if url.endswith("safetensors"):
            raise storage.StorageError("can't read it")
        real(url, path)

    monkeypatch.setattr(storage, "download", fail)
    with pytest.raises(ModelError, match=r"memory://models/tiny: can't read it; BOOMERANG_MODELS"):
        fetch(URL, patterns=PATTERNS)
    assert list((tmp_path / "copies").iterdir()) == []


def test_nothing_of_a_model_is_told():
    put(readme_txt=b"no model")
    with pytest.raises(ModelError, match="nothing of a model is there"):
        fetch(URL, patterns=PATTERNS)


def replacing(monkeypatch: pytest.MonkeyPatch, *, times: int) -> list[str]:
    """After the first file of each of the first `times` copies the model is replaced; the URLs copied."""
    real, copied, left = storage.download, [], iter(range(times))

    def download(url, path):
        real(url, path)
        copied.append(url)
        if url.endswith("config.json") and (number := next(left, None)) is not None:
            put(config_json=b"{}" + b" " * (number + 1), weights_safetensors=b"new" * (number + 2))

    monkeypatch.setattr(storage, "download", download)
    return copied


def test_a_model_that_is_replaced_while_it_is_copied_is_copied_anew(tmp_path, monkeypatch):
    put(config_json=b"{}", weights_safetensors=b"w")
    copied = replacing(monkeypatch, times=1)
    copy = fetch(URL, patterns=PATTERNS)
    assert (copy / "config.json").read_bytes() == b"{} "
    assert (copy / "weights.safetensors").read_bytes() == b"newnew"
    assert len(copied) == 4
    assert list((tmp_path / "copies").iterdir()) == [copy]


def test_a_model_that_is_replaced_again_and_again_is_told(tmp_path, monkeypatch):
    put(config_json=b"{}", weights_safetensors=b"w")
    replacing(monkeypatch, times=9)
    with pytest.raises(
        ModelError, match=r"memory://models/tiny: it was replaced while it was copied, each of 2"
    ):
        fetch(URL, patterns=PATTERNS)
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_model_whose_files_are_taken_away_while_it_is_copied_is_looked_for_anew(monkeypatch):
    put(config_json=b"{}", weights_safetensors=b"w")
    real, copied = storage.download, []

    def download(url, path):
        real(url, path)
        copied.append(url)
        if len(copied) == 1:
            storage.delete(storage.join(URL, "weights.safetensors"))
            put(other_safetensors=b"o")

    monkeypatch.setattr(storage, "download", download)
    copy = fetch(URL, patterns=PATTERNS)
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "other.safetensors"]


COPY = """
import sys, time
from boomerang_batch import storage
from boomerang_batch.models.fetch import fetch
from boomerang_batch.storage import owned
storage.list_tree = lambda url: {"config.json": "1"}
def download(url, path):
    path.write_bytes(b"{")
    print("copying", flush=True)
    time.sleep(120)
storage.download = download
fetch("memory://models/tiny", patterns=["*.json"])
"""


@pytest.mark.slow
def test_what_a_killed_copier_left_is_swept_and_a_living_ones_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(owned, "_YOUNG_S", -1.0)
    put(config_json=b"{}")
    command = [sys.executable, "-c", COPY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "copying\n"
            first = fetch(URL, patterns=PATTERNS)
            assert len(list((tmp_path / "copies").iterdir())) == 2
        finally:
            process.kill()
    put(config_json=b"{ }")
    second = fetch(URL, patterns=PATTERNS)
    assert sorted((tmp_path / "copies").iterdir()) == sorted([first, second])
