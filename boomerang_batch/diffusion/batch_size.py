"""How many samples a batch should hold, found by trying: as fast as it gets, no larger than that takes.

And batches of exactly one size, whatever comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from boomerang_batch.errors import ModelError

_S = TypeVar("_S")
_T = TypeVar("_T")

_GAIN = 0.05
"""A batch that is no more than this share faster is not worth being twice as large."""

_MEMORY_WORDS = (
    "out of memory",  # of CUDA calls other than its allocator's, and of other devices
    "not enough memory",
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, the device's or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def find_batch_size(measure: Callable[[int], float], limit: int) -> int:
    """The smallest of 1, 2, 4, ... up to `limit` whose throughput is within 5 % of the best of them.

    `measure(size)` gives samples per second, more being better. Larger sizes are tried until one gains less
    than 5 % on the one before or runs out of memory. Raises ModelError when not even one sample fits.
    """
    measured: dict[int, float] = {}
    size = 1
    while size <= limit:
        speed = _or_none(measure, size)
        if speed is None:
            break
        measured[size] = speed
        if size > 1 and speed < (1 + _GAIN) * measured[size // 2]:
            break
        size *= 2
    if not measured:
        raise ModelError("not even a batch of one fits into memory; use a smaller model, size or dtype")
    best = max(measured.values())
    return min(size for size, speed in measured.items() if speed >= (1 - _GAIN) * best)


def largest_that_fits(try_size: Callable[[int], object], start: int) -> int:
    """The first of start, start // 2, start // 4, ..., 1 that `try_size` gets through; 0 if none does."""
    size = start
    while size >= 1 and _or_none(lambda size: (try_size(size),), size) is None:
        size //= 2
    return size


def in_fixed_batches(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """An autoencoder's `function` over rows (k, ...) in batches of exactly `size`, the last padded with zeros.

    Raises ModelError, with the size that fits, when memory runs out.
    """
    parts = []
    for chunk in torch.split(rows, size):
        batch = torch.cat([chunk, chunk.new_zeros((size - len(chunk), *chunk.shape[1:]))])
        done = _or_none(function, batch)
        if done is None:
            fitting = largest_that_fits(lambda count: function(batch[:count]), size // 2)  # noqa: B023
            advice = f"batch_size: {fitting} fits" if fitting else "not even 1 fits: use a smaller size"
            raise ModelError(f"memory ran out with model.autoencoder.batch_size: {size}; {advice}")
        parts.append(done[: len(chunk)])
    return torch.cat(parts)


def _or_none(attempt: Callable[[_S], _T], size: _S) -> _T | None:
    """What `attempt(size)` gives, or None when it runs out of memory.

    By the time this returns the error is gone, and with it the frames that would keep their tensors alive.
    """
    try:
        return attempt(size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
