"""The coin between a sample and its copies, and the count of how the coins fell.

A coin is a keyed hash of seed, epoch and the sample's name. Nothing is drawn in sequence, so neither order nor
worker, rank or shard split has a say. Epoch and counts lie in memory that DataLoader's workers share, also
workers that live on from epoch to epoch, which would never hear of a new one otherwise.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from boomerang_batch.diffusion.noise import seed_material
from boomerang_batch.errors import ConfigError
from boomerang_batch.run.naming import ORIGINAL

Fall = Literal["originals", "copies", "fallbacks"]

_FALLS: tuple[Fall, ...] = ("originals", "copies", "fallbacks")
_EPOCH, _PASSES = (0, 0), (0, 1)
_PROCESSES = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How the coins of this epoch fell so far, in all workers of this process.

    `fallbacks` fell for a copy that failed or was dropped when the copies were made: the original was shown.
    """

    originals: int
    copies: int
    fallbacks: int


class Coin:
    """The coins of one loader: `p` is the probability of a copy."""

    def __init__(self, *, p: float, seed: int) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"p is {p}; it is the probability of a copy, from 0 (none) to 1 (nothing else)")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed}; it is a whole number from 0 to 2**63 - 1")
        self._p = p
        self._key = seed_material(seed)
        # The first row is the epoch and its passes; every process counts in a row of its own, for two that add
        # to the same number at once would lose some.
        self._memory = torch.zeros(1 + _PROCESSES, len(_FALLS), dtype=torch.int64)
        self._memory.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch whose coins are tossed."""
        return int(self._memory[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Toss the coins of `epoch` from now on, and count anew."""
        if not 0 <= epoch < 2**63:
            raise ConfigError(f"the epoch is {epoch}; it is a whole number from 0")
        self._memory.zero_()
        self._memory[_EPOCH] = epoch

    def begin(self) -> int:
        """The epoch, for one pass over the data. Warns when a second pass would show just the same."""
        worker = get_worker_info()
        if worker is None or worker.id == 0:
            self._memory[_PASSES] += 1
            if self._memory[_PASSES] == 2:
                _log.warning(
                    "epoch %d begins again, with the coins it had; call set_epoch before each epoch", self.epoch
                )
        return self.epoch

    def toss(self, name: bytes, *, epoch: int, copies: int) -> int:
        """The number of the copy to show, below `copies`, or ORIGINAL."""
        drawn = hashlib.blake2b(
            name, key=self._key, salt=struct.pack("<q", epoch), person=b"bmg-coin", digest_size=16
        ).digest()
        side, number = struct.unpack("<QQ", drawn)
        return number % copies if (side >> 11) * 2.0**-53 < self._p else ORIGINAL

    def count(self, fall: Fall) -> None:
        """Count a coin."""
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_PROCESSES - 1)
        self._memory[1 + row, _FALLS.index(fall)] += 1

    @property
    def counts(self) -> Counts:
        """How the coins fell since the epoch was set."""
        originals, copies, fallbacks = self._memory[1:].sum(0).tolist()
        return Counts(originals=originals, copies=copies, fallbacks=fallbacks)


def coin_name(key: str, *, stem: str | None = None) -> bytes:
    """What names a sample for its coin: the key, or where keys may repeat, shard and key."""
    parts = [part.encode("utf-8", "surrogateescape") for part in (stem, key) if part is not None]
    return parts[0] if stem is None else struct.pack("<Q", len(parts[0])) + b"".join(parts)
