"""What can befall a request, and the rules that say whom: data for the fault proxy."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The store is not asked; an error document comes back."""

    status: int
    code: str


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The connection ends: after so many bytes of a body, or (None) before the first byte of the answer.

    The store has done its part by then, unless it is the request that is cut. `reset` ends it with a reset
    instead of a plain end.
    """

    after_bytes: int | None = None
    of: Literal["request", "response"] = "response"
    reset: bool = False


@dataclass(frozen=True, kw_only=True)
class Shorten:
    """An answer that lacks its last bytes and claims to be whole."""

    missing_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Nothing comes for so long, and then the connection ends.

    The store has done its part by then, and so many bytes of its answer came, or (None) none; with `request` it
    was never asked, and a client that waits for leave to send its body waits.
    """

    seconds: float
    after_bytes: int | None = None
    of: Literal["request", "response"] = "response"


@dataclass(frozen=True, kw_only=True)
class Delay:
    """Everything comes, later."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The request is taken whole, and goes on to the store once it is released.

    Its sender may be dead by then, or have sent it again: this one comes late.
    """

    taken: threading.Event = field(default_factory=threading.Event)
    """Set once the proxy has all of it."""
    release: threading.Event = field(default_factory=threading.Event)
    status: SimpleQueue[int] = field(default_factory=SimpleQueue)
    """Gets what the store answered."""


Fault = Answer | Cut | Shorten | Stall | Delay | Hold

SLOW_DOWN = Answer(status=503, code="SlowDown")
INTERNAL_ERROR = Answer(status=500, code="InternalError")
FORBIDDEN = Answer(status=403, code="AccessDenied")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A fault for a share of the requests of one method (any without) whose target `path` is found in.

    `path` is a regular expression. With `times`, the rule is used up after so many faults.
    """

    fault: Fault
    method: str | None = None
    path: str = ""
    share: float = 1.0
    times: int | None = None

    def fits(self, method: str, target: str) -> bool:
        """Whether the request is one of those it is about."""
        return self.method in (None, method) and re.search(self.path, target) is not None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request that came, and what was done to it."""

    method: str
    target: str
    fault: Fault | None
