"""Methods that go by codes: a shard's codes are drawn and kept first, and its outputs made of them.

Codes are a shard of their own with rows and a marker, committed like any other, so that what was drawn is not
drawn again. They give the sources back, so under anonymize they lie in the private dir.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from boomerang_batch.config.pipeline import ClassLabels, ModelSpec, Recipe
from boomerang_batch.data import fields
from boomerang_batch.data.codes import FIELD, check_codes, code_bytes, load_codes
from boomerang_batch.data.shards import Sample, check_name
from boomerang_batch.diffusion.codes import Code, shifted
from boomerang_batch.diffusion.denoiser import DenoiserSpec, Told
from boomerang_batch.diffusion.engine import Draw, Walk
from boomerang_batch.diffusion.noise import derived_key
from boomerang_batch.errors import (
    ConfigError,
    MeasureError,
    SampleError,
)
from boomerang_batch.run.chained import Choosing, Drawer, Refining, Worth
from boomerang_batch.run.decoder import Decoder
from boomerang_batch.run.guards import Seen, check_hidden
from boomerang_batch.run.kept_codes import MAX_CODE_BYTES, Codes
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.stages import Made, Output, Prepared
from boomerang_batch.run.transform import Transform, told

_REFINE = "refine"


def check_target(recipe: Recipe, model: DenoiserSpec) -> None:
    """Raise ConfigError for a target that means nothing to the decoding model, or may be what a source is."""
    target, asked = recipe.target, recipe.decoded_by
    if target is None:
        return
    if recipe.purpose == "anonymize" and (model.latent or model.conditioning == "prompt"):
        raise ConfigError(
            f"method {recipe.method} under purpose anonymize takes a pixel model that is told classes: two "
            "prompts may mean the same, and behind an autoencoder nobody sees whether a code gave its source"
            " back"
        )
    prompts, labels = asked.prompts, asked.class_labels
    names_prompt = target.prompt is not None or target.field is not None
    if model.conditioning == "prompt" and names_prompt and (prompts is None or prompts.field is None):
        raise ConfigError(
            "a target for a model that is told prompts needs model.prompts.field, each sample's own: where one "
            "prompt is for all, the text encoders are let go"
        )
    if target.select == "class" and model.conditioning != "label":
        raise ConfigError(
            "target.select class asks for the class that a sample becomes, and the decoding model is told none"
        )
    null_label = None if labels is None else labels.null_label
    known = model.conditioning == "label" and target.label in set(range(model.classes or 0)) - {null_label}
    if target.label is not None and not known:
        raise ConfigError(
            f"target.label {target.label} is no class of this model, which has {model.classes or 'none'}"
        )
    if target.prompt is not None and model.conditioning != "prompt":
        raise ConfigError("target.prompt: this model is told no prompts")
    if target.field is not None and model.conditioning == "none":
        raise ConfigError("target.field: this model is told neither a class nor a prompt")


class _Coded(Transform):
    """What drawing and decoding codes have in common: what a sample is to become, and how it is decoded."""

    def __init__(self, *arguments: Any, decoder: Decoder | None = None, **options: Any) -> None:
        """`decoder` None: the model itself."""
        super().__init__(*arguments, **options)
        if decoder is None:
            decoder = Decoder(asked=self._recipe.model, model=self._model, walks=self._walks)
        self._decoder = decoder

    @property
    def _trials(self) -> int:
        return 1 if self._recipe.target is None else self._recipe.target.trials

    def _counterpart(self, sample: Sample, prepared: Prepared) -> Prepared:
        """The sample as it is decoded. Raises SampleError where it can't be what it is to become."""
        target = self._target(sample, prepared.condition)
        if self._recipe.purpose == "anonymize" and target == prepared.condition:
            raise SampleError(
                "target-is-source", "it is what it is to become, and its code would give back the source"
            )
        walks = tuple(
            self._decoder.walks.resolve(
                variant, noise_key=noise_key, fields=sample.fields, size=prepared.canvas.size
            )
            for variant, noise_key in enumerate(prepared.noise_keys)
        )
        return dataclasses.replace(prepared, condition=target, walks=walks)

    def _fed(self, prepared: Prepared, variant: int, codes: Sequence[Code], *, trial: int) -> Iterator[Draw]:
        """The draws that decode a variant's codes."""
        for draw in Transform.draws(self, prepared):
            if draw.tag.variant == variant:
                tag = dataclasses.replace(draw.tag, trial=trial)
                code = self._moved(codes[draw.tag.index], draw.walk)
                yield dataclasses.replace(draw, tag=tag, code=code)

    def _moved(self, code: Code, walk: Walk) -> Code:
        """A code with its colours moved, where the recipe wants them to be."""
        shift = None if self._recipe.target is None else self._recipe.target.shift
        if shift is None:
            return code
        return shifted(code, walk.solver, torch.tensor(shift.by), over=shift.over)

    def _target(self, sample: Sample, source: Told) -> Told:
        """What the sample is to become; what it is, where the recipe has no target."""
        target, model = self._recipe.target, self._decoder.model
        if target is None:
            return source
        if target.field is not None and model.conditioning == "prompt":
            return fields.read_text(sample, target.field.lower())
        if target.field is not None:
            asked = ClassLabels(field=target.field)
            return told(sample, ModelSpec(source="", class_labels=asked), model)
        if target.label is not None or target.prompt is not None:
            return target.prompt if target.label is None else target.label
        return told(sample, self._decoder.asked, model)


