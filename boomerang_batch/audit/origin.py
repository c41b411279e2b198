"""From a key to the rows it stands for, and from a row to its source, as far as OUT and the private dir tell.

Under anonymize a key is an output's pseudonym or its source's key, and the links in the private dir alone join
the two. Rows of appendices take the place of the failed ones they mend, so what is given is what holds now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from boomerang_batch import storage
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.errors import ConfigError, PrivateDirError, VerificationError
from boomerang_batch.run.appendix import appendices
from boomerang_batch.run.commit import MARKER_SUFFIX, PROVENANCE_SUFFIX
from boomerang_batch.run.keys import read_keys
from boomerang_batch.run.links import read_links
from boomerang_batch.run.record import RunRecord, read_record


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One row of OUT, and what leads back from it."""

    shard: str
    """The shard of OUT that holds the row; an appendix where it was mended."""
    stem: str
    """The shard of OUT that its sample belongs to."""
    row: Row
    source_key: str
    source_url: str | None = None
    """None where the manifest alone tells, for names in OUT are the source's."""
    offset: int | None = None
    """Where in the source's tar."""
    detail: str | None = None


def is_private(record: RunRecord) -> bool:
    """Whether OUT's names are pseudonyms."""
    return bool(record.recipe.get("purpose") == "anonymize")


def require_links(out: str, record: RunRecord, private_dir: str | None) -> str | None:
    """The private dir that belongs to OUT; None where there is none to need.

    Raises PrivateDirError where it is needed and not given, or is another run's.
    """
    if not is_private(record):
        return None
    if private_dir is None:
        raise PrivateDirError(
            f"{out} is anonymized: what leads from its images to their sources is in the run's private dir and "
            "nowhere else; give it with --private-dir DIR (if it was destroyed, nothing leads back)"
        )
    there = read_record(private_dir)
    if there is None:
        raise PrivateDirError(f"{private_dir}: no run.json, so this is not the private dir of a run")
    if (there.noise_key_id, there.recipe_digest) != (record.noise_key_id, record.recipe_digest):
        raise PrivateDirError(f"{private_dir} is the private dir of another run than {out}; give its own")
    return private_dir


def find_origins(
    out: str, record: RunRecord, *, key: str, private_dir: str | None, shard: str | None = None
) -> list[Origin]:
    """Every row of `key` that holds now, by shard and variant. `shard`: those of one shard of OUT alone.

    Raises PrivateDirError as `require_links` does, ConfigError where there is none, VerificationError and
    StorageError for files that are not what they should be.
    """
    home = require_links(out, record, private_dir)
    names = storage.list_names(out)
    committed, more = set(names), appendices(names)
    found: dict[tuple[str, str, int], Origin] = {}
    for stem in record.shards:
        if stem + MARKER_SUFFIX not in committed or shard not in (None, stem):
            continue
        for name in (stem, *more.get(stem, ())):
            for origin in _named(out, name, key) if home is None else _linked(out, home, name, key):
                found[stem, origin.row.key or "", origin.row.variant] = origin
    if not found:
        raise ConfigError(f"{out}: {_unknown(record, key, shard)}")
    return [found[place] for place in sorted(found)]


def _named(out: str, name: str, key: str) -> Iterator[Origin]:
    """Rows of a shard whose keys are the source's."""
    if key not in read_keys(out, name):
        return
    for row in read_rows_of(out, name):
        if row.key == key:
            stem = name.partition("~")[0]
            yield Origin(shard=name, stem=stem, row=row, source_key=key, offset=row.offset, detail=row.detail)


def _linked(out: str, private_dir: str, name: str, key: str) -> Iterator[Origin]:
    """Rows of a shard whose keys are pseudonyms, by pseudonym or by the source's key."""
    links = _links(private_dir, name, key)
    if not links:
        return
    rows = {(row.key, row.variant): row for row in read_rows_of(out, name)}
    for link in links:
        row = rows.get((link["row_key"], link["variant"]))
        if row is None:
            raise VerificationError(
                f"{out}: shard {name} has no row {link['row_key']}, which the private dir's links tell of; "
                "the private dir is another run's, or OUT was changed: run verify"
            )
        yield Origin(
            shard=name,
            stem=name.partition("~")[0],
            row=row,
            source_key=link["source_key"],
            source_url=link["source_url"],
            offset=link["offset"],
            detail=link["detail"],
        )


def _links(private_dir: str, name: str, key: str) -> list[dict[str, Any]]:
    table = read_links(private_dir, name)
    both = zip(table.column("row_key").to_pylist(), table.column("source_key").to_pylist(), strict=True)
    hits = [index for index, names in enumerate(both) if key in names and None not in names]
    return list(table.take(hits).to_pylist()) if hits else []


def read_rows_of(out: str, name: str) -> list[Row]:
    """The provenance of a shard of OUT, or of an appendix. Raises what reading it does."""
    with storage.open_read(storage.join(out, name + PROVENANCE_SUFFIX)) as stream:
        return read_rows(stream)


def _unknown(record: RunRecord, key: str, shard: str | None) -> str:
    where = "" if shard is None else f" in shard {shard}"
    base, mark, number = key.rpartition("-v")
    if mark and number.isdecimal() and not is_private(record):
        return (
            f"no row has the key {key}{where}; in OUT's tars it may stand for --key {base} --variant {number}"
        )
    kinds = "is neither an output's pseudonym nor a source's key" if is_private(record) else "is no row's key"
    return f"{key} {kinds}{where}; the column key of OUT's *.parquet lists them"
