"""Names in storage: plain paths, file: URLs and those of stores. Nothing here touches a store."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

_QUERY = re.compile(r"(\w+://[^\s?'\"]+)\?[^\s'\"]*")
# What stands in front of a host is a user; but Azure names containers there, without a password.
_USER = re.compile(r"(https?://)[^\s/@'\"]+@|(\w+://)[^\s/@:'\"]*:[^\s/@'\"]*@")
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|CONNECTION_STRING|_KEY$|_KEY_ID$|SAS")
_SHORTEST_SECRET = 8

ENDPOINT = ("endpoint_url", "region")
"""What tells where a store is, where the environment does not."""


def is_local(url: str) -> bool:
    """Whether `url` is a plain path or a file: URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local `url`."""
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """A local `url` as an absolute path, for processes that run in another folder; others as they are."""
    return os.path.abspath(local_path(url)) if is_local(url) else url  # noqa: PTH100 (keep links)


def join(base: str, *names: str) -> str:
    """`base` with `names` below it."""
    root = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return root + "/".join(names)


def lying_in(folder: str, urls: Iterable[str]) -> Iterator[str]:
    """Those of `urls` that are below `folder`, by their names or by what their links lead to."""
    if not is_local(folder):
        yield from (url for url in urls if url.startswith(join(folder, "")))
        return
    root = os.path.join(os.path.realpath(local_path(folder)), "")  # noqa: PTH118
    resolved = functools.cache(os.path.realpath)  # many shards, few folders
    for url in filter(is_local, urls):
        path = url.removeprefix("file://")
        inside = f"{resolved(os.path.dirname(path))}/".startswith(root)  # noqa: PTH120 (Paths are slow)
        if inside or (os.path.islink(path) and os.path.realpath(path).startswith(root)):  # noqa: PTH114
            yield url


def at_endpoint(url: str, endpoint: Mapping[str, str]) -> str:
    """`url` of a store that is not where its client looks by itself: `endpoint_url`, `region`, or both."""
    if is_local(url) or not endpoint:
        return url
    return f"{url}#{urlencode(sorted(endpoint.items()))}"


def split_endpoint(url: str) -> tuple[str, dict[str, str]]:
    """What `at_endpoint` put together."""
    plain, mark, query = url.rpartition("#")
    endpoint = dict(parse_qsl(query))
    return (plain, endpoint) if mark and endpoint and endpoint.keys() <= {*ENDPOINT} else (url, {})


def holds_credentials(url: str) -> bool:
    """Whether a URL names a user or a password in front of its host."""
    return _USER.match(url) is not None


def without_secrets(text: str) -> str:
    """`text` as it may be shown: no query of a URL (presigned ones carry signatures there), no user in front
    of a host, and nothing that stands in one of the environment's variables for credentials.
    """
    text = _USER.sub(r"\1\2", _QUERY.sub(r"\1?...", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name.upper()):
            text = text.replace(value, f"<{name}>")
    return text
