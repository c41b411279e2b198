"""The driver's unit of work and what comes back of it: small, picklable, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.provenance import BAD

DEPTH = 2
"""Tasks in flight per worker: while one is read, encoded or published, the other's draws fill the device."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What every worker must know to do tasks. The secret is not in it: workers read it themselves."""

    recipe: Recipe
    out: str
    private_dir: str | None
    device: str
    threads: int
    batch_size: int | None = None
    """What `batch_size: auto` came to in this run, once it is known."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard in, one shard out."""

    name: str
    """Stem of the output; a pseudonym under anonymize."""
    url: str
    source_stem: str


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a worker found when it had loaded the model: frozen in run.json, equal on every worker."""

    model_digest: str
    stack: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    """What the user should hear about recipe and model together, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of one task."""

    name: str
    status: str
    """done, there (done by an earlier run), quarantined, or stopped."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows by their status."""
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What became of a run. `exit_code` tells the truth about it."""

    out: str
    shards: Mapping[str, int]
    rows: Mapping[str, int]
    problems: tuple[str, ...]
    """Why shards were quarantined."""
    seconds: float
    stopped: bool

    @property
    def exit_code(self) -> int:
        """0 all done, 1 something is left undone, 3 something was quarantined, 75 stopped and resumable."""
        if self.shards.get("left"):
            return 75 if self.stopped else 1
        bad_rows = sum(count for status, count in self.rows.items() if status in BAD)
        return 3 if bad_rows or self.shards.get("quarantined") else 0
