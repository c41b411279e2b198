"""The samples of a trial: numbered in a scratch tar, run under their own names, given back in order.

In the tar they have numbers, for samples of several shards may have one key, and so that nothing on disk names
them. What drawing gives is told by the place in the tar whose it is.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data.images import Pixels
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.shards import Sample, Unreadable, write_shard
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.errors import SampleError, StorageError
from boomerang_batch.run.ledger import Ledger, Source
from boomerang_batch.run.naming import Naming
from boomerang_batch.run.stages import Prepared
from boomerang_batch.run.transform import Transform
from boomerang_batch.run.walks import Walks

_Item = TypeVar("_Item", Sample, Unreadable)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A sample to try a recipe on."""

    stem: str
    """Of the shard it comes from, as the manifest has it."""
    key: str
    fields: Mapping[str, bytes]
    """As the reader gives them: names in lower case."""
    numbers: tuple[int, ...] | None = None
    """The outputs that are wanted, by their number (the column `variant`); None: all."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one output of a chosen sample."""

    stem: str
    key: str
    row: Row
    """As a run would write it, but for the offset: that would be the scratch folder's."""
    detail: str | None
    """Why there is no output, in a sentence that may quote the input."""
    field: str | None
    image: bytes | None
    """The output image as it is encoded, and the field it would stand in; None without an output."""


class Named(NamedTuple):
    """Who a sample of the scratch tar really is, and which of its outputs are wanted."""

    stem: str
    key: str
    numbers: tuple[int, ...] | None


class Renamed(Transform):
    """A Transform for samples of the scratch tar, where they have numbers, by the names they really have."""

    def __init__(
        self,
        recipe: Recipe,
        model: DenoiserSpec,
        walks: Walks,
        naming: Naming,
        stack: Mapping[str, str],
        *,
        flags: Callable[[Pixels], bool] | None,
        places: Sequence[Named],
    ) -> None:
        super().__init__(recipe, model, walks, naming, stack, flags=flags)
        self.places = places
        self.at: dict[int, Named] = {}
        """By the offset in the scratch tar: keys may be in several shards."""

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """As a Transform does."""
        named, place = self._named(sample)
        return super().prepare(named, shard=place.stem)

    def failed(self, sample: Sample, error: SampleError, *, shard: str) -> list[tuple[Source, Row]]:
        """As a Transform does."""
        named, place = self._named(sample)
        return super().failed(named, error, shard=place.stem)

    def unreadable(self, item: Unreadable, *, shard: str) -> tuple[Source, Row]:
        """As a Transform does."""
        named, place = self._named(item)
        return super().unreadable(named, shard=place.stem)

    def wanted(self) -> dict[str, tuple[int, ...]]:
        """The outputs that are wanted, by the number of their sample."""
        every = tuple(self.output_numbers)
        return {
            _name(index): every if place.numbers is None else place.numbers
            for index, place in enumerate(self.places)
        }

    def _named(self, item: _Item) -> tuple[_Item, Named]:
        place = self.places[int(item.key or "")]
        self.at[item.offset] = place
        return dataclasses.replace(item, key=place.key), place


def write_chosen(tar: Path, samples: Iterable[Chosen]) -> list[Named]:
    """Write the samples under numbers, and tell which number is which."""
    places: list[Named] = []

    def numbered() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for sample in _read(samples):
            places.append(Named(sample.stem, sample.key, sample.numbers))
            yield _name(len(places) - 1), sample.fields

    try:
        write_shard(tar, numbered())
    except OSError as error:
        raise scratch_full(error) from error
    return places


def _read(samples: Iterable[Chosen]) -> Iterator[Chosen]:
    """The samples, where what goes wrong with reading them is not put down to the scratch disk."""
    try:
        yield from samples
    except OSError as error:
        raise StorageError(f"reading the chosen samples broke off: {error.strerror or error}") from error


def outcomes(ledger: Ledger, transform: Renamed) -> Iterator[Outcome]:
    """What the ledger holds, one output at a time."""
    samples = ledger.samples()
    for source, row in ledger.rows():
        field = image = None
        if row.output_digest is not None:
            _, fields = next(samples)
            field, image = next(iter(fields.items()))
        place = transform.at[source.offset]
        if place.numbers is None or row.variant in place.numbers:
            yield Outcome(
                stem=place.stem,
                key=place.key,
                row=dataclasses.replace(row, offset=None),
                detail=source.detail,
                field=field,
                image=image,
            )


def scratch_full(error: OSError) -> StorageError:
    """What to say of a scratch disk that fails."""
    return StorageError(
        f"can't keep a trial's images in {tempfile.gettempdir()}: {error.strerror or error}; "
        "set TMPDIR to a folder with room for it"
    )


def _name(index: int) -> str:
    return f"{index:08d}"
