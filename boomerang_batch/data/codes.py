"""Codes as bytes: one safetensors file for all pieces of an image, read back only as what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from boomerang_batch.diffusion.codes import Code
from boomerang_batch.errors import SampleError

FIELD = "code.safetensors"
"""The field of a shard that holds a code."""


def code_bytes(codes: Sequence[Code], *, proof: bytes) -> bytes:
    """The codes of an image's pieces, in order, with what proves whose they are; equal ones in equal bytes."""
    tensors = {"proof": torch.frombuffer(bytearray(proof), dtype=torch.uint8)}
    for index, code in enumerate(codes):
        tensors[f"{index}.x_n"] = code.x_n.contiguous()
        if code.residuals is not None:
            tensors[f"{index}.residuals"] = code.residuals.contiguous()
    return save(tensors)


def read_codes(data: bytes, *, proof: bytes | None, pieces: int, steps: int) -> list[Code]:
    """What `code_bytes` was given, for walks of so many steps; `proof` None: whosever it is.

    Raises SampleError `bad-code` for anything else, and `stale-code` where it was drawn of something else.
    """
    try:
        tensors = load(data)
        if proof is not None and tensors["proof"].numpy().tobytes() != proof:
            raise SampleError(
                "stale-code",
                "its code was drawn of another image, or by another run; --only-failed draws it anew",
            )
        found = [
            Code(x_n=tensors[f"{index}.x_n"], residuals=tensors.get(f"{index}.residuals"))
            for index in range(pieces)
        ]
    except (SafetensorError, KeyError, ValueError) as error:
        raise SampleError("bad-code", f"what is kept of it is no code: {error}") from error
    for code in found:
        shape = (steps + 1, *code.x_n.shape)
        if code.x_n.dtype != torch.float32 or code.residuals is None or code.residuals.shape != shape:
            raise SampleError("bad-code", f"its code is not one of {steps} steps, as this walk has")
    return found
