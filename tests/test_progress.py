"""Progress is counted from storage: what is done is what has a marker of this run, whoever asks, and when."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from boomerang_batch.cli.status import View, facts_of, line_of, look, rows_of, screen_of, span
from boomerang_batch.data.provenance import Marker
from boomerang_batch.run import markers, progress
from boomerang_batch.run.jobs.job import Job
from boomerang_batch.run.progress import Beginning, Looks, Progress, Session, eta_s, images_per_s, read_session
from boomerang_batch.run.record import RunRecord
from tests import worlds


def marker(stem: str, recipe: str = "r", **counts: int) -> bytes:
    return Marker(
        stem=stem,
        counts=counts,
        tar_sha256="0",
        tar_bytes=1,
        parquet_sha256="0",
        parquet_bytes=1,
        recipe_digest=recipe,
    ).to_bytes()


def record(*shards: str) -> bytes:
    return RunRecord(
        name="n", recipe={}, recipe_digest="r", manifest_digest="m", limit=None, shards=shards,
        model_digest="d", noise_key_id="seed:1", stack={},
    ).to_bytes()  # fmt: skip


def seen(
    at_s: float, done: int, each: int = 10, *, shards: int | None = 100, session: Session | None = None
) -> Progress:
    rows = {"ok": done * each} if done else {}
    return Progress(at_s=at_s, shards=shards, done=done, quarantined=0, rows=rows, session=session or Session())


@pytest.mark.slow
@given(
    shards=st.dictionaries(
        st.sampled_from([f"s-{number:03d}" for number in range(12)]),
        st.none() | st.fixed_dictionaries({"ok": st.integers(0, 50), "failed": st.integers(0, 5)}),
    )
)
def test_what_is_done_is_what_has_a_marker(tmp_path_factory: pytest.TempPathFactory, shards):
    out = tmp_path_factory.mktemp("out")
    (out / "run.json").write_bytes(record(*sorted(shards)))
    for stem, counts in shards.items():
        (out / f"{stem}.tar").write_bytes(b"")
        if counts is not None:
            (out / f"{stem}_stats.json").write_bytes(marker(stem, **counts))
    done = [counts for counts in shards.values() if counts is not None]
    look = Looks(str(out)).look()
    assert (look.done, look.left, look.shards) == (len(done), len(shards) - len(done), len(shards))
    assert look.images == sum(sum(counts.values()) for counts in done)
    assert look.failed == sum(counts["failed"] for counts in done)
    assert look.rows == sum((Counter(counts) for counts in done), Counter())


def test_mended_samples_count_as_what_they_are_now(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(record("a", "b"))
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=5, failed=3))
    (tmp_path / "a~1_stats.json").write_bytes(marker("a~1", ok=1, failed=1))
    (tmp_path / "a~2_stats.json").write_bytes(marker("a~2", ok=1))
    look = Looks(str(tmp_path)).look()
    assert (look.done, look.shards, look.rows) == (1, 2, {"failed": 1, "ok": 7})
    assert progress.done_shards(str(tmp_path)) == 1


def test_a_look_reads_only_markers_that_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = markers.read_marker
    monkeypatch.setattr(markers, "read_marker", lambda out, stem: read.append(stem) or real(out, stem))
    (tmp_path / "run.json").write_bytes(record("a", "b", "c"))
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=1))
    looks = Looks(str(tmp_path))
    assert looks.look().done == 1
    (tmp_path / "b_stats.json").write_bytes(marker("b", ok=2))
    assert (looks.look().images, looks.look().images) == (3, 3)
    assert sorted(read) == ["a", "b"]


def test_a_torn_marker_is_not_done_until_it_is_whole(tmp_path: Path):
    (tmp_path / "run.json").write_bytes(record("a"))
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=1)[:-9])
    looks = Looks(str(tmp_path))
    assert looks.look().done == 0
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=1))
    assert looks.look().done == 1


def test_markers_that_are_not_of_this_run_do_not_count(tmp_path: Path):
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=1))
    (tmp_path / "b_stats.json").write_bytes(marker("b", "another recipe", ok=1))
    (tmp_path / "stranger_stats.json").write_bytes(marker("stranger", ok=1))
    looks = Looks(str(tmp_path))
    before = looks.look()
    assert (before.done, before.shards, before.left) == (3, None, None)
    (tmp_path / "run.json").write_bytes(record("a", "b"))
    assert (looks.look().done, looks.look().left) == (1, 1)


def test_an_out_that_is_not_there_has_nothing_done(tmp_path: Path):
    assert Looks(str(tmp_path / "nowhere")).look().done == 0


def test_the_newest_log_tells_what_was_given_up(tmp_path: Path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "run.json").write_bytes(record("a", "b"))
    given_up = json.dumps({"event": "shard", "name": "b", "status": "quarantined", "at_s": 2.0, "counts": {}})
    (logs / "2020.jsonl").write_text(given_up.replace('"b"', '"a"'))
    (logs / "2021.jsonl").write_text(given_up)
    (logs / "2022-summary.json").write_text("{}")
    looks = Looks(str(tmp_path))
    assert (looks.look().quarantined, looks.look().left) == (1, 1)
    (tmp_path / "b_stats.json").write_bytes(marker("b", ok=1))
    assert (looks.look().quarantined, looks.look().done) == (0, 1)


def test_an_appendix_that_was_given_up_is_no_shard(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.json").write_bytes(record("a", "b"))
    (tmp_path / "a_stats.json").write_bytes(marker("a", ok=5, failed=3))
    events = [
        {"event": "shard", "name": name, "status": "quarantined", "at_s": 2.0, "counts": {}}
        for name in ("a~1", "b")
    ]
    (tmp_path / "logs" / "2020.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    look = Looks(str(tmp_path)).look()
    assert (look.done, look.quarantined, look.left) == (1, 1, 0)


def test_a_log_that_grows_is_read_again(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.json").write_bytes(record("a", "b"))
    event = {"event": "shard", "name": "a", "status": "done", "at_s": 2.0, "counts": {"ok": 6}}
    log = tmp_path / "logs" / "2020.jsonl"
    log.write_text(json.dumps(event) + "\n")
    looks = Looks(str(tmp_path))
    assert images_per_s([looks.look()]) == 3.0
    log.write_text(log.read_text() + json.dumps(event | {"name": "b", "at_s": 3.0}) + "\n")
    assert images_per_s([looks.look()]) == 4.0


@pytest.mark.slow
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_a_log_of_anything_at_all_is_read(log):
    assert read_session(log) == Session()


@given(
    every_s=st.floats(0.1, 1e4),
    each=st.integers(1, 1000),
    steps=st.integers(3, 40),
    before=st.integers(0, 20),
)
def test_a_steady_run_has_its_pace_and_its_end(every_s, each, steps, before):
    looks = [seen(100 + n * every_s, before + n, each) for n in range(steps + 1)]
    rate = images_per_s(looks)
    assert rate == pytest.approx(each / every_s)
    assert eta_s(looks[-1], rate) == pytest.approx((100 - before - steps) * every_s)


def test_few_commits_between_looks_are_no_pace_and_the_job_tells_it():
    looks = [seen(1000, 10), seen(1001, 11)]
    assert images_per_s(looks) is None
    assert images_per_s(looks, Beginning(at_s=901, done=1)) == pytest.approx(1.0)
    assert images_per_s(looks, Beginning(at_s=901, done=11)) is None
    logged = [seen(1000, 10, session=Session(images=30, seconds=10.0))]
    assert images_per_s(logged) == 3.0
    assert images_per_s(logged, Beginning(at_s=900, done=0)) == pytest.approx(1.0)


def test_without_pace_or_run_record_there_is_no_eta():
    assert eta_s(seen(0, 5), None) is None
    assert eta_s(seen(0, 5, shards=None), 1.0) is None
    assert eta_s(seen(0, 0), 1.0) is None
    assert eta_s(seen(0, 100), 1.0) == 0


@pytest.mark.slow
def test_progress_of_a_run_is_what_its_report_says(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, secret: str
):
    out = tmp_path / "out"
    manifest = worlds.save_shards(tmp_path / "in", shards=4, samples=6)
    recipe = worlds.recipe(tiny_model)
    looks = Looks(str(out))
    with monkeypatch.context() as patch:
        stopped = worlds.run(recipe, manifest, out, stop=worlds.stop_within_the_second_shard(patch, out))
    look = looks.look()
    assert (stopped.shards["done"], stopped.shards["left"]) == (look.done, look.left)
    assert look.left
    report = worlds.run(recipe, manifest, out)
    look = looks.look()
    assert (look.done, look.left, look.rows) == (4, 0, dict(report.rows))
    assert images_per_s([look]) == pytest.approx(look.session.images / look.session.seconds)


def test_between_two_commits_the_pace_stays_and_the_time_left_runs_down(monkeypatch: pytest.MonkeyPatch):
    played = [seen(at_s, done) for at_s, done in ((100, 0), (140, 8), (145, 8), (150, 8), (180, 16), (999, 16))]

    class Played:
        def __init__(self, out: str) -> None:
            self._left = iter(played)

        def look(self) -> Progress:
            return next(self._left)

    monkeypatch.setattr(progress, "Looks", Played)
    views = itertools.islice(look(None, None, "s3://bucket/out"), len(played))
    told = [(view.images_per_s, view.eta_s) for view in views]
    assert told == [(None, None), (2.0, 460.0), (2.0, 455.0), (2.0, 450.0), (2.0, 420.0), (2.0, 0.0)]


JOB = Job(
    id="bb-0123456789ab-12",
    state="RUNNING",
    metadata={"recipe": "r" * 30, "out": "s3://bucket/out"},
    began_s=1.0,
)


@pytest.mark.parametrize("width", [80, 40])
def test_the_screen_fits_a_terminal_and_tells_everything(width: int):
    look = Progress(at_s=1.0, shards=20_000, done=12_345, quarantined=3, rows={"failed": 7, "ok": 12_345_678})
    out = "s3://bucket/" + "a-long-name/" * 12 + "out"
    view = View(out=out, job=JOB, progress=look, images_per_s=1234.5, eta_s=7e5, note="[bold]not markup[/]")
    terminal = io.StringIO()
    Console(file=terminal, width=width, force_terminal=True, color_system=None).print(screen_of(view))
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    told = "".join(line.replace(" ", "") for line in lines)
    for fact in (
        "bb-0123456789ab-12",
        "12345of20000done",
        "3quarantined",
        "7failed",
        "8daysleft",
        out,
        "[bold]",
    ):
        assert fact in told


def test_a_failed_job_shows_its_last_words():
    job = dataclasses.replace(
        JOB, state="FAILED", driver_exit_code=2, message="it failed:\nerror: no such recipe\n\n"
    )
    assert ("said", "error: no such recipe") in rows_of(View(out="o", job=job))
    assert rows_of(View(out="o", job=dataclasses.replace(job, message="")))[-1][0] == "out"


def test_a_look_is_told_to_people_and_programs_alike():
    view = View(out="o", job=JOB, progress=seen(1.0, 3, shards=5), images_per_s=2.0, eta_s=10.0)
    assert line_of(view) == "running  3/5 shards  30 images  2 images/s  10 s left"
    facts = json.loads(json.dumps(facts_of(view)))
    assert facts["job"]["id"] == JOB.id
    assert facts["job"]["exit_code"] is None
    assert (facts["shards"], facts["images"]) == ({"all": 5, "done": 3, "quarantined": 0, "left": 2}, 30)
    empty = json.loads(json.dumps(facts_of(View(out="o", note="why"))))
    assert (empty["shards"], empty["note"]) == (None, "why")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "2 h"), (4e5, "5 days"), (3e5, "83 h")],
)
def test_spans_of_time_are_said_as_people_say_them(seconds, said):
    assert span(seconds) == said
