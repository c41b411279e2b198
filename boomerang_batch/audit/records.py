"""Outputs and their sources in step, as everything in an audit compares them, and all that is known of each.

Pictures are compared at one bounded size, however large they are, so that they can wait on the local disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import SampleError

LARGEST_SIDE = 256
"""Pixels at which pictures are compared at most, either side."""
NO_LABEL = -1
LABEL_FIELD = "cls"


@dataclass(frozen=True, kw_only=True)
class Records:
    """n outputs with their sources; row i of everything is record i."""

    rows: tuple[Row, ...]
    shards: tuple[str, ...]
    """The shard of OUT that each is in, or of the input where nothing is in OUT."""
    outputs: NDArray[np.uint8]
    """(n, H, W, 3), all at one size."""
    sources: NDArray[np.uint8]
    """(n, H, W, 3), of the same size; of several outputs of a sample, equal."""
    labels: NDArray[np.int64]
    """(n,); NO_LABEL where there is none."""
    groups: NDArray[np.int64]
    """(n,): records are of one group that agree in everything that is known of them besides."""
    identities: NDArray[np.int64]
    """(n,): equal for the outputs of one sample."""
    samples: tuple[tuple[str, str], ...]
    """(source stem, key) of each identity."""


class Gathering:
    """Records on their way together: an output first, and its source whenever that comes."""

    def __init__(self, recipe: Recipe, rows: Iterable[Row], *, folder: Path | None) -> None:
        """Room for an output of each of these rows, in `folder`, or in memory. Of one size: the largest's."""
        expected = list(rows)
        height, width = (
            min(max((side or 1 for side in sides), default=1), LARGEST_SIDE)
            for sides in ([row.height for row in expected], [row.width for row in expected])
        )
        shape = (len(expected), height, width, 3)
        self._recipe, self._size = recipe, (height, width)
        self._outputs, self._sources = (room(shape, folder, name) for name in ("outputs", "sources"))
        self._rows: list[Row] = []
        self._shards: list[str] = []
        self._known: list[tuple[object, ...]] = []
        self._labels: list[int] = []
        self._identities: list[int] = []
        self._samples: dict[tuple[str, str], int] = {}

    def output(self, shard: str, row: Row, pixels: images.Pixels) -> int:
        """Take the output of a row, (H, W, 3); its place."""
        place = len(self._rows)
        self._outputs[place] = images.resize(pixels, self._size)
        self._rows.append(row)
        self._shards.append(shard)
        self._known.append(())
        self._labels.append(NO_LABEL)
        self._identities.append(0)
        return place

    def source(self, places: Iterable[int], stem: str, sample: Sample) -> None:
        """Take the source, from the input shard `stem`, of the outputs in these places. Raises SampleError."""
        picture = source_picture(sample, self._recipe)
        identity = self._samples.setdefault((stem, sample.key), len(self._samples))
        for place in places:
            row = self._rows[place]
            self._sources[place] = images.resize(picture, self._size)
            self._known[place] = (stem, *known_of(sample, row, picture, self._recipe))
            self._labels[place] = label_of(sample, row, self._recipe)
            self._identities[place] = identity

    def records(self) -> Records:
        """All that came."""
        count = len(self._rows)
        numbers = {what: number for number, what in enumerate(dict.fromkeys(self._known))}
        return Records(
            rows=tuple(self._rows),
            shards=tuple(self._shards),
            outputs=self._outputs[:count],
            sources=self._sources[:count],
            labels=np.array(self._labels, dtype=np.int64),
            groups=np.array([numbers[what] for what in self._known], dtype=np.int64),
            identities=np.array(self._identities, dtype=np.int64),
            samples=tuple(self._samples),
        )


def known_of(sample: Sample, row: Row, picture: images.Pixels, recipe: Recipe) -> tuple[object, ...]:
    """All that is known of a record besides its shard and picture; `config/accounting` lists it in words.

    The number of the output is in it: candidates for an output are sources, each once. Of a field that travels
    as a pseudonym only is known who shares it; it is taken for the value, which errs towards fewer candidates.
    """
    image = fields.image_field(sample, recipe.images)
    format = image.rpartition(".")[2] if recipe.images.format == "input" else None
    return (row.variant, row.width, row.height, _is_grey(picture), format, *_shown(sample, recipe))


def _shown(sample: Sample, recipe: Recipe) -> Iterator[object]:
    """What travels with the output, or what that was drawn under: nobody needs the image to know it."""
    names = [name for name, action in recipe.fields.fields.items() if action != "drop"]
    yield from (sample.fields.get(name.lower()) for name in (*names, *recipe.drawn_under))
    listed = [name for name, action in recipe.fields.json_keys.items() if action != "drop"]
    if listed:
        try:
            values = json.loads(sample.fields.get(fields.JSON_FIELD, b"{}"))
        except ValueError:
            values = {}
        yield from (json.dumps(values.get(name) if isinstance(values, dict) else None) for name in listed)


def label_of(sample: Sample, row: Row, recipe: Recipe) -> int:
    """The class of a sample: what the model was told, else what stands in the field `cls`."""
    labels = recipe.model.class_labels
    if row.label is not None and recipe.target is None:  # else it is what the output became
        return row.label
    try:
        return fields.read_label(sample, labels.field.lower() if labels else LABEL_FIELD)
    except SampleError:
        return NO_LABEL


def source_picture(sample: Sample, recipe: Recipe) -> images.Pixels:
    """The source's image, decoded: (H, W, 3). Raises SampleError."""
    name = fields.image_field(sample, recipe.images)
    return images.decode(sample.fields[name], field=name, channels=3, policy=recipe.images).pixels


def room(shape: tuple[int, ...], folder: Path | None, name: str) -> NDArray[np.uint8]:
    """Where images wait: in a file of this name in the folder, or in memory."""
    if folder is None:
        return np.zeros(shape, np.uint8)
    mapped: NDArray[np.uint8] = np.lib.format.open_memmap(
        folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape
    )
    return mapped


def _is_grey(pixels: images.Pixels) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
