"""Log lines: one JSON object each whatever is in them, and a real run of which nothing else comes on stderr."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from boomerang_batch.cli import main
from boomerang_batch.cli.inputs import stop_on_signals
from boomerang_batch.run import shard_drawing
from boomerang_batch.run.log_lines import JsonLines, about, line, set_up
from boomerang_batch.run.transform import Transform
from tests import worlds


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The process's log is set up as tests that follow expect it."""
    yield
    set_up("text")


@pytest.fixture
def in_json() -> None:
    set_up("json")


def said(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@given(
    message=st.text(),
    facts=st.dictionaries(
        st.sampled_from(["shard", "key", "counts", "n"]), st.text() | st.integers() | st.just(Path("p"))
    ),
)
def test_a_record_is_one_line_whatever_is_in_it(message, facts):
    record = logging.makeLogRecord({"name": "a.b", "levelname": "INFO", "msg": message, **facts})
    text = JsonLines().format(record)
    assert text.isascii()
    assert len(text.splitlines()) == 1
    told = json.loads(text)
    assert (told["level"], told["logger"], told["message"]) == ("INFO", "a.b", message)
    assert told.keys() == {"time", "level", "logger", "message", *facts}
    at = dt.datetime.fromisoformat(told["time"])
    assert at.utcoffset() == dt.timedelta(0)
    assert abs(at.timestamp() - record.created) < 0.002


def test_what_others_hide_in_records_and_what_is_unknown_is_left_out():
    record = logging.makeLogRecord({"msg": "m", "_ray_timestamp_ns": 1, "eta_s": None, "n": 0})
    assert json.loads(JsonLines().format(record)).keys() == {"time", "level", "logger", "message", "n"}


def test_no_secret_of_the_environment_is_in_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'plan"ted-secret')
    try:
        raise KeyError('plan"ted-secret')
    except KeyError:
        record = logging.makeLogRecord({
            "msg": 'with plan"ted-secret to https://x/y?sig=1234', "exc_info": sys.exc_info()
        })  # fmt: skip
    text = JsonLines().format(record)
    assert "ted-secret" not in text
    assert "1234" not in text
    assert "KeyError" in json.loads(text)["exception"]


def test_what_a_thread_is_at_work_on_is_in_its_lines_alone(in_json: None, capsys: pytest.CaptureFixture[str]):
    log = logging.getLogger("boomerang_batch.somewhere")
    with about(shard="s-000"):
        with about(key="k"):
            log.info("both")
        log.info("shard")
        log.info("given", extra={"shard": "s-001"})
        other = threading.Thread(target=log.info, args=("elsewhere",))
        other.start()
        other.join()
    log.info("after")
    told = {one["message"]: (one.get("shard"), one.get("key")) for one in said(capsys)}
    assert told == {
        "both": ("s-000", "k"),
        "shard": ("s-000", None),
        "given": ("s-001", None),
        "elsewhere": (None, None),
        "after": (None, None),
    }


def test_warnings_and_bugs_are_lines_too(in_json: None, capsys: pytest.CaptureFixture[str]):
    logging.getLogger("a.library").info("not asked for")
    logging.getLogger("a.library").warning("beware")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old-fashioned", FutureWarning, stacklevel=1)
    error = RuntimeError("a bug")
    sys.excepthook(RuntimeError, error, None)
    first, second, last = said(capsys)
    assert (first["message"], second["logger"]) == ("beware", "py.warnings")
    assert "old-fashioned" in second["message"]
    assert last["level"] == "CRITICAL"
    assert "RuntimeError: a bug" in last["exception"]


def test_the_last_format_counts(capsys: pytest.CaptureFixture[str]):
    before = sys.excepthook
    root = logging.getLogger()
    handlers = root.handlers[:]
    set_up("json")
    set_up("json")
    logging.getLogger("boomerang_batch").info("once")
    assert [one["message"] for one in said(capsys)] == ["once"]
    set_up("text")
    logging.getLogger("boomerang_batch").info("for programs")
    assert capsys.readouterr().err == ""
    assert root.handlers == handlers
    assert sys.excepthook is before


