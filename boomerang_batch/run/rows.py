"""The provenance rows of one run: what is the same for all of them, and what OUT may tell of each."""

from __future__ import annotations

import dataclasses
import hashlib

from boomerang_batch.config.pipeline import Recipe, Sampler
from boomerang_batch.data import images
from boomerang_batch.data.provenance import Row, Status, pixel_digest
from boomerang_batch.diffusion.engine import Walk
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.naming import ORIGINAL, Naming


class Rows:
    """Makes rows from templates that hold what is the same for all."""

    def __init__(self, recipe: Recipe, naming: Naming, *, model_digest: str, versions: str) -> None:
        self._recipe = recipe
        self._naming = naming
        self._private = recipe.purpose == "anonymize"
        self._any = Row(
            variant=ORIGINAL,
            status="original",
            model_digest=model_digest,
            recipe_digest=recipe.digest,
            versions=versions,
        )
        self._drawn = dataclasses.replace(
            self._any,
            status="ok",
            sampler=_sampler_name(recipe.sampler),
            eta=recipe.sampler.eta,
            noise_key_id=naming.noise_key_id,
        )

    def original(self) -> Row:
        """The template of a kept original."""
        return self._any

    def untouched(self, *, passes: int, flagged: bool | None) -> Row:
        """The template of an output that shows its source, for there was nothing to draw."""
        return dataclasses.replace(self._drawn, passes=passes, evaluations=0, flagged=flagged)

    def drawn(
        self, walk: Walk, *, t: str | None, passes: int, batch_size: int, dtype: str, flagged: bool | None
    ) -> Row:
        """The template of an output. `t` in words, None where OUT may not tell how far it went."""
        row = dataclasses.replace(
            self._drawn,
            passes=passes,
            batch_size=batch_size if walk.n else None,  # with no evaluation there was no batch
            dtype=dtype,
            flagged=flagged,
        )
        if t is None:
            return row
        schedule = walk.schedule
        return dataclasses.replace(
            row,
            t=t,
            node=schedule.n,
            tau=walk.tau[-1],
            # Noise over the source limits what an output tells only where the source is not looked at again.
            sigma=None if self._recipe.looks_again else schedule.relative_sigma,
            evaluations=schedule.n * passes,
        )

    def filled(
        self, template: Row, *, shard: str, key: str, number: int, image: bytes, data: bytes, field: str,
        label: int | None,
    ) -> Row:  # fmt: skip
        """`template` with the facts of one output: `data` in `field`, made of the source's `image`."""
        row_key = self._naming.row_key(shard=shard, key=key, variant=number)
        # Read back what will be written: that it decodes is part of being done.
        written = images.decode(data, field=field, channels=None, policy=self._recipe.images)
        height, width = written.pixels.shape[:2]
        return dataclasses.replace(
            template,
            key=row_key,
            variant=number,
            source_digest=self._naming.source_digest(image, row_key=row_key),
            output_digest=hashlib.sha256(data).hexdigest(),
            pixel_digest=pixel_digest(written),
            label=label,
            width=width,
            height=height,
        )

    def bad(self, status: Status, source: Source, *, shard: str, number: int, reason: str) -> Row:
        """The row of what could not be made."""
        key = None
        if source.key is not None:
            key = self._naming.row_key(shard=shard, key=source.key, variant=number)
        return dataclasses.replace(
            self._any,
            key=key,
            variant=number,
            status=status,
            reason=reason,
            # A sentence may quote the input, an offset finds it: under anonymize both stay private.
            detail=None if self._private else source.detail,
            offset=None if self._private else source.offset,
        )


def _sampler_name(sampler: Sampler) -> str:
    """The sampler column: the name the field has for what the recipe asks for."""
    if sampler.eta:
        return f"ancestral {sampler.variance}"
    return "ddim" if sampler.order == 1 else "dpm-solver++2m"
