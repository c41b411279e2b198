"""How far a run is, counted from storage: neither driver nor cluster is asked.

A look lists OUT once and reads the markers it does not know yet, so looking again costs what is new. Time comes
from the looks themselves, from when the job began, or from the newest log, in that order of trust: a shard's
images all come to storage in one moment.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from boomerang_batch import storage
from boomerang_batch.data.provenance import BAD
from boomerang_batch.errors import StorageError
from boomerang_batch.run.appendix import appendices, current_counts, is_appendix
from boomerang_batch.run.commit import MARKER_SUFFIX
from boomerang_batch.run.markers import Markers, Told
from boomerang_batch.run.record import LOGS_NAME, RunRecord, read_record

_EVENTS_SUFFIX = ".jsonl"
_SHARDS_TO_TRUST_LOOKS = 3


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the newest log in OUT tells of the command that wrote it."""

    images: int = 0
    seconds: float = 0.0
    quarantined: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One look at OUT."""

    at_s: float
    """The clock's time of the look."""
    shards: int | None
    """What run.json says that the finished output has; None while there is none."""
    done: int
    quarantined: int
    """Shards that the newest log gave up and that are not done since."""
    rows: Mapping[str, int]
    """Rows of the done shards by their status."""
    session: Session = field(default_factory=Session)

    @property
    def images(self) -> int:
        """Rows of the done shards: variants that came to their end, good or bad."""
        return sum(self.rows.values())

    @property
    def failed(self) -> int:
        """Those of them that came to a bad one."""
        return sum(count for status, count in self.rows.items() if status in BAD)

    @property
    def left(self) -> int | None:
        """Shards that are still to come; None while run.json is not there to tell."""
        return None if self.shards is None else max(self.shards - self.done - self.quarantined, 0)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """When a job began, and how many shards were done by then."""

    at_s: float
    done: int


class Looks:
    """Looks at one OUT, one after the other; remembers every marker it has read."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._markers: Markers | None = None
        self._log: tuple[str, int, Session] = ("", 0, Session())

    def look(self) -> Progress:
        """Look now. Raises StorageError when OUT can't be listed, RunMismatchError for a broken run.json."""
        found = storage.list_sizes(self._out, MARKER_SUFFIX)
        record = read_record(self._out)
        sizes = {name.removesuffix(MARKER_SUFFIX): size_bytes for name, size_bytes in found.items()}
        stems = set(sizes)
        mended = appendices(found)
        stems -= set(itertools.chain.from_iterable(mended.values()))
        if record is not None:
            stems &= set(record.shards)
        again = itertools.chain.from_iterable(mended.get(stem, ()) for stem in stems)
        if self._markers is None:
            self._markers = Markers(self._out)
        told = self._markers.read({name: sizes[name] for name in {*stems, *again}})
        done = {stem for stem in stems if stem in told and _belongs(told[stem], record)}
        rows: Counter[str] = Counter()
        for stem in done:
            appended = (told[name].counts for name in mended.get(stem, ()) if name in told)
            rows.update(current_counts(told[stem].counts, appended))
        session = self._newest_session()
        return Progress(
            at_s=time.time(),
            shards=None if record is None else len(record.shards),
            done=len(done),
            quarantined=sum(not is_appendix(name) for name in session.quarantined - done),
            rows={status: count for status, count in sorted(rows.items()) if count},
            session=session,
        )

    def _newest_session(self) -> Session:
        """What the newest log tells; read again only when there is a newer one or it has grown."""
        folder = storage.join(self._out, LOGS_NAME)
        newest = max((name for name in storage.list_names(folder) if name.endswith(_EVENTS_SUFFIX)), default="")
        if not newest:
            return Session()
        url = storage.join(folder, newest)
        try:
            size = storage.size(url)
            if self._log[:2] != (newest, size):
                self._log = (newest, size, read_session(storage.read_bytes(url)))
        except StorageError:
            return Session()  # a log is no proof of anything; what is done is still known without it
        return self._log[2]


def read_session(log: bytes) -> Session:
    """What a log of events tells. Lines that are no events are passed over."""
    images, seconds, quarantined = 0, 0.0, set()
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict) or event.get("event") != "shard":
            continue
        counts, at_s = event.get("counts"), event.get("at_s")
        if event.get("status") == "quarantined":
            quarantined.add(str(event.get("name")))
        elif event.get("status") == "done" and isinstance(counts, dict) and isinstance(at_s, int | float):
            images += sum(count for count in counts.values() if isinstance(count, int))
            seconds = float(at_s)
    return Session(images=images, seconds=seconds, quarantined=frozenset(quarantined))


def done_shards(out: str) -> int:
    """How many shards `out` has, by its names alone."""
    names = storage.list_names(out)
    return sum(name.endswith(MARKER_SUFFIX) and not is_appendix(name) for name in names)


def images_per_s(looks: Sequence[Progress], beginning: Beginning | None = None) -> float | None:
    """How fast images come, as well as it can be told; None when nothing tells.

    Between the first and last of the looks when some shards came meanwhile; else since the job's beginning;
    else as the newest log has it.
    """
    first, last = looks[0], looks[-1]
    if last.done - first.done >= _SHARDS_TO_TRUST_LOOKS and last.at_s > first.at_s:
        return (last.images - first.images) / (last.at_s - first.at_s)
    if beginning is not None and last.done > beginning.done and last.at_s > beginning.at_s:
        share = (last.done - beginning.done) / last.done
        return last.images * share / (last.at_s - beginning.at_s)
    if last.session.images and last.session.seconds > 0:
        return last.session.images / last.session.seconds
    return None


def eta_s(progress: Progress, rate: float | None) -> float | None:
    """Seconds until the last shard at `rate`, by the done shards' mean size; None when nothing tells."""
    if progress.left is None or not rate or not progress.done:
        return None
    return progress.left * (progress.images / progress.done) / rate


def _belongs(told: Told, record: RunRecord | None) -> bool:
    return record is None or told.recipe_digest == record.recipe_digest
