"""Which outputs a report shows, and their sources where those may be seen; all as thumbnails.

Chosen by their names alone, from shards all over the run, so that nobody picked them; of those looked at, the
worst are then shown first. A source is shown only if its bytes have the digest that the output's row tells of.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boomerang_batch import storage
from boomerang_batch.config.blocks import ImagePolicy
from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.data.shards import Sample, read_samples
from boomerang_batch.errors import BoomerangError, StorageError
from boomerang_batch.report.sections import Thumbnail
from boomerang_batch.report.sources import Origin, Sources
from boomerang_batch.run.commit import PROVENANCE_SUFFIX, TAR_SUFFIX
from boomerang_batch.run.naming import ORIGINAL, member_key

SIDE = 192
"""Of a thumbnail, at most, in pixels."""
_SHARDS, _PER_SHARD = 8, 32
_CRISP_BELOW = 96

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """An output and its source, small."""

    shard: str
    row: Row
    after: images.Pixels
    before: images.Pixels | None = None
    source_key: str | None = None

    @property
    def difference(self) -> float | None:
        """Of the two as shown, as a share of the whole range; None without source."""
        return None if self.before is None else difference(self.before, self.after)


@dataclass(frozen=True, kw_only=True)
class Album:
    """What was looked at."""

    shown: tuple[Shown, ...]
    unread: int = 0
    """Shards whose sources can't be read."""
    foreign: int = 0
    """Sources that are other pictures than those the outputs were made from."""


Named = tuple[str | None, int]
"""An output by the key and the variant of its row."""


def look(out: str, recipe: Recipe, done: Sequence[str], sources: Sources | None) -> Album:
    """A bounded number of outputs, with their sources where there are any."""
    count = min(_SHARDS, len(done))
    chosen = [done[index * len(done) // count] for index in range(count)]
    return _album(out, recipe, dict.fromkeys(chosen), sources)


def look_up(out: str, recipe: Recipe, wanted: Mapping[str, frozenset[Named]], sources: Sources | None) -> Album:
    """The outputs wanted of each shard, with their sources where there are any."""
    return _album(out, recipe, wanted, sources)


def _album(
    out: str, recipe: Recipe, wanted: Mapping[str, frozenset[Named] | None], sources: Sources | None
) -> Album:
    """The outputs wanted of each shard, the first ones where None are named."""
    shown: list[Shown] = []
    unread = foreign = 0
    for shard, names in wanted.items():
        outputs = _outputs(out, recipe, shard, names)
        before: Mapping[Named, tuple[str, images.Pixels]] = {}
        try:
            if sources is not None:
                before, others = _sources(recipe, sources, shard, outputs)
                foreign += others
        except (StorageError, OSError) as error:
            # A finished run needs its inputs no more, and they may be gone by now.
            _log.warning("the sources of shard %s can't be read: %s", shard, error, extra={"shard": shard})
            unread += 1
        for one in outputs:
            key, pixels = before.get(_named(one.row), (None, one.before))
            shown.append(dataclasses.replace(one, before=pixels, source_key=key))
    return Album(shown=tuple(shown), unread=unread, foreign=foreign)


def difference(one: images.Pixels, other: images.Pixels) -> float:
    """Root mean square difference of two pictures as a share of the whole range, 0..1, at the smaller size."""
    height, width = (min(one.shape[axis], other.shape[axis]) for axis in (0, 1))
    first, second = (images.resize(each, (height, width)).astype(np.float64) for each in (one, other))
    return float(np.sqrt(np.mean(np.square((first - second) / 255))))


def thumbnail(pixels: images.Pixels) -> Thumbnail:
    """Pixels as a small file: png where single pixels can be seen, else webp."""
    crisp = max(pixels.shape[:2]) < _CRISP_BELOW
    policy = ImagePolicy(format="png" if crisp else "webp", quality=80)
    grey = bool((pixels == pixels[..., :1]).all())
    data, format = images.encode(
        images.Picture(pixels=pixels, alpha=None, format="png", grey=grey), policy=policy
    )
    height, width = pixels.shape[:2]
    return Thumbnail(data=data, mime=f"image/{format}", width=width, height=height)


def _outputs(out: str, recipe: Recipe, shard: str, names: frozenset[Named] | None) -> list[Shown]:
    """Outputs of a shard, the first or those named; originals that were kept beside them are their sources."""
    keys = None if names is None else {key for key, _ in names}
    with storage.open_read(storage.join(out, shard + PROVENANCE_SUFFIX)) as stream:
        rows = {member_key(recipe, row.key or "", row.variant): row for row in read_rows(stream)}
    url = storage.join(out, shard + TAR_SUFFIX)
    found: list[Shown] = []
    originals: dict[str | None, images.Pixels] = {}
    with storage.open_read(url) as stream:
        for item in read_samples(stream, shard=shard):
            row = rows.get(item.key or "")
            if not isinstance(item, Sample) or row is None or row.status not in ("ok", "original"):
                continue
            if names is None and len(found) == _PER_SHARD:
                break
            if keys is not None and row.key not in keys:
                continue
            pixels = _picture(recipe, item)
            if pixels is not None and row.variant == ORIGINAL:
                originals[row.key] = pixels
            elif pixels is not None and (names is None or _named(row) in names):
                found.append(Shown(shard=shard, row=row, after=pixels))
    return [dataclasses.replace(one, before=originals.get(one.row.key)) for one in found]


def _sources(
    recipe: Recipe, sources: Sources, shard: str, outputs: Sequence[Shown]
) -> tuple[Mapping[Named, tuple[str, images.Pixels]], int]:
    """Key and pixels of the sources of a shard's outputs, by the output's (key, variant).

    And how many have another digest than the output's row tells of.
    """
    origins = sources.origins(shard, [one.row for one in outputs])
    if not origins:
        return {}, 0
    (url,) = {origin.url for origin in origins}
    found: dict[Named, tuple[str, images.Pixels]] = {}
    foreign = set()
    for origin, sample in _samples_of(url, origins):
        try:
            data = sample.fields[fields.image_field(sample, recipe.images)]
        except BoomerangError:
            continue
        named = _named(origin.row)
        if sources.naming.source_digest(data, row_key=origin.row.key or "") != origin.row.source_digest:
            foreign.add(named)
        elif (pixels := _picture(recipe, sample)) is not None:
            found[named] = origin.key, pixels
    return found, len(foreign - found.keys())


def _samples_of(url: str, origins: Sequence[Origin]) -> Iterator[tuple[Origin, Sample]]:
    missing: dict[str, list[Origin]] = {}
    for origin in origins:
        missing.setdefault(origin.key, []).append(origin)
    with storage.open_read(url) as stream:
        for item in read_samples(stream, shard=url):
            if isinstance(item, Sample) and item.key in missing:
                for origin in missing.pop(item.key):
                    yield origin, item
            if not missing:
                return


def _named(row: Row) -> Named:
    return row.key, row.variant


def _picture(recipe: Recipe, sample: Sample) -> images.Pixels | None:
    """A sample's picture as small as a thumbnail, on white where it is transparent; None where it is none."""
    try:
        name = fields.image_field(sample, recipe.images)
        policy = recipe.images.model_copy(update={"alpha": "white"})
        pixels = images.decode(sample.fields[name], field=name, channels=3, policy=policy).pixels
    except BoomerangError:
        return None
    scale = SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return images.resize(pixels, (height, width))
