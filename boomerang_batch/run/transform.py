"""One sample on its way: from bytes to a draw, and from what was drawn to bytes and a provenance row.

No I/O and no model here; a sample that can't be processed raises SampleError and costs nobody else anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from boomerang_batch.config.pipeline import Recipe, Sampler
from boomerang_batch.data import fields, geometry, images
from boomerang_batch.data.formats import output_field
from boomerang_batch.data.provenance import Row, Status, pixel_digest
from boomerang_batch.data.shards import Sample, Unreadable, check_name
from boomerang_batch.diffusion.denoiser import DenoiserSpec
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.diffusion.guards import check_output
from boomerang_batch.diffusion.schedule import Schedule
from boomerang_batch.errors import SampleError
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.naming import ORIGINAL, Naming, member_key, refuse_reserved_key


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample decoded and placed, with all that finishing its variants needs."""

    source: Source
    shard: str
    identity: bytes
    image_field: str
    image: bytes
    picture: images.Picture
    placement: geometry.Placement
    x_0: Tensor
    label: int | None
    label_shows: bool
    """Whether the row may tell it: under anonymize only where its field travels as it is."""
    travelling: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished variant: its row, its name in the tar, its fields."""

    row: Row
    member_key: str
    fields: Mapping[str, bytes]


class Transform:
    """What one run does to any sample: the recipe, the model's needs and the run's names, applied."""

    def __init__(
        self, recipe: Recipe, model: DenoiserSpec, schedule: Schedule, naming: Naming, versions: str
    ) -> None:
        self._recipe = recipe
        self._model = model
        self._naming = naming
        self._private = recipe.purpose == "anonymize"
        unit, value = recipe.t.unit
        # Rows are made from templates that hold what is the same for all.
        self._row = Row(
            variant=ORIGINAL,
            status="original",
            model_digest=model.digest,
            recipe_digest=recipe.digest,
            versions=versions,
        )
        self._drawn_row = dataclasses.replace(
            self._row,
            variant=0,
            status="ok",
            t=f"{unit}={value:g}",
            node=schedule.n,
            tau=float(schedule.tau[-1]),
            sigma=schedule.relative_sigma,
            evaluations=schedule.n,
            sampler=_sampler_name(recipe.sampler),
            eta=recipe.sampler.eta,
            noise_key_id=naming.noise_key_id,
        )

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """Decode, place and name one sample. Raises SampleError."""
        recipe, policy = self._recipe, self._recipe.images
        refuse_reserved_key(recipe, sample.key)
        image_field = fields.image_field(sample, policy)
        image = sample.fields[image_field]
        travelling = fields.travelling(
            sample,
            image_field=image_field,
            policy=recipe.fields,
            purpose=recipe.purpose,
            pseudonymize=self._naming.pseudonym,
        )
        picture = images.decode(image, field=image_field, channels=self._model.channels, policy=policy)
        size = (self._model.height, self._model.width)
        pixels, placement = geometry.place(picture.pixels, size=size, policy=policy.resize)
        if placement.crops or (not policy.restore_size and placement.source != placement.model):
            geometry.refuse_moved_places(travelling)
        values = images.to_model_values(pixels, self._model.value_range)
        return Prepared(
            source=Source(key=sample.key, offset=sample.offset),
            shard=shard,
            identity=self._naming.identity(shard=shard, key=sample.key, image=image),
            image_field=image_field,
            image=image,
            picture=picture,
            placement=placement,
            x_0=torch.from_numpy(values),
            label=self._label(sample),
            label_shows=self._label_shows(sample, travelling),
            # In an order of our own, so that under anonymize not even that comes from the input.
            travelling=dict(sorted(travelling.items())),
        )

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """One draw per variant."""
        for variant in range(self._recipe.variants):
            yield Draw(
                tag=(prepared, variant),
                x_0=prepared.x_0,
                noise_key=self._naming.noise_key(prepared.identity, variant),
                label=prepared.label,
            )

    def finish(self, prepared: Prepared, variant: int, x_0: Tensor) -> Output:
        """Check, restore and encode what was drawn. Raises SampleError."""
        check_output(x_0, prepared.x_0)
        picture, policy = prepared.picture, self._recipe.images
        pixels, alpha = images.to_pixels(x_0.numpy(), self._model.value_range), picture.alpha
        if policy.restore_size:
            pixels = geometry.restore(pixels, prepared.placement)
        elif alpha is not None:
            size = (self._model.height, self._model.width)
            alpha = geometry.place(alpha[..., np.newaxis], size=size, policy=policy.resize)[0][..., 0]
        drawn = dataclasses.replace(picture, pixels=pixels, alpha=alpha)
        data, format = images.encode(drawn, policy=policy)
        field = output_field(prepared.image_field, format)
        return self._output(prepared, variant, field, data, self._drawn_row)

    def original(self, prepared: Prepared) -> Output:
        """The kept original beside its variants, byte for byte."""
        return self._output(prepared, ORIGINAL, prepared.image_field, prepared.image, self._row)

    def failed(self, sample: Sample, error: SampleError, *, shard: str) -> list[tuple[Source, Row]]:
        """A row per variant for a sample that can't be processed."""
        source = Source(key=sample.key, offset=sample.offset, detail=error.detail)
        return [
            (source, self._bad_row("failed", source, shard, variant, error.reason))
            for variant in range(self._recipe.variants)
        ]

    def failed_variant(self, prepared: Prepared, variant: int, error: SampleError) -> tuple[Source, Row]:
        """The row of a variant that was drawn but can't be used."""
        source = Source(key=prepared.source.key, offset=prepared.source.offset, detail=error.detail)
        return source, self._bad_row("failed", source, prepared.shard, variant, error.reason)

    def unreadable(self, item: Unreadable, *, shard: str) -> tuple[Source, Row]:
        """The row of bytes that could not be read as a sample."""
        source = Source(key=item.key, offset=item.offset, detail=item.detail)
        return source, self._bad_row("unreadable", source, shard, 0, item.reason)

    def _label(self, sample: Sample) -> int | None:
        labels = self._recipe.model.class_labels
        if labels is None:
            return None
        label = fields.read_label(sample, labels.field)
        count = self._model.classes or 0
        if not 0 <= label < count or label == labels.null_label:
            detail = f"field {labels.field} holds {label}, which is no class of this model ({count} embeddings)"
            raise SampleError("label-out-of-range", detail)
        return label

    def _output(
        self,
        prepared: Prepared,
        variant: int,
        field: str,
        data: bytes,
        template: Row,
    ) -> Output:
        source_key = prepared.source.key or ""
        row_key = self._naming.row_key(shard=prepared.shard, key=source_key, variant=variant)
        key = member_key(self._recipe, row_key, variant)
        contents = fields.with_image(field, data, prepared.travelling)
        for name in contents:
            check_name(key, name)
        # Read back what will be written: that it decodes is part of being done.
        written = images.decode(data, field=field, channels=None, policy=self._recipe.images)
        height, width = written.pixels.shape[:2]
        row = dataclasses.replace(
            template,
            key=row_key,
            variant=variant,
            source_digest=self._naming.source_digest(prepared.image, row_key=row_key),
            output_digest=hashlib.sha256(data).hexdigest(),
            pixel_digest=pixel_digest(written),
            label=prepared.label if prepared.label_shows else None,
            width=width,
            height=height,
        )
        return Output(row=row, member_key=key, fields=contents)

    def _bad_row(self, status: Status, source: Source, shard: str, variant: int, reason: str) -> Row:
        key = None
        if source.key is not None:
            key = self._naming.row_key(shard=shard, key=source.key, variant=variant)
        return dataclasses.replace(
            self._row,
            key=key,
            variant=variant,
            status=status,
            reason=reason,
            # A sentence may quote the input, an offset finds it: under anonymize both stay private.
            detail=None if self._private else source.detail,
            offset=None if self._private else source.offset,
        )

    def _label_shows(self, sample: Sample, travelling: Mapping[str, bytes]) -> bool:
        labels = self._recipe.model.class_labels
        if labels is None or not self._private:
            return labels is not None
        return labels.field in travelling and travelling[labels.field] == sample.fields.get(labels.field)


def _sampler_name(sampler: Sampler) -> str:
    """The sampler column: the name the field has for what the recipe asks for."""
    if sampler.eta:
        return f"ancestral {sampler.variance}"
    return "ddim" if sampler.order == 1 else "dpm-solver++2m"
