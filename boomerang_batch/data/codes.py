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


def code_bytes(codes: Sequence[Code]) -> bytes:
    """The codes of an image's pieces, in order. Equal codes give equal bytes."""
    tensors = {}
    for index, code in enumerate(codes):
        tensors[f"{index}.x_n"] = code.x_n.contiguous()
        if code.residuals is not None:
            tensors[f"{index}.residuals"] = code.residuals.contiguous()
    return save(tensors)


def read_codes(data: bytes, *, pieces: int, steps: int) -> list[Code]:
    """What `code_bytes` was given, for walks of so many steps. Raises SampleError `bad-code` for others."""
    try:
        tensors = load(data)
        found = [
            Code(x_n=tensors[f"{index}.x_n"], residuals=tensors.get(f"{index}.residuals"))
            for index in range(pieces)
        ]
    except (SafetensorError, KeyError, ValueError) as error:
        raise SampleError("bad-code", f"what is kept of it is no code: {error}") from error
    for code in found:
        shape = (steps + 1, *code.x_n.shape)
        if code.x_n.dtype != torch.float32 or (code.residuals is not None and code.residuals.shape != shape):
            raise SampleError("bad-code", f"its code is not one of {steps} steps, as this walk has")
    return found
