"""What a run tells of itself: the words beside the bar, the lines where there is no terminal, the time left."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from boomerang_batch.run import telemetry as module
from boomerang_batch.run.tasks import ShardReport
from boomerang_batch.run.telemetry import Telemetry
from boomerang_batch.run.words import pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def report(name: str, status: str = "done", **counts: int) -> ShardReport:
    return ShardReport(name=name, status=status, counts=counts, seconds=1.0)


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_a_quarantined_appendix_is_no_shard(capsys: pytest.CaptureFixture[str]):
    with Telemetry(shards=2) as telemetry:
        telemetry.resumed([report("a", "there", ok=5, failed=1)])
        telemetry.shard(report("a~1", "quarantined"))
        telemetry.shard(report("b", "quarantined"))
    line = last_line(capsys.readouterr().err)
    assert (line["shards_done"], line["shards"], line["quarantined"]) == (1, 2, 1)
    assert {"event": "shard", "name": "a~1", "status": "quarantined"}.items() <= json.loads(
        telemetry.log().splitlines()[1]
    ).items()


def test_the_time_left_is_that_of_the_images_left(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Telemetry(shards=5) as telemetry:
        telemetry.resumed([report("a", "there", ok=100)])
        clock[0] += 10
        telemetry.images_in_flight("b", 20)
        telemetry.images_in_flight("c", 30)  # 50 images in 10 s; 400 to draw, 350 of them left
    line = last_line(capsys.readouterr().err)
    assert (line["images"], line["images_per_s"], line["eta_s"]) == (50, 5.0, 70)


def test_with_no_shard_done_nobody_knows_how_long_it_takes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with Telemetry(shards=2) as telemetry:
        clock[0] += 10
        telemetry.images_in_flight("a", 20)
    assert last_line(capsys.readouterr().err)["eta_s"] is None


def test_shards_that_were_there_are_no_pace(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Telemetry(shards=100) as telemetry:
        clock[0] += 1
        telemetry.resumed([report(f"s{number}", "there", ok=50) for number in range(99)])
        clock[0] += 49
        telemetry.shard(report("last", ok=49, failed=1))
    line = last_line(capsys.readouterr().err)
    assert (line["images"], line["images_per_s"], line["failed"], line["shards_done"]) == (50, 1.0, 1, 100)
    assert line["eta_s"] == 0


def test_the_end_is_always_told(capsys: pytest.CaptureFixture[str]):
    telemetry = Telemetry(shards=1)
    telemetry.images_in_flight("a", 3)
    with pytest.raises(KeyError), telemetry:
        raise KeyError
    assert last_line(capsys.readouterr().err)["images"] == 3
    with Telemetry(shards=1, quiet=True) as telemetry:
        telemetry.shard(report("a", ok=1))
    assert capsys.readouterr().err == ""


def test_where_the_log_is_at_info_progress_is_part_of_it(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    with caplog.at_level(logging.INFO, "boomerang_batch"), Telemetry(shards=2) as telemetry:
        telemetry.shard(report("a", ok=2))
        telemetry.shard(report("b", "quarantined"))
    assert capsys.readouterr().err == ""
    told = [(one.levelname, one.getMessage(), getattr(one, "shard", None)) for one in caplog.records]
    assert told == [
        ("INFO", "shard a: done", "a"),
        ("WARNING", "shard b: quarantined", "b"),
        ("INFO", "1 of 2 shards done", None),
        ("INFO", "1 of 2 shards done", None),
    ]
    assert vars(caplog.records[-1]).items() >= {"images": 2, "quarantined": 1, "shards": 2}.items()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A terminal of 80 columns to which the bar goes."""
    screen = io.StringIO()
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        module, "Console", lambda stderr: Console(file=screen, width=80, force_terminal=True, color_system=None)
    )
    return screen


def shown(screen: io.StringIO) -> list[str]:
    """Every state of the bar, in order."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_the_bar_tells_how_far_the_run_is(terminal: io.StringIO, clock: list[float]):
    with Telemetry(shards=4) as telemetry:
        telemetry.resumed([report("a", "there", ok=50)])
        clock[0] += 10
        telemetry.shard(report("b", ok=45, failed=5))
        telemetry.shard(report("c", "quarantined"))
        telemetry.images_in_flight("d", 25)
    assert shown(terminal)[-1].endswith(" 2/4 shards, 3 s left, 5 failed, 1 quarantined, 75 images, 7.5/s")


def test_a_long_run_stays_on_one_line(terminal: io.StringIO, clock: list[float]):
    with Telemetry(shards=100_000) as telemetry:
        telemetry.resumed([report(f"s{number}", "there", ok=990, failed=10) for number in range(12_345)])
        clock[0] += 100_000
        telemetry.images_in_flight("next", 12_345_678)
    lines = shown(terminal)
    assert max(map(len, lines)) <= 80
    assert "12,345/100,000 shards, 7 days left, 123,450 failed" in lines[-1]


@given(st.floats(0.001, 1e7))
def test_a_pace_has_digits_that_mean_something(rate):
    said = pace(rate)
    assert "e" not in said
    assert float(said.replace(",", "")) == pytest.approx(rate, rel=0.06)
