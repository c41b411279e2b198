"""scratch.py: what a killed worker leaves is removed, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from boomerang_batch.run.scratch import scratch_folder, sweep_scratch
from boomerang_batch.storage import owned


@pytest.fixture
def tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(owned, "_YOUNG_S", -1.0)
    return tmp_path


def test_a_folder_is_empty_and_gone_after_the_block(tmpdir):
    with scratch_folder() as folder:
        assert list(folder.iterdir()) == []
        (folder / "spool").write_bytes(b"x")
        sweep_scratch()  # it has an owner
        assert (folder / "spool").exists()
    assert list(tmpdir.iterdir()) == []


STAY = """
import time
from boomerang_batch.run.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "spool").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(120)
"""


def test_the_folder_of_a_killed_process_is_swept_and_of_a_living_one_is_not(tmpdir):
    command = [sys.executable, "-c", STAY]
    environment = os.environ | {"TMPDIR": str(tmpdir)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            folder = Path(process.stdout.readline().strip())
            sweep_scratch()
            assert (folder / "spool").exists()
        finally:
            process.kill()
    assert (folder / "spool").exists()
    sweep_scratch()
    assert list(tmpdir.iterdir()) == []


def test_young_folders_and_those_of_others_stay(tmpdir, monkeypatch):
    ours = tmpdir / "boomerang-ours"
    (ours / "task").mkdir(parents=True)
    (ours / "lock").touch()
    (tmpdir / "boomerang-without-a-lock").mkdir()
    (tmpdir / "others").mkdir()
    (tmpdir / "boomerang-file").touch()
    monkeypatch.setattr(owned, "_YOUNG_S", 60.0)
    sweep_scratch()
    assert ours.exists()
    old = time.time() - 3600
    os.utime(ours, (old, old))
    sweep_scratch()
    assert sorted(path.name for path in tmpdir.iterdir()) == [
        "boomerang-file",
        "boomerang-without-a-lock",
        "others",
    ]
