"""`AugmentedDataset`: a map-style dataset that shows samples or copies of them; `Copies`: those in an OUT."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset

from boomerang_batch import storage
from boomerang_batch.data.shards import split_name
from boomerang_batch.data.tars import member_places
from boomerang_batch.errors import ConfigError, RunMismatchError, VerificationError
from boomerang_batch.loader.coin import Coin, Counts, coin_name
from boomerang_batch.loader.outputs import Out, open_out, read_rows
from boomerang_batch.run.commit import TAR_SUFFIX
from boomerang_batch.run.naming import ORIGINAL, member_key


class MapStyle(Sized, Protocol):
    """What torch calls a map-style dataset."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample at an index."""


class AugmentedDataset(Dataset[Any]):
    """Each of `originals`, or what `join` makes of it and one of its copies.

    Pickles if its parts do, for workers that are spawned.
    """

    def __init__(
        self,
        originals: MapStyle,
        copies: Mapping[Any, Sequence[Any]],
        *,
        join: Callable[[Any, Any], Any],
        keys: Sequence[Hashable] | None = None,
        p: float = 0.5,
        seed: int = 0,
    ) -> None:
        """`copies` has those of a sample under its key, None for one that failed; `keys` are the samples' keys
        in order, their indices by default. `join(original, copy)` puts a copy into the original's place, and
        leaves the label. `p` is the probability of a copy. Raises RunMismatchError for a key without copies.
        """
        self._originals, self._copies, self._join = originals, copies, join
        self._keys = range(len(originals)) if keys is None else keys
        self._coin = Coin(p=p, seed=seed)
        if len(self._keys) != len(originals):
            raise RunMismatchError(f"there are {len(self._keys)} keys for {len(originals)} originals")
        seen: set[Hashable] = set()
        for index, key in enumerate(self._keys):
            if key in seen:
                raise RunMismatchError(f"original {index} has the key {key}, and so has one before it")
            if key not in copies:
                raise RunMismatchError(f"original {index} has the key {key}, and there are no copies of that")
            seen.add(key)

    def set_epoch(self, epoch: int) -> None:
        """Toss the coins of `epoch` from now on; in workers that are alive already too."""
        self._coin.set_epoch(epoch)

    @property
    def counts(self) -> Counts:
        """How the coins of this epoch fell so far."""
        return self._coin.counts

    def __len__(self) -> int:
        return len(self._originals)

    def __getitem__(self, index: int) -> Any:
        key = self._keys[index]
        original, copies = self._originals[index], self._copies[key]
        name = coin_name(str(key))
        number = self._coin.toss(name, epoch=self._coin.epoch, copies=max(len(copies), 1))
        copy = copies[number] if number != ORIGINAL and copies else None
        if copy is None:
            self._coin.count("originals" if number == ORIGINAL else "fallbacks")
            return original
        self._coin.count("copies")
        return self._join(original, copy)


class Copies(Mapping[str, Sequence[bytes | None]]):
    """The images of an OUT by the key of their original: for each, those of its variants in order.

    They are read from the tars when they are asked for; None stands for one that failed or was dropped. Where
    they lie is kept in memory, about 300 bytes for each.
    """

    def __init__(self, out: str) -> None:
        """OUT must be complete, and on a disk. Raises ConfigError, and RunMismatchError for a missing shard."""
        if not storage.is_local(out):
            raise ConfigError(f"{out} is in a store, and images are read one by one: copy it to a disk first")
        opened = open_out(out)
        self._tars: list[Path] = []
        self._index: dict[str, tuple[_Place | None, ...]] = {}
        for stem in opened.stems:
            found = self._shard(opened, stem)
            repeated = min(found.keys() & self._index.keys(), default=None)
            if repeated is not None:
                raise ConfigError(
                    f"key {repeated} is in shard {stem} and in another of {out}; use Augment, which goes shard "
                    "by shard"
                )
            self._index |= found

    def __getitem__(self, key: str) -> Sequence[bytes | None]:
        return _Read(self._tars, self._index[key])

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def _shard(self, out: Out, stem: str) -> dict[str, tuple[_Place | None, ...]]:
        found: dict[str, list[_Place | None]] = {}
        out.marker(stem)
        for name in out.names(stem):
            tar = storage.local_path(storage.join(out.url, name + TAR_SUFFIX))
            images: dict[str, _Place] = {}
            for member, start, size in member_places(tar):
                key, _ = split_name(member) or ("", "")
                images.setdefault(key, _Place(len(self._tars), start, size))  # the image comes first
            self._tars.append(tar)
            for row in read_rows(out, name):
                if row.key is None or row.variant == ORIGINAL:
                    continue
                places = found.setdefault(row.key, [None] * out.recipe.outputs)
                if row.good:
                    member = member_key(out.recipe, row.key, row.variant)
                    if member not in images:
                        raise VerificationError(f"{tar} has no {member}, which is in its provenance")
                    places[row.variant] = images[member]
        return {key: tuple(places) for key, places in found.items()}


class _Place(NamedTuple):
    """Where an image is."""

    tar: int
    start: int
    size: int


class _Read(Sequence[bytes | None]):
    """Images that are read when they are asked for."""

    def __init__(self, tars: Sequence[Path], places: Sequence[_Place | None]) -> None:
        self._tars, self._places = tars, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        place = self._places[number]
        if place is None:
            return None
        with self._tars[place.tar].open("rb") as file:
            file.seek(place.start)
            return file.read(place.size)