def test_where_nobody_else_shows_the_log_text_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    set_up("text")
    logging.getLogger("boomerang_batch").warning("beware")
    assert capsys.readouterr().err == "WARNING: beware\n"


def test_a_line_of_ones_own_comes_in_the_format_that_was_set_up():
    assert line(logging.ERROR, "torn", text="error: torn", exit_code=1) == "error: torn"
    set_up("json")
    told = json.loads(line(logging.ERROR, "torn %s", text="error: torn", exit_code=1))
    assert (told["level"], told["message"], told["exit_code"]) == ("ERROR", "torn %s", 1)


def test_the_wish_to_stop_is_a_line(in_json: None, capfd: pytest.CaptureFixture[str]):
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
    (told,) = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert told["level"] == "WARNING"
    assert "stopping" in told["message"]


# Real runs


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def run_with_failures(folder: Path, model: Path, *words: object, purpose: str = "augment") -> Result:
    """A run in JSON of three shards, of which one has two bad samples and one is not there."""
    pipeline = folder / "tiny.yaml"
    pipeline.write_text(worlds.recipe_text(model, purpose=purpose))
    manifest = worlds.save_shards(folder / "in", shards=3, samples=3)
    members = worlds.sample_members("good", 1)
    members += worlds.sample_members("torn-image", 2, png=b"no image")
    members += worlds.sample_members("odd-label", 3, cls=b"no number")
    worlds.write_tar(folder / "in" / "s-001.tar", members)
    (folder / "in" / "s-002.tar").unlink()
    options = ("--threads", 1, "--device", "cpu", "--log-format", "json", "--private-dir", folder / "private")
    return call("run", pipeline, manifest, folder / "out", *options, *words)


def test_every_line_of_a_run_is_an_object_and_shards_can_be_picked(tmp_path: Path, tiny_model: Path):
    result = run_with_failures(tmp_path, tiny_model)
    assert result.exit_code == 3
    assert "shards 2 done, 1 quarantined" in result.stdout
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in lines)
    failed = [(one["shard"], one["key"], one["variant"], one["reason"]) for one in lines if "key" in one]
    assert failed == [("s-001", "torn-image", 0, "undecodable"), ("s-001", "odd-label", 0, "bad-label")]
    assert "'no number'" in next(one["message"] for one in lines if one.get("key") == "odd-label")
    assert "nothing at that path" in next(one["message"] for one in lines if one.get("shard") == "s-002")
    ends = {one["shard"]: (one["status"], one["counts"]) for one in lines if "counts" in one}
    assert ends == {
        "s-000": ("done", {"ok": 3}),
        "s-001": ("done", {"failed": 2, "ok": 1}),
        "s-002": ("quarantined", {}),
    }
    assert [one["shard"] for one in lines if one["level"] == "WARNING"] == ["s-002"]
    last = lines[-1]
    assert (last["shards_done"], last["shards"], last["quarantined"], last["failed"]) == (2, 3, 1, 2)


def test_the_kept_log_is_warnings_as_before(tmp_path: Path, tiny_model: Path):
    run_with_failures(tmp_path, tiny_model)
    (kept,) = (tmp_path / "out" / "logs").glob("*.log")
    first, *more = kept.read_text().splitlines()
    assert first.endswith("WARNING: shard s-002: quarantined")
    assert [text.partition(":")[0] for text in more] == ["quarantined"]


