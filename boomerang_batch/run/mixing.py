"""Methods that mix latents: each image is turned into one by DDIM inversion, and mixtures of them are decoded.

A shard's latents are codes, drawn, kept and committed as `coding` has it, one for each sample. An output takes
the place of the sample whose latent went into it: its key, its fields, its condition.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from boomerang_batch import storage
from boomerang_batch.config.pipeline import FromField, Interpolate, Recipe
from boomerang_batch.data import fields
from boomerang_batch.data.codes import read_codes
from boomerang_batch.data.provenance import Row, read_rows
from boomerang_batch.data.shards import Sample
from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.engine import Draw
from boomerang_batch.diffusion.latents import slerp
from boomerang_batch.errors import SampleError
from boomerang_batch.run.appendix import appendices, is_appendix, shard_of
from boomerang_batch.run.coding import Encoding
from boomerang_batch.run.commit import PROVENANCE_SUFFIX
from boomerang_batch.run.guards import Seen, check_apart, check_hidden
from boomerang_batch.run.kept_codes import Codes
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.naming import member_key
from boomerang_batch.run.stages import Made, Mixture, Output, Prepared
from boomerang_batch.run.tasks import Task
from boomerang_batch.run.transform import Transform


class Inverting(Encoding):
    """Finds latents instead of outputs: of each sample one, as its first variant's code."""

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """As a Transform does for the first variant, up instead of down."""
        for draw in Transform.draws(self, prepared):
            if draw.tag.variant == 0:
                # An energy leads the way down alone.
                up, found = self._walks.inverted(draw.walk), prepared.condition
                yield dataclasses.replace(draw, path="ddim", walk=up, condition=found)

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """As an Encoding does; the row tells what partners are chosen by."""
        output = super().finish(made, seen=seen)
        label = made.prepared.condition
        height, width = made.codes[0].x_n.shape[1:]
        row = dataclasses.replace(
            output.row, label=label if isinstance(label, int) else None, height=height, width=width
        )
        return dataclasses.replace(output, row=row)

    def failed(self, sample: Sample, error: SampleError, *, shard: str) -> list[tuple[Source, Row]]:
        """One row, as for what succeeds."""
        return super().failed(sample, error, shard=shard)[:1]


class Latents:
    """The latents of a shard, by row key; those of an appendix go before its shard's."""

    def __init__(self, recipe: Recipe, codes: Sequence[Codes], rows: Sequence[Row]) -> None:
        """`codes` of the shard and its appendices, in order; `rows` of all of them."""
        self._recipe = recipe
        self._codes = codes
        self.rows = {(row.key or ""): row for row in rows if row.status == "ok"}
        """Of those that there are, in the order of the shard."""

    def read(self, row_key: str, *, proof: bytes | None = None) -> Tensor:
        """The latent (c, h, w) of this row. Raises SampleError `no-code`, and as `read_codes` does."""
        name = member_key(self._recipe, row_key, 0)
        for codes in reversed(self._codes):
            if name in codes:
                [code] = read_codes(codes.read(name), proof=proof, pieces=1, steps=None)
                return code.x_n
        raise SampleError("no-code", "it could not be inverted; the rows of the codes say why")


def inverting(task: Task) -> Task:
    """The task of drawing the latents of a task's samples."""
    if task.only is None:
        return task
    return dataclasses.replace(task, only=dict.fromkeys(task.only, (0,)))


def latents_before(home: str, task: Task) -> Iterator[Task]:
    """Of an appendix, the tasks that have drawn its shard's latents, and those of earlier appendices."""
    if is_appendix(task.name):
        stem = shard_of(task.name)
        yield dataclasses.replace(task, name=stem, only=None)
        for name in appendices(storage.list_names(home)).get(stem, ()):
            if name != task.name:
                yield dataclasses.replace(task, name=name, only={})


def rows_of_codes(home: str, name: str) -> list[Row]:
    """The rows of a shard of codes."""
    with storage.open_read(storage.join(home, name + PROVENANCE_SUFFIX)) as stream:
        return read_rows(stream)


