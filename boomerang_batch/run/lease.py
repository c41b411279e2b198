"""One run at a time on one OUT: a lease in storage, for stores that know no locks.

A run that begins makes the next epoch object, which create-only gives to one run alone, and from then on
overwrites that epoch's beat object every few seconds. Another run that finds the beat unchanged for long enough
on its own clock takes over with a higher epoch; so clocks are never compared. Before every publication workers
list the epochs, and stop where there is a higher one.

A store checks no epoch when it takes an object, so a holder that was frozen may still publish late. That is
harmless, for the same recipe on the same stack gives the same bytes; who takes over and goes on with another
stack waits first until every upload of the former holder must have ended. Epochs and beats lie under OUT/logs,
which is not part of the output. But OUT is published: an epoch names machine and process only as long as others
need them, until its holder has let go or the next has taken over.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from boomerang_batch import storage
from boomerang_batch.errors import LeaseError, ObjectExistsError, ObjectMissingError, StoppedError, StorageError
from boomerang_batch.run.discretion import PLAIN

FOLDER = "lease"
BEAT_EVERY_S = 10.0
STALE_AFTER_S = 60.0
UPLOADS_END_AFTER_S = 2400.0
"""An upload of up to a GiB in flight is given up after as long: see `Remote.put` and `retries.PATIENCE_S`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds an epoch, for people and for the others on its machine."""

    token: str
    host: str
    process: int
    machine: str
    """Boot and process namespace: where they are the same, process numbers can be compared."""
    born: str
    """When the process began, in the machine's own count: numbers are used again."""
    since: str
    """UTC, ISO 8601."""

    @property
    def forgotten(self) -> Holder:
        """What stays of it in OUT."""
        return Holder(token=self.token, host="", process=0, machine="", born="", since=self.since)

    def __str__(self) -> str:
        return f"a run on {self.host} (process {self.process}) since {self.since}"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to write to OUT, while no higher epoch is there."""

    epoch: int
    taken_over_at: float | None
    """time.monotonic() when it was taken from a holder who had not let go; None if nobody had to be ousted."""

    @property
    def waited_out(self) -> bool:
        """Whether no upload of an ousted holder can be on its way any more."""
        return self.taken_over_at is None or time.monotonic() - self.taken_over_at >= UPLOADS_END_AFTER_S

    def let_uploads_end(self, stop: threading.Event) -> None:
        """Wait until whatever the ousted holder was uploading must have ended, or been given up."""
        if self.taken_over_at is not None:
            left_s = self.taken_over_at + UPLOADS_END_AFTER_S - time.monotonic()
            if left_s > 0:
                _log.warning("waiting %.0f s for uploads of the former run, which had another stack", left_s)
                if stop.wait(left_s):
                    raise StoppedError("stopped while waiting; run the same command to go on")


def require(out: str, epoch: int) -> None:
    """Raise LeaseError when a run with a higher epoch than `epoch` has taken over OUT."""
    epochs = _epochs(out)
    if epochs and epochs[-1] > epoch:
        raise LeaseError(f"{out}: another run has taken over; this one stops, and what it did counts")


@contextlib.contextmanager
def held(out: str, *, wait: bool, stop: threading.Event) -> Iterator[Lease]:
    """Hold the lease on OUT for the block.

    Where another run holds it and beats, raises LeaseError, or with `wait` waits for its end. A holder that
    is dead is taken over: at once if it died on this machine, else after STALE_AFTER_S without a beat. Setting
    `stop` ends the waiting with LeaseError.
    """
    lease = _acquire(out, wait=wait, stop=stop)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(out, lease.epoch, over), name="boomerang-lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        over.set()
        beating.join()
        # Who took over and ends soon after leaves the wait for uploads to the next, who finds a dead holder.
        if lease.waited_out:
            with contextlib.suppress(StorageError):
                _write_beat(out, lease.epoch, {"released": True})
                _forget(out, lease.epoch)


def _acquire(out: str, *, wait: bool, stop: threading.Event) -> Lease:
    storage.make_folder(_folder(out))
    while True:
        epochs = _epochs(out)
        last = epochs[-1] if epochs else 0
        ousted = bool(epochs) and not _await_end(out, last, wait=wait, stop=stop)
        try:
            storage.create_only(_url(out, "epoch", last + 1), json.dumps(asdict(_this_process())).encode())
        except ObjectExistsError:
            continue  # another run was faster: look at that one
        if last:
            with contextlib.suppress(StorageError):
                _forget(out, last)  # who died could not
        return Lease(epoch=last + 1, taken_over_at=time.monotonic() if ousted else None)


def _await_end(out: str, epoch: int, *, wait: bool, stop: threading.Event) -> bool:
    """Wait until the holder of `epoch` has let go (True), or is dead or silent for long (False)."""
    holder = _holder(out, epoch)
    beat, silent_since = _read_beat(out, epoch), time.monotonic()
    told = False
    # One that is forgotten has let go too, or has been taken over from, which the next epoch will tell.
    while holder.host and not beat.get("released"):
        silent_s = time.monotonic() - silent_since
        if _is_dead(holder) or silent_s >= STALE_AFTER_S:
            said = "%s: taking over from %s, which ended without letting go"
            _log.warning(said, out, holder, extra=PLAIN)
            return False
        if not told:
            said = "%s is held by %s; seeing whether it lives takes up to a minute"
            _log.warning(said, out, holder, extra=PLAIN)
            told = True
        if stop.wait(min(BEAT_EVERY_S / 4, STALE_AFTER_S - silent_s)):
            raise LeaseError(f"{out} is held by {holder}; stopped while waiting for it")
        now = _read_beat(out, epoch)
        if now != beat:
            beat, silent_since = now, time.monotonic()
            if not wait and not beat.get("released"):
                raise LeaseError(
                    f"{out} is held by {holder}, which is at work; wait for its end, or say --if-held wait"
                )
    return True


def _beat(out: str, epoch: int, over: threading.Event) -> None:
    """Overwrite the beat until the lease is over. What can't be written is tried again a beat later."""
    count = 0
    while True:
        count += 1
        try:
            _write_beat(out, epoch, {"count": count})
        except StorageError as error:
            _log.warning("the lease's beat was not written: %s", error, extra=PLAIN)
        if over.wait(BEAT_EVERY_S):
            return


