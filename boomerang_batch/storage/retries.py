"""Trying again: which failures of a store pass by themselves, and how long to wait for that.

The clients of S3, GCS, Azure and HTTP have errors with no parent in common, and wrap each other's. So an error
is judged by its whole chain of causes: an HTTP status where one is found, else by the kind of error. Waits
double and are drawn at random below that (full jitter), lest a thousand workers come back at once.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from boomerang_batch.storage.urls import without_secrets

PATIENCE_S = 300.0
"""How long a store that was reached before may be away: a restart, a failover, a storm of throttling."""
FIRST_PATIENCE_S = 20.0
"""The same for one never reached so far, whose address may be wrong."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 20.0

_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
"""409: S3's answer to a conditional write that met another one in flight."""
_PASSING_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE}
_PASSING_KINDS = {
    "ClientConnectionError",  # aiohttp: no connection, or one that broke
    "ClientPayloadError",  # aiohttp: a body cut short
    "HTTPClientError",  # botocore: connections and timeouts
    "ConnectionError",  # botocore: no connection; the cause tells too, but is lost while another is handled
    "ResponseParserError",  # botocore: an answer that ends in the middle
    "ServiceRequestError",  # azure: no connection
    "ServiceResponseError",  # azure: one that broke
    "IncompleteReadError",  # azure, asyncio
    "IncompleteRead",  # http.client
    "RequestException",  # requests
    "TransportError",  # google.auth
}

_log = logging.getLogger(__name__)
_noting = threading.Lock()
_tried_again = 0
_T = TypeVar("_T")


class IncompleteReadError(Exception):
    """A store sent fewer bytes than were asked for."""


def patiently(call: Callable[[], _T], *, patience_s: float, doing: str) -> _T:
    """What `call` returns, tried again for up to `patience_s` seconds while its failures may pass.

    `doing` says in logs what is being tried. Raises the last failure.
    """
    started = time.monotonic()
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return call()
        except Exception as error:
            left_s = patience_s - (time.monotonic() - started)
            if left_s <= 0 or not may_pass(error):
                raise
            pause_s = min(random.uniform(0, wait_s), left_s)  # noqa: S311 (no secret)
            reason = without_secrets(f"{type(error).__name__}: {error}")
            _log.warning("%s: %s; trying again in %.1f s", doing, reason, pause_s)
            _note_retry()
        time.sleep(pause_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def retry_count() -> int:
    """How often this process has tried again."""
    return _tried_again


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    for link in _causes(error):
        if isinstance(link, FileExistsError):  # Azure's refusal of a create is a 409, too
            return False
        status = http_status(link)
        if status is not None:
            return status in _PASSING_STATUS
        if _is_passing(link):
            return True
    return False


def http_status(error: BaseException) -> int | None:
    """The HTTP status that a client's error carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return _as_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    if response is not None:  # requests
        return _as_status(getattr(response, "status_code", None))
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
        status = _as_status(getattr(error, name, None))
        if status is not None:
            return status
    return None


def is_missing(error: FileNotFoundError) -> bool:
    """Whether nothing is there. The client of HTTP says so too when it is refused, or gets no answer."""
    return status_of(error) in (None, 404, 410) and not may_pass(error)


def status_of(error: BaseException) -> int | None:
    """The first HTTP status in an error's chain of causes."""
    return next((status for status in map(http_status, _causes(error)) if status is not None), None)


def _note_retry() -> None:
    global _tried_again
    with _noting:
        _tried_again += 1


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    return any(kind.__name__ in _PASSING_KINDS for kind in type(error).__mro__)


def _as_status(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and 400 <= value < 600 else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, latest first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
