"""What the driver's process says, kept where it outlives the machine: its log, and how the run ended.

A cluster's logs die with its head. So warnings and errors are published as `<time>.log` every minute and at
the end, and the run's report as `<time>-summary.json`. Counts go to OUT/logs. Sentences may quote an input:
under anonymize they go to the private dir's logs, and nowhere while there is none. A Ray worker of such a run
keeps a log of its own there.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import socket
import threading
import traceback
from types import TracebackType

from boomerang_batch import storage
from boomerang_batch.errors import BoomerangError, ConfigError, PrivateDirError, StorageError
from boomerang_batch.run import log_lines
from boomerang_batch.run.discretion import PLAIN, Discretion
from boomerang_batch.run.private import prepare_private_dir
from boomerang_batch.run.record import LOGS_NAME
from boomerang_batch.run.tasks import RunReport, RunSpec

FORMAT_VERSION = 1
_PUBLISH_EVERY_S = 60.0
_FORM = "%(asctime)s %(levelname)s: %(message)s"

_log = logging.getLogger(__name__)


class KeptLog(logging.Handler):
    """Collects the process's log while it is entered. Set `report` when there is one."""

    def __init__(self, *, out: str, anonymize: bool, private_dir: str | None) -> None:
        """`anonymize` keeps sentences out of OUT; they go to `private_dir` if there is one."""
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter(_FORM))
        self._out = out
        self._private_dir = private_dir if anonymize else None
        self._home = private_dir if anonymize else out
        self._stamp = _stamp()
        self._lines: list[str] = []
        self._published = 0
        self._over = threading.Event()
        self._publisher = threading.Thread(target=self._publish_now_and_then, name="log", daemon=True)
        self.report: RunReport | None = None

    @property
    def place(self) -> str | None:
        """Where what is said is kept; None if nowhere."""
        return None if self._home is None else storage.join(self._home, LOGS_NAME, f"{self._stamp}.log")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record. Called by logging."""
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)

    def __enter__(self) -> KeptLog:
        logging.getLogger().addHandler(self)
        self._publisher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)
        self._over.set()
        self._publisher.join()
        # A refused request has no run of its own, and leaves nothing in what may be another's OUT.
        if not isinstance(error, ConfigError):
            self._last_words(error)
        elif log_lines.hides(error) and self._private_dir is not None:
            # But what is said nowhere else must stand somewhere.
            try:
                prepare_private_dir(self._private_dir, out=self._out)
            except (PrivateDirError, StorageError, OSError) as refused:
                told = "nothing is kept of what went wrong, for there is no private dir to keep it in: %s"
                _log.warning(told, refused, extra=PLAIN)
            else:
                self._last_words(error)

    def _last_words(self, error: BaseException | None) -> None:
        if isinstance(error, BoomerangError):
            self._lines.append(f"error: {error}")
        elif error is not None:
            self._lines += traceback.format_exception(error)
        if self.report is not None:
            self._lines += [f"quarantined: {problem}" for problem in self.report.problems]
        try:
            if self.report is not None:
                self._put(self._out, f"{self._stamp}-summary.json", _summary(self.report))
            self._publish()
        except StorageError as lost:
            _log.warning("the run's log is lost: %s", lost, extra=PLAIN)

    def _publish_now_and_then(self) -> None:
        while not self._over.wait(_PUBLISH_EVERY_S):
            try:
                if storage.exists(self._out):
                    self._publish()
            except StorageError:
                continue  # said at the end, if it lasts

    def _publish(self) -> None:
        lines = list(self._lines)
        home = self._home
        # The driver makes OUT, and the private dir with the mode it needs; without them nothing was begun.
        if home is None or len(lines) == self._published or not storage.exists(home):
            return
        text = storage.without_secrets("".join(line.rstrip("\n") + "\n" for line in lines))
        self._put(home, f"{self._stamp}.log", text.encode())
        self._published = len(lines)

    def _put(self, home: str, name: str, data: bytes) -> None:
        folder = storage.join(home, LOGS_NAME)
        storage.make_folder(folder)
        storage.publish_bytes(data, storage.join(folder, name))


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return storage.without_secrets(super().format(record))


def discretion_of_worker(spec: RunSpec) -> Discretion | None:
    """How a worker in a process of its own keeps the inputs of its run to itself; None where it need not.

    Its warnings and errors go to a log of its own in the private dir.
    """
    if spec.recipe.purpose != "anonymize":
        return None
    if spec.private_dir is None:
        return Discretion(named=(spec.out,), kept=None)
    folder = storage.local_path(spec.private_dir) / LOGS_NAME
    path = folder / f"{_stamp()}-{socket.gethostname()}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # links could not be written either, which ends the run and says so
        return Discretion(named=(spec.out,), kept=None)
    handler = logging.FileHandler(path, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_WithoutSecrets(_FORM))
    logging.getLogger().addHandler(handler)
    return Discretion(named=(spec.out,), kept=str(path))


def _stamp() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def _summary(report: RunReport) -> bytes:
    """The report in counts alone: no path, and no sentence that might quote an input."""
    facts = {
        "format_version": FORMAT_VERSION,
        "exit_code": report.exit_code,
        "rows": dict(report.rows),
        "seconds": report.seconds,
        "shards": dict(report.shards),
        "stopped": report.stopped,
    }
    return (json.dumps(facts, sort_keys=True) + "\n").encode()
