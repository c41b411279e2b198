"""Manifests: which shards a run reads, as YAML, JSON Lines or Parquet.

A manifest is resolved to one entry per shard, sorted by stem, so that the order it was written in never
matters. Relative paths are relative to the manifest's own folder. Columns: manifests/README.md.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand

from boomerang_batch import shipped, storage
from boomerang_batch.config import strict_yaml
from boomerang_batch.errors import ManifestError

FORMAT_VERSION = 1
SUFFIXES = (".yaml", ".yml", ".jsonl", ".parquet")

_COLUMNS = {"url": str, "id": str, "bytes": int, "samples": int, "digest": str}
ARROW_COLUMNS = pa.schema(
    [(name, pa.int64() if kind is int else pa.string()) for name, kind in _COLUMNS.items()],
    metadata={"format_version": str(FORMAT_VERSION)},
)
# A stem becomes file names in OUT, where `~` marks appendix shards.
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@ -]*")
_SHARD_SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One input shard. `written` is its URL as the manifest has it, `url` where that is.

    `size_bytes`, `samples` and `digest` (SHA-256 hex of the file) are what the manifest claims, or None.
    """

    url: str
    written: str
    stem: str
    size_bytes: int | None = None
    samples: int | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of a dataset, sorted by stem, no stem twice."""

    name: str
    shards: tuple[ShardEntry, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over stems, URLs as written and file digests; neither order nor folder matters."""
        lines = sorted(json.dumps([entry.stem, entry.written, entry.digest]) for entry in self.shards)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_manifest(ref: str) -> Manifest:
    """Load a manifest by path, URL, `shipped:` reference or shipped name.

    Lists globs, but doesn't look whether named shards exist. Raises ManifestError naming file, entry and fix;
    StorageError when it can't be read.
    """
    url = str(shipped.named("manifests", ref) or shipped.resolve(ref))
    suffix = suffix_of(url)
    endpoint: Mapping[str, str] = {}
    if suffix == ".parquet":
        name, items = _file_stem(url), _read_parquet(url)
    else:
        try:
            text = storage.read_bytes(url).decode()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{url}: not UTF-8 text: {error}") from error
        if suffix in (".yaml", ".yml"):
            name, items, endpoint = _read_yaml(url, text)
        else:
            name, items = _file_stem(url), _read_jsonl(url, text)
    entries = [
        entry for place, item in items for entry in _resolve(item, folder_of(url), f"{url}: {place}", endpoint)
    ]
    return Manifest(name=name, shards=_unique(entries, url))


def find_shards(patterns: Sequence[str], folder: str) -> tuple[ShardEntry, ...]:
    """The shards that paths, brace ranges, globs or URLs stand for, relative ones in `folder`, sorted by stem.

    Raises ManifestError for a pattern that matches nothing, and for shards that can't be in one manifest.
    """
    found = [entry for pattern in patterns for entry in _resolve({"url": pattern}, folder, pattern)]
    return _unique(found, "the patterns given")


def _read_yaml(url: str, text: str) -> tuple[str, list[tuple[str, Any]], Mapping[str, str]]:
    """Name, items, and where the store of the shards is, if the manifest tells."""
    try:
        data = strict_yaml.load(text)
    except ValueError as error:
        raise ManifestError(f"{url}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{url}: a manifest is a mapping with format_version, name and shards")
    _refuse_unknown(data, ("format_version", "name", "description", "storage", "shards"), url)
    if data.get("format_version") != FORMAT_VERSION or data["format_version"] is True:
        given = data.get("format_version", "missing")
        raise ManifestError(f"{url}: format_version is {given}; this release reads {FORMAT_VERSION}")
    name, shards = data.get("name"), data.get("shards")
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{url}: name is missing; give the dataset one, such as name: my-photos")
    if not isinstance(shards, list) or not shards:
        raise ManifestError(f"{url}: shards must be a list of at least one path, range, glob or mapping")
    items = [{"url": item} if isinstance(item, str) else item for item in shards]
    endpoint = data.get("storage", {})
    if not isinstance(endpoint, dict) or not all(
        isinstance(value, str) and value for value in endpoint.values()
    ):
        raise ManifestError(f"{url}: storage is a mapping of {' and '.join(storage.ENDPOINT)} to text")
    _refuse_unknown(endpoint, storage.ENDPOINT, f"{url}: storage")
    return name, [(f"shards[{index}]", item) for index, item in enumerate(items)], endpoint


def _read_jsonl(url: str, text: str) -> list[tuple[str, Any]]:
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                items.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise ManifestError(f"{url}: line {number}: not valid JSON: {error}") from error
    return items


def _read_parquet(url: str) -> list[tuple[str, Any]]:
    try:
        with storage.open_read(url) as stream:
            rows = pq.ParquetFile(stream).read().to_pylist()
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{url}: not a Parquet file: {error}") from error
    return [
        (f"row {index}", {name: value for name, value in row.items() if value is not None})
        for index, row in enumerate(rows)
    ]


