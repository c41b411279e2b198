"""The private dir: the secret that keys the noise, and the tables that link outputs back to inputs.

Whoever holds it can undo pseudonyms and re-draw any sample; whoever destroys it makes the link unrecoverable.
Nothing of it ever enters OUT. The secret may come from the environment variable BOOMERANG_SECRET instead, as
hex, so that workers on other machines need no shared folder to read it from.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from boomerang_batch import storage
from boomerang_batch.errors import PrivateDirError

SECRET_VARIABLE = "BOOMERANG_SECRET"  # noqa: S105 (its name, not its value)
_SECRET_BYTES = 32
_LEAST_SECRET_BYTES = 16
_SECRET_FILE = "secret"  # noqa: S105


def prepare_private_dir(private_dir: str, *, out: str) -> None:
    """Make the private dir (mode 0700) and, unless the environment has one, its secret (mode 0600).

    Raises PrivateDirError when it is not a folder of its own apart from `out`, or is open to others.
    """
    if not storage.is_local(private_dir):
        raise PrivateDirError(f"{private_dir}: the private dir must be a folder on a local or shared disk")
    path = storage.local_path(private_dir).resolve()
    if storage.is_local(out):
        published = storage.local_path(out).resolve()
        if path.is_relative_to(published) or published.is_relative_to(path):
            raise PrivateDirError(
                f"{private_dir}: the private dir and OUT ({out}) must not contain one another; "
                "OUT is to be published, the private dir never"
            )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            raise PrivateDirError(
                f"{private_dir}: others can enter this folder, where the secret and what links back are kept; "
                "chmod 700 it, or name a new folder inside it"
            )
        if SECRET_VARIABLE not in os.environ:
            _make_secret(path / _SECRET_FILE)
    except OSError as error:
        raise PrivateDirError(f"{private_dir}: {error.strerror or error}") from error


def load_secret(private_dir: str | None) -> bytes:
    """The run's secret, at least 128 bits. Raises PrivateDirError when there is none to be had."""
    text, origin = os.environ.get(SECRET_VARIABLE), f"the environment variable {SECRET_VARIABLE}"
    if text is None:
        if private_dir is None:
            raise PrivateDirError(
                "purpose anonymize keys its noise with a secret: give --private-dir DIR (made on first use), "
                f"or set {SECRET_VARIABLE}"
            )
        path = storage.local_path(private_dir) / _SECRET_FILE
        origin = str(path)
        try:
            if path.stat().st_mode & 0o077:
                raise PrivateDirError(f"{origin} can be read by others; run chmod 600 on it")
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise PrivateDirError(f"{origin}: {error.strerror or error}") from error
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        # The cause would show the secret's text; leave it out.
        raise PrivateDirError(f"{origin} does not hold a secret in hex") from None
    if not _LEAST_SECRET_BYTES <= len(secret) <= 64:
        raise PrivateDirError(f"{origin} holds {len(secret) * 8} bits; a secret has 128 to 512")
    return secret


def _make_secret(path: Path) -> None:
    """Write a fresh secret under `path` unless one is there; whole or not at all."""
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as writer:
            writer.write(secrets.token_hex(_SECRET_BYTES) + "\n")
            writer.flush()
            os.fsync(writer.fileno())
        with contextlib.suppress(FileExistsError):  # another run's secret came first: that one is it
            os.link(unfinished, path)
    finally:
        unfinished.unlink()
