"""Is this output what its records say? Completeness, digests, and no key missing or doubled.

The plain check reads markers, provenance and tar headers; the deep one re-reads every byte, recomputes every
digest and decodes every image. Problems are sentences; an empty list means that all is well.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from boomerang_batch import storage
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import images
from boomerang_batch.data.codes import FIELD
from boomerang_batch.data.provenance import Marker, Row, pixel_digest, read_rows
from boomerang_batch.data.shards import Unreadable, read_samples
from boomerang_batch.errors import SampleError, StorageError, VerificationError
from boomerang_batch.run import artefacts
from boomerang_batch.run.appendix import appendices, current_counts
from boomerang_batch.run.commit import (
    MARKER_SUFFIX,
    PROVENANCE_SUFFIX,
    TAR_SUFFIX,
    digest_stream,
    read_marker,
)
from boomerang_batch.run.kept_codes import MAX_CODE_BYTES, codes_home
from boomerang_batch.run.keys import KeyRegistry, read_keys
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.record import (
    LOGS_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SHEET_NAME,
    RunRecord,
    recorded_recipe,
    require_record,
)
from boomerang_batch.run.unseen import FIT, MOMENTS_SUFFIX, digest_of_names


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at and what is wrong with it."""

    shards: int
    rows: Mapping[str, int]
    problems: tuple[str, ...] = field(default_factory=tuple)


Look = Callable[[str, str, Mapping[str, bytes], Row], Iterator[str]]
"""What is wrong with a sample's fields: by its shard's location, its key, the fields and its row."""


def verify(out: str, *, deep: bool, private_dir: str | None = None) -> Verification:
    """Check a run's output, and the codes that it was made of if it has any.

    Under anonymize codes lie in the `private_dir`, and without that nobody looks at them. Raises
    VerificationError when `out` is not a run's.
    """
    record = require_record(out)
    recipe = recorded_recipe(out, record)
    more = appendices(storage.list_names(out))
    problems = list(_strangers(out, record, more))
    rows: Counter[str] = Counter()
    done, registry = 0, KeyRegistry(out)
    for stem in record.shards:
        marker = read_marker(out, stem)
        if marker is None:
            problems.append(f"shard {stem} is not done; run the same command to finish")
            continue
        done += 1
        mended = filter(None, (read_marker(out, name) for name in more.get(stem, ())))
        rows.update(current_counts(marker.counts, (appendix.counts for appendix in mended)))
        if marker.recipe_digest != record.recipe_digest:
            problems.append(f"shard {stem} was made by another recipe")
        names, look = more.get(stem, ()), functools.partial(_check_image, recipe) if deep else None
        try:
            problems += _check_shard(out, stem, marker, recipe, look)
            problems += _check_appendices(out, stem, names, record, recipe, look)
            problems += _check_codes(out, private_dir, (stem, *names), recipe, deep=deep)
            repeated = registry.add(stem, read_keys(out, stem)) if recipe.identity == "key" else None
            problems += [repeated] if repeated else []
        except (StorageError, VerificationError) as error:
            problems.append(f"shard {stem}: {error}")
    if done and recipe.method == "unseen":
        problems += _check_fit(out, private_dir, record, recipe, deep=deep)
    return Verification(shards=done, rows=dict(sorted(rows.items())), problems=tuple(problems))


def _check_appendices(
    out: str, stem: str, names: Sequence[str], record: RunRecord, recipe: Recipe, look: Look | None
) -> Iterator[str]:
    """Everything that can be wrong with a shard's appendices."""
    status = {(row.key, row.variant): row.status for row in _rows(out, stem)} if names else {}
    for name in names:
        marker = read_marker(out, name)
        if marker is None or marker.recipe_digest != record.recipe_digest:
            yield f"shard {name} has no marker of this run's recipe"
            continue
        yield from _check_shard(out, name, marker, recipe, look)
        for row in _rows(out, name):
            if row.status != "original" and status.get((row.key, row.variant)) != "failed":
                yield f"shard {name}: key {row.key}, variant {row.variant} takes the place of no failed row"
            status[row.key, row.variant] = row.status


def _check_codes(
    out: str, private_dir: str | None, names: Sequence[str], recipe: Recipe, *, deep: bool
) -> Iterator[str]:
    """Everything that can be wrong with the codes that shards were made of."""
    if recipe.method == "boomerang" or (recipe.purpose == "anonymize" and private_dir is None):
        return
    home = codes_home(recipe, out, private_dir)
    for name in names:
        marker = read_marker(home, name)
        if marker is None:
            yield f"{home}: there are no codes of shard {name}, though it was made of them"
        elif marker.recipe_digest != recipe.digest:
            yield f"{home}: the codes of shard {name} were drawn by another recipe"
        else:
            yield from _check_shard(home, name, marker, recipe, _check_code if deep else None)


