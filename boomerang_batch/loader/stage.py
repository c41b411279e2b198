"""`Augment`: a stage of a webdataset pipeline that shows each sample or one of its copies.

It stands right behind the reader, where samples come shard by shard in the tar's order, and reads the same
shard of OUT beside them. webdataset itself is not needed: a stage is called with an iterable of dicts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from boomerang_batch.config.pipeline import ImagePolicy
from boomerang_batch.data import fields, geometry
from boomerang_batch.data.shards import Sample
from boomerang_batch.errors import ConfigError, RunMismatchError, SampleError
from boomerang_batch.loader.coin import Coin, Counts, coin_name
from boomerang_batch.loader.outputs import Output, ShardOutputs, open_out
from boomerang_batch.run.naming import ORIGINAL

VARIANT = "__variant__"
"""What a sample is told to be: the number of the copy, or -1 for the original."""

_SHARD_SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)\Z")


class Augment:
    """A stage that gives each sample as it is, or with the image of one of its copies in OUT.

    Everything but the image is the original's, its labels too. The coin knows a sample by its key, or by shard
    and key where the copies' recipe says so. Pickles, for workers that are spawned.
    """

    def __init__(
        self, out: str, *, p: float = 0.5, seed: int = 0, stems: Mapping[str, str] | None = None
    ) -> None:
        """`p` is the probability of a copy. `stems` names shards of OUT by the URL of their originals, where
        a manifest's `id:` or a `pipe:` keeps that from being seen in the URL. Raises ConfigError.
        """
        self._out = open_out(out)
        self._coin = Coin(p=p, seed=seed)
        self._stems = dict(stems or {})

    def set_epoch(self, epoch: int) -> None:
        """Toss the coins of `epoch` from the next pass on; for workers that are alive already too."""
        self._coin.set_epoch(epoch)

    @property
    def counts(self) -> Counts:
        """How the coins of this epoch fell so far."""
        return self._coin.counts

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The stage. Raises RunMismatchError where originals and copies don't belong together."""
        epoch = self._coin.begin()
        url, stem = "", ""
        outputs: ShardOutputs | None = None
        try:
            for sample in samples:
                if not {"__key__", "__url__"} <= sample.keys():
                    raise ConfigError(
                        "samples have no __key__ and __url__; put Augment right behind the reader"
                    )
                if outputs is None or sample["__url__"] != url or outputs.begins_with(sample["__key__"]):
                    if outputs is not None:
                        outputs.finish()
                        outputs.close()
                    url = sample["__url__"]
                    stem = self._stem(url)
                    outputs = ShardOutputs(self._out, stem)
                yield self._shown(sample, outputs.take(sample["__key__"]), stem=stem, epoch=epoch)
            if outputs is not None:
                outputs.finish()
        finally:
            if outputs is not None:
                outputs.close()

    def _stem(self, url: str) -> str:
        if url in self._stems:
            return self._stems[url]
        path = url.partition("#")[0].partition("?")[0] if "://" in url else url
        stem, found = _SHARD_SUFFIX.subn("", path.rpartition("/")[2])
        if not found or url.startswith("pipe:"):
            raise ConfigError(f"{url} does not tell its shard's stem; give it in stems={{url: stem}}")
        return stem

    def _shown(
        self, sample: dict[str, Any], found: Mapping[int, Output], *, stem: str, epoch: int
    ) -> dict[str, Any]:
        recipe = self._out.recipe
        key = sample["__key__"]
        place = f"shard {stem}, key {key}"
        name = coin_name(key, stem=None if recipe.identity == "key" else stem)
        number = self._coin.toss(name, epoch=epoch, copies=recipe.outputs)
        if not found:
            return self._original(sample, number)
        own = {field: data for field, data in sample.items() if not field.startswith("__")}
        image_field = _checked(own, next(iter(found.values())), key=key, policy=recipe.images, place=place)
        copy = found.get(number)
        if number == ORIGINAL or copy is None:
            return self._original(sample, number)
        field, data = copy.image
        _refuse_other_places(own, copy.fields, image_field=image_field, place=place)
        self._coin.count("copies")
        shown = {(field if name == image_field else name): value for name, value in sample.items()}
        return {**shown, field: data, VARIANT: number}

    def _original(self, sample: dict[str, Any], number: int) -> dict[str, Any]:
        self._coin.count("originals" if number == ORIGINAL else "fallbacks")
        return {**sample, VARIANT: ORIGINAL}


def _checked(own: Mapping[str, Any], output: Output, *, key: str, policy: ImagePolicy, place: str) -> str:
    """The image's field, when the image is the very one that `output` was made of."""
    if not all(isinstance(data, bytes) for data in own.values()):
        raise ConfigError(f"{place} is decoded already; put Augment right behind the reader, before decode")
    try:
        image_field = fields.image_field(Sample(key=key, fields=own, offset=0), policy)
    except SampleError as error:
        raise RunMismatchError(f"{place}: {error.detail}; its copies were made of another sample") from error
    if hashlib.sha256(own[image_field]).hexdigest() != output.source_digest:
        raise RunMismatchError(
            f"{place}: the image is not the one that its copies were made of; give the shards of that run, or "
            "make the copies anew"
        )
    return image_field


def _refuse_other_places(
    own: Mapping[str, bytes], copied: Mapping[str, bytes], *, image_field: str, place: str
) -> None:
    """Boxes and masks fit the copy only if they came through the run with it, which refuses what would move."""
    left = {name: data for name, data in own.items() if name != image_field and copied.get(name) != data}
    try:
        geometry.refuse_moved_places(left)
    except SampleError as error:
        said = error.detail.partition(";")[0]
        raise ConfigError(
            f"{place}: {said}; it did not travel with the copy, so it may not fit: let it travel (`fields` in "
            "the recipe of the copies), or take it out of the originals"
        ) from error
