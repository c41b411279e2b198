"""discretion.py: of a run that anonymizes nothing is said that could quote an input, wherever it comes from."""

from __future__ import annotations

import ast
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import boomerang_batch
from boomerang_batch import errors
from boomerang_batch.errors import (
    BoomerangError,
    LeaseError,
    ManifestError,
    RecipeError,
    StorageError,
    VerificationError,
)
from boomerang_batch.run import log_lines
from boomerang_batch.run.discretion import HIDDEN, PLAIN, Discretion
from boomerang_batch.run.keys import KeyRegistry
from boomerang_batch.run.log_lines import set_up
from boomerang_batch.run.logs import KeptLog, discretion_of_worker
from boomerang_batch.run.metrics import COUNTERS, GAUGES
from boomerang_batch.run.tasks import RunSpec, Task
from boomerang_batch.run.worker import Worker
from tests import worlds

MARK = "Zq-a-name-in-the-input-Kx"
PACKAGE = Path(boomerang_batch.__file__).parent
WorkerClass = Worker.__ray_metadata__.modified_class


def discretion(**more: object) -> Discretion:
    return Discretion(**{"named": ("s3://b/out", "in/m.yaml"), "kept": "private/logs/x.log"} | more)


def record(message: object, *words: object, name: str = "boomerang_batch.run.x", **more: object):
    made = logging.LogRecord(name, logging.WARNING, __file__, 1, message, words, None)
    vars(made).update(more)
    return made


@pytest.fixture
def _text_again() -> Iterator[None]:
    yield
    set_up("text")


@pytest.mark.parametrize(
    ("message", "words", "more", "said"),
    [
        ("the store is busy", (), {}, "the store is busy"),
        ("%d of %s, %.1f s", (3, MARK, 0.5), {}, f"3 of {HIDDEN}, 0.5 s"),
        ("%s", (KeyError(MARK),), {}, HIDDEN),
        ("%s: %s", ("can't write s3://b/out/0f3a.tar", MARK), {}, f"can't write s3://b/out/0f3a.tar: {HIDDEN}"),
        ("%s", (f"in/m.yaml: {MARK}",), {}, HIDDEN),
        ("%s", (f"s3://b/output/{MARK}",), {}, HIDDEN),
        ("%d", (MARK,), {}, HIDDEN),
        ("%(a)s %(b)d", ({"a": MARK, "b": 2},), {}, HIDDEN),
        ("%s", ({MARK: 2},), {}, HIDDEN),
        (KeyError(MARK), (), {}, HIDDEN),
        ("shard %s", ("0f3a",), PLAIN, "shard 0f3a"),
        (f"old {MARK}", (), {"name": "py.warnings"}, f"py.warnings: {HIDDEN}"),
        ("%s", (MARK,), {"name": "ray", **PLAIN}, f"ray: {HIDDEN}"),
        ("is it ours?", (), {"name": "boomerang_batches"}, f"boomerang_batches: {HIDDEN}"),
    ],
)
def test_of_a_record_our_own_words_and_numbers_are_said(message, words, more, said):
    made = record(message, *words, **more)
    assert discretion().message(made) == said


VALUES = st.recursive(
    st.text().map(lambda text: MARK + text) | st.binary().map(lambda data: MARK.encode() + data),
    lambda inner: st.lists(inner, min_size=1) | st.dictionaries(st.just(MARK), inner, min_size=1),
).flatmap(lambda value: st.sampled_from([value, KeyError(value), Path(MARK), RuntimeError(MARK, value)]))


@pytest.mark.slow
@given(st.sampled_from(["%s", "%r", "%d", "%5.1f", "%x", "%%", "%(a)s"]), VALUES)
def test_whatever_is_logged_and_however_none_of_it_is_seen(form, value):
    made = record(f"seen {form}", value)
    assert MARK not in discretion().message(made)


SAYABLE = ("ConfigError", "RecipeError", "RunMismatchError", "PrivateDirError", "ModelError", "StoppedError",
           "LeaseError", "GateError", "MeasureError")  # fmt: skip