def test_a_refusal_is_a_line_with_its_exit_code(tmp_path: Path, tiny_model: Path):
    result = run_with_failures(tmp_path, tiny_model, "--set", "t.fraction=7")
    assert result.exit_code == 2
    (told,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert (told["level"], told["exit_code"]) == ("ERROR", 2)
    assert "t.fraction" in told["message"]
    # And the next command of this process says it in text again.
    assert call("verify", tmp_path / "nowhere").stderr.startswith("error: ")


def test_under_anonymize_shard_and_key_are_those_of_the_output(tmp_path: Path, tiny_model: Path):
    result = run_with_failures(tmp_path, tiny_model, "--set", "variants=2", purpose="anonymize")
    assert result.exit_code == 3
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    failed = [(one["key"], one["variant"], one["message"]) for one in lines if "key" in one]
    bad = [row for row in worlds.rows(tmp_path / "out") if row.status == "failed"]
    assert failed == [(row.key, row.variant, f"failed: {row.reason}") for row in bad]
    assert len(failed) == 4
    stems = json.loads((tmp_path / "out" / "run.json").read_text())["shards"]
    assert {one["shard"] for one in lines if "shard" in one} == set(stems)
    for name in ("torn-image", "odd-label", "no number", "s-00", str(tmp_path / "in")):
        assert name not in result.stderr


@pytest.mark.parametrize("purpose", ["augment", "anonymize"])
def test_what_is_logged_on_the_way_has_shard_and_key_where_they_may_stand(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
):
    """Its words may name the input, so under anonymize no pseudonym is beside them."""
    prepare, read = Transform.prepare, shard_drawing.read_samples

    def prepared(self, sample, *, shard):
        if sample.key == "good":
            raise ZeroDivisionError
        return prepare(self, sample, shard=shard)

    def reading(stream, *, shard):
        logging.getLogger("boomerang_batch.storage").warning("the store is busy")
        return read(stream, shard=shard)

    monkeypatch.setattr(Transform, "prepare", prepared)
    monkeypatch.setattr(shard_drawing, "read_samples", reading)
    lines = [
        json.loads(line)
        for line in run_with_failures(tmp_path, tiny_model, purpose=purpose).stderr.splitlines()
    ]
    (bug,) = [one for one in lines if "exception" in one]
    busy = [one.get("shard") for one in lines if one["message"] == "the store is busy"]
    assert "ZeroDivisionError" in bug["exception"]
    if purpose == "anonymize":
        assert "shard" not in bug
        assert "key" not in bug
        assert busy == [None, None]
    else:
        assert (bug["shard"], bug["key"]) == ("s-001", "good")
        assert sorted(busy) == ["s-000", "s-001"]


@pytest.mark.slow
def test_a_worker_of_ray_writes_the_same_lines_and_no_log_names_an_input(tmp_path: Path, tiny_model: Path):
    """Everything that Ray keeps on its machines is searched, its own logs too."""
    # Sockets lie in it, and a socket's path is short.
    temporary = Path(tempfile.mkdtemp(prefix="bb", dir="/tmp"))
    pipeline = tmp_path / "tiny.yaml"
    pipeline.write_text(worlds.recipe_text(tiny_model))
    worlds.save_samples(tmp_path / "in", {"torn-image": {"png": b"no image", "cls": b"1"}})
    (tmp_path / "in" / "s-000.tar").rename(tmp_path / "in" / "a-marked-shard.tar")
    manifest = tmp_path / "in" / "manifest.yaml"
    manifest.write_text("format_version: 1\nname: n\nshards: [a-marked-shard.tar, another-that-is-gone.tar]\n")
    private = tmp_path / "private"
    command = [sys.executable, "-m", "boomerang_batch", "run", pipeline, manifest, tmp_path / "out"]
    command += ["--address", "local", "--device", "cpu", "--threads", "1", "--log-format", "json"]
    command += ["--private-dir", private]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"RAY_TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 3, done.stderr
        logs = [path.read_text() for path in temporary.rglob("session_2*/logs/worker-*.err")]
        kept = [path.read_bytes() for path in temporary.rglob("session_2*/logs/*") if path.is_file()]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    driver, workers = [
        [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
        for texts in ([done.stderr], logs)
    ]
    (row,) = worlds.rows(tmp_path / "out")
    (stem,) = [path.stem for path in (tmp_path / "out").glob("*.tar")]
    told = {one["shard"]: (one["status"], one["counts"]) for one in driver if "shard" in one}
    assert told.pop(stem) == ("done", {"failed": 1})
    assert [*told.values()] == [("quarantined", {})]
    assert [(one["shard"], one["key"], one["reason"]) for one in workers] == [(stem, row.key, "undecodable")]
    names = ("torn-image", "a-marked-shard", "another-that-is-gone", "no image")
    everything = b"\n".join([done.stdout.encode(), done.stderr.encode(), *kept])
    assert [name for name in names if name.encode() in everything] == []
    assert "another-that-is-gone" in "".join(path.read_text() for path in (private / "logs").glob("*.log"))
