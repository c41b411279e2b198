"""What may be said of a run that anonymizes: nothing that could quote an input.

What a run says on its terminal, or in the log of a job, is read by others than its private dir is, and outlives
it. So of a log record only this program's own words, numbers and names in OUT are said. Text from elsewhere
(the URL or key of an input, a library's message, the words of an error) is [private]: it stands in the private
dir's log alone. Of an error about a place that the command itself names, OUT or the manifest, that name is
said. A traceback keeps its places in the code.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from boomerang_batch.errors import (
    ConfigError,
    GateError,
    ManifestError,
    MeasureError,
    StoppedError,
    StorageError,
    VerificationError,
)

HIDDEN = "[private]"
PLAIN: Final[Mapping[str, object]] = {"_plain": True}
"""The `extra` of a record whose texts come from no input."""

_PACKAGE = "boomerang_batch"
_OF_THE_USERS_OWN = (ConfigError, StoppedError, GateError, MeasureError)
"""Errors that quote what the user wrote, machines and OUT; manifests apart, which name inputs."""


@dataclass(frozen=True, kw_only=True)
class Discretion:
    """How one process keeps a run's inputs to itself."""

    named: tuple[str, ...]
    """Places that stand in the command itself, OUT above all: what a store says of them may be said."""
    kept: str | None
    """Where what is hidden is kept; None if nowhere."""

    @property
    def notice(self) -> str:
        """Where to look, for who may."""
        if self.kept is None:
            return f"what is {HIDDEN} is kept nowhere; with --private-dir DIR it is kept there"
        return f"what is {HIDDEN} stands in {self.kept}"

    def message(self, record: logging.LogRecord) -> str:
        """What a record says, as it may be said."""
        if not is_ours(record):
            return f"{record.name}: {HIDDEN}"
        if getattr(record, "_plain", False):
            return record.getMessage()
        if not isinstance(record.msg, str) or isinstance(record.args, Mapping):
            return HIDDEN
        try:
            return record.msg % tuple(map(self._shown, record.args)) if record.args else record.msg
        except (TypeError, ValueError):  # the template wants a number
            return HIDDEN

    def words(self, error: BaseException) -> str:
        """What an error says, as it may be said."""
        if not self.hides(error):
            return str(error)
        about = self._about(error)
        place = "" if about is None else f"{self._places[about[3]]}: "
        return f"{type(error).__name__}: {place}{HIDDEN}; {self.notice}"

    def hides(self, error: BaseException) -> bool:
        """Whether an error's words might quote an input."""
        if isinstance(error, StorageError | VerificationError):
            return self._about(error) is None
        return isinstance(error, ManifestError) or not isinstance(error, _OF_THE_USERS_OWN)

    def places(self, error: BaseException) -> str:
        """The traceback of an error and of what led to it: places in the code, without anybody's words."""
        lines: list[str] = []
        for link in reversed([*_causes(error)]):
            kind = type(link)
            lines += ["Traceback (most recent call last):\n", *traceback.format_tb(link.__traceback__)]
            lines.append(f"{kind.__module__}.{kind.__qualname__}: {HIDDEN}\n")
        return "".join(lines).rstrip("\n")

    def _shown(self, value: object) -> object:
        """A record's argument, if it is a number or such a place."""
        if isinstance(value, str) and re.fullmatch(rf"{self._place}(/\S*)?", value):
            return value
        return value if isinstance(value, int | float) else HIDDEN

    def _about(self, error: BaseException) -> re.Match[str] | None:
        """That an error is about a place that may be named, if it is: the third group has it."""
        return re.match(rf"{self._place}([/: ]|$)", str(error))

    @property
    def _place(self) -> str:
        """What begins with a place that may be named, or is an error about it, as a pattern.

        Such an error of a store, or about what is in OUT, is about one place, and no input lies in OUT.
        """
        return rf"(can't (\w+ )+)?({'|'.join(map(re.escape, self._places))})"

    @property
    def _places(self) -> Mapping[str, str]:
        """Every place that may be named, and as the user wrote it."""
        from boomerang_batch import storage  # not for --help

        return {
            storage.without_secrets(place).rstrip("/"): storage.without_secrets(name)
            for name in self.named
            for place in (name, storage.absolute(name))
        }


def is_ours(record: logging.LogRecord) -> bool:
    """Whether this program wrote a record, and not a library."""
    return record.name == _PACKAGE or record.name.startswith(f"{_PACKAGE}.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, latest first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
