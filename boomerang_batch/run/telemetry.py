"""What a run tells while it runs: a progress bar on a terminal, one JSON line every few seconds otherwise.

Both go to stderr. Where the log is shown at INFO, progress and shards are records of it instead, and there is
no bar that they would tear. Events are kept and published under OUT/logs when the run ends; so they name
outputs only (pseudonyms under anonymize) and never quote a reason, which might quote an input.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from boomerang_batch.data.provenance import BAD
from boomerang_batch.run.appendix import is_appendix
from boomerang_batch.run.discretion import PLAIN
from boomerang_batch.run.tasks import ShardReport
from boomerang_batch.run.words import pace, span

_LINE_EVERY_S = 5.0

_log = logging.getLogger(__name__)


class Telemetry:
    """Counts what happens and shows it. Use as a context manager around the work."""

    def __init__(self, *, shards: int, quiet: bool = False) -> None:
        self._shards = shards
        self._done = self._quarantined = 0
        self._images_of_done = 0
        self._failed = 0
        self._finished_images = 0
        self._images_in_flight: dict[str, int] = {}
        self._started = self._last_line = time.monotonic()
        self._events: list[dict[str, Any]] = []
        self._quiet = quiet
        self._logged = _log.isEnabledFor(logging.INFO)
        self._bar: Progress | None = None
        if not quiet and not self._logged and sys.stderr.isatty():
            # The bar gets what width the words leave.
            columns = BarColumn(bar_width=None), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._row = self._bar.add_task(self._words(0.0), total=shards)

    def __enter__(self) -> Telemetry:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._show(force=True)
        if self._bar is not None:
            self._bar.stop()

    def resumed(self, done: Sequence[ShardReport]) -> None:
        """Earlier runs have done these shards. One event for all: of each its marker tells."""
        counts = Counter[str]()
        for report in done:
            counts.update(report.counts)
        self._done += len(done)
        self._images_of_done += sum(counts.values())
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
            if report.status in ("done", "there"):
                self._done += 1
                self._images_of_done += sum(report.counts.values())
            self._quarantined += report.status == "quarantined"
        bad = sum(count for status, count in report.counts.items() if status in BAD)
        self._failed += bad
        self.event(
            "shard", name=report.name, status=report.status, counts=dict(report.counts), seconds=report.seconds
        )
        facts = {"status": report.status, "counts": dict(report.counts), "seconds": report.seconds}
        level = logging.WARNING if report.status == "quarantined" else logging.INFO
        told = {"shard": report.name, **facts, **PLAIN}
        _log.log(level, "shard %s: %s", report.name, report.status, extra=told)
        self._show(force=report.status == "quarantined")

    def event(self, kind: str, **facts: Any) -> None:
        """Keep one event for the log."""
        self._events.append({"event": kind, "at_s": round(time.monotonic() - self._started, 3), **facts})

    def log(self) -> bytes:
        """Every event as JSON lines."""
        return "".join(json.dumps(event, sort_keys=True) + "\n" for event in self._events).encode()

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        rate = self._images / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._row, completed=self._done + self._quarantined, description=self._words(rate))
        elif not self._quiet and (force or now - self._last_line >= _LINE_EVERY_S):
            self._last_line = now
            self._say(rate)

    def _say(self, rate: float) -> None:
        eta_s = self._eta_s(rate)
        facts = {
            "shards_done": self._done,
            "shards": self._shards,
            "quarantined": self._quarantined,
            "images": self._images,
            "failed": self._failed,
            "images_per_s": round(rate, 2),
            "eta_s": None if eta_s is None else round(eta_s),
        }
        if self._logged:
            _log.info("%d of %d shards done", self._done, self._shards, extra=facts)
        else:
            print(json.dumps(facts), file=sys.stderr, flush=True)

    def _words(self, rate: float) -> str:
        """What stands beside the bar, the less dispensable first: a narrow terminal cuts it."""
        parts = [f"{self._done:,}/{self._shards:,} shards"]
        eta_s = self._eta_s(rate)
        if eta_s:
            parts.append(f"{span(eta_s)} left")
        parts += [f"{self._failed:,} failed"] if self._failed else []
        parts += [f"{self._quarantined:,} quarantined"] if self._quarantined else []
        parts.append(f"{self._images:,} images")
        parts += [f"{pace(rate)}/s"] if self._images else []
        return ", ".join(parts)

    @property
    def _images(self) -> int:
        """Outputs of this run so far, those of shards in work included."""
        return self._finished_images + sum(self._images_in_flight.values())

    def _eta_s(self, rate: float) -> float | None:
        """Time left, by the mean size of the done shards; None while none is."""
        if not self._done or not rate:
            return None
        left = max(self._shards - self._done - self._quarantined, 0) * self._images_of_done / self._done
        return max(left - sum(self._images_in_flight.values()), 0.0) / rate
