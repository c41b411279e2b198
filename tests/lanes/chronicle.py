"""What was done to a cluster and what came of it, a line each, in a file that outlives a failure."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path


class Chronicle:
    """Notes with the seconds since it was opened. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._began = time.monotonic()
        path.write_text(time.strftime("began %Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self._began

    def note(self, kind: str, text: str = "") -> None:
        """Write down that something of a kind happened."""
        self.counts[kind] += 1
        with self.path.open("a") as file:
            file.write(f"{self.seconds:8.1f} s  {kind}{': ' if text else ''}{text}\n")
