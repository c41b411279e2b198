"""What OUT tells of a run, counted over every row: outcomes, reasons with examples, noise levels.

Provenance is read by columns, a shard at a time, so memory does not grow with the run. Rows of an appendix take
the place of the failed rows that they mend.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.errors import StorageError, VerificationError
from boomerang_batch.run.appendix import appendices
from boomerang_batch.run.commit import MARKER_SUFFIX, PROVENANCE_SUFFIX
from boomerang_batch.run.progress import Looks, Progress
from boomerang_batch.run.record import RunRecord, recorded_recipe, require_record

_COLUMNS = [
    "key",
    "variant",
    "status",
    "reason",
    "detail",
    "sigma",
    "evaluations",
    "flagged",
    "width",
    "height",
]
_EXAMPLES = 3
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One row that has no output."""

    shard: str
    key: str | None
    variant: int
    status: str
    reason: str
    detail: str | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What OUT tells."""

    record: RunRecord
    recipe: Recipe
    progress: Progress
    done: tuple[str, ...]
    """Stems of the shards that are done, sorted."""
    reasons: Mapping[tuple[str, str], int]
    """How many rows have which status and reason."""
    examples: tuple[Failure, ...]
    """A few rows of each reason."""
    sigmas: Mapping[int, tuple[float, float]]
    """Least and largest noise relative to the clean signal among the outputs, by variant."""
    evaluations: tuple[int, int] | None
    """Least and most network calls for an output."""
    sizes: Counter[tuple[int, int]]
    """How many outputs have which (width, height)."""
    untouched: int
    """Outputs in which nothing was drawn anew, their region being empty."""
    flagged: int

    @property
    def anonymize(self) -> bool:
        """Whether OUT must not lead back to its sources."""
        return self.recipe.purpose == "anonymize"

    @property
    def outputs(self) -> int:
        """Pictures that were made."""
        return self.progress.rows.get("ok", 0)


def read_facts(out: str) -> Facts:
    """Read them. Raises VerificationError where OUT is no run's, or one of a release unknown here."""
    record = require_record(out)
    recipe = recorded_recipe(out, record)
    names = set(storage.list_names(out))
    more = appendices(names)
    done = tuple(stem for stem in sorted(record.shards) if stem + MARKER_SUFFIX in names)
    tally = _Tally(recipe)
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(done), 64):  # a block at a time, or all of them would wait in memory
            block = done[start : start + 64]
            for stem, tables in zip(
                block, readers.map(lambda stem: _tables(out, [stem, *more.get(stem, ())]), block), strict=True
            ):
                tally.add(stem, tables)
    return Facts(
        record=record,
        recipe=recipe,
        progress=Looks(out).look(),
        done=done,
        reasons=dict(sorted(tally.reasons.items())),
        examples=tuple(example for _, of_reason in sorted(tally.examples.items()) for example in of_reason),
        sigmas=dict(sorted(tally.sigmas.items())),
        evaluations=tally.evaluations,
        sizes=tally.sizes,
        untouched=tally.untouched,
        flagged=tally.flagged,
    )


class _Tally:
    """Adds up shard after shard."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[Failure]] = defaultdict(list)
        self.sigmas: dict[int, tuple[float, float]] = {}
        self.evaluations: tuple[int, int] | None = None
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.untouched = self.flagged = 0

    def add(self, shard: str, tables: Sequence[pa.Table]) -> None:
        for row in _current(tables):
            if row["status"] == "ok":
                self._add_output(row)
            elif row["status"] != "original":
                self._add_failure(shard, row)

    def _add_output(self, row: Mapping[str, Any]) -> None:
        variant, sigma, calls = self._recipe.variant_of(row["variant"]), row["sigma"], row["evaluations"]
        if sigma is not None:
            low, high = self.sigmas.get(variant, (sigma, sigma))
            self.sigmas[variant] = min(low, sigma), max(high, sigma)
        self.untouched += sigma is None and calls == 0
        if calls:
            least, most = self.evaluations or (calls, calls)
            self.evaluations = min(least, calls), max(most, calls)
        self.flagged += bool(row["flagged"])
        # Sizes of photographs are without number.
        size = row["width"], row["height"]
        self.sizes[size if size in self.sizes or len(self.sizes) < 1000 else (0, 0)] += 1

    def _add_failure(self, shard: str, row: Mapping[str, Any]) -> None:
        kind = row["status"], row["reason"] or ""
        self.reasons[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(
                Failure(
                    shard=shard,
                    key=row["key"],
                    variant=row["variant"],
                    status=kind[0],
                    reason=kind[1],
                    detail=row["detail"],
                )
            )


def _tables(out: str, names: Sequence[str]) -> list[pa.Table]:
    found = []
    for name in names:
        url = storage.join(out, name + PROVENANCE_SUFFIX)
        try:
            with storage.open_read(url) as stream:
                found.append(pq.read_table(stream, columns=_COLUMNS))
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise VerificationError(f"{url} is not a provenance file: {error}") from error
    return found


def _current(tables: Sequence[pa.Table]) -> Iterator[Mapping[str, Any]]:
    """The rows of a shard and its appendices, later ones in the place of earlier."""
    if len(tables) == 1:
        yield from tables[0].to_pylist()
        return
    nameless, latest = [], {}
    for table in tables:
        for row in table.to_pylist():
            if row["key"] is None:
                nameless.append(row)
            else:
                latest[row["key"], row["variant"]] = row
    yield from nameless
    yield from latest.values()
