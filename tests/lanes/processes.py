"""Server processes: free ports, started, asked until they answer, ended by pid, started on the same data."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

_LOOPBACK = "127.0.0.1"
_START_WITHIN_S = 60.0
_END_WITHIN_S = 15.0


class ServerProcess:
    """One process that serves: `ready` raises until it does. Use as a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        ready: Callable[[], None],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        # Where tests are killed, nobody is left to end their servers: the kernel does it.
        tied = shutil.which("setpriv")
        self._command = [*([tied, "--pdeathsig", "KILL", "--"] if tied else []), *command]
        self._log = log
        self._ready = ready
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait for it. Raises RuntimeError with the end of its log when it doesn't come up."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which end it themselves
            )
        deadline = time.monotonic() + _START_WITHIN_S
        while True:
            try:
                self._ready()
                return
            except Exception as error:
                if self._process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                self.kill()
                said = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(self._command)} does not serve: {error}\n{said}") from error

    def stop(self) -> None:
        """Ask it to end, and end it where it doesn't."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class ObjectServer(ABC):
    """A real object store on loopback, with one way in that is not the code under test. A context manager."""

    environment: Mapping[str, str]
    """What a client needs to find in its environment; credentials are there and nowhere else."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._process = ServerProcess(command, log=log, ready=self._ask, environment=environment)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()

    def start(self) -> None:
        """Start, on the data it had, and wait until a request with credentials is answered."""
        self._process.start()

    def kill(self) -> None:
        """End at once, as a power cut would."""
        self._process.kill()

    @abstractmethod
    def make_bucket(self, name: str) -> str:
        """A new empty bucket; its URL."""

    @abstractmethod
    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Put one object."""

    @abstractmethod
    def tree(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """Every object below `prefix`, by its name relative to it."""

    @abstractmethod
    def _ask(self) -> None:
        """A request with credentials; raises while it is not answered."""


def free_port(*, companion: int = 0) -> int:
    """A port nobody listens on, and with `companion` another one, so far above it, that is free as well.

    It lies below those that systems give out by themselves, which another process might get meanwhile.
    """
    while True:
        port = random.randint(12_000, 21_000)
        if all(_is_free(port + above) for above in {0, companion}):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True


def find_program(name: str, *, fix: str) -> str:
    """The program beside this interpreter or on PATH. Raises RuntimeError with `fix` when there is none."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: {fix}")
    return found
