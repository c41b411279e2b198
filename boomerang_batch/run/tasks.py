"""The driver's unit of work and what comes back of it: small, picklable, no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.provenance import BAD
from boomerang_batch.run.log_lines import Format

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
    epoch: int
    """Of the run's lease on OUT."""
    batch_size: int | None = None
    """What `batch_size: auto` came to in this run, once it is known."""
    reached: frozenset[str] = frozenset()
    """Stores that answered the driver: a worker hired while one is away waits, and takes no shard for lost."""
    log_format: Format = "text"
    """Of the lines that a worker of its own process writes to its log."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard in, one shard out; or a phase of it, see `phase`."""

    name: str
    """Stem of the output; a pseudonym under anonymize."""
    url: str
    source_stem: str
    size_bytes: int | None = None
    digest: str | None = None
    """What the manifest claims of the shard's bytes (SHA-256, hex); see `ShardEntry`."""
    only: Mapping[str, tuple[int, ...]] | None = None
    """Outputs to make, by number, of the samples with these keys; None: all of all."""
    phase: Literal["outputs", "latents", "fit"] = "outputs"
    """What is made: the shard's outputs; or, for methods that have phases, first its latents and what they add
    to the fit; or the fit."""
    of: tuple[str, ...] = ()
    """For the fit: names of all shards."""

    def wants(self, key: str | None, number: int | None = None) -> bool:
        """Whether a sample, or one of its outputs, is part of the task."""
        if self.only is None:
            return True
        numbers = self.only.get(key or "", ())
        return bool(numbers) if number is None else number in numbers


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What a worker found when it had loaded the model: frozen in run.json, equal on every worker."""

    model_digest: str
    stack: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    """What the user should hear about recipe and model together, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """How a worker is, as it answers at any time."""

    finished: Mapping[str, int] = field(default_factory=dict)
    """Outputs finished so far, by task in flight."""
    coded: Mapping[str, int] = field(default_factory=dict)
    """Codes drawn so far, by task in flight."""
    loading_s: float = 0.0
    """How long it has been loading the model; 0 before and after."""
    stalled_s: float = 0.0
    """How long its device has been at the step it is at; 0 between steps."""
    node: str = ""
    """Ray's id of its machine."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of one task."""

    name: str
    status: str
    """done, there (done by an earlier run), quarantined, or stopped."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows by their status."""
    marker_bytes: int = 0
    """Size of the marker that was committed, if one was."""
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What became of a run. `exit_code` tells the truth about it."""

    out: str
    shards: Mapping[str, int]
    rows: Mapping[str, int]
    problems: tuple[str, ...]
    """Why shards were quarantined. Under anonymize these sentences tell the inputs: see `discreet`."""
    stopped: bool
    gave_up: str = ""
    """Why the run ended before all was tried, if more failed than its recipe allows."""
    seconds: float = 0.0
    quarantined: tuple[str, ...] = ()
    """Names of the quarantined shards."""

    def discreet(self) -> RunReport:
        """The report with no word that might quote an input."""
        return dataclasses.replace(self, problems=tuple(f"shard {name}" for name in self.quarantined))

    @property
    def exit_code(self) -> int:
        """0 all done, 1 given up or left undone, 3 something was quarantined, 75 stopped and resumable."""
        if self.gave_up:
            return 1
        if self.shards.get("left"):
            return 75 if self.stopped else 1
        bad_rows = sum(count for status, count in self.rows.items() if status in BAD)
        return 3 if bad_rows or self.shards.get("quarantined") else 0