def test_errors_are_said_by_their_kind():
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    of_one_word = {
        name: kind(MARK)
        for name, kind in kinds.items()
        if issubclass(kind, BoomerangError) and name != "SampleError"
    }
    said = {name for name, error in of_one_word.items() if MARK in discretion().words(error)}
    assert said == set(SAYABLE)
    assert MARK not in discretion().words(errors.SampleError("bad", MARK))
    for error in (KeyError(MARK), ManifestError(MARK)):
        assert discretion().words(error).endswith("stands in private/logs/x.log")
    assert "--private-dir" in discretion(kept=None).words(KeyError(MARK))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("can't write s3://b/out/0f3a.tar: permission denied", True),
        ("can't read in/m.yaml: there is nothing at that path", True),
        (f"can't read {Path('in/m.yaml').absolute()}: there is nothing at that path", True),
        ("s3://b/out/0f3a_stats.json is there already", True),
        ("can't read s3://b/output/cat.tar: permission denied", False),
        ("can't read s3://b/in/cat.tar: permission denied, as s3://b/out/x", False),
        ("can't read in/m.yaml.tar: permission denied", False),
        ("can't build shard 0f3a in /tmp: No space left", False),
    ],
)
def test_of_a_store_it_is_said_what_is_about_the_places_of_the_command(text, seen):
    assert (discretion().words(StorageError(text)) == text) is seen


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("s3://b/out/0f3a.parquet is not a provenance file: torn", True),
        (f"{MARK} is not a provenance file: torn", False),
    ],
)
def test_what_is_wrong_with_a_file_of_out_is_said(text, seen):
    assert (discretion().words(VerificationError(text)) == text) is seen


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"in/m.yaml: shards[0]: {MARK}", "in/m.yaml: "),
        (f"{Path('in/m.yaml').absolute()}: shards[0]: {MARK}", "in/m.yaml: "),
        (f"in/m.yaml.old: {MARK}", ""),
        (f"{MARK} in/m.yaml: is wrong", ""),
        (f"s3://b/out/{MARK} lies in OUT", "s3://b/out: "),
    ],
)
def test_of_what_the_user_typed_the_name_is_said_and_no_more(text, named):
    """It stands in the command, and tells which of the files was meant."""
    said = discretion().words(ManifestError(text))
    assert said == f"ManifestError: {named}{HIDDEN}; {discretion().notice}"


def test_a_key_in_two_shards_of_out_is_said(tmp_path: Path):
    """Keys and shards go by their names in OUT: whoever reads it can mend the recipe."""
    for stem in ("0f3a", "77be"):
        pq.write_table(pa.table({"key": ["pseudonym"]}), tmp_path / f"{stem}.parquet")
    registry = KeyRegistry(str(tmp_path))
    assert registry.add("0f3a", ["pseudonym"]) is None
    said = discretion().words(RecipeError(registry.add("77be", ["pseudonym"])))
    assert "key pseudonym is in shard " in said
    assert "set identity: shard+key" in said


def test_a_traceback_keeps_its_places_and_loses_its_words():
    try:
        try:
            raise KeyError(MARK)
        except KeyError as error:
            raise ValueError(f"of {MARK}") from error
    except ValueError as error:
        error.add_note(MARK)
        told = discretion().places(error)
    assert MARK not in told
    assert told.index("KeyError") < told.index("ValueError")
    assert told.count(Path(__file__).name) == 2


