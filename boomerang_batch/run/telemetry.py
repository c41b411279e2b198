"""What a run tells while it runs: a progress bar on a terminal, one JSON line every few seconds otherwise.

Both go to stderr. Events are kept and published under OUT/logs when the run ends; so they name outputs only
(pseudonyms under anonymize) and never quote a reason, which might quote an input.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from boomerang_batch.data.provenance import BAD
from boomerang_batch.run.appendix import is_appendix
from boomerang_batch.run.tasks import ShardReport

_LINE_EVERY_S = 5.0


class Telemetry:
    """Counts what happens and shows it. Use as a context manager around the work."""

    def __init__(self, *, shards: int, quiet: bool = False) -> None:
        self._shards = shards
        self._done = self._done_here = self._quarantined = 0
        self._failed = 0
        self._finished_images = 0
        self._images_in_flight: dict[str, int] = {}
        self._started = self._last_line = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._quiet = quiet
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("shards"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._row = self._bar.add_task("shards", total=shards, note="")

    def __enter__(self) -> Telemetry:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resumed(self, done: Sequence[ShardReport]) -> None:
        """Earlier runs have done these shards. One event for all: of each its marker tells."""
        counts = Counter[str]()
        for report in done:
            counts.update(report.counts)
        self._done += len(done)
        self._failed += sum(count for status, count in counts.items() if status in BAD)
        if done:
            self.event("resumed", shards=len(done), counts=dict(counts))
            self._show()

    def images_in_flight(self, task: str, finished: int) -> None:
        """`finished` variants of a shard in work are drawn."""
        self._images_in_flight[task] = finished
        self._show()

    def shard(self, report: ShardReport) -> None:
        """A shard has come to its end, good or bad."""
        self._images_in_flight.pop(report.name, None)
        if report.status == "done":
            self._finished_images += sum(report.counts.values())
        if not is_appendix(report.name):
            self._done += report.status in ("done", "there")
            self._done_here += report.status == "done"
            self._quarantined += report.status == "quarantined"
        bad = sum(count for status, count in report.counts.items() if status in BAD)
        self._failed += bad
        self.event(
            "shard", name=report.name, status=report.status, counts=dict(report.counts), seconds=report.seconds
        )
        self._show(force=report.status == "quarantined")

    def event(self, kind: str, **facts: Any) -> None:
        """Keep one event for the log."""
        self._events.append({"event": kind, "at_s": round(time.monotonic() - self._started, 3), **facts})

    def log(self) -> bytes:
        """Every event as JSON lines."""
        return "".join(json.dumps(event, sort_keys=True) + "\n" for event in self._events).encode()

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        images = self._finished_images + sum(self._images_in_flight.values())
        rate = images / max(now - self._started, 1e-9)
        if self._bar is not None:
            note = f"{images} images, {rate:.1f}/s, {self._failed} failed"
            self._bar.update(self._row, completed=self._done, note=note)
        elif not self._quiet and (force or now - self._last_line >= _LINE_EVERY_S):
            self._last_line = now
            left = max(self._shards - self._done - self._quarantined, 0)
            eta_s = round((now - self._started) / self._done_here * left) if self._done_here else None
            line = {"shards_done": self._done, "shards": self._shards, "images": images, "failed": self._failed}
            print(
                json.dumps({**line, "images_per_s": round(rate, 2), "eta_s": eta_s}),
                file=sys.stderr,
                flush=True,
            )
