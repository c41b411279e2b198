"""The driver's log and summary outlive its machine, and under anonymize no sentence of them reaches OUT."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from boomerang_batch.cli import main
from boomerang_batch.errors import ManifestError, StorageError
from boomerang_batch.run import logs
from boomerang_batch.run.logs import KeptLog
from boomerang_batch.run.tasks import RunReport
from tests import worlds

REPORT = RunReport(
    out="/somewhere/private",
    shards={"done": 1, "quarantined": 1},
    rows={"ok": 3},
    problems=("cat.jpg is torn",),
    seconds=1.5,
    stopped=False,
)


def written(folder: Path) -> dict[str, str]:
    return {path.suffix: path.read_text() for path in sorted((folder / "logs").glob("[0-9]*.*"))}


def test_what_was_said_and_how_it_ended_is_in_out(tmp_path: Path):
    with KeptLog(out=str(tmp_path), anonymize=False, private_dir=None) as log:
        logging.getLogger("boomerang_batch.x").warning("beware of %s", "cat.jpg")
        log.report = REPORT
    logging.getLogger("boomerang_batch.x").warning("too late")
    found = written(tmp_path)
    assert "WARNING: beware of cat.jpg" in found[".log"]
    assert "quarantined: cat.jpg is torn" in found[".log"]
    assert "too late" not in found[".log"]
    summary = json.loads(found[".json"])
    assert summary == {
        "format_version": 1, "exit_code": 3, "rows": {"ok": 3}, "seconds": 1.5, "shards": dict(REPORT.shards),
        "stopped": False,
    }  # fmt: skip


@pytest.mark.parametrize("with_private_dir", [True, False])
def test_under_anonymize_sentences_go_to_the_private_dir_alone(tmp_path: Path, with_private_dir: bool):
    out, private = tmp_path / "out", tmp_path / "private"
    if with_private_dir:
        private.mkdir()
    with KeptLog(out=str(out), anonymize=True, private_dir=str(private)) as log:
        logging.getLogger().warning("beware of cat.jpg")
        log.report = REPORT
    assert written(out).keys() == {".json"}
    assert "cat.jpg" not in written(out)[".json"]
    assert private.exists() == with_private_dir
    if with_private_dir:
        assert "beware of cat.jpg" in written(private)[".log"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(StorageError("the disk is full"), "error: the disk is full"), (KeyError("k"), "KeyError: 'k'")],
)
def test_what_ended_a_run_is_its_last_word(tmp_path: Path, error: Exception, said: str):
    with pytest.raises(type(error)), KeptLog(out=str(tmp_path), anonymize=False, private_dir=None):
        raise error
    assert written(tmp_path)[".log"].splitlines()[-1] == said


def test_a_refused_request_leaves_nothing(tmp_path: Path):
    out = tmp_path / "another-run"
    with pytest.raises(ManifestError), KeptLog(out=str(out), anonymize=False, private_dir=None):
        raise ManifestError("no shards")
    assert not out.exists()


def test_a_log_that_is_not_over_is_published_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "_PUBLISH_EVERY_S", 0.01)
    with KeptLog(out=str(tmp_path), anonymize=False, private_dir=None) as log:
        logging.getLogger().warning("first")
        while not written(tmp_path):
            log._over.wait(0.01)
        assert "first" in written(tmp_path)[".log"]
        logging.getLogger().warning("second")
    assert "second" in written(tmp_path)[".log"]


def test_a_log_that_cannot_be_published_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "logs").write_text("a file where a folder should be")
    with KeptLog(out=str(tmp_path), anonymize=False, private_dir=None) as log:
        log.report = REPORT
    assert "the run's log is lost" in caplog.text


def test_a_run_leaves_its_summary_and_no_empty_log(tmp_path: Path, tiny_model: Path):
    pipeline = tmp_path / "tiny.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model, purpose="augment"))
    manifest = worlds.save_shards(tmp_path / "in", shards=1, samples=2)
    out = tmp_path / "out"
    words = ["run", str(pipeline), str(manifest), str(out), "--threads", "1", "--device", "cpu"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert written(out).keys() == {".json", ".jsonl"}
    assert json.loads(written(out)[".json"])["shards"]["done"] == 1
