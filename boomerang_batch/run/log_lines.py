"""Log lines on stderr, the driver's and the workers' alike: sentences for people, or a JSON object a line.

A JSON line has `time` (UTC), `level`, `logger` and `message`, and whatever the record was given as `extra`; of
one shard that is `shard`, its name in OUT, of one sample `key`, its key in OUT. Under anonymize both are
pseudonyms. What only programs want to know is said at INFO, and in JSON alone.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

FORMATS = ("text", "json")
Format = Literal["text", "json"]

_PACKAGE = "boomerang_batch"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest is what it was given."""

_log = logging.getLogger(__name__)


class _About(threading.local):
    """What the thread is at work on. Not a context variable: a reader's generator may end on another thread."""

    facts: Mapping[str, str] = {}


_about = _About()


class JsonLines(logging.Formatter):
    """One record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        from boomerang_batch.storage import without_secrets

        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        facts: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
            **_about.facts,
        }
        given = {name: value for name, value in vars(record).items() if name not in _OWN and name[0] != "_"}
        facts |= {name: value for name, value in given.items() if value is not None}
        if record.exc_info:
            facts["exception"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(facts, default=str)


class _Stderr(logging.Handler):
    """Writes to what is stderr at the moment: while a progress bar is shown, that keeps lines off the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_handler = _Stderr()
_TEXT = logging.Formatter("%(levelname)s: %(message)s")
_JSON = JsonLines()


def set_up(format: Format) -> None:
    """From now on this process's log comes on stderr in `format`. The last call counts."""
    root, in_json = logging.getLogger(), format == "json"
    root.removeHandler(_handler)
    if in_json or not root.handlers:
        root.addHandler(_handler)
    _handler.setFormatter(_JSON if in_json else _TEXT)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO if in_json else logging.NOTSET)
    logging.captureWarnings(in_json)
    if in_json:
        sys.excepthook = _unforeseen
    elif sys.excepthook is _unforeseen:
        sys.excepthook = sys.__excepthook__


def line(level: int, message: str, *, text: str | None = None, **facts: Any) -> str:
    """A line in the format that was set up, for those who write it themselves; `text` is for people."""
    if _handler.formatter is not _JSON:
        return message if text is None else text
    name = logging.getLevelName(level)
    return _JSON.format(
        logging.makeLogRecord({"name": _PACKAGE, "levelno": level, "levelname": name, "msg": message, **facts})
    )


@contextlib.contextmanager
def about(**facts: str) -> Iterator[None]:
    """Whatever this thread logs inside has these facts, if it's logged as JSON."""
    before, _about.facts = _about.facts, {**_about.facts, **facts}
    try:
        yield
    finally:
        _about.facts = before


def _unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug's traceback is a line like any other."""
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _log.critical("unforeseen error; please report it", exc_info=(kind, error, trace))