@pytest.mark.usefixtures("_text_again")
@pytest.mark.parametrize("format", ["text", "json"])
def test_nothing_goes_past_it_to_stderr(
    format, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Records of ours, of libraries and of one that writes by itself; warnings, bugs, bugs in threads."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    chatty = logging.getLogger("a.chatty.library")
    chatty.addHandler(logging.StreamHandler(sys.stderr))
    chatty.propagate = False
    set_up(format, discretion())
    log_lines.speak_for(chatty.name)
    chatty.error("%s", MARK)
    logging.getLogger("boomerang_batch.x").warning("can't do %s", MARK, extra={"shard": "0f3a"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(MARK, UserWarning, stacklevel=1)
    try:
        raise KeyError(MARK)
    except KeyError as error:
        logging.getLogger("boomerang_batch.x").exception("unforeseen")
        sys.excepthook(KeyError, error, error.__traceback__)

    def breaks() -> None:
        raise RuntimeError(MARK)

    thread = threading.Thread(target=breaks)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert MARK not in said
    assert f"can't do {HIDDEN}" in said
    assert said.count("stands in private/logs/x.log") == 1
    assert said.count("KeyError") >= 2
    assert "RuntimeError" in said
    if format == "json":
        assert all(json.loads(line)["level"] for line in said.splitlines())


@pytest.mark.usefixtures("_text_again")
def test_a_record_that_can_not_be_put_in_words_is_not_shown_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    set_up("text", discretion())
    with KeptLog(out=str(tmp_path), anonymize=True, private_dir=str(tmp_path)):
        logging.getLogger("boomerang_batch.x").warning("%d things", MARK)
    assert capsys.readouterr().err == f"WARNING: {discretion().notice}\nWARNING: {HIDDEN}\n"


def test_before_and_after_all_is_said(capsys: pytest.CaptureFixture[str]):
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    set_up("json", discretion())
    set_up("json")
    assert log_lines.words(KeyError(MARK)) == repr(MARK)
    logging.getLogger("boomerang_batch.x").warning("%s", MARK)
    assert MARK in capsys.readouterr().err
    set_up("text")
    assert hooks == (sys.excepthook, threading.excepthook, sys.unraisablehook)


@pytest.mark.slow
def test_templates_of_log_lines_are_literals():
    """An f-string would carry what it quotes into the template, which is said."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        literals = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(tree):
            of_log = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if not of_log or ast.unparse(call.func.value) != "_log" or call.func.attr == "isEnabledFor":
                continue
            template = call.args[1 if call.func.attr == "log" else 0]
            where = f"{path.name}:{call.lineno}"
            assert isinstance(template, ast.Constant) or getattr(template, "id", None) in literals, where


# A worker in a process of its own


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> RunSpec:
    (tmp_path / "private").mkdir(mode=0o700)
    return RunSpec(
        recipe=worlds.recipe(tiny_model), out=str(tmp_path / "out"), private_dir=str(tmp_path / "private"),
        device="cpu", threads=1, epoch=1,
    )  # fmt: skip


class Failing:
    """A runner whose tasks end as the test says."""

    def __init__(self, error: Exception) -> None:
        self.error, self.totals = error, dict.fromkeys([*COUNTERS, *GAUGES], 0.0)

    def run(self, *words: object, **more: object) -> None:
        raise self.error


@pytest.mark.usefixtures("_text_again")
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError(MARK), RuntimeError),
        (StorageError(f"can't read s3://b/{MARK}.tar: gone"), StorageError),
        (LeaseError("another run has taken over"), LeaseError),
    ],
)
def test_what_a_call_to_a_worker_raises_can_be_shown_by_ray(
    spec: RunSpec, error: Exception, kind: type, capsys: pytest.CaptureFixture[str], monkeypatch
):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    worker = WorkerClass(spec)
    worker._runner = Failing(error)
    try:
        with pytest.raises(kind) as caught:
            worker.run(Task(name="0f3a", url=f"s3://b/{MARK}.tar", source_stem=MARK))
    finally:
        for handler in root.handlers:
            handler.close()
    assert MARK not in str(caught.value) + capsys.readouterr().err
    assert caught.value.__cause__ is None
    kept = "".join(path.read_text() for path in Path(spec.private_dir, "logs").glob("*.log"))
    if isinstance(error, LeaseError):
        assert caught.value is error
    else:
        assert MARK in kept
        assert str(Path(spec.private_dir, "logs")) in str(caught.value)


def test_a_worker_of_another_purpose_says_everything(spec: RunSpec, tiny_model: Path):
    augment = worlds.recipe(tiny_model, purpose="augment")
    assert discretion_of_worker(RunSpec(**vars(spec) | {"recipe": augment})) is None
