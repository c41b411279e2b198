"""One sample on its way: from bytes to draws, and from what was drawn to bytes and a provenance row.

No I/O and no model here; a sample that can't be processed raises SampleError and costs nobody else anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.formats import output_field
from boomerang_batch.data.provenance import Row
from boomerang_batch.data.shards import Sample, Unreadable, check_name
from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.diffusion.guards import Seen, check_changed, check_output
from boomerang_batch.errors import SampleError
from boomerang_batch.run.canvas import Canvas, Layout
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.naming import ORIGINAL, Naming, member_key, refuse_reserved_key
from boomerang_batch.run.rows import Rows
from boomerang_batch.run.walks import Resolved, Walks

FLAGGED = "flagged"
FLAG_FIELD = "flagged.cls"
"""Field that tells, as 0 or 1, what the safety checker said of an output that is kept whatever it said."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample decoded and laid out, with all that finishing its variants needs."""

    source: Source
    shard: str
    image_field: str
    image: bytes
    picture: images.Picture
    canvas: Canvas
    walks: tuple[Resolved, ...]
    """One per variant."""
    noise_keys: tuple[bytes, ...]
    condition: Condition
    shows: frozenset[str]
    """Fields whose values rows may tell: all, but under anonymize only those that travel as they are."""
    travelling: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class PieceTag:
    """What a draw is for: the piece of which variant of which sample."""

    prepared: Prepared
    variant: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """All that was drawn for one output."""

    prepared: Prepared
    variant: int
    pass_number: int
    pieces: Sequence[Tensor]
    """(C, h, w) float32 for each of the canvas's pieces, in order."""
    batch_size: int
    dtype: str
    flagged: bool | None = None
    """What the model's safety checker says, where it was asked."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished output: its row, its name in the tar, its fields."""

    row: Row
    member_key: str
    fields: Mapping[str, bytes]