class Encoding(_Coded):
    """Draws codes instead of outputs: of a sample's variants, the code of each, or the best of several."""

    def drawer(self, encoding: Drawer, decoding: Drawer) -> Drawer:
        """What draws for it."""
        if self._trials == 1:
            return encoding
        return Choosing(
            encoding=encoding, decoding=decoding, again=self._decoded, worth=self._worth, trials=self._trials
        )

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """As a Transform does; with what is decoded to choose by. Raises SampleError."""
        prepared = super().prepare(sample, shard=shard)
        if self._trials == 1:
            return prepared
        return dataclasses.replace(prepared, counterpart=self._counterpart(sample, prepared))

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """As a Transform does, along a path; all pieces of a trial before the next one's."""
        for _, pieces in itertools.groupby(super().draws(prepared), key=lambda draw: draw.tag.variant):
            for trial, draw in itertools.product(range(self._trials), list(pieces)):
                # The first trial is what there would be without others.
                key = derived_key(draw.noise_key, f"trial {trial}") if trial else draw.noise_key
                tag, path = dataclasses.replace(draw.tag, trial=trial), cast("Any", self._recipe.method)
                # An energy leads to what the code is decoded to, away from what it was found under.
                found = prepared.condition
                yield dataclasses.replace(draw, tag=tag, noise_key=key, path=path, condition=found)

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """Check and encode the codes of one variant. Raises SampleError."""
        prepared, number = made.prepared, self.number(made)
        if made.refused is not None:
            raise made.refused
        if not all(_is_finite(code) for code in made.codes):
            raise SampleError("non-finite-output", "the model returned NaN or infinity; try dtype float32")
        trial = None if self._trials == 1 else made.trial
        data = code_bytes(made.codes, proof=self.proof(prepared, number), trial=trial)
        if len(data) > MAX_CODE_BYTES:
            raise SampleError("code-too-large", f"its code has {len(data):,} bytes; take fewer steps")
        key = self._naming.row_key(shard=prepared.shard, key=prepared.source.key or "", variant=number)
        row = self._rows.drawn(
            prepared.walks[made.variant].walk,
            t=prepared.walks[made.variant].t,
            passes=made.pass_number,
            batch_size=made.batch_size,
            dtype=made.dtype,
            flagged=None,
        )
        row = dataclasses.replace(
            row,
            key=key,
            variant=number,
            source_digest=self._naming.source_digest(prepared.image, row_key=key),
            output_digest=hashlib.sha256(data).hexdigest(),
            # Each trial is drawn and decoded.
            evaluations=(row.evaluations or 0) * (1 if trial is None else 2 * self._trials),
            trial=trial,
        )
        name = member_key(self._recipe, key, number)
        check_name(name, FIELD)
        return Output(row=row, member_key=name, fields={FIELD: data})

    def _decoded(self, made: Made) -> Iterator[Draw]:
        """The draws that show what a trial's code becomes."""
        prepared = made.prepared.counterpart or made.prepared
        return self._fed(prepared, made.variant, made.codes, trial=made.trial)

    def _worth(self, made: Made) -> Worth:
        """How good it is what a code became. Raises SampleError where the classifier can't tell."""
        pieces = zip(made.prepared.canvas.pieces, made.pieces, strict=True)
        apart = sum(float((x_0 - piece.image).double().square().sum()) for piece, x_0 in pieces)
        judge = self._decoder.judge
        if judge is None or not math.isfinite(apart):
            return (-apart,)
        pixels = self.picture(made).pixels
        colours = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        try:
            [sure] = judge.probability(colours[None], str(made.prepared.condition))
        except MeasureError as error:
            raise SampleError("not-judged", f"trial {made.trial}: {error}") from error
        # Under anonymize the first of equals is kept, not the one that is most like what is to be hidden.
        return (sure,) if self._recipe.purpose == "anonymize" else (sure, -apart)


