"""Manifests that claim what is so: built from the shards' own bytes, and checked against them."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.data.manifest import (
    ARROW_COLUMNS,
    Manifest,
    find_shards,
    folder_of,
    load_manifest,
    suffix_of,
)
from boomerang_batch.data.scan import contradictions, scan_shard
from boomerang_batch.errors import ManifestError, StorageError

_log = logging.getLogger(__name__)


def build_manifest(patterns: Sequence[str], out: str) -> Manifest:
    """Measure shards (paths, brace ranges, globs, URLs) and write the manifest `out`, Parquet or JSON Lines.

    Shards in or below the folder of `out` are written relative to it. What can't be read in a shard is logged
    as a warning and not counted; a run would report it sample by sample.
    """
    if suffix_of(out) not in (".parquet", ".jsonl"):
        raise ManifestError(f"{out}: a built manifest is .parquet or .jsonl")
    rows = []
    for entry in find_shards(patterns, str(Path.cwd())):
        measured = scan_shard(entry.url)
        for problem in measured.problems:
            _log.warning("%s", problem)
        rows.append(
            {
                "url": entry.url.removeprefix(folder_of(out) + "/"),
                "id": entry.stem,
                "bytes": measured.size_bytes,
                "samples": len(measured.keys),
                "digest": measured.digest,
            }
        )
    with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
        built = Path(folder) / "built"
        if suffix_of(out) == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=ARROW_COLUMNS), built, compression="zstd")
        else:
            built.write_text("".join(json.dumps(row) + "\n" for row in rows))
        storage.publish(built, out)
    return load_manifest(out)


def check_manifest(manifest: Manifest) -> list[str]:
    """Read every shard and compare: problems as sentences naming shard and fix, none when all is well."""
    problems: list[str] = []
    seen: dict[bytes, str] = {}
    for entry in manifest.shards:
        try:
            measured = scan_shard(entry.url)
        except (StorageError, OSError) as error:
            problems.append(f"{error}; correct the URL or take the shard out")
            continue
        problems += measured.problems
        wrong = contradictions(measured, size_bytes=entry.size_bytes, digest=entry.digest)
        if entry.samples not in (None, len(measured.keys)):
            wrong.append(f"samples is {len(measured.keys)}, the manifest says {entry.samples}")
        fix = "restore the shard, or build the manifest anew"
        problems += [f"{entry.url}: {claim}; {fix}" for claim in wrong]
        for key in measured.keys:
            short = hashlib.blake2b(key.encode(), digest_size=12).digest()
            if short in seen:
                fix = "rename one, or set identity: shard+key in the recipe"
                problems.append(f"{entry.url}: key {key} is also in shard {seen[short]}; {fix}")
            seen.setdefault(short, entry.stem)
    return problems
