"""Embedders and classifiers of any make, held to their word: who they are, and what they say of images.

Nobody who audits can see from a number that what it rests on was wrong. So each says its name, the digest of
its weights and its licence, is given a bounded number of images at a time, and fails in one line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any, Protocol

from boomerang_batch import installed
from boomerang_batch.errors import ConfigError, MeasureError
from boomerang_batch.measures.images import Images, check_images

BATCH = 32
"""Images that one gets at a time: what it needs then doesn't grow with the number of images."""


class Introduced(Protocol):
    """Who it is, whatever it says of images."""

    @property
    def name(self) -> str:
        """A word for tables: what it told is named after it."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides on its answers: weights, and what was fitted."""
        ...

    @property
    def licence(self) -> str:
        """Of its weights and code, as a short name."""
        ...


def introduced(
    made: Any, kind: str, *, method: str, entry: EntryPoint | None, page: str = "docs/embedders.md"
) -> tuple[str, str, str]:
    """Name, digest and licence of an embedder or a classifier; `page` says what it must be.

    One that was installed goes by the name of its entry point, and what made it is in its digest. Raises
    ConfigError where `made` lacks one of these, or the method.
    """
    name, digest, licence = (_said(made, kind, what, page) for what in ("name", "digest", "licence"))
    if re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise ConfigError(f"{kind} {name}: its digest {digest!r} is no SHA-256 (64 hex digits) of its weights")
    if not callable(getattr(made, method, None)):
        raise ConfigError(f"{kind} {name}: it has no method {method}; see {page}")
    return (name, digest, licence) if entry is None else (entry.name, installed.digest(entry, digest), licence)


def answers(call: Callable[[Images], Any], images: Images, *, who: str) -> Iterator[tuple[Any, int]]:
    """What `call` gives for images (N, H, W, C), batch by batch, and for how many. Raises MeasureError."""
    check_images(images)
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        failure = f"{who} failed on images of shape {batch.shape}"
        yield installed.attempt(functools.partial(call, batch), failure, error=MeasureError), len(batch)


def _said(made: Any, kind: str, what: str, page: str) -> str:
    value = getattr(made, what, None)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{kind} {made!r}: its {what} is {value!r}; it must be a text, see {page}")
    return value
