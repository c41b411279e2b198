"""What things are called: inside, for the noise; outside, in OUT.

The identity of a sample is what the recipe says names it: its key, its shard and key, or its content. The noise
key is made from the identity and the variant alone. With `purpose: anonymize` everything derived from the
input that reaches OUT (stems, keys, digests) is a MAC under the run's secret; otherwise names stay as they are.
"""

from __future__ import annotations

import hashlib
import re
import struct

from boomerang_batch.config.pipeline import Recipe
from boomerang_batch.diffusion.noise import noise_key, seed_material
from boomerang_batch.errors import SampleError

_VARIANT_KEY = re.compile(r"-v[0-9]+\Z")

ORIGINAL = -1
"""The variant number of a kept original."""


def member_key(recipe: Recipe, row_key: str, variant: int) -> str:
    """The `__key__` under which the row (row_key, variant) stands in the output tar."""
    plain = recipe.purpose == "anonymize" or (recipe.outputs == 1 and not recipe.keep_originals)
    return row_key if plain or variant == ORIGINAL else f"{row_key}-v{variant}"


def refuse_reserved_key(recipe: Recipe, key: str) -> None:
    """Refuse a key that looks like a variant's where originals keep theirs, for both could be one.

    By its look alone, so that no other sample, here or in another shard, has a say. Raises SampleError
    `reserved-key`.
    """
    if recipe.keep_originals and _VARIANT_KEY.search(key):
        detail = f"key {key} is what a variant's would be; rename the sample, or set keep_originals: false"
        raise SampleError("reserved-key", detail)


def _of_this_run(recipe: Recipe, secret: bytes) -> bytes:
    """Noise key material of one recipe under one secret.

    Two runs of other recipes under one secret must not share their noise: from the outputs of two t's it would
    cancel, and give the image away.
    """
    return hashlib.blake2b(recipe.digest.encode(), key=secret, digest_size=32, person=b"bmg-noise").digest()


class Naming:
    """Every name and noise key of one run. `secret` is None for purposes that publish their seed."""

    def __init__(self, recipe: Recipe, secret: bytes | None) -> None:
        self._recipe = recipe
        self._secret = secret
        self._material = seed_material(recipe.seed or 0) if secret is None else _of_this_run(recipe, secret)

    @property
    def noise_key_id(self) -> str:
        """Which secret or seed the noise was keyed with; tells nothing about the secret."""
        if self._secret is None:
            return f"seed:{self._recipe.seed}"
        return "secret:" + self._mac(b"key-id", b"", size=8)

    def identity(self, *, shard: str, key: str, image: bytes) -> bytes:
        """What names a sample for the noise, by the recipe's `identity`."""
        if self._recipe.identity == "content":
            return hashlib.sha256(image).digest()
        return self._place(shard, key)

    def noise_key(self, identity: bytes, variant: int) -> bytes:
        """The 16-byte noise key of one variant."""
        return noise_key(self._material, identity=identity, variant=variant)

    def row_key(self, *, shard: str, key: str, variant: int) -> str:
        """The key column of the provenance row: the key, or the variant's own pseudonym.

        Unlike the noise, a pseudonym never goes by content: equal images are still different samples.
        """
        if self._secret is None:
            return key
        return self._mac(b"key", self._place(shard, key) + struct.pack("<q", variant), size=16)

    def stem(self, source_stem: str) -> str:
        """The output's stem for an input's."""
        return source_stem if self._secret is None else self._mac(b"stem", source_stem.encode(), size=8)

    def source_digest(self, image: bytes, *, row_key: str) -> str:
        """The source_digest column. Under a secret each row has its own: equal ones would tell variants."""
        data = image if self._secret is None else row_key.encode() + b"\0" + image
        return self.digest(data)

    def digest(self, data: bytes) -> str:
        """A digest of input bytes: SHA-256, or a MAC where a bare digest would let anyone confirm a guess."""
        return hashlib.sha256(data).hexdigest() if self._secret is None else self._mac(b"digest", data, size=32)

    def pseudonym(self, data: bytes) -> str:
        """A field's value under the policy `pseudonymize`: equal values stay equal, nothing else shows."""
        if self._secret is None:
            return hashlib.blake2b(data, key=self._material, digest_size=16, person=b"field").hexdigest()
        return self._mac(b"field", data, size=16)

    def _place(self, shard: str, key: str) -> bytes:
        """The key, or shard and key as one text such that no two different pairs meet."""
        if self._recipe.identity == "key":
            return key.encode()
        parts = (shard.encode(), key.encode())
        return b"".join(struct.pack("<Q", len(part)) + part for part in parts)

    def _mac(self, purpose: bytes, data: bytes, *, size: int) -> str:
        key = self._secret or b""
        return hashlib.blake2b(data, key=key, digest_size=size, person=b"bmg-" + purpose).hexdigest()
