"""One sample on its way: from bytes to draws, and from what was drawn to bytes and a provenance row.

No I/O and no model here; a sample that can't be processed raises SampleError and costs nobody else anything.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from boomerang_batch.config.pipeline import ModelSpec, Recipe
from boomerang_batch.data import fields, images
from boomerang_batch.data.formats import output_field
from boomerang_batch.data.provenance import Row, Status
from boomerang_batch.data.shards import Sample, Unreadable, check_name
from boomerang_batch.diffusion.denoiser import Condition, DenoiserSpec, Guided, Told
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.errors import SampleError
from boomerang_batch.run.canvas import Layout
from boomerang_batch.run.guards import RepeatedOutputError, Seen, check_changed, check_output
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.naming import ORIGINAL, Naming, member_key, refuse_reserved_key
from boomerang_batch.run.rows import Rows
from boomerang_batch.run.stack import short_versions
from boomerang_batch.run.stages import Made, Output, PieceTag, Place, Prepared, Refusal
from boomerang_batch.run.walks import Walks

FLAGGED = "flagged"
FLAG_FIELD = "flagged.cls"
"""Field that tells, as 0 or 1, what the safety checker said of an output that is kept whatever it said."""


class Transform:
    """What one run does to any sample: the recipe, the model's needs and the run's names, applied.

    `flags` asks the model's safety checker about an output's pixels; None: nobody asks.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: DenoiserSpec,
        walks: Walks,
        naming: Naming,
        stack: Mapping[str, str],
        *,
        flags: Callable[[images.Pixels], bool] | None = None,
    ) -> None:
        self._recipe = recipe
        self._model = model
        self._layout = Layout(recipe, model)
        self._walks = walks
        self._naming = naming
        self._flags = flags
        self._who = "the model" + ("" if recipe.energy is None else f", led by {recipe.energy.source},")
        self._made_by = json.dumps([recipe.digest, model.digest, dict(stack)], sort_keys=True).encode()
        self._rows = Rows(recipe, naming, model_digest=model.digest, versions=short_versions(stack))

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
            condition=told(sample, recipe.model, self._model),
            toward=self._toward(sample),
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
                    batch_size=0,
                    dtype=self._recipe.model.dtype,
                )

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """A draw for each piece of each variant."""
        passes = self._recipe.passes
        conditions = [self._led(prepared, piece.image) for piece in prepared.canvas.pieces]
        for variant, (resolved, noise_key) in enumerate(zip(prepared.walks, prepared.noise_keys, strict=True)):
            for index, piece in enumerate(prepared.canvas.pieces):
                yield Draw(
                    tag=PieceTag(prepared=prepared, variant=variant, index=index),
                    image=piece.image,
                    noise_key=noise_key,
                    walk=resolved.walk,
                    condition=conditions[index],
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

    def nothing_seen(self) -> Seen:
        """What `finish` compares with, before a task's first output."""
        return Seen(self._model.value_range)

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """Check, restore and encode what was drawn; `seen` are the task's other outputs. Raises SampleError."""
        prepared, recipe = made.prepared, self._recipe
        number = self.number(made)
        moved = self._must_change(prepared, made.variant)
        for piece, x_0 in zip(prepared.canvas.pieces, made.pieces, strict=True):
            check_output(x_0, piece.image, value_range=self._model.value_range, who=self._who)
            if moved:
                check_changed(x_0, piece.image, value_range=self._model.value_range)
        digests = tuple(map(seen.digest, made.pieces)) if moved else ()
        self.check_repeated(prepared, number, digests, seen=seen)
        drawn = self.picture(made)
        flagged = None if self._flags is None else self._flags(drawn.pixels)
        if flagged and recipe.model.safety != "keep":
            raise SampleError(FLAGGED, "the model's safety checker objects to the output")
        data, format = images.encode(drawn, policy=recipe.images)
        resolved = prepared.walks[made.variant]
        if made.pieces:
            shown = resolved.field is None or resolved.field in prepared.shows
            template = self._rows.drawn(
                resolved.walk,
                t=resolved.t if shown else None,
                passes=made.pass_number,
                batch_size=made.batch_size,
                dtype=made.dtype,
                flagged=flagged,
            )
        else:
            template = self._rows.untouched(passes=made.pass_number, flagged=flagged)
        output = self._output(prepared, number, output_field(prepared.image_field, format), data, template)
        return replace(output, digests=digests)

    def picture(self, made: Made) -> images.Picture:
        """What was drawn, put back into its picture."""
        return self._layout.take_back(made.prepared.canvas, made.pieces, made.prepared.picture)

    def _must_change(self, prepared: Prepared, variant: int) -> bool:
        """Whether an output can neither be its input nor another's output."""
        return prepared.walks[variant].walk.n > 0

    def check_repeated(
        self, prepared: Prepared, number: int, digests: Sequence[bytes | None], *, seen: Seen
    ) -> None:
        """Raise RepeatedOutputError where a piece of an output, by its digest, is one that was seen before.

        Looks at every piece, though one is enough to refuse the output: others may repeat the rest.
        """
        others: list[Hashable] = []
        repeated = False
        drawn_of, pass_number = self._drawn_of(prepared, number)
        for index, digest in enumerate(digests):
            place = Place(
                noise_key=drawn_of,
                pass_number=pass_number,
                index=index,
                source=prepared.source,
                shard=prepared.shard,
                number=number,
                fingerprint=prepared.fingerprint,
            )
            try:
                seen.check(digest, draw=place)
            except RepeatedOutputError as error:
                others += error.others
                repeated = True
        if repeated:
            raise RepeatedOutputError(others)

    def _drawn_of(self, prepared: Prepared, number: int) -> tuple[bytes, int]:
        """What an output was drawn of: noise key and number. Those of which this is equal may be equal."""
        return prepared.noise_keys[self.variant(number)], number

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

    def proof(self, prepared: Prepared, number: int) -> bytes:
        """What proves that an output, by its number, was made of just this sample and by this very run.

        A hash under the noise key: under a secret it tells nothing of the sample.
        """
        return hashlib.blake2b(
            number.to_bytes(4, "little") + self._made_by + prepared.fingerprint,
            key=prepared.noise_keys[self.variant(number)],
            digest_size=16,
        ).digest()

    def failed_output(self, prepared: Prepared, number: int, error: SampleError) -> Iterator[Refusal]:
        """An output that was drawn but can't be used, or is not wanted.

        Of equal outputs all go, so that it doesn't matter which one came first.
        """
        places = [(prepared.source, prepared.shard, number, prepared.fingerprint)]
        if isinstance(error, RepeatedOutputError):
            others = [one for one in error.others if isinstance(one, Place)]
            places += [(one.source, one.shard, one.number, one.fingerprint) for one in others]
        unwanted = error.reason == FLAGGED and self._recipe.model.safety == "drop"
        status: Status = "dropped" if unwanted else "failed"
        for source, shard, number, fingerprint in places:
            told = replace(source, detail=error.detail)
            row = self._rows.bad(status, told, shard=shard, number=number, reason=error.reason)
            yield Refusal(source=told, row=row, fingerprint=fingerprint)

    def unreadable(self, item: Unreadable, *, shard: str) -> tuple[Source, Row]:
        """The row of bytes that could not be read as a sample."""
        source = Source(key=item.key, offset=item.offset, detail=item.detail)
        return source, self._rows.bad("unreadable", source, shard=shard, number=0, reason=item.reason)

    def number(self, made: Made) -> int:
        """An output's number, the variant column: passes that are outputs count like variants."""
        passes = self._recipe.passes
        return made.variant * passes.count + made.pass_number - 1 if passes.outputs == "all" else made.variant

    @property
    def output_numbers(self) -> range:
        """The numbers of a sample's outputs."""
        return range(self._recipe.outputs)

    def numbers(self, variant: int) -> range:
        """The numbers of a variant's outputs."""
        passes = self._recipe.passes
        each = passes.count if passes.outputs == "all" else 1
        return range(variant * each, (variant + 1) * each)

    def variant(self, number: int) -> int:
        """The variant of an output's number."""
        passes = self._recipe.passes
        return number // passes.count if passes.outputs == "all" else number

    def _toward(self, sample: Sample) -> int | None:
        """The class that an energy leads the sample to, if one does."""
        energy = self._recipe.energy
        if energy is None or energy.toward is None:
            return None
        if energy.toward.field is None:
            return energy.toward.label
        field, count = energy.toward.field, self._model.guided_classes or 0
        label = fields.read_label(sample, field.lower())  # as the reader gives fields
        if not 0 <= label < count:
            detail = f"field {field} holds {label}, and {energy.source} knows {count} classes"
            raise SampleError("label-out-of-range", detail)
        return label

    def _led(self, prepared: Prepared, image: Tensor) -> Condition:
        """What a piece is drawn under; guided where the recipe has an energy."""
        if self._recipe.energy is None:
            return prepared.condition
        return Guided(condition=prepared.condition, about=image if prepared.toward is None else prepared.toward)

    def _output(self, prepared: Prepared, number: int, field: str, data: bytes, template: Row) -> Output:
        row = self._rows.filled(
            template,
            shard=prepared.shard,
            key=prepared.source.key or "",
            number=number,
            image=prepared.image,
            data=data,
            field=field,
            label=self._told_label(prepared),
        )
        key = member_key(self._recipe, row.key or "", number)
        contents = fields.with_image(field, data, prepared.travelling)
        if row.flagged is not None:
            if FLAG_FIELD in contents:
                detail = f"the checker's verdict would replace the travelling field {FLAG_FIELD}; drop it"
                raise SampleError("field-collision", detail)
            contents[FLAG_FIELD] = str(int(row.flagged)).encode()
        for name in contents:
            check_name(key, name)
        return Output(row=row, member_key=key, fields=contents)

    def _told_label(self, prepared: Prepared) -> int | None:
        """The class that the model was told, where rows may tell it."""
        labels = self._recipe.model.class_labels
        told = labels is not None and labels.field.lower() in prepared.shows
        return prepared.condition if told and isinstance(prepared.condition, int) else None

    def _shown(self, sample: Sample, travelling: Mapping[str, bytes]) -> frozenset[str]:
        if self._recipe.purpose != "anonymize":
            return frozenset(sample.fields)
        return frozenset(name for name, data in travelling.items() if data == sample.fields.get(name))


def told(sample: Sample, asked: ModelSpec, model: DenoiserSpec) -> Told:
    """What a model, as it is `asked` for, is told of a sample: a label, its prompt or everybody's, or nothing.

    Raises SampleError where the sample does not say, or no class of this model.
    """
    labels, prompts = asked.class_labels, asked.prompts
    if model.conditioning == "prompt":
        field = None if prompts is None else prompts.field
        return None if field is None else fields.read_text(sample, field.lower())
    if labels is None:
        return None
    label = fields.read_label(sample, labels.field.lower())  # as the reader gives fields
    count = model.classes or 0
    if not 0 <= label < count or label == labels.null_label:
        detail = f"field {labels.field} holds {label}, which is no class of this model ({count} embeddings)"
        raise SampleError("label-out-of-range", detail)
    return label
