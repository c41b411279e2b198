"""What a sample is on its way through the runner: prepared, in pieces, made, and an output."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from boomerang_batch.data.images import Picture
from boomerang_batch.data.provenance import Row
from boomerang_batch.diffusion.codes import Code
from boomerang_batch.diffusion.denoiser import Told
from boomerang_batch.errors import SampleError
from boomerang_batch.run.canvas import Canvas
from boomerang_batch.run.ledger import Source
from boomerang_batch.run.walks import Resolved


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a variant is decoded from where latents are mixed."""

    latent: Tensor
    """(c, h, w) float32."""
    told: str
    """What went into it, as rows tell it: name=value and so on."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample decoded and laid out, with all that finishing its variants needs."""

    source: Source
    shard: str
    image_field: str
    image: bytes
    picture: Picture
    canvas: Canvas
    walks: tuple[Resolved, ...]
    """One per variant."""
    noise_keys: tuple[bytes, ...]
    condition: Told
    toward: int | None
    """The class that an energy is to lead it to; None where none is."""
    shows: frozenset[str]
    """Fields whose values rows may tell: all, but under anonymize only those that travel as they are."""
    travelling: Mapping[str, bytes]
    counterpart: Prepared | None = None
    """The same sample as its codes are decoded, where they are drawn and decoded at once."""
    mixtures: tuple[Mixture, ...] = ()
    """One per variant, where latents are mixed."""

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Of all that outputs depend on beside recipe and model: whether two readings gave the same sample."""
        facts: tuple[Any, ...] = (self.shard, self.source.key, self.condition)
        facts += ([resolved.t for resolved in self.walks],)
        if self.toward is not None:  # only then, lest codes and journals of runs without an energy be unknown
            facts += (self.toward,)
        if self.counterpart is not None:  # by which the best of several codes is chosen
            facts += (self.counterpart.condition,)
        mask = self.canvas.mask
        parts = [repr((facts, *self.travelling)).encode(), self.image, *self.travelling.values()]
        digest = hashlib.blake2b(digest_size=16)
        for part in [*parts, b"" if mask is None else mask.tobytes()]:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()


@dataclass(frozen=True, kw_only=True)
class PieceTag:
    """What a draw is for: the piece of which variant of which sample."""

    prepared: Prepared
    variant: int
    index: int
    trial: int = 0
    """Which of several codes of the variant."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """All that was drawn for one output."""

    prepared: Prepared
    variant: int
    pass_number: int
    pieces: Sequence[Tensor]
    """(C, h, w) float32 for each of the canvas's pieces, in order."""
    batch_size: int
    """The smallest batch shape that any of its steps was computed in; meaningless without an evaluation."""
    dtype: str
    codes: Sequence[Code] = ()
    """Those of the pieces, where codes were drawn."""
    trial: int = 0
    """Which of several codes of the variant."""
    refused: SampleError | None = None
    """Why it may not be used, where what it came from tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A piece of an output, by where its noise came from; with what refusing that output takes."""

    noise_key: bytes
    pass_number: int
    index: int
    source: Source = field(compare=False)
    shard: str = field(compare=False)
    number: int = field(compare=False)
    fingerprint: bytes = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An output that there will not be, with its row, and its sample's `Prepared.fingerprint`."""

    source: Source
    row: Row
    fingerprint: bytes


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished output: its row, its name in the tar, its fields."""

    row: Row
    member_key: str
    fields: Mapping[str, bytes]
    digests: tuple[bytes | None, ...] = ()
    """`Seen.digest` of its pieces, where it took an evaluation."""