class Transform:
    """What one run does to any sample: the recipe, the model's needs and the run's names, applied."""

    def __init__(
        self, recipe: Recipe, model: DenoiserSpec, walks: Walks, naming: Naming, versions: str
    ) -> None:
        self._recipe = recipe
        self._model = model
        self._layout = Layout(recipe, model)
        self._walks = walks
        self._naming = naming
        self._rows = Rows(recipe, naming, model_digest=model.digest, versions=versions)

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """Decode, lay out and name one sample. Raises SampleError."""
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
        canvas = self._layout.lay_out(picture, sample.fields)
        self._layout.refuse_moved_places(canvas, travelling)
        identity = self._naming.identity(shard=shard, key=sample.key, image=image)
        noise_keys = tuple(self._naming.noise_key(identity, variant) for variant in range(recipe.variants))
        return Prepared(
            source=Source(key=sample.key, offset=sample.offset),
            shard=shard,
            image_field=image_field,
            image=image,
            picture=picture,
            canvas=canvas,
            walks=tuple(
                self._walks.resolve(variant, noise_key=noise_key, fields=sample.fields, size=canvas.size)
                for variant, noise_key in enumerate(noise_keys)
            ),
            noise_keys=noise_keys,
            condition=self._condition(sample),
            shows=self._shown(sample, travelling),
            # In an order of our own, so that under anonymize not even that comes from the input.
            travelling=dict(sorted(travelling.items())),
        )

    def untouched(self, prepared: Prepared) -> Iterator[Made]:
        """The outputs of a sample of which nothing is to be drawn, for its region is empty; else none."""
        if not prepared.canvas.pieces:
            for variant, pass_number in self._outputs():
                yield Made(
                    prepared=prepared,
                    variant=variant,
                    pass_number=pass_number,
                    pieces=(),
                    batch_size=self._recipe.model.autoencoder.batch_size,
                    dtype=self._recipe.model.dtype,
                )

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """A draw for each piece of each variant."""
        passes = self._recipe.passes
        for variant, (resolved, noise_key) in enumerate(zip(prepared.walks, prepared.noise_keys, strict=True)):
            for index, piece in enumerate(prepared.canvas.pieces):
                yield Draw(
                    tag=PieceTag(prepared=prepared, variant=variant, index=index),
                    image=piece.image,
                    noise_key=noise_key,
                    walk=resolved.walk,
                    condition=prepared.condition,
                    passes=passes.count,
                    emit_all=passes.outputs == "all",
                    window=piece.window,
                    region=piece.region,
                )

    def _outputs(self) -> Iterator[tuple[int, int]]:
        """(variant, pass number) of every output of a sample, in the order of their numbers."""
        count = self._recipe.passes.count
        numbers = range(1, count + 1) if self._recipe.passes.outputs == "all" else [count]
        return itertools.product(range(self._recipe.variants), numbers)

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """Check, restore and encode what was drawn; `seen` are the task's other outputs. Raises SampleError."""
        prepared, recipe = made.prepared, self._recipe
        for index, (piece, x_0) in enumerate(zip(prepared.canvas.pieces, made.pieces, strict=True)):
            check_output(x_0, piece.image)
            if prepared.walks[made.variant].walk.n:
                check_changed(x_0, piece.image)
                seen.check(x_0, draw=(prepared.noise_keys[made.variant], made.pass_number, index))
        if made.flagged and recipe.model.safety != "keep":
            raise SampleError(FLAGGED, "the model's safety checker objects to the output")
        drawn = self._layout.take_back(prepared.canvas, made.pieces, prepared.picture)
        data, format = images.encode(drawn, policy=recipe.images)
        resolved = prepared.walks[made.variant]
        template = self._rows.drawn(
            resolved if resolved.field is None or resolved.field in prepared.shows else None,
            passes=made.pass_number,
            batch_size=made.batch_size,
            dtype=made.dtype,
            flagged=made.flagged,
        )
        number = self._number(made.variant, made.pass_number)
        return self._output(prepared, number, output_field(prepared.image_field, format), data, template)

    def original(self, prepared: Prepared) -> Output:
        """The kept original beside its variants, byte for byte."""
        return self._output(prepared, ORIGINAL, prepared.image_field, prepared.image, self._rows.original())

    def failed(self, sample: Sample, error: SampleError, *, shard: str) -> list[tuple[Source, Row]]:
        """A row per output for a sample that can't be processed."""
        source = Source(key=sample.key, offset=sample.offset, detail=error.detail)
        return [
            (source, self._rows.bad("failed", source, shard=shard, number=number, reason=error.reason))
            for number in range(self._recipe.outputs)
        ]

    def failed_output(self, made: Made, error: SampleError) -> tuple[Source, Row]:
        """The row of an output that was drawn but can't be used, or is not wanted."""
        prepared, number = made.prepared, self._number(made.variant, made.pass_number)
        unwanted = error.reason == FLAGGED and self._recipe.model.safety == "drop"
        source = Source(key=prepared.source.key, offset=prepared.source.offset, detail=error.detail)
        row = self._rows.bad(
            "dropped" if unwanted else "failed",
            source,
            shard=prepared.shard,
            number=number,
            reason=error.reason,
        )
        return source, row

    def unreadable(self, item: Unreadable, *, shard: str) -> tuple[Source, Row]:
        """The row of bytes that could not be read as a sample."""
        source = Source(key=item.key, offset=item.offset, detail=item.detail)
        return source, self._rows.bad("unreadable", source, shard=shard, number=0, reason=item.reason)

    def _number(self, variant: int, pass_number: int) -> int:
        """An output's number, the variant column: passes that are outputs count like variants."""
        passes = self._recipe.passes
        return variant * passes.count + pass_number - 1 if passes.outputs == "all" else variant

    def _condition(self, sample: Sample) -> Condition:
        """What the sample is drawn under: its label, its own prompt or everybody's, or nothing."""
        labels, prompts = self._recipe.model.class_labels, self._recipe.model.prompts
        if self._model.conditioning == "prompt":
            field = None if prompts is None else prompts.field
            return None if field is None else fields.read_text(sample, field)
        if labels is None:
            return None
        label = fields.read_label(sample, labels.field)
        count = self._model.classes or 0
        if not 0 <= label < count or label == labels.null_label:
            detail = f"field {labels.field} holds {label}, which is no class of this model ({count} embeddings)"
            raise SampleError("label-out-of-range", detail)
        return label

    def _output(self, prepared: Prepared, number: int, field: str, data: bytes, template: Row) -> Output:
        labels = self._recipe.model.class_labels
        told = labels is not None and labels.field in prepared.shows
        row = self._rows.filled(
            template,
            shard=prepared.shard,
            key=prepared.source.key or "",
            number=number,
            image=prepared.image,
            data=data,
            field=field,
            label=prepared.condition if told and isinstance(prepared.condition, int) else None,
        )
        key = member_key(self._recipe, row.key or "", number)
        contents = fields.with_image(field, data, prepared.travelling)
        if row.flagged is not None:
            contents[FLAG_FIELD] = str(int(row.flagged)).encode()
        for name in contents:
            check_name(key, name)
        return Output(row=row, member_key=key, fields=contents)

    def _shown(self, sample: Sample, travelling: Mapping[str, bytes]) -> frozenset[str]:
        if self._recipe.purpose != "anonymize":
            return frozenset(sample.fields)
        return frozenset(name for name, data in travelling.items() if data == sample.fields.get(name))
