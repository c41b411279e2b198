"""The commands as a user types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from boomerang_batch.cli import main
from boomerang_batch.run.verify import verify
from tests import worlds

COMMAND = [sys.executable, "-m", "boomerang_batch"]


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def pipeline(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return worlds.save_shards(tmp_path / "in", shards=2, samples=3)


@pytest.mark.slow
def test_run_reports_for_people_and_for_programs(tmp_path: Path, pipeline: Path, manifest: Path):
    options = ("--threads", 1, "--device", "cpu")
    first = call("run", pipeline, manifest, tmp_path / "out", *options)
    assert first.exit_code == 0
    assert "shards 2 done; samples 6 ok" in first.stdout
    again = call("run", pipeline, manifest, tmp_path / "out", *options, "--json")
    assert json.loads(again.stdout)["shards"] == {
        "done": 0,
        "there": 2,
        "mended": 0,
        "quarantined": 0,
        "left": 0,
    }


def test_without_a_terminal_progress_is_json_lines_on_stderr(
    tmp_path: Path, pipeline: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("boomerang_batch.run.telemetry._LINE_EVERY_S", 0.0)
    result = call("run", pipeline, manifest, tmp_path / "out", "--threads", 1)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert lines[-1]["shards_done"] == lines[-1]["shards"] == 2
    assert lines[-1]["images"] == 6


def test_verify_says_what_is_wrong_and_exits_with_one(tmp_path: Path, pipeline: Path, manifest: Path):
    out = tmp_path / "out"
    call("run", pipeline, manifest, out, "--threads", 1)
    assert call("verify", out, "--deep").exit_code == 0
    tar = out / "s-001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert call("verify", out).exit_code == 0  # headers and sizes are as they were
    harmed = call("verify", out, "--deep")
    assert harmed.exit_code == 1
    assert "s-001.tar does not have the digest its marker says" in harmed.stdout


def test_doctor_shows_the_nodes_and_that_batches_are_independent(pipeline: Path):
    result = call("doctor", pipeline, "--threads", 1)
    assert result.exit_code == 0
    assert "4 evaluations of 6 steps" in result.stdout
    (start,) = [line for line in result.stdout.splitlines() if "<- start" in line]
    node, tau, sigma, snr, evaluations = start.split()[:5]
    assert (node, tau, evaluations) == ("4", "9.00", "4")
    assert float(snr) == pytest.approx(float(sigma) ** -2, rel=1e-3)
    assert "equal to the last bit" in result.stdout


def test_pack_makes_shards_that_a_run_takes(tmp_path: Path, pipeline: Path):
    for number in range(4):
        folder = tmp_path / "photos" / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(worlds.png(number))
    packed = call("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 3)
    assert packed.exit_code == 0
    assert "2 shards, 2 classes" in packed.stdout
    checked = call("manifest", "check", tmp_path / "shards" / "manifest.yaml")
    assert "all well" in checked.stdout
    result = call("run", pipeline, tmp_path / "shards" / "manifest.yaml", tmp_path / "out", "--threads", 1)
    assert "samples 4 ok" in result.stdout


def test_manifest_build_and_show(tmp_path: Path, manifest: Path):
    built = call("manifest", "build", manifest.parent / "s-*.tar", tmp_path / "m.parquet")
    assert "2 shards, 6 samples" in built.stdout
    shown = call("manifest", "show", tmp_path / "m.parquet")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["s-000", "s-001"]
    assert "3 samples" in shown.stdout


def test_an_unknown_pipeline_names_the_shipped_ones(tmp_path: Path, manifest: Path):
    result = call("run", "demo-anonimize", manifest, tmp_path / "out")
    assert result.exit_code == 2
    assert "demo-anonymize" in result.stderr


@pytest.mark.slow
def test_the_shipped_demo_anonymizes_and_augments(tmp_path: Path):
    for name, rows in (("demo-anonymize", {"ok": 50}), ("demo-augment", {"ok": 100, "original": 50})):
        out = tmp_path / name
        result = call("run", name, "demo", out, "--private-dir", tmp_path / "private", "--limit", 1, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["rows"] == rows
        assert verify(str(out), deep=True).problems == ()
        assert (out / "contact-sheet.png").is_file()
        pairs = (tmp_path / "private" if name == "demo-anonymize" else out) / "before-after.png"
        assert pairs.is_file()
    assert not (tmp_path / "demo-anonymize" / "before-after.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("address", "number"), [("inline", signal.SIGTERM), ("local", signal.SIGINT)])
def test_a_signal_ends_at_a_batch_boundary_and_the_run_resumes(
    tmp_path: Path, pipeline: Path, address: str, number: signal.Signals
):
    manifest = worlds.save_shards(tmp_path / "in", shards=6, samples=8)
    calm, out = tmp_path / "calm", tmp_path / "out"
    slow = ["--set", "t.fraction=1.0", "--set", "steps=20", "--set", "batch_size=2", "--threads", "1"]
    assert call("run", pipeline, manifest, calm, *slow).exit_code == 0

    command = [*COMMAND, "run", str(pipeline), str(manifest), str(out), *slow, "--address", address]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    while run.poll() is None and not list(out.glob("*_stats.json")):
        time.sleep(0.02)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 75, stderr
    assert b"stopping at the next batch boundary" in stderr
    assert 1 <= len(list(out.glob("*_stats.json"))) < 6
    assert verify(str(out), deep=True).problems != ()

    assert call("run", pipeline, manifest, out, *slow).exit_code == 0
    assert worlds.tree(out) == worlds.tree(calm)
