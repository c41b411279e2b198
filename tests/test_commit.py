"""The transaction: what is in OUT when a shard is committed once, twice, or by two that disagree."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from boomerang_batch import storage
from boomerang_batch.data.provenance import Marker
from boomerang_batch.errors import StorageError
from boomerang_batch.run.commit import commit, read_marker


def built(folder: Path, tar: bytes, provenance: bytes = b"rows") -> tuple[Marker, Path, Path]:
    """A finished shard on scratch disk."""
    folder.mkdir(exist_ok=True)
    (folder / "tar").write_bytes(tar)
    (folder / "rows").write_bytes(provenance)
    marker = Marker(
        stem="s",
        counts={"ok": 1},
        tar_sha256=hashlib.sha256(tar).hexdigest(),
        tar_bytes=len(tar),
        parquet_sha256=hashlib.sha256(provenance).hexdigest(),
        parquet_bytes=len(provenance),
        recipe_digest="0" * 64,
    )
    return marker, folder / "tar", folder / "rows"


def do(out: Path, folder: Path, tar: bytes) -> None:
    out.mkdir(exist_ok=True)
    marker, tar_file, rows = built(folder, tar)
    commit(str(out), marker, tar=tar_file, provenance=rows)


def test_a_commit_leaves_three_files_and_a_marker_that_reads_back(tmp_path: Path):
    do(tmp_path / "out", tmp_path / "a", b"tar")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["s.parquet", "s.tar", "s_stats.json"]
    marker = read_marker(str(tmp_path / "out"), "s")
    assert marker is not None
    assert marker.tar_bytes == 3


def test_the_same_bytes_again_are_welcome_and_touch_nothing(tmp_path: Path):
    out = tmp_path / "out"
    do(out, tmp_path / "a", b"tar")
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    do(out, tmp_path / "b", b"tar")
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before


def test_other_bytes_are_refused_before_they_replace_what_is_committed(tmp_path: Path):
    out = tmp_path / "out"
    do(out, tmp_path / "a", b"tar")
    with pytest.raises(StorageError, match="other bytes"):
        do(out, tmp_path / "b", b"other")
    assert (out / "s.tar").read_bytes() == b"tar"


def test_a_torn_marker_is_replaced(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "s_stats.json").write_bytes(b'{"stem"')
    do(out, tmp_path / "a", b"tar")
    assert read_marker(str(out), "s") is not None


@pytest.mark.parametrize("published", ["s.tar", "s.parquet"])
def test_a_kill_at_any_point_leaves_no_marker_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: str
):
    out, real = tmp_path / "out", storage.publish

    class KilledError(Exception):
        pass

    def publish(source: Path, url: str) -> None:
        real(source, url)
        if url.endswith(published):
            raise KilledError

    monkeypatch.setattr(storage, "publish", publish)
    with pytest.raises(KilledError):
        do(out, tmp_path / "a", b"old")
    assert read_marker(str(out), "s") is None
    monkeypatch.setattr(storage, "publish", real)
    do(out, tmp_path / "b", b"new")  # whatever lay there
    assert (out / "s.tar").read_bytes() == b"new"


def test_a_marker_of_another_shard_is_none(tmp_path: Path):
    do(tmp_path / "out", tmp_path / "a", b"tar")
    (tmp_path / "out" / "s_stats.json").rename(tmp_path / "out" / "t_stats.json")
    assert read_marker(str(tmp_path / "out"), "t") is None
