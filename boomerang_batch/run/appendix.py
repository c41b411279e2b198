"""Appendix shards: samples that failed, done again, beside the shard that is committed and stays as it is.

The n-th appendix of shard S is S~n, with tar, provenance and marker of its own. Its rows supersede those of S,
and of earlier appendices, with the same key and variant. Only failed rows are ever superseded, so each row of
an appendix takes the place of one failed row, but for originals that were not kept before.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.run.commit import MARKER_SUFFIX, PROVENANCE_SUFFIX
from boomerang_batch.run.links import read_links
from boomerang_batch.run.naming import ORIGINAL
from boomerang_batch.run.tasks import Task

_MARK = "~"


def is_appendix(name: str) -> bool:
    """Whether a shard of OUT is an appendix. No input's stem has the mark in it."""
    return _MARK in name


def shard_of(name: str) -> str:
    """The shard that an appendix belongs to; its own name, of a shard."""
    return name.partition(_MARK)[0]


def appendices(names: Collection[str]) -> dict[str, list[str]]:
    """The committed appendices among the names in OUT, by the shard they belong to, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem, mark, number = name.removesuffix(MARKER_SUFFIX).partition(_MARK)
        if mark and name.endswith(MARKER_SUFFIX) and number.isdecimal():
            found[stem].append(f"{stem}{_MARK}{number}")
    return {stem: sorted(of_stem, key=_number) for stem, of_stem in found.items()}


def current_counts(counts: Mapping[str, int], appended: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows by status of a shard whose marker says `counts`, now that its appendices' markers say `appended`."""
    current = Counter(counts)
    for more in appended:
        current["failed"] -= sum(more.values()) - more.get("original", 0)
        current.update(more)
    return {status: count for status, count in sorted(current.items()) if count}


def failed_tasks(out: str, private_dir: str | None, done: Sequence[Task]) -> Iterator[Task]:
    """A task for every committed shard of which something has failed and not been mended since.

    With `private_dir` the failed samples are found through its links, for OUT does not tell their names. Raises
    PrivateDirError where those are missing.
    """
    there = appendices(storage.list_names(out))
    for task in done:
        names = [task.name, *there.get(task.name, ())]
        status: dict[tuple[str, int], str] = {}
        for name in names:
            status |= _private_status(private_dir, name) if private_dir else _status(out, name)
        again: dict[str, list[int]] = defaultdict(list)
        for (key, number), what in sorted(status.items()):
            if what == "failed":
                again[key].append(number)
        for key, numbers in again.items():
            if (key, ORIGINAL) not in status:  # of a sample that failed as a whole it was not kept either
                numbers.append(ORIGINAL)
        if again:
            number = _number(names[-1]) + 1 if len(names) > 1 else 1
            only = {key: tuple(numbers) for key, numbers in again.items()}
            yield dataclasses.replace(task, name=f"{task.name}{_MARK}{number}", only=only)


def _status(out: str, name: str) -> Mapping[tuple[str, int], str]:
    with storage.open_read(storage.join(out, name + PROVENANCE_SUFFIX)) as stream:
        rows = pq.read_table(stream, columns=["key", "variant", "status"]).to_pylist()
    return {(row["key"], row["variant"]): row["status"] for row in rows if row["key"] is not None}


def _private_status(private_dir: str, name: str) -> Mapping[tuple[str, int], str]:
    rows = read_links(private_dir, name, columns=["source_key", "variant", "status"]).to_pylist()
    return {(row["source_key"], row["variant"]): row["status"] for row in rows if row["source_key"] is not None}


def _number(name: str) -> int:
    return int(name.rpartition(_MARK)[2])