class Decoding(_Coded):
    """Makes outputs of the codes of one shard, under the recipe's target."""

    def __init__(
        self, *arguments: Any, codes: Codes, wants: Callable[[str | None, int], bool], **options: Any
    ) -> None:
        """`wants` tells which outputs, by key and number, there are to be."""
        super().__init__(*arguments, **options)
        self._codes = codes
        self._wants = wants

    def drawer(self, decoding: Drawer) -> Drawer:
        """What draws for it."""
        if self._decoder.refining is None:
            return decoding
        return Refining(drawing=decoding, again=self._refined, check=self._check_hidden)

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """As a Transform does, to be told the target. Raises SampleError too where a code is missing or bad."""
        prepared = super().prepare(sample, shard=shard)
        becoming = self._counterpart(sample, prepared)
        drawn = prepared if self._trials == 1 else dataclasses.replace(prepared, counterpart=becoming)
        for variant in range(self._recipe.variants):
            if prepared.canvas.pieces and self._wants(sample.key, variant):
                self._check(becoming, variant, proof=self.proof(drawn, variant))
                self._refining_walk(becoming, variant)  # which there may be none of at this size
        return becoming

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """As a Transform does, fed the codes."""
        for variant in range(self._recipe.variants):
            if self._wants(prepared.source.key, variant):
                codes, trial = self._read(prepared, variant)
                yield from self._fed(prepared, variant, codes, trial=trial)

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """As a Transform does. Raises SampleError too where what is to be hidden came back."""
        if made.refused is not None:
            raise made.refused
        self._check_hidden(made)
        output = super().finish(made, seen=seen)
        more = self._refining_walk(made.prepared, made.variant)
        known = output.row.evaluations
        row = dataclasses.replace(
            output.row,
            evaluations=known if known is None or more is None else known + more.n,
            trial=None if self._trials == 1 else made.trial,
        )
        return dataclasses.replace(output, row=row)

    def _told_label(self, prepared: Prepared) -> int | None:
        """The class it became, where the recipe or what travels says it anyway."""
        target = self._recipe.target
        if target is None:
            return super()._told_label(prepared)
        labels = self._decoder.asked.class_labels
        field = target.field or ("" if labels is None else labels.field)
        known = target.label is not None or field.lower() in prepared.shows
        return prepared.condition if known and isinstance(prepared.condition, int) else None

    def _check_hidden(self, made: Made) -> None:
        """Raise SampleError where what is to be hidden came back, whether or not it is refined then."""
        if self._recipe.purpose == "anonymize":
            for piece, x_0 in zip(made.prepared.canvas.pieces, made.pieces, strict=True):
                check_hidden(x_0, piece.image, value_range=self._model.value_range)

    def _check(self, prepared: Prepared, variant: int, *, proof: bytes) -> None:
        """Raise SampleError where the codes of a variant's pieces are none, or not of this `proof`."""
        place, steps = self._codes.place(self._name(prepared, variant)), prepared.walks[variant].walk.n
        check_codes(place, proof=proof, pieces=len(prepared.canvas.pieces), steps=steps)

    def _read(self, prepared: Prepared, variant: int) -> tuple[list[Code], int]:
        """The codes of a variant's pieces, and which trial they are."""
        return load_codes(self._codes.place(self._name(prepared, variant)), pieces=len(prepared.canvas.pieces))

    def _refined(self, made: Made) -> Iterator[Draw]:
        """The draws that refine what was decoded."""
        walk = self._refining_walk(made.prepared, made.variant)
        for draw in Transform.draws(self, made.prepared):
            if draw.tag.variant == made.variant and walk is not None:
                tag = dataclasses.replace(draw.tag, trial=made.trial)
                key = derived_key(draw.noise_key, _REFINE)
                image = made.pieces[draw.tag.index]
                yield dataclasses.replace(draw, tag=tag, image=image, noise_key=key, walk=walk)

    def _refining_walk(self, prepared: Prepared, variant: int) -> Walk | None:
        if self._decoder.refining is None:
            return None
        size = prepared.canvas.size
        return self._decoder.refining.resolve(variant, noise_key=b"", fields={}, size=size).walk

    def _must_change(self, prepared: Prepared, variant: int) -> bool:
        """A code may give back its image, which is what it is for, unless the image is to be hidden."""
        return self._recipe.purpose == "anonymize" and super()._must_change(prepared, variant)

    def _name(self, prepared: Prepared, variant: int) -> str:
        key = self._naming.row_key(shard=prepared.shard, key=prepared.source.key or "", variant=variant)
        return member_key(self._recipe, key, variant)


def _is_finite(code: Code) -> bool:
    return bool(code.x_n.isfinite().all()) and (code.residuals is None or bool(code.residuals.isfinite().all()))