def _write_beat(out: str, epoch: int, beat: Mapping[str, Any]) -> None:
    storage.publish_bytes(json.dumps(beat).encode(), _url(out, "beat", epoch))


def _read_beat(out: str, epoch: int) -> dict[str, Any]:
    """The beat; empty before the first one."""
    try:
        beat = json.loads(storage.read_bytes(_url(out, "beat", epoch)))
    except (ObjectMissingError, ValueError):
        return {}
    return beat if isinstance(beat, dict) else {}


def _holder(out: str, epoch: int) -> Holder:
    """Who made an epoch."""
    try:
        return Holder(**json.loads(storage.read_bytes(_url(out, "epoch", epoch))))
    except (ValueError, TypeError):  # another release's
        return Holder(token="", host="an unknown machine", process=0, machine="", born="", since="some time")


def _forget(out: str, epoch: int) -> None:
    """Take machine and process out of an epoch that nobody asks about any more; its name is what counts."""
    holder = _holder(out, epoch)
    if holder.process:
        storage.publish_bytes(json.dumps(asdict(holder.forgotten)).encode(), _url(out, "epoch", epoch))


def _epochs(out: str) -> list[int]:
    """Every epoch there has been, ascending."""
    names = (name.removesuffix(".json").partition("-") for name in storage.list_names(_folder(out)))
    return sorted(int(number) for kind, _, number in names if kind == "epoch" and number.isdecimal())


def _folder(out: str) -> str:
    return storage.join(out, "logs", FOLDER)


def _url(out: str, kind: str, epoch: int) -> str:
    return storage.join(_folder(out), f"{kind}-{epoch:06d}.json")


def _this_process() -> Holder:
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        process=os.getpid(),
        machine=_machine(),
        born=_born(os.getpid()) or "",
        since=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _is_dead(holder: Holder) -> bool:
    """Whether it can be told from here that the holder's process has ended."""
    return bool(holder.machine) and holder.machine == _machine() and _born(holder.process) != holder.born


def _machine() -> str:
    """Boot id and process namespace; empty where there is no /proc, and nothing can be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(process: int) -> str | None:
    """When a process began, in clock ticks since boot; None when there is none, or a zombie."""
    try:
        # The command's name stands in parentheses and may hold any character, parentheses too.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
