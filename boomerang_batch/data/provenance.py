"""How every output was made, one Parquet row per attempted sample and variant, and the marker that says done.

The bytes of both depend on their content alone: fixed row groups, a fixed writer configuration, sorted keys,
no clock and no host. The columns are listed in docs/output-format.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch.data.images import Picture
from boomerang_batch.errors import ShardError, VerificationError

FORMAT_VERSION = 1
ROW_GROUP_ROWS = 1024

Status = Literal["ok", "original", "failed", "unreadable", "dropped"]
BAD: frozenset[Status] = frozenset({"failed", "unreadable"})
"""What sets the exit code; what was dropped, the recipe wanted dropped."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one variant of one sample; None where a fact doesn't apply.

    status      ok, original (kept, variant -1), failed (the sample was read), unreadable (it was not), or
                dropped (made, and left out as the recipe wants)
    reason      kebab-case word for what has no output; `detail` its sentence, absent under anonymize
    offset      where in the input shard unreadable bytes begin
    *_digest    SHA-256 hex; of the source under anonymize a MAC; pixel_digest as the function here makes it
    sigma       noise std relative to the clean signal at the point where the walk back began; `t` as text,
                `node` and `tau` tell the same point in the schedule's and the network's terms
    evaluations network calls per sample, those of all passes together
    passes      how often Boomerang was applied; more than 1 in a cascade
    batch_size  the smallest batch shape it was computed in; less than the recipe's only with batching elastic
    dtype       what the network computed in; float32 also where half precision had failed
    flagged     whether the model's safety checker objects; None where it was not asked
    width, height  of the output, in pixels
    trial       which of several codes was kept, from 0; only in files of runs that try several
    """

    key: str | None = None
    variant: int
    status: Status
    reason: str | None = None
    detail: str | None = None
    offset: int | None = None
    source_digest: str | None = None
    output_digest: str | None = None
    pixel_digest: str | None = None
    t: str | None = None
    node: int | None = None
    tau: float | None = None
    sigma: float | None = None
    evaluations: int | None = None
    sampler: str | None = None
    eta: float | None = None
    passes: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    flagged: bool | None = None
    noise_key_id: str | None = None
    label: int | None = None
    width: int | None = None
    height: int | None = None
    model_digest: str
    recipe_digest: str
    versions: str
    trial: int | None = None


_ARROW_TYPES = {
    "str": pa.string(),
    "Status": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
}

WITH_TRIALS: pa.Schema = pa.schema(
    [
        pa.field(
            column.name,
            _ARROW_TYPES[str(column.type).removesuffix(" | None")],
            nullable=str(column.type).endswith("None"),
        )
        for column in dataclasses.fields(Row)
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
"""The columns of a run that tries several codes."""

SCHEMA: pa.Schema = WITH_TRIALS.remove(WITH_TRIALS.get_field_index("trial"))
"""The columns of every other run, whose files are what they were before there were trials."""


def write_rows(path: Path, rows: Iterable[Row], *, schema: pa.Schema = SCHEMA) -> None:
    """Write a shard's rows in the order given, in the columns of one of the two schemas.

    Raises ShardError when a (key, variant) comes twice, ValueError for a row that contradicts itself.
    """
    seen: set[tuple[str, int]] = set()
    waiting = iter(rows)
    with pq.ParquetWriter(
        path, schema, version="2.6", data_page_version="1.0", compression="zstd", compression_level=3
    ) as writer:
        while group := list(itertools.islice(waiting, ROW_GROUP_ROWS)):
            for row in group:
                if problem := _contradiction(row):
                    raise ValueError(problem)
                if row.key is not None and (row.key, row.variant) in seen:
                    raise ShardError(
                        f"key {row.key}, variant {row.variant} has two provenance rows; expected one"
                    )
                if row.key is not None:
                    seen.add((row.key, row.variant))
            columns = {name: [getattr(row, name) for row in group] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP_ROWS)


def read_rows(source: Path | str | BinaryIO) -> list[Row]:
    """Every row of a provenance file, in order.

    Raises VerificationError when it is no such file, or one of a later release.
    """
    try:
        with pq.ParquetFile(source) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:  # damaged pages come as OSError
        raise VerificationError(f"{_named(source)} is not a provenance file: {error}") from error
    metadata = table.schema.metadata or {}
    version = metadata.get(b"format_version", b"no").decode()
    if version != str(FORMAT_VERSION):
        raise VerificationError(
            f"{_named(source)} has {version} format_version; this release reads {FORMAT_VERSION}"
        )
    there = (table.schema.names, table.schema.types)
    if there not in [(schema.names, schema.types) for schema in (SCHEMA, WITH_TRIALS)]:
        raise VerificationError(f"{_named(source)} has other columns than a provenance file")
    rows = [Row(**values) for values in table.to_pylist()]
    if problem := next(filter(None, map(_contradiction, rows)), None):
        raise VerificationError(f"{_named(source)}: {problem}")
    return rows


def _contradiction(row: Row) -> str | None:
    """What a row says that can't be: every bad one has its reason, every good one its output."""
    bad = row.status not in ("ok", "original")
    if row.status not in get_args(Status):
        return f"unknown status {row.status}"
    if bad != (row.reason is not None):
        return f"a row with status {row.status} {'needs a' if bad else 'has no'} reason"
    if bad == (row.output_digest is not None):
        return f"a row with status {row.status} {'has no' if bad else 'needs an'} output_digest"
    if row.key is None and row.status != "unreadable":
        return f"a row with status {row.status} needs a key"
    return None


def pixel_digest(picture: Picture) -> str:
    """SHA-256 (hex) over size, channels and decoded uint8 pixels, alpha included.

    Decode with `channels=None` before: then it is a fact of the file, whatever the model.
    """
    height, width, channels = picture.pixels.shape
    alpha = picture.alpha is not None
    digest = hashlib.sha256(f"uint8 {height}x{width}x{channels}{'+alpha' if alpha else ''}\n".encode())
    digest.update(picture.pixels.tobytes())
    if picture.alpha is not None:
        digest.update(picture.alpha.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Marker:
    """One committed shard: the facts that tar and provenance must agree with. Its presence means done."""

    format_version: int = FORMAT_VERSION
    stem: str
    counts: Mapping[str, int]
    tar_sha256: str
    tar_bytes: int
    parquet_sha256: str
    parquet_bytes: int
    recipe_digest: str

    def to_bytes(self) -> bytes:
        """The marker file's content: JSON with sorted keys and a final newline."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Marker | None:
        """The marker in `data`, or None for anything else: a torn or foreign marker means not done."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            return None
        columns = {column.name: str(column.type) for column in dataclasses.fields(Marker)}
        if not isinstance(values, dict) or values.keys() != columns.keys():
            return None
        if values["format_version"] != FORMAT_VERSION:
            return None
        return Marker(**values) if all(_fits(columns[name], value) for name, value in values.items()) else None


def _fits(type_name: str, value: Any) -> bool:
    if type_name == "int":
        return type(value) is int and value >= 0
    if type_name == "str":
        return isinstance(value, str)
    known = get_args(Status)
    return isinstance(value, dict) and all(key in known and _fits("int", count) for key, count in value.items())


def _named(source: Path | str | BinaryIO) -> str:
    return str(source) if isinstance(source, Path | str) else str(getattr(source, "name", "the stream"))
