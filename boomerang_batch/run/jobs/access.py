"""How a cluster lets us in, and which cluster Ray's client is to talk to.

A token is never an option's value, for others on the machine could read it there. A token stands for running
any code on the cluster, and plain http does not hide it: keep to a private network, a tunnel, or https.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from boomerang_batch.errors import ConfigError

HEADERS_VARIABLE = "RAY_JOB_HEADERS"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105 (its name, not its value)
TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"  # noqa: S105
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def auth_headers(token_file: str | None) -> Mapping[str, str]:
    """Headers that let us in, from RAY_JOB_HEADERS and from a token in a file or the environment.

    Without any of them Ray looks for a token by its own rules.
    """
    headers: dict[str, str] = {}
    if HEADERS_VARIABLE in os.environ:
        try:
            given = json.loads(os.environ[HEADERS_VARIABLE])
        except ValueError:
            given = None
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise ConfigError(f'{HEADERS_VARIABLE} is no JSON object of texts, such as {{"Name": "value"}}')
        headers.update(given)
    token = _token(token_file)
    if token and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _token(token_file: str | None) -> str | None:
    variable = os.environ.get(TOKEN_VARIABLE)
    path = token_file or (None if variable else os.environ.get(TOKEN_PATH_VARIABLE))
    if path is None:
        return variable
    try:
        token = Path(path).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        detail = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{path}: can't read the cluster's token: {detail}") from error
    if not token:
        raise ConfigError(f"{path}: there is no token in it")
    return token


@contextlib.contextmanager
def overruling_environment(address: str | None) -> Iterator[None]:
    """Have Ray's client take `address`; by itself it prefers what the environment says."""
    before = os.environ.get(_ADDRESS_VARIABLE)
    if address is not None:
        os.environ[_ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        os.environ.pop(_ADDRESS_VARIABLE, None)
        if before is not None:
            os.environ[_ADDRESS_VARIABLE] = before
