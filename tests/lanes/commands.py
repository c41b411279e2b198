"""The command line as a user calls it, in a process of its own, with a store in its environment."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from boomerang_batch import shipped
from tests import worlds


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str

    def expect(self, code: int) -> Said:
        """Itself, once it has ended as expected; no command may end with a traceback."""
        assert self.code == code, f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        assert "Traceback" not in self.stderr, self.stderr
        return self


class Place:
    """A working folder for commands: scratch disk and private dir below it, a store in the environment.

    `program` is what the interpreter is given in front of a command's words.
    """

    def __init__(
        self,
        *,
        work: Path,
        environment: Mapping[str, str],
        program: tuple[str, ...] = ("-m", "boomerang_batch"),
    ) -> None:
        self.work = work
        self._program = program
        self.private = work / "private"
        self.scratch = work / "scratch"
        self.scratch.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AZURE_"))}
        self.environment = {
            **kept,
            "BOOMERANG_SECRET": worlds.SECRET,
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            **environment,
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start a command and go on; its output is to be read by communicate()."""
        return subprocess.Popen(
            [sys.executable, *self._program, *words],
            env=self.environment,
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *words: str, timeout_s: float = 900) -> Said:
        """A command to its end."""
        return ended(self.begin(*words), timeout_s=timeout_s)


def ended(process: subprocess.Popen[str], *, timeout_s: float = 900) -> Said:
    """What a command that was begun says until its end; what it started and left running ends too."""
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
            _end_session(process.pid)
    return Said(code=process.returncode, stdout=stdout, stderr=stderr)


def _end_session(leader: int) -> None:
    """A killed driver's Ray ends by itself, but not at once."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(folder.name), signal.SIGKILL)


def run_words(recipe: str, manifest: str, out: str, place: Place) -> tuple[str, ...]:
    """The words of a run on one thread, so that its bytes are the same wherever it reads and writes."""
    return (
        "run",
        recipe,
        manifest,
        out,
        "--private-dir",
        str(place.private),
        "--threads",
        "1",
        "--device",
        "cpu",
    )


def demo_inputs() -> Mapping[str, bytes]:
    """The demo's recipe, shards, and a manifest that finds them beside it, by file name."""
    recipe = shipped.named("pipelines", "demo-anonymize")
    assert recipe is not None
    shards = sorted(Path(shipped.resolve("shipped:demo/shards")).glob("*.tar"))
    manifest = f"format_version: 1\nname: demo\nshards: ['demo-{{000000..{len(shards) - 1:06d}}}.tar']\n"
    return {
        "recipe.yaml": recipe.read_bytes(),
        "manifest.yaml": manifest.encode(),
        **{path.name: path.read_bytes() for path in shards},
    }


def without_logs(tree: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """What must be the same, whatever happened on the way."""
    return {name: data for name, data in tree.items() if not name.startswith("logs/")}


def spellings(secret: str) -> set[bytes]:
    """A secret as text, as a URL has it, in hex, and in base64 at each place it may have in a longer text."""
    data = secret.encode()
    shifted = {base64.b64encode(bytes(shift) + data)[4 * shift : -4] for shift in range(3)}
    return {data, quote(secret, safe="").encode(), data.hex().encode(), *shifted}


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file's name and content."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
