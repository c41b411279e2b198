"""WebDataset shards: a strict streaming reader that never passes on half a sample, and a deterministic writer.

The reader holds one sample in memory at a time. What it can't vouch for it reports as an `Unreadable` with
shard, member and offset; it would rather withhold a whole sample than guess. Names mean what they mean to
WebDataset: the key ends at the first dot after the last slash, the field is the rest in lower case.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from boomerang_batch.data.tars import Member, TarBrokenError, TarStream, fits_ustar, write_tar
from boomerang_batch.errors import SampleError

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 256 * 2**20

_METADATA_NAME = re.compile(r"__[^/]*__(/|$)")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One whole sample. `offset` is that of its first member's header in the (decompressed) tar, in bytes."""

    key: str
    fields: Mapping[str, bytes]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Bytes that don't make a sample.

    `key` is the sample they belong to, or None where no name tells. An Unreadable speaks for its key as a
    whole: it withdraws a Sample or an Unreadable of that key that came earlier from the same shard.
    """

    key: str | None
    reason: str
    detail: str
    offset: int


def read_samples(
    stream: BinaryIO, *, shard: str, max_member_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[Sample | Unreadable]:
    """Read a shard from front to back; `.tar`, or gzip-compressed as told by its bytes.

    `shard` is only for messages. `max_member_bytes` bounds each member and each sample. Left out, as
    WebDataset leaves them out: folders, `__name__` metadata, names without a dot; and other than there,
    hidden files such as `a/.DS_Store`, which would tear samples apart. How many were left out is logged.

    Reasons that end the shard: `not-a-tar`, `truncated-tar`, `broken-header`, `broken-gzip`,
    `data-after-end`; the sample being read then goes with them as their key. Reasons that spoil one sample:
    `key-repeated` (interleaved or doubled), `field-repeated`, `unsafe-name`, `link-member`, `special-member`,
    `member-too-large`, `sample-too-large`. An OSError of the stream says nothing about the shard and passes.
    """
    tar = TarStream(stream)
    group: _Group | None = None
    seen: set[str] = set()
    left_out = 0
    try:
        for member in tar.members():
            if member.kind == "folder" or _METADATA_NAME.match(member.name):
                continue
            problem = _problem(member, max_member_bytes)
            split = split_name(member.name)
            if split is None:
                if problem:
                    yield _unreadable(None, *problem, shard=shard, offset=member.offset)
                else:
                    left_out += 1
                continue

            # A new key ends the sample before it.
            key, name = split
            if group is None or key != group.key:
                if group:
                    yield group.finished(shard)
                group = _Group(key=key, offset=member.offset)
                if key in seen:
                    group.problem = (
                        "key-repeated",
                        "the key comes again; repack with each sample's members together",
                    )
                seen.add(key)

            # Once spoilt, a sample's data is not even read.
            if group.problem or problem:
                group.problem = group.problem or problem
            elif name in group.fields:
                group.problem = "field-repeated", f"field {_shown(name)} comes twice; keep one of them"
            elif group.size_bytes + member.size_bytes > max_member_bytes:
                group.problem = "sample-too-large", f"its members exceed {max_member_bytes:,} bytes together"
            else:
                group.fields[name] = tar.read(member)
                group.size_bytes += member.size_bytes
    except TarBrokenError as broken:
        # Members of the last sample may be missing, even if what came so far looks whole.
        if group and group.problem:
            yield group.finished(shard)
            group = None
        offset = broken.offset or 0
        detail = f"{broken.detail}; nothing after byte {offset:,} was read"
        yield _unreadable(group.key if group else None, broken.reason, detail, shard=shard, offset=offset)
    else:
        if group:
            yield group.finished(shard)
    if left_out:
        # No names: this line may end up beside anonymized output.
        logger.warning("%s: %d member(s) whose names give no key and field were left out", shard, left_out)


def split_name(name: str) -> tuple[str, str] | None:
    """The (key, field) a member's name stands for, or None for a name without both."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def check_name(key: str, field: str) -> None:
    """Refuse a member name that USTAR or a WebDataset reader would not give back as it is.

    Raises SampleError `name-too-long` (over 100 bytes, or 255 where a slash cuts it well) or `unsafe-name`.
    """
    name = f"{key}.{field}"
    if problem := _name_problem(name):
        raise SampleError("unsafe-name", f"{_shown(name)} {problem}; rename the sample")
    if split_name(name) != (key, field) or _METADATA_NAME.match(name):
        detail = f"{_shown(name)} would not be read back as key {_shown(key)} and field {_shown(field)}"
        raise SampleError(
            "unsafe-name", f"{detail}; no dots in keys, no capitals in fields, no __name__ folder"
        )
    if not fits_ustar(name):
        limit = "a tar name has 100 bytes, or 255 where a slash cuts it well"
        raise SampleError("name-too-long", f"{name} is too long: {limit}; shorten the key")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, fields) pairs as a USTAR file whose bytes depend on nothing but them, and fsync it.

    Members lie in the order given. On an error an unfinished file is left at `path`. Raises SampleError as
    `check_name` does, `key-repeated` for a key given twice and `no-fields` for one without fields.
    """
    write_tar(path, _checked_members(samples))


def _checked_members(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()
    for key, fields in samples:
        if key in seen:
            raise SampleError("key-repeated", f"key {_shown(key)} was given twice; a shard holds each key once")
        if not fields:
            raise SampleError("no-fields", f"key {_shown(key)} has no fields to write")
        seen.add(key)
        for name, data in fields.items():
            check_name(key, name)
            yield f"{key}.{name}", data


@dataclass(kw_only=True)
class _Group:
    """The members of one key so far, or why they are no sample."""

    key: str
    offset: int
    fields: dict[str, bytes] = field(default_factory=dict)
    size_bytes: int = 0
    problem: tuple[str, str] | None = None

    def finished(self, shard: str) -> Sample | Unreadable:
        if self.problem:
            return _unreadable(self.key, *self.problem, shard=shard, offset=self.offset)
        return Sample(key=self.key, fields=self.fields, offset=self.offset)


def _unreadable(key: str | None, reason: str, detail: str, *, shard: str, offset: int) -> Unreadable:
    if key is None:
        return Unreadable(key=None, reason=reason, detail=f"{shard}: {detail}", offset=offset)
    shown = _shown(key)
    return Unreadable(key=shown, reason=reason, detail=f"{shard}: sample {shown}: {detail}", offset=offset)


def _problem(member: Member, max_member_bytes: int) -> tuple[str, str] | None:
    """Reason and detail why this member can't be taken as it is, or None."""
    shown = f"member {_shown(member.name)}"
    if problem := _name_problem(member.name):
        return "unsafe-name", f"{shown} {problem}; rename it"
    if member.kind == "link":
        return "link-member", f"{shown} is a link; repack with tar --dereference --hard-dereference"
    if member.kind == "special":
        return "special-member", f"{shown} is no regular file; leave it out, or repack without --sparse"
    if member.size_bytes > max_member_bytes:
        size = f"{member.size_bytes:,} bytes, over the limit of {max_member_bytes:,}"
        return "member-too-large", f"{shown} has {size}"
    return None


def _name_problem(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "leads outside the archive"
    if _CONTROL_CHARACTERS.search(name):
        return "has control characters"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "is not valid UTF-8"
    split = split_name(name)
    if split and split[1].startswith("__") and split[1].endswith("__"):
        return "has a field name that WebDataset keeps for itself"
    return None


def _shown(name: str) -> str:
    """`name` fit for a message, a log line or a UTF-8 column."""
    escaped = name.encode("utf-8", "backslashreplace").decode()
    return _CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found.group()):02x}", escaped)
