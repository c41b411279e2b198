"""No key twice: with `identity: key`, equal keys in two shards would be drawn with equal noise.

That is a wrong output and, under anonymize, a leak, so a run ends as soon as it sees one, and verify looks
again.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from boomerang_batch import storage
from boomerang_batch.errors import VerificationError
from boomerang_batch.run.commit import PROVENANCE_SUFFIX


class KeyRegistry:
    """Every row key of the shards added so far, as 12-byte digests."""

    def __init__(self) -> None:
        self._shards: dict[bytes, str] = {}

    def add(self, out: str, stem: str) -> str | None:
        """Add a committed shard's keys; the first that another shard has, in a sentence, or None.

        Raises VerificationError when its provenance can't be read.
        """
        url = storage.join(out, stem + PROVENANCE_SUFFIX)
        try:
            with storage.open_read(url) as stream:
                keys = pq.read_table(stream, columns=["key"]).column("key").unique().to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise VerificationError(f"{url} is not a provenance file: {error}") from error
        for key in keys:
            if key is None:
                continue
            short = hashlib.blake2b(key.encode(), digest_size=12).digest()
            other = self._shards.setdefault(short, stem)
            if other != stem:
                return (
                    f"key {key} is in shard {other} and in shard {stem}, so both got the same noise; set "
                    "identity: shard+key or content in the recipe and use an empty OUT"
                )
        return None