class Mixing(Transform, abc.ABC):
    """Makes outputs of mixed latents. What a method mixes, it says in `_mixtures`."""

    def __init__(self, *arguments: Any, latents: Latents, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._latents = latents

    def prepare(self, sample: Sample, *, shard: str) -> Prepared:
        """As a Transform does, with a mixture for each variant. Raises SampleError too where there is none."""
        prepared = super().prepare(sample, shard=shard)
        own = self._latents.read(self._own(prepared), proof=self.proof(prepared, 0))
        mixtures = tuple(self._mixtures(sample, prepared, own))
        told = dataclasses.replace(prepared.source, detail="; ".join(mixture.told for mixture in mixtures))
        return dataclasses.replace(prepared, mixtures=mixtures, source=told)

    def draws(self, prepared: Prepared) -> Iterator[Draw]:
        """As a Transform does, from the mixtures on."""
        for draw in super().draws(prepared):
            latent = prepared.mixtures[draw.tag.variant].latent
            yield dataclasses.replace(draw, code=Code(x_n=latent, residuals=None))

    def finish(self, made: Made, *, seen: Seen) -> Output:
        """As a Transform does; the row tells the mixture where OUT may."""
        if self._recipe.purpose == "anonymize":
            for piece, x_0 in zip(made.prepared.canvas.pieces, made.pieces, strict=True):
                check_hidden(x_0, piece.image, value_range=self._model.value_range)
            return super().finish(made, seen=seen)
        output = super().finish(made, seen=seen)
        told = made.prepared.mixtures[made.variant].told
        return dataclasses.replace(output, row=dataclasses.replace(output.row, detail=told))

    @abc.abstractmethod
    def _mixtures(self, sample: Sample, prepared: Prepared, own: Tensor) -> Iterator[Mixture]:
        """What each variant is decoded from, of a sample whose own latent this is. Raises SampleError."""

    def _check_apart(self, mixed: Tensor, *latents: Tensor) -> None:
        """Raise SampleError where images are to be hidden, and a mixture is all but the latent of one."""
        if self._recipe.purpose == "anonymize":
            for latent in latents:
                check_apart(mixed, latent)

    def _own(self, prepared: Prepared) -> str:
        """The sample's row key among the latents."""
        return self._naming.row_key(shard=prepared.shard, key=prepared.source.key or "", variant=0)


class Interpolating(Mixing):
    """Makes outputs that lie between two samples of a shard."""

    def __init__(self, *arguments: Any, latents: Latents, **options: Any) -> None:
        super().__init__(*arguments, latents=latents, **options)
        self._block = self._recipe.interpolate or Interpolate()
        self._next = _following(latents.rows.values(), self._group, rank=self._rank)

    def _mixtures(self, sample: Sample, prepared: Prepared, own: Tensor) -> Iterator[Mixture]:
        partner = self._partner(sample, prepared.shard, self._own(prepared))
        other = self._latents.read(partner)
        weights = self._block.weights
        for variant in range(self._recipe.variants):
            weight = weights[variant if len(weights) > 1 else 0]
            mixed = slerp(own, other, weight)
            self._check_apart(mixed, own, other)
            yield Mixture(latent=mixed, told=f"partner={partner} weight={weight!r}")

    def _partner(self, sample: Sample, shard: str, own: str) -> str:
        """The row key of what the sample is mixed with. Raises SampleError `no-partner`."""
        if not isinstance(self._block.partner, FromField):
            partner = self._next[own]
            if partner == own:
                same = " and class" if self._block.same else ""
                raise SampleError(
                    "no-partner", f"no other sample of its shard has a latent of its size{same} to mix with"
                )
            return partner
        field = self._block.partner.field.lower()  # as the reader gives fields
        named = fields.read_text(sample, field)
        partner = self._naming.row_key(shard=shard, key=named, variant=0)
        if partner not in self._latents.rows:
            raise SampleError(
                "no-partner",
                f"field {field} names {named}, which has no latent in this shard; partners of other shards "
                "can't be had: put both into one",
            )
        if partner == own:
            raise SampleError("no-partner", f"field {field} names the sample itself")
        if self._size(self._latents.rows[partner]) != self._size(self._latents.rows[own]):
            raise SampleError("no-partner", f"field {field} names {named}, whose latent has another size")
        return partner

    def _drawn_of(self, prepared: Prepared, number: int) -> tuple[bytes, int]:
        """The mixture: two that are each other's partners have one image between them, halfway."""
        latent = prepared.mixtures[number].latent
        return hashlib.blake2b(latent.numpy().tobytes(), digest_size=16).digest(), 0

    def _rank(self, row_key: str) -> str:
        """Sorts keys in an order that nothing but seed or secret knows."""
        return self._naming.pseudonym(row_key.encode())

    def _group(self, row: Row) -> Hashable:
        """Equal for samples that may be partners."""
        return (row.label if self._block.same else None, self._size(row))

    @staticmethod
    def _size(row: Row) -> Hashable:
        return row.height, row.width


def _following(
    rows: Iterable[Row], group: Callable[[Row], Hashable], *, rank: Callable[[str], str]
) -> Mapping[str, str]:
    """For each row's key the next of its group, in a circle through all of it."""
    members: dict[Hashable, list[str]] = defaultdict(list)
    for row in rows:
        members[group(row)].append(row.key or "")
    following: dict[str, str] = {}
    for keys in members.values():
        ordered = sorted(keys, key=rank)
        following |= zip(ordered, [*ordered[1:], ordered[0]], strict=True)
    return following
