"""How fast the run went, by the events that its commands left under OUT/logs.

Logs are no proof of anything and may be missing; what they say is shown, not counted on. Times of several
commands stand one after the other: the pauses between them are nobody's work.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from boomerang_batch import storage
from boomerang_batch.errors import StorageError
from boomerang_batch.report.sections import Curve, Line, Section, Table
from boomerang_batch.report.words import number, plural
from boomerang_batch.run.record import LOGS_NAME
from boomerang_batch.run.words import pace, span

_SUFFIX = ".jsonl"
_ROWS = 12
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What one command's log tells."""

    began: str
    commits: tuple[tuple[float, int], ...]
    """(seconds since it began, images) of every shard that it finished, in time."""
    quarantined: int

    @property
    def images(self) -> int:
        """Images it finished."""
        return sum(count for _, count in self.commits)

    @property
    def seconds(self) -> float:
        """Until its last shard."""
        return self.commits[-1][0] if self.commits else 0.0


def read_stretches(out: str) -> list[Stretch]:
    """Every command's, in time. Logs that can't be read are passed over."""
    folder = storage.join(out, LOGS_NAME)
    found = []
    for name in storage.list_names(folder):
        if name.endswith(_SUFFIX):
            try:
                found.append(_stretch(name, storage.read_bytes(storage.join(folder, name))))
            except StorageError:
                continue
    return [stretch for stretch in found if stretch.commits or stretch.quarantined]


def section(stretches: list[Stretch]) -> Section | None:
    """The timeline; None where no log tells of a shard."""
    working = [stretch for stretch in stretches if stretch.commits and stretch.seconds > 0]
    if not working:
        return None
    points, passed, images = [(0.0, 0.0)], 0.0, 0
    for stretch in working:
        for at_s, count in stretch.commits:
            images += count
            points.append((passed + at_s, float(images)))
        passed += stretch.seconds
    rate = images / passed
    unit, size_s = next((unit, size_s) for unit, size_s in _UNITS if passed >= 3 * size_s or size_s == 1)
    line = Line(name="images done", points=tuple((at / size_s, count) for at, count in points), steps=True)
    times = tuple((number(at), f"{count:,.0f}") for at, count in _evenly(list(line.points)))
    return Section(
        anchor="timeline",
        title="How fast it went",
        prose=(
            f"{plural(images, 'picture')} in {span(passed)} of work: {pace(rate)} a second. The straighter the "
            "line, the steadier the pace; a shard's pictures all count when it is committed.",
        ),
        curves=(
            Curve(
                title="Pictures done over time",
                x=f"{unit} of work",
                y="pictures done",
                lines=(line,),
                table=Table(
                    caption="Pictures done over time", head=(unit.capitalize(), "Pictures"), rows=times
                ),
            ),
        ),
        tables=(_commands(stretches),) if len(stretches) > 1 else (),
    )


def _commands(stretches: list[Stretch]) -> Table:
    shown = stretches[-_ROWS:]
    left_out = len(stretches) - len(shown)
    return Table(
        caption=f"Commands that worked on it{f', but for the first {left_out}' if left_out else ''}",
        head=("Log of", "Shards", "Pictures", "Worked", "A second", "Quarantined"),
        rows=tuple(
            (
                one.began,
                f"{len(one.commits):,}",
                f"{one.images:,}",
                span(one.seconds),
                pace(one.images / one.seconds) if one.seconds else "–",
                f"{one.quarantined:,}",
            )
            for one in shown
        ),
    )


def _stretch(name: str, log: bytes) -> Stretch:
    commits, quarantined = [], set()
    for event in _events(log):
        counts, at_s = event.get("counts"), event.get("at_s")
        if event.get("status") == "quarantined":
            quarantined.add(str(event.get("name")))
        elif event.get("status") == "done" and isinstance(counts, dict) and _is_time(at_s):
            commits.append((float(at_s), sum(count for count in counts.values() if isinstance(count, int))))
    return Stretch(began=_time(name), commits=tuple(sorted(commits)), quarantined=len(quarantined))


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value < 1e9


def _events(log: bytes) -> Iterator[dict[str, object]]:
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and event.get("event") == "shard":
            yield event


def _time(name: str) -> str:
    try:
        return dt.datetime.strptime(name.removesuffix(_SUFFIX), "%Y%m%dT%H%M%S.%fZ").strftime(
            "%Y-%m-%d %H:%M UTC"
        )
    except ValueError:
        return name.removesuffix(_SUFFIX)


def _evenly(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _ROWS:
        return points
    return [points[index * (len(points) - 1) // (_ROWS - 1)] for index in range(_ROWS)]
