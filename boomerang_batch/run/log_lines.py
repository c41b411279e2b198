"""Log lines on stderr, the driver's and the workers' alike: sentences for people, or a JSON object a line.

A JSON line has `time` (UTC), `level`, `logger` and `message`, and whatever the record was given as `extra`; of
one shard that is `shard`, its name in OUT, of one sample `key`, its key in OUT. Under anonymize both are
pseudonyms, and what could quote an input is not said: see `discretion`. What only programs want to know is said
at INFO, and in JSON alone.
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

from boomerang_batch.run.discretion import HIDDEN, PLAIN, Discretion, is_ours

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


class _Discreet(logging.Formatter):
    """Says no more of an exception than may be said."""

    def formatException(self, exc_info: Any) -> str:  # noqa: N802 (logging's name)
        return super().formatException(exc_info) if _discretion is None else _discretion.places(exc_info[1])


class JsonLines(_Discreet):
    """One record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        from boomerang_batch.storage import without_secrets

        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        facts: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": without_secrets(_message(record)),
            **_about.facts,
        }
        given = {name: value for name, value in vars(record).items() if name not in _OWN and name[0] != "_"}
        if _discretion is None or is_ours(record):
            facts |= {name: value for name, value in given.items() if value is not None}
        if record.exc_info:
            facts["exception"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(facts, default=str)


class TextLines(_Discreet):
    """One record as a sentence, with its traceback behind it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines, without the end."""
        told = f"{record.levelname}: {_message(record)}"
        return f"{told}\n{self.formatException(record.exc_info)}" if record.exc_info else told


class _Stderr(logging.Handler):
    """Writes to what is stderr at the moment: while a progress bar is shown, that keeps lines off the bar."""

    noticed = False
    """Whether it has been said where to find what is hidden."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if _discretion is not None and not self.noticed and HIDDEN in text:
                self.noticed = True
                self.emit(_record(logging.WARNING, _discretion.notice, **PLAIN))
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_handler = _Stderr()
_TEXT = TextLines()
_JSON = JsonLines()
_discretion: Discretion | None = None
_hooks: Any = None
"""What else was to be done with errors of threads, while discretion does it."""


def set_up(format: Format, discretion: Discretion | None = None) -> None:
    """From now on this process's log comes on stderr in `format`. The last call counts.

    With `discretion`, or in JSON, warnings and tracebacks of bugs are records too.
    """
    global _discretion, _hooks
    root, in_json = logging.getLogger(), format == "json"
    ours = in_json or discretion is not None
    _discretion, _handler.noticed = discretion, False
    root.removeHandler(_handler)
    if ours or not root.handlers:
        root.addHandler(_handler)
    _handler.setFormatter(_JSON if in_json else _TEXT)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO if in_json else logging.NOTSET)
    logging.captureWarnings(ours)
    logging.raiseExceptions = discretion is None  # of a record that can't be put in words all would be shown
    if ours:
        sys.excepthook = _unforeseen
    elif sys.excepthook is _unforeseen:
        sys.excepthook = sys.__excepthook__
    if discretion is not None and _hooks is None:
        _hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook = sys.unraisablehook = _unforeseen_beside
    elif discretion is None and _hooks is not None:
        threading.excepthook, sys.unraisablehook = _hooks
        _hooks = None


def speak_for(library: str) -> None:
    """Under discretion a library that writes its log to stderr by itself must leave that to us."""
    if _discretion is not None:
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def words(error: BaseException) -> str:
    """What an error says, as it may be said here."""
    return str(error) if _discretion is None else _discretion.words(error)


def hides(error: BaseException) -> bool:
    """Whether `words` leaves out what an error says."""
    return _discretion is not None and _discretion.hides(error)


def line(level: int, message: str, *, text: str | None = None, **facts: Any) -> str:
    """A line in the format that was set up, for those who write it themselves; `text` is for people."""
    if _handler.formatter is not _JSON:
        return message if text is None else text
    return _JSON.format(_record(level, message, **facts, **PLAIN))


@contextlib.contextmanager
def about(**facts: str) -> Iterator[None]:
    """Whatever this thread logs inside has these facts, if it's logged as JSON."""
    before, _about.facts = _about.facts, {**_about.facts, **facts}
    try:
        yield
    finally:
        _about.facts = before


def _record(level: int, message: str, **facts: Any) -> logging.LogRecord:
    name = logging.getLevelName(level)
    return logging.makeLogRecord(
        {"name": _PACKAGE, "levelno": level, "levelname": name, "msg": message, **facts}
    )


def _message(record: logging.LogRecord) -> str:
    return record.getMessage() if _discretion is None else _discretion.message(record)


def _unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug's traceback is a line like any other."""
    if isinstance(error, KeyboardInterrupt):
        if _discretion is None:
            sys.__excepthook__(kind, error, trace)
        return
    _log.critical("unforeseen error; please report it", exc_info=(kind, error, trace))


def _unforeseen_beside(told: Any) -> None:
    """The same of a thread, or of where nobody could catch it."""
    if told.exc_value is not None and not isinstance(told.exc_value, SystemExit):
        _log.critical("unforeseen error beside the run; please report it", exc_info=told.exc_value)