def _resolve(
    item: Any, folder: str, place: str, endpoint: Mapping[str, str] | None = None
) -> Iterator[ShardEntry]:
    """The entries one item stands for; shards in a store are at `endpoint`."""
    if not isinstance(item, dict):
        raise ManifestError(f"{place}: expected a path or a mapping with url, not {item!r}")
    _refuse_unknown(item, tuple(_COLUMNS), place)
    for name, value in item.items():
        right = type(value) is _COLUMNS[name] and (value if name == "url" else value != "")
        if not right or (type(value) is int and value < 0):
            kind = "a number of at least 0" if _COLUMNS[name] is int else "text"
            raise ManifestError(f"{place}: {name} must be {kind}, not {value!r}")
    if "url" not in item:
        raise ManifestError(f"{place}: url is missing")
    digest = item.get("digest")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise ManifestError(f"{place}: digest must be a SHA-256 in 64 small hex digits, not {digest!r}")
    found = list(_expand(item["url"], folder, place, endpoint or {}))
    if len(found) != 1 and len(item) > 1:
        extra = ", ".join(sorted(item.keys() - {"url"}))
        raise ManifestError(f"{place}: {item['url']} stands for {len(found)} shards, so it can't have {extra}")
    for written, url in found:
        stem = item.get("id") or _stem_of(url, place)
        if not _STEM.fullmatch(stem):
            detail = "letters, digits and _ . , = + @ - or spaces inside, for it names files in OUT"
            raise ManifestError(
                f"{place}: {stem!r} can't name a shard: use {detail}; id: gives it another name"
            )
        yield ShardEntry(
            url=url,
            written=written,
            stem=stem,
            size_bytes=item.get("bytes"),
            samples=item.get("samples"),
            digest=digest,
        )


def _expand(written: str, folder: str, place: str, endpoint: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(URL as written, URL) of every shard a path, brace range or glob stands for."""
    try:
        names = list(braceexpand(written)) if "{" in written else [written]
    except ValueError as error:
        raise ManifestError(f"{place}: {written}: {error}; write a range as x-{{000..019}}.tar") from error
    for name in names:
        elsewhere = "://" in name or name.startswith(("/", shipped.SCHEME))
        url = shipped.resolve(name) if elsewhere else storage.join(folder, name)
        if not re.search(r"[*?\[]", name.partition("?")[0] if name.startswith("http") else name):
            yield name, storage.at_endpoint(url, endpoint)
            continue
        # The folder's own name may hold what looks like a pattern; only `name` is one.
        pattern = url if elsewhere else storage.join(glob.escape(folder), name)
        found = storage.glob(storage.at_endpoint(pattern, endpoint))
        if not found:
            raise ManifestError(f"{place}: {name} matches nothing in {folder}; correct the pattern")
        yield from ((match if elsewhere else match.removeprefix(folder + "/"), match) for match in found)


def _unique(entries: Sequence[ShardEntry], source: str) -> tuple[ShardEntry, ...]:
    if not entries:
        raise ManifestError(f"{source}: lists no shards")
    by_stem: dict[str, ShardEntry] = {}
    by_url: dict[str, ShardEntry] = {}
    for entry in entries:
        if entry.url in by_url:
            raise ManifestError(f"{source}: {entry.written} is listed twice; keep it once")
        if entry.stem in by_stem:
            both = f"{by_stem[entry.stem].written} and {entry.written}"
            detail = f"{both} have one stem, {entry.stem}; give one of them another with id:"
            raise ManifestError(f"{source}: {detail}")
        by_stem[entry.stem] = by_url[entry.url] = entry
    return tuple(by_stem[stem] for stem in sorted(by_stem))


def _refuse_unknown(given: Mapping[Any, Any], known: Sequence[str], place: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ManifestError(f"{place}: unknown key {name}; {hint}")


def _stem_of(url: str, place: str) -> str:
    url = url.partition("#")[0] if "://" in url else url
    name = url.partition("?")[0].rpartition("/")[2] if "://" in url else url.rpartition("/")[2]
    stem, found = _SHARD_SUFFIX.subn("", name)
    if not found:
        raise ManifestError(f"{place}: {name} is not named .tar, .tar.gz or .tgz; id: gives its output a name")
    return stem


def suffix_of(url: str) -> str:
    """A manifest's suffix, one of SUFFIXES. Raises ManifestError for a name that has none of them."""
    suffix = next((suffix for suffix in SUFFIXES if url.endswith(suffix)), None)
    if suffix is None:
        known = ", ".join(shipped.names("manifests"))
        hint = f"a manifest is a {', '.join(SUFFIXES)} file, or one of the shipped names: {known}"
        raise ManifestError(f"{url}: {hint}")
    return suffix


def _file_stem(url: str) -> str:
    return url.rpartition("/")[2].rpartition(".")[0]


def folder_of(url: str) -> str:
    """The folder of a file; of a local one absolute, because workers may run in another."""
    if storage.is_local(url):
        return os.path.dirname(os.path.abspath(storage.local_path(url)))  # noqa: PTH100, PTH120 (keep links)
    return url.rpartition("/")[0]