def _check_fit(
    out: str, private_dir: str | None, record: RunRecord, recipe: Recipe, *, deep: bool
) -> Iterator[str]:
    """Everything that can be wrong with the fit that outputs were accepted by, and what shards added to it."""
    if recipe.purpose == "anonymize" and private_dir is None:
        return
    home = codes_home(recipe, out, private_dir)
    made_of = digest_of_names(record.shards)
    if not artefacts.is_there(home, FIT, made_of=made_of, recipe_digest=recipe.digest):
        yield f"{home}: there is no fit of this run's shards, though its outputs were accepted by one"
        return
    for name in (FIT, *(stem + MOMENTS_SUFFIX for stem in record.shards if deep)):
        problem = artefacts.problem(home, name)
        if problem is not None:
            yield problem


def _check_shard(out: str, stem: str, marker: Marker, recipe: Recipe, look: Look | None) -> Iterator[str]:
    """Everything that can be wrong with one committed shard; without `look` not reading all of it."""
    files = (
        (TAR_SUFFIX, marker.tar_sha256, marker.tar_bytes),
        (PROVENANCE_SUFFIX, marker.parquet_sha256, marker.parquet_bytes),
    )
    for suffix, sha256, size_bytes in files:
        url = storage.join(out, stem + suffix)
        if not storage.exists(url):
            yield f"{url} is missing"
            return
        if storage.size(url) != size_bytes:
            yield f"{url} has {storage.size(url)} bytes, its marker says {size_bytes}"
            return
        if look is not None:
            with storage.open_read(url) as stream:
                if digest_stream(stream).sha256 != sha256:
                    yield f"{url} does not have the digest its marker says"
                    return
    rows = _rows(out, stem)
    if Counter(row.status for row in rows) != Counter(marker.counts):
        yield f"shard {stem}: the provenance rows are not those the marker counts"
    expected = {
        member_key(recipe, row.key or "", row.variant): row for row in rows if row.status in ("ok", "original")
    }
    url = storage.join(out, stem + TAR_SUFFIX)
    with storage.open_read(url) as stream:
        for item in read_samples(stream, shard=url, max_member_bytes=MAX_CODE_BYTES):
            if isinstance(item, Unreadable):
                yield f"{url}: {item.reason} at offset {item.offset}: {item.detail}"
                continue
            row = expected.pop(item.key, None)
            if row is None:
                yield f"{url}: sample {item.key} has no provenance row"
            elif look is not None:
                yield from look(url, item.key, item.fields, row)
    for key in expected:
        yield f"{url}: sample {key} is missing"


def _check_code(url: str, key: str, fields: Mapping[str, bytes], row: Row) -> Iterator[str]:
    """A code's bytes against its row."""
    if hashlib.sha256(fields.get(FIELD, b"")).hexdigest() != row.output_digest:
        yield f"{url}: the code of {key} does not have the digest of its row"


def _check_image(recipe: Recipe, url: str, key: str, fields: Mapping[str, bytes], row: Row) -> Iterator[str]:
    """The output image's bytes and pixels against its row."""
    found = [name for name, data in fields.items() if hashlib.sha256(data).hexdigest() == row.output_digest]
    if not found:
        yield f"{url}: no field of sample {key} has the output digest of its row"
        return
    try:
        picture = images.decode(fields[found[0]], field=found[0], channels=None, policy=recipe.images)
        if pixel_digest(picture) != row.pixel_digest:
            yield f"{url}: the pixels of {key}.{found[0]} are not those its row tells of"
    except SampleError as error:
        yield f"{url}: {key}.{found[0]} does not decode: {error}"


def _rows(out: str, stem: str) -> list[Row]:
    with storage.open_read(storage.join(out, stem + PROVENANCE_SUFFIX)) as stream:
        return read_rows(stream)


def _strangers(out: str, record: RunRecord, more: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What lies in OUT and is not this run's: a foreign shard, or under anonymize anything at all."""
    suffixes = (MARKER_SUFFIX, TAR_SUFFIX, PROVENANCE_SUFFIX)
    stems = [name for stem in record.shards for name in (stem, *more.get(stem, ()))]
    known = {stem + suffix for stem in stems for suffix in suffixes}
    known |= {RECORD_NAME, SHEET_NAME, LOGS_NAME, REPORT_NAME}
    published = record.recipe.get("purpose") == "anonymize"
    for name in storage.list_names(out):
        if name not in known and (published or name.endswith(suffixes)):
            yield f"{storage.join(out, name)} is not part of this run"
