"""A folder of images into shards and a manifest: one folder per class, or all in one.

The same folder gives the same bytes. Samples are ordered by the SHA-256 of their key, so that every shard is a
mixture of the classes. Image files go in byte for byte, their metadata included: this is input for a run, not
something to publish.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from boomerang_batch import storage
from boomerang_batch.data.formats import Format, describe, sniff
from boomerang_batch.data.manifest import Manifest, load_manifest
from boomerang_batch.data.scan import scan_shard
from boomerang_batch.data.shards import check_name, write_shard
from boomerang_batch.errors import ConfigError, SampleError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.yaml"

_FIELDS: Mapping[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The manifest made, the classes by label (none for a flat folder), and every file left out, with why."""

    manifest: Manifest
    classes: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _File:
    path: Path
    key: str
    field: str
    label: int | None


def pack_folder(folder: str, out: str, *, samples_per_shard: int = 1000) -> Packed:
    """Pack the images below the local `folder` into `out`/NAME-000000.tar and so on, with a manifest.

    With images in subfolders, each subfolder is a class: its place among the sorted names becomes `cls`, its
    name `class_name` in `json`. Fields are named after what the bytes are, keys after the path; a dot in a name
    becomes an underscore. Everything that is no png, jpeg or webp is left out and listed.

    Raises ConfigError when there are no images, images beside class folders, two files with one key, names a
    shard can't hold, or when `out` has shards already.
    """
    source, target = Path(folder), Path(out)
    if not source.is_dir():
        raise ConfigError(f"{folder} is no folder")
    if target.resolve() == source.resolve() or target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} lies in {folder}, so the next packing would see it; choose another OUT")
    if target.is_dir() and any(
        path.name == MANIFEST_NAME or path.suffix == ".tar" for path in target.iterdir()
    ):
        raise ConfigError(f"{out} has shards or a manifest already; choose an empty OUT")

    found, left_out = _sort_out(source)
    classes = _classes(found, folder)
    files = sorted(_keyed(found, classes, source), key=lambda file: hashlib.sha256(file.key.encode()).digest())
    for line in left_out:
        logger.warning("left out: %s", line)

    target.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9-]+", "-", source.resolve().name.lower()).strip("-") or "images"
    entries = []
    chunks = _chunks(files, samples_per_shard)
    for number, chunk in enumerate(chunks):
        shard = target / f"{name}-{number:06d}.tar"
        unfinished = shard.with_suffix(".unfinished")
        write_shard(unfinished, _samples(chunk, classes))
        unfinished.replace(shard)
        scan = scan_shard(str(shard))
        entries.append(
            {"url": shard.name, "bytes": scan.size_bytes, "samples": len(scan.keys), "digest": scan.digest}
        )
    manifest = {"format_version": 1, "name": name, "shards": entries}
    url = str(target / MANIFEST_NAME)
    storage.publish_bytes(yaml.safe_dump(manifest, sort_keys=False, width=200).encode(), url)
    return Packed(manifest=load_manifest(url), classes=classes, left_out=tuple(left_out))


def _sort_out(source: Path) -> tuple[list[tuple[Path, Format]], list[str]]:
    """Every image with its format, and every other file with what it is; both in one fixed order."""
    images: list[tuple[Path, Format]] = []
    others: list[str] = []
    for path in sorted(_walk(source), key=lambda path: path.parts):
        shown = path.relative_to(source).as_posix().encode("utf-8", "backslashreplace").decode()
        if path.is_symlink() or not path.is_file():
            others.append(f"{shown}: a link or no regular file")
        elif path.name.startswith("."):
            others.append(f"{shown}: hidden")
        else:
            with path.open("rb") as stream:
                head = stream.read(32)
            format = sniff(head)
            if format:
                images.append((path, format))
            else:
                others.append(f"{shown}: {describe(head)}, not png, jpeg or webp")
    return images, others


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below that is no real folder; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield Path(entry.path)


def _classes(found: Sequence[tuple[Path, Format]], folder: str) -> tuple[str, ...]:
    source = Path(folder)
    if not found:
        raise ConfigError(f"{folder} has no png, jpeg or webp images")
    parts = [path.relative_to(source).parts for path, _ in found]
    flat = next((part[-1] for part in parts if len(part) == 1), None)
    nested = next(("/".join(part) for part in parts if len(part) > 1), None)
    if flat and nested:
        both = f"{flat} lies beside the class folder of {nested}"
        raise ConfigError(f"{folder}: {both}; have images either all at the top or all in class folders")
    return tuple(sorted({part[0] for part in parts})) if nested else ()


def _keyed(found: Sequence[tuple[Path, Format]], classes: Sequence[str], source: Path) -> Iterator[_File]:
    by_key: dict[str, str] = {}
    for path, format in found:
        relative = path.relative_to(source)
        key = relative.with_suffix("").as_posix().replace(".", "_")
        field = _FIELDS[format]
        try:
            check_name(key, field)
        except SampleError as error:
            raise ConfigError(f"{source}: {error.detail}") from error
        if key in by_key:
            both = f"{by_key[key]} and {relative.as_posix()}"
            raise ConfigError(f"{source}: {both} would both have the key {key}; rename one")
        by_key[key] = relative.as_posix()
        label = classes.index(relative.parts[0]) if classes else None
        yield _File(path=path, key=key, field=field, label=label)


def _samples(files: Sequence[_File], classes: Sequence[str]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for file in files:
        fields = {file.field: file.path.read_bytes()}
        if file.label is not None:
            fields["cls"] = str(file.label).encode()
            fields["json"] = json.dumps({"class_name": classes[file.label]}, separators=(",", ":")).encode()
        yield file.key, fields


def _chunks(files: Sequence[_File], size: int) -> Iterator[Sequence[_File]]:
    waiting = iter(files)
    while chunk := list(itertools.islice(waiting, size)):
        yield chunk
